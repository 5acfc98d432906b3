"""Rows packed into sequences of full length, as TRL packs them: every row stays whole and keeps its number."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset
from trl import pack_dataset


class PackedRows:
    """
    Which rows share a packed sequence; the rows themselves stay where they are.

    Args:
        rows (`numpy.ndarray`): numbers of all rows, those of a sequence next to each other, int32 of shape (N,).
        offsets (`numpy.ndarray`): where the rows of each of the P sequences start, int64 of shape (P + 1,).
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray):
        self._rows = rows
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def rows_of(self, sequence: int) -> list[int]:
        """Numbers of the rows in a packed sequence."""
        return self._rows[self._offsets[sequence] : self._offsets[sequence + 1]].tolist()

    def shuffled(self, seed: int) -> "PackedRows":
        """The same sequences in a random order."""
        order = np.random.default_rng(seed).permutation(len(self))
        rows = [self._rows[self._offsets[sequence] : self._offsets[sequence + 1]] for sequence in order]
        return PackedRows(np.concatenate(rows), np.concatenate([[0], np.cumsum([len(part) for part in rows])]))


def pack_rows(dataset: Dataset, max_length: int, name: str) -> PackedRows:
    """
    Pack prepared rows by TRL's best-fit-decreasing strategy.

    TRL packs columns of tokens; here each row's tokens are replaced by its number, so that the packed sequences tell
    which rows they hold.

    Args:
        dataset (`datasets.Dataset`): rows with `input_ids`, none longer than `max_length` tokens.
        max_length (`int`): tokens of a packed sequence.
        name (`str`): of the dataset, for the progress bar.
    """
    numbered = dataset.select_columns(["input_ids"]).with_format("arrow")
    numbered = numbered.map(
        _number_tokens,
        batched=True,
        with_indices=True,
        remove_columns=["input_ids"],
        desc=f"Numbering the rows of {name} dataset",
    )
    packed = pack_dataset(numbered, max_length, "bfd", {"desc": f"Packing {name} dataset"}).with_format("arrow")
    rows, counts = [], []
    for batch in packed.iter(batch_size=1000):
        lengths = batch.column("seq_lengths").combine_chunks()  # of the rows in each sequence
        starts = np.concatenate([[0], np.cumsum(lengths.flatten().to_numpy())[:-1]]).astype(np.int64)
        rows.append(batch.column("row").combine_chunks().flatten().to_numpy()[starts])
        counts.append(lengths.value_lengths().to_numpy())
    return PackedRows(np.concatenate(rows), np.concatenate([[0], np.cumsum(np.concatenate(counts))]))


def _number_tokens(tokens: pa.Table, indices: list[int]) -> dict[str, Any]:
    lengths = pa.compute.list_value_length(tokens.column("input_ids")).to_numpy()
    numbers = np.repeat(np.array(indices, dtype=np.int32), lengths)
    return pa.table({"row": pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), numbers)})
