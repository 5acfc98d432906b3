"""The column that says how much each row counts: read and checked before training."""

import math
from decimal import Decimal
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from .parquet_files import read_column


logger = get_logger(__name__)

_CHECKED_AHEAD = 100  # rows of a stream
_LARGEST = float(np.finfo(np.float32).max)
_CURE = "A weight is a finite number of at least 0; 0 leaves the row out."


class CountedRows(NamedTuple):
    """The rows to train on, those of weight above 0."""

    dataset: Dataset | IterableDataset
    """Their columns as they were, the weights among them."""
    scale: float
    """What the column is multiplied by to get the weights of the loss."""


def read_counted_rows(dataset: Dataset | IterableDataset, column: str, normalize: bool) -> CountedRows:
    """
    Check the weights of a dataset and leave out its rows of weight 0.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): training rows. Of a stream the first 100 rows are
            checked here, the others as they are read.
        column (`str`): its column of weights: integers, floats, decimals, or booleans for 0 and 1.
        normalize (`bool`): multiply the weights by what gives those above 0 a mean of 1. Not for a stream.

    Raises:
        `ValueError`: for a column that does not exist, rows whose weight is missing, negative, NaN or infinite, or too
            large for the loss, weights that are all 0, and for a stream that should be normalized.
        `TypeError`: for a column of anything but numbers.
    """
    if isinstance(dataset, IterableDataset):
        return _read_stream(dataset, column, normalize)
    if len(dataset) == 0:
        raise ValueError("`train_dataset` is empty. Pass a dataset with at least one row.")
    _check_is_there(column, dataset.column_names)
    weights = _read_numbers(dataset, column)
    unusable = ~(np.isfinite(weights) & (weights >= 0))
    if unusable.any():
        row = int(unusable.argmax())
        value = read_column(dataset, column)[row].as_py()
        more = f" ({unusable.sum():,} of {len(weights):,} rows have no weight to use)" if unusable.sum() > 1 else ""
        raise ValueError(f"{_of_row(column, row)} is {_named(value)}{more}. {_CURE}")
    counted = weights > 0
    if not counted.any():
        raise ValueError(f"All {len(weights):,} weights in the column {column!r} are 0: there is nothing to train on.")
    scale = _scale(weights[counted]) if normalize else 1.0
    _check_fits_the_loss(weights, scale, column)
    if counted.all():
        return CountedRows(dataset, scale)
    logger.info(f"{(~counted).sum():,} of {len(weights):,} rows have a weight of 0 in {column!r} and are left out.")
    return CountedRows(dataset.select(np.flatnonzero(counted)), scale)


def _read_stream(stream: IterableDataset, column: str, normalize: bool) -> CountedRows:
    if normalize:
        raise ValueError(
            "`normalize_weights=True` is not supported with a stream as `train_dataset`: nobody knows the mean of its "
            "weights. Set `normalize_weights=False`, and divide the column by its mean if it is far from 1."
        )
    if next(iter(stream), None) is None:
        raise ValueError("`train_dataset` is a stream without rows.")
    _check_is_there(column, get_dataset_column_names(stream))
    for number, row in enumerate(islice(stream, _CHECKED_AHEAD)):
        check_weight(row.get(column), column, number)

    def counts(row: dict[str, Any], number: int) -> bool:
        return check_weight(row.get(column), column, number) > 0

    counted = stream.filter(counts, with_indices=True)
    if next(iter(counted), None) is None:
        raise ValueError(f"All weights in the column {column!r} are 0: there is nothing to train on.")
    return CountedRows(counted, 1.0)


def check_weight(value: Any, column: str, row: int) -> float:
    """
    The weight of a stream's row.

    Args:
        value: what the column says.
        column (`str`): its name, for the error.
        row (`int`): number of the row in the stream, for the error.

    Raises:
        `TypeError`: if it is no number.
        `ValueError`: if it is missing, negative, NaN, infinite, or too large.
    """
    if value is not None and not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{_of_row(column, row)} is no number but {value!r}. {_CURE}")
    weight = math.nan if value is None else float(value)
    if not 0 <= weight <= _LARGEST:
        raise ValueError(f"{_of_row(column, row)} is {_named(value)}. {_CURE}")
    return weight


def _check_is_there(column: str, names: list[str]) -> None:
    if column not in names:
        raise ValueError(
            f"`weight_column={column!r}` is not a column of `train_dataset`, which has {names}. Name the column that "
            "says how much each row counts, or train with `trl.SFTTrainer`."
        )


def _read_numbers(dataset: Dataset, column: str) -> np.ndarray:
    """The column as float64 of shape (N,), NaN where it is empty."""
    values = read_column(dataset, column)
    kind = values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (is_number or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise TypeError(
            f"The column {column!r} has type {kind}, and {values[0].as_py()!r} in row 0: weights are numbers. Cast it "
            "with `train_dataset.cast_column`, or name another column as `weight_column`."
        )
    if pa.types.is_boolean(kind):
        values = values.cast(pa.int8())
    return values.cast(pa.float64()).to_numpy()


def _scale(weights: np.ndarray) -> float:
    largest = weights.max()  # divided by first: the sum of the largest numbers is infinite
    return float(1 / (weights / largest).mean() / largest)


def _check_fits_the_loss(weights: np.ndarray, scale: float, column: str) -> None:
    largest = int(weights.argmax())
    if not weights[largest] * scale <= _LARGEST:
        raise ValueError(
            f"{_of_row(column, largest)} is {weights[largest]}, beyond the 32-bit numbers of the loss. Set "
            "`normalize_weights=True`, or divide the column by its mean."
        )


def _of_row(column: str, row: int) -> str:
    return f"The weight of row {row:,} in the column {column!r}"


def _named(value: Any) -> str:
    return "missing" if value is None else str(value)
