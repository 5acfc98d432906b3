"""Rows that a user has put into a trainer after it was built, such as rows whose prompts were masked."""

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from .dataset_checks import hash_rows
from .paired_batches import SAMPLE_INDEX_COLUMN
from .parquet_files import read_column


_ROWS_LOOKED_AT = 100
_NAMES = ("train_dataset", "validation_dataset")


def refuse_other_labels(before: tuple[Any, Any], now: tuple[Any, Any]) -> None:
    """
    Refuse labels that were changed in one of two datasets only: the losses of both must count the same kind of tokens.

    Args:
        before (`tuple`): training and validation rows as the trainer has prepared them.
        now (`tuple`): as they are.

    Raises:
        `ValueError`: naming the dataset and the cure.
    """
    changed = [new is not old and _counts_other_tokens(old, new) for old, new in zip(before, now, strict=True)]
    if changed[0] == changed[1]:
        return
    name, other = _NAMES if changed[0] else _NAMES[::-1]
    raise ValueError(
        f"`trainer.{name}` was replaced after the trainer was built, and its labels count other tokens than before, "
        f"while those of `trainer.{other}` do not. Do the same to `trainer.{other}`; or leave both as they are, and "
        "set `assistant_only_loss=True` or `completion_only_loss=True`, or pass rows with `labels` of your own."
    )


def _counts_other_tokens(before: Dataset | IterableDataset, now: Dataset | IterableDataset) -> bool:
    """Whether a row that is in both has labels at other positions; rows may come in another order, and be fewer."""
    first = [*now.take(_ROWS_LOOKED_AT)]
    if isinstance(before, IterableDataset) or isinstance(now, IterableDataset):
        pairs = [*zip(before.take(_ROWS_LOOKED_AT), first, strict=False)]
    else:
        old_keys, new_keys = _keys(before, now)
        if old_keys is None or new_keys is None:  # only the data collator reads them
            return False
        positions = {key: position for position, key in enumerate(old_keys.tolist())}
        places = [positions.get(key) for key in new_keys.tolist()]
        pairs = [(before[place], row) for place, row in zip(places, first, strict=True) if place is not None]
    return any(_counted(old) != _counted(new) for old, new in pairs if _tokens(old) == _tokens(new))


def _keys(before: Dataset, now: Dataset) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What tells the rows of a dataset, and the first of another, from each other: their numbers, or their tokens."""
    first = now.select(range(min(_ROWS_LOOKED_AT, len(now))))
    if SAMPLE_INDEX_COLUMN in before.column_names and SAMPLE_INDEX_COLUMN in now.column_names:
        return tuple(read_column(rows, SAMPLE_INDEX_COLUMN).to_numpy() for rows in (before, first))
    return hash_rows(before), hash_rows(first)


def _tokens(row: dict[str, Any]) -> list[int]:
    return [*row.get("input_ids", [])]


def _counted(row: dict[str, Any]) -> list[bool]:
    """Which tokens of a prepared row TRL's collator labels."""
    if "labels" in row:
        return [label != -100 for label in row["labels"]]
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]
    return [all(bits) for bits in zip(*masks, strict=True)] if masks else [True] * len(_tokens(row))
