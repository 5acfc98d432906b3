"""What a method is measured on: rows of mixed quality, rows to trust, and a model. It knows no method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset


GOOD = "good"
"""The kind of a row without a fault."""


class Problem(NamedTuple):
    """A dataset with faults that are known, and everything else that is the same for all methods."""

    name: str
    """What its results are filed under, without the seed."""
    seed: int
    """Of the rows, the faults, the adapters and the training."""
    model: str
    """Folder or name of the base model, for `from_pretrained`."""
    tokenizer: Any
    trusted_name: str
    """The same for problems that differ in their training rows only: they share what is trained on trusted rows."""
    training: Dataset
    """The rows of mixed quality, N, in the format that the trainers get."""
    kinds: np.ndarray
    """What is wrong with each of them, shape (N,), str; [`GOOD`] for nothing."""
    trusted: Dataset
    """Validation rows, in the same format."""
    held_out: Dataset
    """Good rows that no method sees, in the same format."""
    num_epochs: int
    """Over the training rows; all methods take as many steps, whatever they train on."""
    options: dict[str, Any]
    """Of the training configuration, for all methods: learning rate, batch size."""
    lora: dict[str, Any]
    """Of `peft.LoraConfig`."""
    losses: Callable[[Any, Dataset], np.ndarray]
    """Mean loss of each row's completion under a model, nats per token, shape (N,), whatever its training counts."""
    measure: Callable[[Any], dict[str, float]]
    """What a trained model does on the held-out rows."""
    unseen: Dataset | None = None
    """Rows of the same mixture as the training rows, which nothing is trained on, where there are some."""
    unseen_kinds: np.ndarray | None = None
    """What is wrong with each of these, str."""
    is_right: Callable[[Dataset], np.ndarray] | None = None
    """Whether the answer of each of some rows is right, bool, where any answer can be checked."""
    rows_per_pass: int | None = None
    """Rows per forward pass of `trainer.score`; `None` for its own default."""

    @property
    def good(self) -> np.ndarray:
        """Which training rows are good, bool of shape (N,)."""
        return self.kinds == GOOD

    def num_steps(self, batch_size: int) -> int:
        """Optimizer steps of each method's training."""
        return self.num_epochs * -(-len(self.training) // batch_size)
