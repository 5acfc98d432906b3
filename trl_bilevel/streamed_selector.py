"""A data selector for rows that come one after the other, from a stream whose length nobody knows."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import torch

from .data_selector import DataSelector
from .selector_updates import SelectorActivation
from .weight_sums import WeightSums


SampleId = str | int
_FIRST_CAPACITY = 1024  # rows
_DIGEST_BITS = 63  # an int64 that is not negative


class ConsumedRows:
    """
    How many rows of a stream were trained on, and a digest of their ids, to know the stream again on resume.

    The digest is a sum of hashes: the processes of a run see the rows of a step in an order of their own.
    """

    def __init__(self, count: int = 0, digest: int = 0):
        self.count = count
        self.digest = digest

    def restart(self) -> None:
        """Nothing yet: the stream is read from its beginning."""
        self.count = self.digest = 0

    def add(self, ids: Iterable[SampleId]) -> None:
        """Rows that were trained on, each as often as it was."""
        for sample_id in ids:
            hashed = hashlib.blake2b(str(sample_id).encode(), digest_size=8).digest()
            self.digest = (self.digest + int.from_bytes(hashed, "little")) % (1 << _DIGEST_BITS)
            self.count += 1


class StreamedSelector(DataSelector):
    """
    Weights over the rows of a stream that were seen so far, N of them and more with every batch.

    Rows are numbered in the order of their first appearance; one that is seen again keeps its number and its weight.
    A new row starts with the logit that every row of a [`DataSelector`] starts with. So the logits are those of a
    selector that knew all rows from the beginning, given the same losses, and so are the weights once all rows were
    seen; before that the weights have mean 1 over the rows seen. An update costs O(B), new rows included.

    Args:
        activation, learning_rate, centered, prior:
            As in [`DataSelector`]. The optimizer is mirror descent: dense Adam would move rows that are yet to come.

    Example:

    ```python
    >>> import torch
    >>> from trl_bilevel.streamed_selector import StreamedSelector

    >>> selector = StreamedSelector(learning_rate=1.0)
    >>> selector.row_numbers(["b", "a", "b"])
    tensor([0, 1, 0])
    >>> selector.update(torch.tensor([0, 1]), losses=torch.tensor([0.5, 2.5]))
    >>> selector.row_numbers(["c"])
    tensor([2])
    >>> selector.sample_ids.to_pylist(), selector.logits
    (['b', 'a', 'c'], tensor([ 1., -1.,  0.]))

    ```
    """

    def __init__(
        self,
        activation: SelectorActivation = "softmax",
        learning_rate: float | None = None,
        centered: bool = True,
        prior: float = 0.5,
    ):
        super().__init__(
            _FIRST_CAPACITY, activation=activation, learning_rate=learning_rate, centered=centered, prior=prior
        )
        self.consumed = ConsumedRows()
        self._numbers: dict[SampleId, int] = {}
        self._first_logit = self._unit_logits[0].item()
        # The tensors of the parent class are the filled parts of these
        self._buffers = (self._unit_logits, self._scored, self._restarted)
        self._show(0)
        self._sums = WeightSums(activation, prior=prior)

    @property
    def sample_ids(self) -> pa.ChunkedArray:
        """Ids of the rows seen, N of them, in the order of their first appearance."""
        ids = list(self._numbers)
        return pa.chunked_array([pa.array(ids) if ids else pa.array(ids, pa.string())])

    def number_of(self, sample_id: SampleId) -> int | None:
        """The number of a row, or `None` for one that was never seen."""
        return self._numbers.get(sample_id)

    def row_numbers(self, ids: Sequence[SampleId]) -> torch.Tensor:
        """
        The numbers of some rows, which are seen by this: new ones get the next numbers, in the order given.

        Args:
            ids (`list[str]` or `list[int]`): of the training rows of a global batch, B of them.

        Returns:
            `torch.Tensor`: int64, shape (B,).

        Raises:
            `TypeError`: if strings and integers are mixed.
        """
        kinds = {type(sample_id) for sample_id in itertools.chain(ids, itertools.islice(self._numbers, 1))}
        if len(kinds) > 1:
            raise TypeError(
                "Sample ids must be all strings or all integers, but the stream has "
                f"{' and '.join(sorted(kind.__name__ for kind in kinds))}. Cast the column."
            )
        numbers = [self._numbers.setdefault(sample_id, len(self._numbers)) for sample_id in ids]
        self._grow(len(self._numbers))
        return torch.tensor(numbers, dtype=torch.int64)

    def _grow(self, num_rows: int) -> None:
        before = self.num_rows
        if num_rows == before:
            return
        self._reserve(num_rows)
        self._show(num_rows)
        self._sums.grow(self._unit_logits, num_known=before)

    def _reserve(self, num_rows: int) -> None:
        """Room for rows, at least twice as much as there was, so that a row costs O(1) on average."""
        capacity = len(self._buffers[0])
        if num_rows <= capacity:
            return
        more = max(num_rows, 2 * capacity) - capacity
        logits, scored, restarted = self._buffers
        self._buffers = (
            torch.cat([logits, torch.full((more,), self._first_logit)]),
            torch.cat([scored, torch.zeros(more, dtype=torch.bool)]),
            torch.cat([restarted, torch.zeros(more, dtype=torch.bool)]),
        )

    def _show(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._unit_logits, self._scored, self._restarted = (buffer[:num_rows] for buffer in self._buffers)

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        """Without the rows: those that come are compared with `consumed`."""
        return {"streamed": True, "activation": self.activation, "optimizer": self.optimizer, "prior": self.prior}

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            **super()._state(),
            "sample_ids": _to_bytes(self.sample_ids),
            "consumed": torch.tensor([self.consumed.count, self.consumed.digest]),
        }

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        ids = _from_bytes(tensors["sample_ids"])
        self._numbers = {sample_id: number for number, sample_id in enumerate(ids)}
        self._buffers[0].fill_(self._first_logit)  # of rows that were seen since, when an earlier state comes back
        for buffer in self._buffers[1:]:
            buffer.zero_()
        self._reserve(len(ids))
        self._show(len(ids))
        super()._restore(tensors)
        self.consumed.count, self.consumed.digest = tensors["consumed"].tolist()


def _to_bytes(ids: pa.ChunkedArray) -> torch.Tensor:
    """Ids as a tensor of bytes, in Arrow's format: in one file with the logits, whole or not at all."""
    sink = pa.BufferOutputStream()
    table = pa.table({"sample_id": ids})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)


def _from_bytes(stored: torch.Tensor) -> list[SampleId]:
    with pa.ipc.open_stream(pa.py_buffer(stored.numpy())) as reader:
        return reader.read_all().column("sample_id").to_pylist()
