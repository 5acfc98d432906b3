"""Rows of a stream and validation rows in one batch: what `paired_batches.py` is for rows that have numbers."""

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from .paired_batches import (
    SAMPLE_INDEX_COLUMN,
    ValidationStream,
    num_validation_rows,
    read_validation_rows,
    without_our_keys,
)
from .streamed_selector import ConsumedRows, SampleId


class StreamedPair(NamedTuple):
    """A training row and the numbers of the validation rows that travel with it."""

    row: dict[str, Any]
    """With its id under `SAMPLE_INDEX_COLUMN`."""
    validation: tuple[int, ...]


def read_sample_id(row: dict[str, Any], column: str) -> SampleId:
    """
    The id of a row of a stream.

    Raises:
        `ValueError`: for a row without one.
        `TypeError`: for an id that is neither a string nor an integer.
    """
    sample_id = row.get(column)
    if sample_id is None:
        raise ValueError(
            f"A row of the stream has no id in the column {column!r}; its columns are {sorted(row)}. Give each "
            "row one."
        )
    if isinstance(sample_id, str):
        return sample_id
    try:
        return operator.index(sample_id)
    except TypeError as error:
        raise TypeError(
            f"Sample ids must be strings or integers, but a row of the stream has {sample_id!r} in the column "
            f"{column!r}. Cast it, for instance with `train_dataset.map`."
        ) from error


class PairedStream(TorchIterableDataset):
    """
    The rows of a stream, over and over, each with the validation rows that travel with it.

    It has no end: when the stream ends, its next pass begins, shuffled anew where the stream is shuffled. So all
    batches are full, an epoch of Trainer's is the whole training, and going on after n batches is skipping n batches.
    The n-th training row brings validation rows along as the n-th of [`~trl_bilevel.paired_batches.PairedSampler`].

    Args:
        training (`datasets.IterableDataset`): prepared training rows.
        validation_stream ([`~trl_bilevel.paired_batches.ValidationStream`]): where validation rows come from.
        sample_id_column (`str`): the column with the rows' ids.
        columns (`list[str]`, *optional*): columns that the collator needs; all if `None`.
        training_batch_size (`int`): T, rows.
        validation_batch_size (`int`): V, rows.
        consumed ([`~trl_bilevel.streamed_selector.ConsumedRows`]): what was trained on when iteration starts. The
            stream has to begin with as many rows of the same ids.
    """

    def __init__(
        self,
        training: IterableDataset,
        validation_stream: ValidationStream,
        sample_id_column: str,
        columns: list[str] | None,
        training_batch_size: int,
        validation_batch_size: int,
        consumed: ConsumedRows,
    ):
        self.training = training
        self.validation_stream = validation_stream
        self.sample_id_column = sample_id_column
        self.columns = None if columns is None else frozenset(columns)
        self.training_batch_size = training_batch_size
        self.validation_batch_size = validation_batch_size
        self.consumed = consumed

    def __iter__(self) -> Iterator[StreamedPair]:
        expected = ConsumedRows(self.consumed.count, self.consumed.digest)
        read = ConsumedRows()
        stop = 0
        for position, row in enumerate(self._rows()):
            sample_id = read_sample_id(row, self.sample_id_column)
            if read.count < expected.count:
                read.add([sample_id])
                if read.count == expected.count and read.digest != expected.digest:
                    raise ValueError(
                        f"The first {read.count} rows of the stream are not those that the checkpoint was trained on. "
                        "Resume with the same stream, shuffled with the same seed and read by as many dataloader "
                        "workers, or train from the start."
                    )
            start = stop
            stop = num_validation_rows(position + 1, self.training_batch_size, self.validation_batch_size)
            kept = without_our_keys(row)
            if self.columns is not None:
                kept = {name: value for name, value in kept.items() if name in self.columns}
            yield StreamedPair({**kept, SAMPLE_INDEX_COLUMN: sample_id}, self.validation_stream.rows(start, stop))

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            self.training.set_epoch(number)
            row = None
            for row in self.training:
                yield row
            if row is None:
                raise ValueError(
                    f"The stream gave no rows in pass {number + 1}. "
                    + (
                        "It can be read only once, and training needs more rows. Lower `max_steps`, or make a stream "
                        "that starts again at every iteration."
                        if number
                        else "Truncation to `max_length` may have left none."
                    )
                )


class StreamedPairCollator:
    """
    Collates a batch of [`StreamedPair`].

    Args:
        collator (`Callable`): a [`~trl_bilevel.paired_batches.PairedCollator`].
        validation (`datasets.Dataset`): prepared validation rows, or preference pairs.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], validation: Dataset):
        self.collator = collator
        self.validation = validation

    def __call__(self, pairs: list[StreamedPair]) -> dict[str, Any]:
        numbers = [number for pair in pairs for number in pair.validation]
        return self.collator([*(pair.row for pair in pairs), *read_validation_rows(self.validation, numbers)])
