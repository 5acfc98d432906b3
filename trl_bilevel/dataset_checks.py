"""Checks of the datasets, before anything is loaded or trained: each error names the value and the cure."""

import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from pandas.util import hash_pandas_object

from .bilevel_sft_config import BilevelSFTConfig
from .curation import CURATION_COLUMNS, SAMPLE_ID_COLUMN
from .paired_batches import SAMPLE_INDEX_COLUMN, read_sample_indices
from .parquet_files import read_column, read_pieces
from .row_format_checks import columns_read, name_some


logger = get_logger(__name__)

_ROWS_PER_PIECE = 10_000


def check_datasets(training: Any, validation: Any, args: BilevelSFTConfig, has_formatting_func: bool) -> None:
    """
    Check that both datasets are there, not empty, and of kinds that fit each other.

    Args:
        training, validation: what the user passed.
        args ([`~trl_bilevel.BilevelSFTConfig`]): which column is read, and the kind of validation loss.
        has_formatting_func (`bool`): whether the user's own function makes text of the rows, of any columns.

    Raises:
        `TypeError`: for something that is not a `datasets.Dataset`.
        `ValueError`: for a missing or empty dataset, images in one of them only, or columns that the curated dataset
            adds itself.
    """
    columns: dict[str, list[str]] = {}
    for name, dataset in (("train_dataset", training), ("validation_dataset", validation)):
        if dataset is None:
            raise ValueError(
                f"`{name}` is required. Pass a `datasets.Dataset`"
                + (" of rows you trust, in the format of `train_dataset`." if name == "validation_dataset" else ".")
            )
        is_stream = name == "train_dataset" and isinstance(dataset, IterableDataset)
        if not isinstance(dataset, Dataset) and not is_stream:
            raise TypeError(
                # TRL's words, which scripts may look for
                f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. {_cure(dataset)}"
            )
        if not is_stream and len(dataset) == 0:
            raise ValueError(f"`{name}` is empty. Pass a dataset with at least one row.")
        columns[name] = stream_column_names(dataset) if is_stream else dataset.column_names
        if {"input_ids", "seq_lengths"} <= set(columns[name]):
            raise ValueError(
                f"The rows of `{name}` are packed already (columns 'input_ids' and 'seq_lengths'), and each row has "
                "a weight of its own. Pass them as they were before packing, and set `packing=True`."
            )
    training_columns, validation_columns = columns["train_dataset"], columns["validation_dataset"]
    _check_kinds(training_columns, validation_columns, args, has_formatting_func)
    _check_images(columns, args)
    taken = sorted({*CURATION_COLUMNS, SAMPLE_INDEX_COLUMN} & set(training_columns))
    if taken:
        raise ValueError(
            f"`train_dataset` already has the columns {taken}, which curation adds. Drop or rename them first: "
            f"`train_dataset.remove_columns({taken})`, or name those to train on in a YAML file, "
            "`datasets: [{path: ..., columns: [...]}]`."
        )


def _cure(dataset: Any) -> str:
    if isinstance(dataset, Mapping) and dataset:
        splits = [*dataset]
        return f"Pass one of its splits {splits}, for instance `dataset[{splits[0]!r}]`."
    return "Make one with `datasets.Dataset.from_list` or `from_dict`, or read one with `load_dataset`."


def _check_kinds(
    training_columns: list[str], validation_columns: list[str], args: BilevelSFTConfig, has_formatting_func: bool
) -> None:
    """Refuse preference pairs where there must be none, and rows whose losses would cover different tokens."""
    missing_sides = [side for side in ("chosen", "rejected") if side not in validation_columns]
    if args.validation_loss_type == "dpo" and missing_sides:
        raise ValueError(
            "`validation_loss_type='dpo'` needs preference pairs, but `validation_dataset` has no column "
            f"{missing_sides[0]!r}; its columns are {validation_columns}. Add it, or use "
            "`validation_loss_type='nll'`."
        )
    has_text = has_formatting_func or bool(
        {"input_ids", "messages", "conversations", "completion", args.dataset_text_field} & set(validation_columns)
    )
    if args.validation_loss_type == "nll" and not missing_sides and not has_text:
        raise ValueError(
            "`validation_dataset` holds preference pairs (columns 'chosen' and 'rejected'). Set "
            "`validation_loss_type='dpo'`, or rename 'chosen' to 'completion'."
        )
    for column, kind in (("input_ids", "tokenized"), ("completion", "prompt-completion")):
        if column == "completion" and has_formatting_func:
            continue  # it makes text of both
        in_training, in_validation = column in training_columns, column in validation_columns
        if args.validation_loss_type == "nll" and in_training != in_validation:
            raise ValueError(
                f"`train_dataset` and `validation_dataset` must both be {kind} datasets, or neither, so that both "
                f"losses cover the same tokens. Their columns are {training_columns} and "
                f"{validation_columns}."
            )


def _check_images(columns: dict[str, list[str]], args: BilevelSFTConfig) -> None:
    """Rows of both datasets go through one collator, which reads the same columns of all of them."""
    images = {name: sorted({"image", "images"} & {*names}) for name, names in columns.items()}
    if not any(images.values()):
        return
    if args.validation_loss_type == "dpo" or args.refine_ratio > 0:
        option = "validation_loss_type='dpo'" if args.validation_loss_type == "dpo" else "refine_ratio"
        raise ValueError(
            f"`{option}` is not supported with images (columns {images}): it reads the tokens of prompts, which say "
            "nothing of the images. Leave it out, or drop the images."
        )
    if images["train_dataset"] != images["validation_dataset"]:
        raise ValueError(
            f"`train_dataset` and `validation_dataset` must have the same columns of images, got {images}. Rename "
            "one, or give rows without an image an empty list in a column 'images'."
        )


def stream_column_names(stream: IterableDataset) -> list[str]:
    """
    Names of a stream's columns; those of its first row where it does not say.

    Raises:
        `ValueError`: if the stream is empty.
    """
    first = next(iter(stream), None)
    if first is None:
        raise ValueError("`train_dataset` is empty. Pass a stream with at least one row.")
    return list(first) if stream.column_names is None else stream.column_names


def check_prepared_rows(name: str, num_rows: int, num_prepared: int, max_length: int | None) -> None:
    """
    Report the rows that preparation dropped, because truncation left them without a completion token.

    Raises:
        `ValueError`: if no row is left.
    """
    if num_prepared == 0:
        raise ValueError(
            f"No row of `{name}` has a completion token left after truncation to max_length={max_length}. Raise "
            "`max_length`, or shorten the prompts."
        )
    if num_prepared < num_rows:
        logger.warning(
            f"{num_rows - num_prepared} of {num_rows} rows of `{name}` have no completion token left after truncation "
            f"to max_length={max_length}. They are not trained on; the curated dataset marks training rows among them "
            "with scored=False."
        )


def check_validation_batch(num_rows: int, batch: int, are_pairs: bool) -> None:
    """
    Check that `per_device_validation_batch_size`, where it was set, can be filled in one optimizer step.

    Args:
        num_rows (`int`): validation rows.
        batch (`int`): validation rows per optimizer step, over accumulation steps and processes.
        are_pairs (`bool`): whether the rows are preference pairs.

    Raises:
        `ValueError`: if there are fewer.
    """
    if num_rows < batch:
        raise ValueError(
            f"`validation_dataset` has {num_rows} {'pairs' if are_pairs else 'rows'} to train on, fewer than one "
            f"batch of {batch} (`per_device_validation_batch_size`, times accumulation steps, times processes). Lower "
            "`per_device_validation_batch_size` or leave it out, lower `gradient_accumulation_steps`, or add rows."
        )


def resolve_sample_ids(dataset: Dataset, column: str | None) -> pa.ChunkedArray:
    """
    The rows' ids: a column of the user's, or the rows' positions.

    Args:
        dataset (`datasets.Dataset`): training rows, N of them.
        column (`str`, *optional*): name of the id column; if `None`, `sample_id` where it exists.

    Returns:
        `pyarrow.ChunkedArray`: N unique ids, strings or integers.

    Raises:
        `TypeError`: for ids that are neither strings nor integers.
        `ValueError`: for a column that does not exist, or missing or repeated ids.
    """
    is_default = column is None and SAMPLE_ID_COLUMN in dataset.column_names
    if is_default:
        column = SAMPLE_ID_COLUMN
    elif column is not None and column != SAMPLE_ID_COLUMN and SAMPLE_ID_COLUMN in dataset.column_names:
        raise ValueError(
            f"`sample_id_column={column!r}`, but `train_dataset` also has a column `sample_id`, the name under which "
            "the curated dataset reports ids. Drop or rename that column."
        )
    if column is None:
        return pa.chunked_array([pa.array(np.arange(len(dataset)))])
    if column not in dataset.column_names:
        raise ValueError(
            f"`sample_id_column={column!r}` is not a column of `train_dataset`, which has {dataset.column_names}."
        )
    ids = _read_labels(dataset, column, "Sample ids")
    if ids.null_count:
        raise ValueError(
            f"{ids.null_count} of {len(ids)} rows have no id in the column {column!r}. Give each row one."
        )
    if len(ids.unique()) < len(ids):
        repeated, times = Counter(ids.to_pylist()).most_common(1)[0]
        raise ValueError(
            f"Sample ids must be unique, but {len(ids) - len(ids.unique())} rows repeat an id in the column "
            f"{column!r}, for example {repeated!r} ({times} times). "
            f"{'Drop or rename that column' if is_default else 'Use another column, or none'}."
        )
    return ids


class Sources(NamedTuple):
    """The sources of a training dataset, S of them."""

    names: pa.Array
    """Strings or integers, in the order of their first row, S of them."""
    of_rows: torch.Tensor
    """Number of each row's source, int64 of shape (N,)."""


def resolve_sources(dataset: Dataset, column: str) -> Sources:
    """
    Read the column that names the rows' sources.

    Raises:
        `TypeError`: for sources that are neither strings nor integers.
        `ValueError`: for a column that does not exist, or rows without a source.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"`source_column={column!r}` is not a column of `train_dataset`, which has {dataset.column_names}."
        )
    encoded = _read_labels(dataset, column, "Sources").dictionary_encode().unify_dictionaries()
    if encoded.null_count:
        raise ValueError(f"{encoded.null_count} of {len(encoded)} rows have no source in the column {column!r}.")
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return Sources(encoded.chunk(0).dictionary, torch.from_numpy(codes.astype(np.int64)))


def _read_labels(dataset: Dataset, column: str, role: str) -> pa.ChunkedArray:
    """A column of strings or integers."""
    values = read_column(dataset, column)
    if not (
        pa.types.is_integer(values.type) or pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    ):
        raise TypeError(
            f"{role} must be strings or integers, but the column {column!r} has type {values.type}. Cast it with "
            "`train_dataset.cast_column`."
        )
    return values


def hash_rows(dataset: Dataset, column: str = "input_ids") -> np.ndarray | None:
    """
    A hash of each prepared row's tokens, uint64 of shape (N,), the same in every session.

    `None` for rows that only the data collator tokenizes.
    """
    if column not in dataset.column_names:
        return None
    hashes = bytearray()  # 8 bytes a row, and not an object for each
    dataset = dataset.select_columns([column])
    stored = np.arange(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_numpy()
    order = stored.argsort(kind="stable")  # rows are read in the order they are stored in
    for batch in read_pieces(dataset if dataset._indices is None else dataset.select(order)):
        for tokens in _token_bytes(batch.column(column).combine_chunks()):
            hashes += hashlib.blake2b(tokens, digest_size=8).digest()
    in_order = np.empty(len(dataset), dtype=np.uint64)
    in_order[order] = np.frombuffer(hashes, dtype=np.uint64)
    return in_order


def hash_contents(dataset: Dataset, columns: list[str]) -> np.ndarray:
    """
    A hash of what each row says, uint64 of shape (N,), the same in every session, and whatever a template makes of it.

    Args:
        dataset (`datasets.Dataset`): rows as the user passed them.
        columns (`list[str]`): those that are read.
    """
    hashes = bytearray()
    for batch in read_pieces(dataset.select_columns(columns)):
        for row in batch.to_pylist():
            hashes += hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(bytes(hashes), dtype=np.uint64)


def contents_columns(dataset: Dataset, args: BilevelSFTConfig, has_formatting_func: bool) -> list[str]:
    """The columns of [`hash_contents`]: those that TRL makes text of, and all where something of the user's does."""
    is_prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset") or dataset.format["type"] == "custom"
    if has_formatting_func or is_prepared:
        return dataset.column_names
    first = dataset.with_format(None)[0]
    known = {"labels", "completion_mask", "assistant_masks", "tools", "chat_template_kwargs", "images", "image"}
    if args.validation_loss_type == "dpo" and "chosen" in first:
        return [name for name in dataset.column_names if name in {"prompt", "chosen", "rejected", *known}]
    read = {*columns_read("train_dataset", first, args.dataset_text_field), *known}
    return [name for name in dataset.column_names if name in read]


def _token_bytes(rows: pa.ListArray) -> Iterator[bytes]:
    rows = rows.cast(pa.large_list(pa.int64()))  # from whatever integer and list type the user's tokens have
    tokens, offsets = rows.flatten().to_numpy(), rows.offsets.to_numpy()
    for start, stop in itertools.pairwise(offsets - offsets[0]):
        yield tokens[start:stop].tobytes()


def fingerprint_rows(
    ids: pa.ChunkedArray, sample_indices: np.ndarray, row_hashes: np.ndarray | None, sources: Sources | None = None
) -> str:
    """
    A short digest of the training rows, to tell on resume whether they are still the same.

    Args:
        ids (`pyarrow.ChunkedArray`): ids of all rows, in their order.
        sample_indices (`numpy.ndarray`): positions of the prepared rows among them, in any order, shape (M,).
        row_hashes (`numpy.ndarray`, *optional*): what [`hash_contents`] made of these, shape (M,).
        sources ([`Sources`], *optional*): of all rows.
    """
    digest = hashlib.sha256()
    for start in range(0, len(ids), _ROWS_PER_PIECE):  # pandas makes objects of strings
        piece = ids.slice(start, _ROWS_PER_PIECE).to_pandas()
        digest.update(hash_pandas_object(piece, index=False).to_numpy().tobytes())
    order = sample_indices.argsort()
    digest.update(sample_indices[order].astype(np.int64).tobytes())
    if row_hashes is not None:
        digest.update(row_hashes[order].tobytes())
    if sources is not None:
        digest.update(sources.of_rows.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_training_rows(
    training: Dataset,
    validation: Dataset,
    args: BilevelSFTConfig,
    sample_ids: pa.ChunkedArray,
    sources: Sources | None,
    contents: np.ndarray,
) -> str:
    """
    Report the training rows that were dropped, or that are also validation rows.

    Args:
        training (`datasets.Dataset`): prepared training rows.
        validation (`datasets.Dataset`): prepared validation rows.
        args ([`BilevelSFTConfig`]): options.
        sample_ids (`pyarrow.ChunkedArray`): of all training rows, as they were before preparation.
        sources ([`Sources`], *optional*): of the same.
        contents (`numpy.ndarray`): what [`hash_contents`] made of them, shape (N,).

    Returns:
        `str`: what [`fingerprint_rows`] makes of them.
    """
    check_prepared_rows("train_dataset", len(sample_ids), len(training), args.max_length)
    row_hashes = hash_rows(training)
    validation_tokens = "chosen_input_ids" if args.validation_loss_type == "dpo" else "input_ids"
    numbers = read_sample_indices(training)
    warn_about_shared_rows(row_hashes, hash_rows(validation, validation_tokens), sample_ids.take(pa.array(numbers)))
    return fingerprint_rows(sample_ids, numbers, contents[numbers], sources)


def warn_about_shared_rows(
    training: np.ndarray | None, validation: np.ndarray | None, sample_ids: pa.ChunkedArray
) -> None:
    """Warn which training rows are, token for token, also validation rows; takes what [`hash_rows`] returns."""
    if training is None or validation is None:
        return
    shared = np.flatnonzero(np.isin(training, validation))
    if len(shared):
        names = name_some([repr(one) for one in sample_ids.take(pa.array(shared)).to_pylist()])
        warnings.warn(
            f"{len(shared)} training rows are also in `validation_dataset`, token for token: sample ids {names}. "
            "Their weights say little: the validation loss trains on them already. Remove them from one of the two.",
            stacklevel=3,
        )
