"""Checks of a stream as the training dataset: each error names the value and the cure."""

from itertools import islice
from typing import Any

from datasets import IterableDataset

from .bilevel_sft_config import BilevelSFTConfig
from .curation import SAMPLE_ID_COLUMN
from .dataset_checks import stream_column_names
from .paired_stream import read_sample_id


_WRITTEN_BY_PREPARATION = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "labels")


def check_stream(stream: IterableDataset, args: BilevelSFTConfig, data_selector: Any = None) -> str:
    """
    Check that a stream can be trained on with these options; reads its first row.

    Args:
        stream (`datasets.IterableDataset`): training rows as the user passed them.
        args ([`BilevelSFTConfig`]): options.
        data_selector ([`DataSelector`] or `str`, *optional*): weights to start from.

    Returns:
        `str`: the column with the rows' ids.

    Raises:
        `ValueError` or `TypeError`: for an option that needs rows that can be counted, or a stream without ids.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"A stream as `train_dataset` needs `max_steps`, got {args.max_steps}: nobody knows where its epochs end."
        )
    for name, value, cure in _unsupported(args):
        raise ValueError(f"`{name}={value!r}` is not supported with a stream as `train_dataset`. {cure}")
    if data_selector is not None:
        raise ValueError(
            "`data_selector` is not supported with a stream as `train_dataset`, whose rows are not known yet. Load "
            "the rows without `streaming=True`, or leave it out."
        )
    column = _sample_id_column(stream, args.sample_id_column)
    for row in islice(stream, 1):
        read_sample_id(row, column)
    return column


def _unsupported(args: BilevelSFTConfig) -> list[tuple[str, Any, str]]:
    """Options in the way, their values, and what to do instead."""
    load = "Load the rows without `streaming=True`, or "
    skip = "A resumed run would count rows twice that it reads again: leave it out."
    steps = "An epoch of a stream is the whole training: use 'steps'."
    found = [
        ("packing", args.packing, False, load + "use `padding_free=True`."),
        ("refine_ratio", args.refine_ratio, 0, load + "set `refine_ratio=0`."),
        ("source_column", args.source_column, None, load + "leave it out."),
        ("selector_optimizer", args.selector_optimizer, "mirror_descent", "Use 'mirror_descent'."),
        ("validation_weight_decay", args.validation_weight_decay, 0, load + "leave it out."),
        ("ignore_data_skip", args.ignore_data_skip, False, skip),
    ]
    unsupported = [(name, value, cure) for name, value, supported, cure in found if value != supported]
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            unsupported.append((name, getattr(args, name).value, steps))
    if args.train_sampling_strategy == "group_by_length":
        unsupported.append(
            ("train_sampling_strategy", args.train_sampling_strategy, "Rows come in the stream's order.")
        )
    if args.dataloader_num_workers > 1:
        cure = "Several workers would each pair rows of their own. Use 1, which reads ahead, or 0."
        unsupported.append(("dataloader_num_workers", args.dataloader_num_workers, cure))
    return unsupported


def _sample_id_column(stream: IterableDataset, column: str | None) -> str:
    names = stream_column_names(stream)
    if column is None and SAMPLE_ID_COLUMN in names:
        column = SAMPLE_ID_COLUMN
    if column is None:
        raise ValueError(
            "A stream as `train_dataset` needs `sample_id_column`, the column with a unique id per row: a row's "
            f"position says nothing in a stream. Its columns are {names}."
        )
    if column not in names:
        raise ValueError(f"`sample_id_column={column!r}` is not a column of `train_dataset`, which has {names}.")
    if column != SAMPLE_ID_COLUMN and SAMPLE_ID_COLUMN in names:
        raise ValueError(
            f"`sample_id_column={column!r}`, but `train_dataset` also has a column `sample_id`, the name under which "
            "the curated dataset reports ids. Drop or rename that column."
        )
    if column in _WRITTEN_BY_PREPARATION:
        raise ValueError(
            f"`sample_id_column={column!r}` is text or tokens, which preparation changes. Use a column of ids."
        )
    return column
