"""Trusted rows as users have them, a stream among them: read whole, as every step needs any of them."""

from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset


MOST_STREAMED_ROWS = 10_000


def read_trusted_rows(dataset: Any) -> Any:
    """
    The rows of a stream as a `datasets.Dataset` in memory; anything else as it is.

    Args:
        dataset (`datasets.IterableDataset` or `Any`): what the user passed as `validation_dataset`.

    Raises:
        `ValueError`: if the stream has more than 10,000 rows, or none.
    """
    if not isinstance(dataset, IterableDataset):
        return dataset
    stream = dataset.with_format(None)
    rows = list(islice(stream, MOST_STREAMED_ROWS + 1))
    if len(rows) > MOST_STREAMED_ROWS:
        raise ValueError(
            f"`validation_dataset` is a stream of more than {MOST_STREAMED_ROWS} rows. Trusted rows are read whole "
            f"before training: take some of them, `validation_dataset.take({MOST_STREAMED_ROWS})`, or load them "
            "without `streaming=True`, which has no limit."
        )
    if not rows:
        raise ValueError("`validation_dataset` is empty. Pass a dataset with at least one row.")
    return Dataset.from_list(rows, features=stream.features, split=stream.split)
