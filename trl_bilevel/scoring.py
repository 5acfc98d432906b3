"""Scores for rows that were never trained on: one forward pass a row, in chunks that survive an interruption."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import (
    Dataset,
    IterableDataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.table import InMemoryTable
from peft import get_peft_model_state_dict
from tqdm.auto import tqdm

from .amortized_selector import AmortizedSelector, captured_hidden_states, pool_completions
from .assistant_turns import prepare_answers
from .batch_layout import PaddedLayout, padded
from .labelled_positions import fused_forward
from .losses import row_losses
from .paired_batches import read_sample_indices, without_our_keys
from .parquet_files import open_parquet, pieces_of_stream
from .row_format_checks import columns_read, name_some, refuse_gaps
from .run_settings import row_options
from .value_function import ValueFunction
from .whole_files import damage_explained, write_whole


logger = get_logger(__name__)

SCORE_COLUMNS = ("score", "loss", "value_loss", "selector_score")
_MANIFEST_NAME = "scoring.json"
_DIGEST = b"rows_digest"
_MOST_KEPT = 11  # numbers of rows without a score: one more than a message names


class Scorer(Protocol):
    """Gives each row some numbers."""

    trainer: Any
    """[`~trl.SFTTrainer`] that prepares rows."""
    columns: tuple[str, ...]
    """Names of the numbers, which the rows may not have as columns."""

    def fingerprint(self) -> str:
        """Of what decides the numbers, but for the rows."""
        ...

    def score(self, rows: Dataset) -> dict[str, np.ndarray]:
        """The numbers of N rows, by the name of the column, each of shape (N,)."""
        ...


class RowScorer:
    """
    Scores rows with a trained model, as it was trained: same formatting, truncation and completion tokens.

    Args:
        trainer ([`~trl.SFTTrainer`]): holds the model and prepares rows for it.
        value_function ([`~trl_bilevel.value_function.ValueFunction`], *optional*): to score by the excess loss.
        amortized_selector ([`~trl_bilevel.amortized_selector.AmortizedSelector`], *optional*): for `selector_score`.
        batch_size (`int`): rows per forward pass.
    """

    columns: tuple[str, ...] = SCORE_COLUMNS

    def __init__(
        self,
        trainer: Any,
        value_function: ValueFunction | None,
        amortized_selector: AmortizedSelector | None,
        batch_size: int,
    ):
        self.trainer = trainer
        self.value_function = value_function
        self.amortized_selector = amortized_selector
        self.batch_size = batch_size

    def fingerprint(self) -> str:
        """Of what decides the scores: the trained parameters, the value function, the head, and how rows are cut."""
        model = self.trainer.model
        adapter = (
            get_peft_model_state_dict(model, adapter_name=model.active_adapter)
            if is_peft_model(model)
            else model.state_dict()
        )
        states = [adapter, self.value_function, self.amortized_selector]
        digest = hashlib.sha256(json.dumps(row_options(self.trainer.args), sort_keys=True).encode())
        for state in states:
            tensors = {} if state is None else state if isinstance(state, dict) else state.state()
            digest.update(f"{state is None} {len(tensors)}".encode())
            for name, value in sorted(tensors.items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def score(self, rows: Dataset) -> dict[str, np.ndarray]:
        """
        The columns of `SCORE_COLUMNS` that apply, float64 of shape (N,).

        `score`, higher is better, is the loss under the value function minus the loss, and without one the negative
        loss; both in nats per token of the answers, also of a conversation, whatever training counts. NaN for a row
        without an answer after truncation.
        """
        trainer = self.trainer
        indexed = prepare_answers(trainer, rows, "scored")
        if "input_ids" not in indexed.column_names and not trainer._is_vision_dataset:
            raise ValueError("Only rows that are tokenized before the data collator can be scored.")
        positions = read_sample_indices(indexed)
        order = np.arange(len(indexed))
        if "input_ids" in indexed.column_names:
            # Rows of similar length share a batch; the longest first, so that memory runs out at once or not at all
            lengths = pa.compute.list_value_length(
                indexed.select_columns(["input_ids"]).with_format("arrow")[:].column("input_ids")
            ).to_numpy()
            order = np.argsort(-lengths, kind="stable")

        columns: dict[str, np.ndarray] = {"loss": np.full(len(rows), np.nan)}
        if self.value_function is not None:
            columns["value_loss"] = np.full(len(rows), np.nan)
        if self.amortized_selector is not None:
            columns["selector_score"] = np.full(len(rows), np.nan)
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                batch_rows = order[start : start + self.batch_size]
                examples = [
                    {"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])}
                    if "input_ids" in row
                    else without_our_keys(row)  # with images, which the collator tokenizes
                    for row in indexed.select(batch_rows)
                ]
                for name, values in self._score_batch(
                    trainer._prepare_inputs(padded(trainer.data_collator)(examples))
                ).items():
                    columns[name][positions[batch_rows]] = values.double().cpu().numpy()
        finally:
            trainer.model.train(was_training)
        score = columns["value_loss"] - columns["loss"] if self.value_function is not None else -columns["loss"]
        return {"score": score, **columns}

    def _score_batch(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = {}
        with captured_hidden_states(self.trainer.model) as hidden_states:
            scores["loss"] = self._losses(inputs)
        if self.amortized_selector is not None:
            pooled = pool_completions(hidden_states.pop(), inputs["labels"], PaddedLayout()).cpu()
            scores["selector_score"] = self.amortized_selector.score(pooled, scores["loss"].float().cpu())
        if self.value_function is not None:
            with self.value_function.active():
                scores["value_loss"] = self._losses(inputs)
        return scores

    def _losses(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.trainer.accelerator.autocast():
            outputs = fused_forward(self.trainer.model, self.trainer.model, inputs, self.trainer.args)
        return row_losses(outputs.log_probs, outputs.label_mask).mean  # (B,)


class _Chunk(NamedTuple):
    number: int
    rows: Dataset


def score_dataset(
    scorer: Scorer, dataset: Dataset | IterableDataset, output_dir: str | os.PathLike | None, chunk_size: int
) -> Dataset:
    """
    Score every row, chunk by chunk.

    Args:
        scorer ([`Scorer`]): scores a chunk.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows in the format that was trained on.
        output_dir (`str` or `os.PathLike`, *optional*): where the chunks are written, see [`score_to_files`]. Needed
            for a stream.
        chunk_size (`int`): rows per chunk.

    Returns:
        `datasets.Dataset`: the rows with the columns that `scorer` adds, read from `output_dir` if given.

    Raises:
        `ValueError`: as [`score_to_files`], and for a stream without `output_dir`.
    """
    if output_dir is not None:
        return open_parquet(score_to_files(scorer, dataset, output_dir, chunk_size))
    if not isinstance(dataset, Dataset):
        raise ValueError("Streamed rows are written as they are scored: give `output_dir`.")
    _check_dataset(scorer, dataset, chunk_size)
    scored = _score_chunks(scorer, dataset, chunk_size, is_scored=lambda chunk: False)
    return Dataset(pa.concat_tables([table for _, table in scored]))


def score_to_files(
    scorer: Scorer, dataset: Dataset | IterableDataset, output_dir: str | os.PathLike, chunk_size: int
) -> list[Path]:
    """
    Score every row and write each chunk as soon as it is scored. A second call scores only what is missing, what has
    changed and what a stream has more.

    Args:
        scorer, dataset, output_dir, chunk_size: see [`score_dataset`].

    Returns:
        `list[pathlib.Path]`: Parquet files in the order of the rows.

    Raises:
        `ValueError`: for a column that scoring adds itself, an empty dataset, one with rows without a text, rows of a
            stream that do not fit the columns of its first chunk, or an `output_dir` that belongs to another model,
            dataset or chunk size.
    """
    _check_dataset(scorer, dataset, chunk_size)
    folder = Path(output_dir)
    accelerator = scorer.trainer.accelerator  # its processes work on the same chunks, and the main one writes them
    manifest = {"model": scorer.fingerprint(), "rows": _fingerprint_rows(dataset), "chunk_size": chunk_size}
    with accelerator.main_process_first():
        _check_manifest(folder, manifest)

    digests: dict[Path, str] = {}  # of the chunks, in their order

    def is_scored(chunk: _Chunk) -> bool:
        path = _chunk_path(folder, chunk.number)
        digests[path] = _digest(chunk.rows)
        return _read_digest(path) == digests[path]

    for chunk, table in _score_chunks(scorer, dataset, chunk_size, is_scored):
        path = _chunk_path(folder, chunk.number)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _DIGEST: digests[path]})
        if accelerator.is_main_process:
            write_whole(path, partial(pa.parquet.write_table, table))
    if accelerator.is_main_process:
        for path in set(folder.glob("scored-*.parquet")) - digests.keys():  # of a stream that has become shorter
            path.unlink()
    accelerator.wait_for_everyone()
    return [*digests]


def _check_dataset(scorer: Scorer, dataset: Dataset | IterableDataset, chunk_size: int) -> None:
    trainer = scorer.trainer
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if not list(dataset.take(1)):
        raise ValueError("The dataset is empty, so there is nothing to score.")
    taken = sorted(set(scorer.columns) & set(next(iter(dataset))))
    if taken:
        raise ValueError(
            f"The dataset already has the columns {taken}, which scoring adds. Drop or rename them first."
        )
    if isinstance(dataset, Dataset) and trainer._formatting_func is None:  # now, and not when such a row is reached
        refuse_gaps("dataset", dataset, columns_read("dataset", dataset[0], trainer.args.dataset_text_field))


def _score_chunks(
    scorer: Scorer,
    dataset: Dataset | IterableDataset,
    chunk_size: int,
    is_scored: Callable[[_Chunk], bool],
) -> Iterator[tuple[_Chunk, pa.Table]]:
    total = len(dataset) if isinstance(dataset, Dataset) else None
    num_missing, first_missing = 0, list[int]()
    with row_progress(scorer.trainer, total, "Scoring") as progress:
        for chunk in _chunks(dataset, chunk_size):
            if not is_scored(chunk):
                rows = _in_memory(chunk.rows)
                table, scores = rows.data.table, scorer.score(rows)
                for name, values in scores.items():
                    table = table.append_column(name, pa.array(values))
                missing = np.flatnonzero(np.isnan(scores["loss"])) + chunk.number * chunk_size
                num_missing += len(missing)
                first_missing += missing[: _MOST_KEPT - len(first_missing)].tolist()
                yield chunk, table
            progress.update(len(chunk.rows))
    if num_missing:
        logger.warning(
            f"{num_missing} rows have no answer, none within `max_length`, or one that the chat template refuses, and "
            f"no score. Counted from 0 they are {name_some(first_missing)}."
        )


@contextmanager
def row_progress(trainer: Any, total: int | None, description: str) -> Iterator[tqdm]:
    """A bar of rows on the main process of each machine, and none for the preparation of every single chunk."""
    had_progress_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    is_hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_local_main_process
    try:
        with tqdm(total=total, unit="row", desc=description, disable=is_hidden) as progress:
            yield progress
    finally:
        if had_progress_bars:
            enable_progress_bars()


def _chunks(dataset: Dataset | IterableDataset, chunk_size: int) -> Iterator[_Chunk]:
    if isinstance(dataset, Dataset):
        for number, start in enumerate(range(0, len(dataset), chunk_size)):
            yield _Chunk(number, dataset.select(range(start, min(start + chunk_size, len(dataset)))))
    else:
        for number, rows in enumerate(pieces_of_stream(dataset, chunk_size)):
            yield _Chunk(number, rows)


def _in_memory(rows: Dataset) -> Dataset:
    """Rows without a file of theirs: what is made of them, tokens above all, stays out of the cache on the disk."""
    rows = rows.with_format(None)
    if rows._indices is not None:
        return rows.flatten_indices(keep_in_memory=True)
    table = InMemoryTable(rows.data.table)
    return Dataset(table, info=rows.info.copy(), split=rows.split, fingerprint=rows._fingerprint)


def _chunk_path(folder: Path, number: int) -> Path:
    return folder / f"scored-{number:06d}.parquet"


def _fingerprint_rows(dataset: Dataset | IterableDataset) -> str:
    """Of the first row, and for a dataset of the number of rows and the last one too."""
    if not isinstance(dataset, Dataset):
        return _digest(next(pieces_of_stream(dataset, 1)))
    marks = _digest(dataset.select([0, len(dataset) - 1]))
    return hashlib.sha256(f"{marks} {len(dataset)}".encode()).hexdigest()[:16]


def _digest(rows: Dataset) -> str:
    """Of the rows as they are stored: what is decoded, such as an image, has no text of its own."""
    stored = rows.with_format("arrow")[:].to_pylist()
    return hashlib.sha256(repr(stored).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _read_digest(path: Path) -> str | None:
    """Of the rows that a file has scores of, `None` if it is not there."""
    if not path.is_file():
        return None
    with damage_explained(path, "Delete it, and its rows are scored again."):
        return (pa.parquet.read_schema(path).metadata or {}).get(_DIGEST, b"").decode()


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Chunks of another model, of other rows or of another size must not be mixed with new ones."""
    path = folder / _MANIFEST_NAME
    if path.is_file():
        with damage_explained(path, "Choose another `output_dir`, or delete it."):
            found = json.loads(path.read_text())
            differing = sorted(name for name in manifest if found.get(name) != manifest[name])
        if differing:
            raise ValueError(
                f"{folder} holds scores with another {', '.join(differing)} ({found}, now {manifest}). Choose another "
                "`output_dir`, or delete it."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(manifest)))
