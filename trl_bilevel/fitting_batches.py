"""Batches that fit into memory: halved when they do not, for the rest of the run."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class FittingBatches:
    """
    Cuts work into batches, and into smaller ones after it ran out of memory.

    On several processes each has its own size, so no batch may need another process.

    Args:
        size (`int`): items per batch, to begin with.
        what (`str`): the work, for the warning.
        cure (`str`): what to do if one item alone does not fit.
    """

    def __init__(self, size: int, what: str, cure: str):
        self.size = size
        self._what = what
        self._cure = cure

    def run(self, work: Callable[[Sequence[Item], int], list[Result]], items: Sequence[Item]) -> list[Result]:
        """
        The results of all items, one after the other.

        Args:
            work (`Callable`): of a batch and its number among the batches of this call; does nothing that must not
                be done twice.
            items (`Sequence`): all of them.

        Raises:
            `RuntimeError`: if there is not enough memory for a single item.
        """
        results: list[Result] = []
        start = number = 0
        while start < len(items):
            batch = items[start : start + self.size]
            found = self._try(work, batch, number)
            if found is None:
                self._halve(len(batch))
                continue
            results += found
            start, number = start + len(batch), number + 1
        return results

    def _try(self, work: Callable[[Sequence[Any], int], list[Any]], batch: Sequence[Any], number: int) -> Any:
        """`None` if it does not fit. The error is gone by then, and with it the tensors that its traceback holds."""
        try:
            return work(batch, number)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            if len(batch) == 1:
                raise RuntimeError(
                    f"There is not enough memory for {self._what}, one at a time. {self._cure}"
                ) from error
            return None

    def _halve(self, size: int) -> None:
        self.size = size // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(
            f"Out of memory in {self._what}, {size} at a time. It goes on with {self.size}, for the rest of the run."
        )
