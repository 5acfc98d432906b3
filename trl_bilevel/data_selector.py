"""The data selector: one logit per training row, and the weights it stands for."""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .selector_updates import SelectorActivation, mirror_descent_step, selection_gradient


SELECTOR_FILE_NAME = "data_selector.safetensors"
_FORMAT_VERSION = "1"
# The running normaliser is recomputed once its rounding error, or exp(), could matter (see `_set_logits`).
_LARGEST_EXPONENT = 200.0
_SMALLEST_TOTAL_RATIO = 1e-6

SelectorOptimizer = Literal["mirror_descent", "adam"]
DEFAULT_LEARNING_RATE: dict[SelectorOptimizer, float] = {"mirror_descent": 1.0, "adam": 5e-3}


class SelectorStatistics(NamedTuple):
    """Health of the selector's weights; uniform weights give `entropy = log N` and `effective_sample_ratio = 1`."""

    entropy: float
    """Entropy of the normalised weights, in nats."""
    effective_sample_ratio: float
    """Effective number of rows over the number of rows, `(sum w)^2 / (N sum w^2)`, in (0, 1]."""
    weight_min: float
    weight_max: float


class DataSelector:
    """
    Weights over the N rows of a training dataset, learned from the rows' losses.

    It lives on the CPU in fp32, outside the model, whatever the model's precision or sharding. A row is known by its
    position in the dataset the user passed, so shuffling, dropped rows and epochs cannot move a weight to another row.
    A mirror-descent update costs O(B): the normaliser is kept as a running sum.

    Args:
        num_rows (`int`): N, the number of rows.
        activation (`"softmax"` or `"sigmoid"`): softmax weights compete for one unit of mass; sigmoid weights saturate
            each on its own. Both are reported with mean 1.
        optimizer (`"mirror_descent"` or `"adam"`): `"adam"` is dense Adam on all N logits, O(N) per update, the
            reference of the published codes (SEAL, BIPOST), kept for comparison.
        learning_rate (`float`, *optional*): for mirror descent the step in logits per nat of excess loss, 1 if not
            given; for Adam its usual rate, 5e-3 if not given.

    Raises:
        `ValueError`: for an empty dataset, an unknown activation or optimizer, or a negative or non-finite rate.

    Example:

    ```python
    >>> import torch
    >>> from trl_bilevel import DataSelector

    >>> selector = DataSelector(num_rows=4, learning_rate=1.0)
    >>> selector.weights()
    tensor([1., 1., 1., 1.])
    >>> selector.update(torch.tensor([0, 3]), losses=torch.tensor([0.5, 2.5]))
    >>> selector.weights().mean()
    tensor(1.)
    >>> selector.weights().argsort(descending=True)[0]
    tensor(0)

    ```
    """

    def __init__(
        self,
        num_rows: int,
        activation: SelectorActivation = "softmax",
        optimizer: SelectorOptimizer = "mirror_descent",
        learning_rate: float | None = None,
    ):
        if num_rows < 1:
            raise ValueError(f"A data selector needs at least one row to weigh, got num_rows={num_rows}.")
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be 'softmax' or 'sigmoid', got {activation!r}.")
        if optimizer not in ("mirror_descent", "adam"):
            raise ValueError(f"optimizer must be 'mirror_descent' or 'adam', got {optimizer!r}.")
        if learning_rate is None:
            learning_rate = DEFAULT_LEARNING_RATE[optimizer]
        if not 0 <= learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a finite number, 0 or larger, got {learning_rate}.")
        self.num_rows = num_rows
        self.activation = activation
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.logits = torch.zeros(num_rows)  # (N,)
        self._scored = torch.zeros(num_rows, dtype=torch.bool)  # (N,)
        self._adam = torch.optim.Adam([self.logits], lr=learning_rate) if optimizer == "adam" else None
        self._refresh_normalizer()

    def weights(self) -> torch.Tensor:
        """Weights of all rows, shape (N,), fp32, mean 1, in the row order of the training dataset."""
        return self._normalize(self._mass(self.logits))

    def weights_of(self, row_indices: torch.Tensor) -> torch.Tensor:
        """Weights of some rows, in O(B): `row_indices` is int64 of shape (B,), the result fp32 of shape (B,)."""
        return self._normalize(self._mass(self.logits[row_indices]))

    @property
    def scored(self) -> torch.Tensor:
        """Which rows an update has ever moved, bool of shape (N,); the others keep the logit they started with, 0."""
        return self._scored.clone()

    def update(self, row_indices: torch.Tensor, losses: torch.Tensor) -> None:
        """
        Move the weights of the rows of one global batch (the upper-level step).

        Rows with a NaN or infinite loss are left alone. A row that occurs twice, as when a sampler pads the last batch
        of an epoch, counts once.

        Args:
            row_indices (`torch.Tensor`): positions of the rows in the training dataset, shape (B,), int64.
            losses (`torch.Tensor`): mean negative log-likelihood per completion token, shape (B,), in nats.
        """
        row_indices, losses = _once_and_finite(row_indices, losses)
        if row_indices.numel() == 0:
            return
        self._scored[row_indices] = True
        if self._adam is None:
            logits = self.logits[row_indices]
            logits = mirror_descent_step(logits, self._log_mass(logits), losses, self.learning_rate)
            self._set_logits(row_indices, logits)
        else:
            mass = self._mass(self.logits)
            self.logits.grad = selection_gradient(mass, row_indices, losses.double(), self.activation).float()
            self._adam.step()
            self.logits.grad = None
            self._refresh_normalizer()

    def assign(self, row_indices: torch.Tensor, log_weights: torch.Tensor) -> None:
        """
        Set the rows of one global batch to weights computed elsewhere, those of their last visit.

        Args:
            row_indices (`torch.Tensor`): positions of the rows in the training dataset, shape (B,), int64.
            log_weights (`torch.Tensor`): logarithms of weights with mean 1 over the batch, shape (B,). Rows without a
                finite one are left alone. Of a row that occurs twice, one counts.

        Raises:
            `ValueError`: if the activation is not softmax, whose logits are logarithms of weights.
        """
        if self.activation != "softmax":
            raise ValueError(f"Only a softmax selector can be given weights, this one is {self.activation!r}.")
        row_indices, logits = _once_and_finite(row_indices, log_weights)
        if row_indices.numel() == 0:
            return
        self._scored[row_indices] = True
        self._set_logits(row_indices, logits)

    def statistics(self) -> SelectorStatistics:
        """Entropy, effective sample ratio and extremes of the weights; walks all N rows once."""
        share = self._mass(self.logits) / self._total  # (N,), sums to 1
        return SelectorStatistics(
            entropy=torch.special.entr(share).sum().item(),
            effective_sample_ratio=1 / (self.num_rows * share.square().sum().item()),
            weight_min=self.num_rows * share.min().item(),
            weight_max=self.num_rows * share.max().item(),
        )

    def save(self, directory: str | os.PathLike, fingerprint: str) -> Path:
        """
        Write the selector's state to `data_selector.safetensors` in `directory`, whole or not at all.

        Args:
            directory (`str` or `os.PathLike`): an existing directory.
            fingerprint (`str`): identifies the training rows; `load` refuses a file written for other rows.

        Returns:
            `pathlib.Path`: the file written.
        """
        tensors = {
            "logits": self.logits,
            "scored": self._scored,
            "normalizer": torch.tensor([self._shift, self._total, self._refreshed_total], dtype=torch.float64),
        }
        if self._adam is not None:
            tensors |= {f"adam.{name}": value for name, value in self._adam.state[self.logits].items()}
        path = Path(directory) / SELECTOR_FILE_NAME
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt", "selector": json.dumps(self._identity(fingerprint))})
        os.replace(partial, path)
        return path

    def load(self, directory: str | os.PathLike, fingerprint: str) -> None:
        """
        Restore what `save` wrote.

        Raises:
            `FileNotFoundError`: if the directory holds no selector state.
            `ValueError`: if the file is damaged, or belongs to other rows or to another kind of selector.
        """
        path = Path(directory) / SELECTOR_FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so the learned row weights cannot be restored. Resume from a checkpoint that "
                "BilevelSFTTrainer wrote, or train from the start."
            )
        try:
            with safe_open(path, framework="pt") as file:
                stored = json.loads((file.metadata() or {}).get("selector", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged and cannot be read ({error}). Resume from another checkpoint."
            ) from error
        expected = self._identity(fingerprint)
        differing = [
            f"{key} {stored.get(key)!r} (now {value!r})" for key, value in expected.items() if stored.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"{path} was written for another run: {', '.join(differing)}. Resume with the same training rows, "
                "sample ids and selector options, or train from the start."
            )
        self.logits.copy_(tensors["logits"])
        self._scored.copy_(tensors["scored"])
        self._shift, self._total, self._refreshed_total = tensors["normalizer"].tolist()
        if self._adam is not None:
            self._adam.state[self.logits] = {
                name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")
            }

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        return {
            "format_version": _FORMAT_VERSION,
            "num_rows": self.num_rows,
            "rows_fingerprint": fingerprint,
            "activation": self.activation,
            "optimizer": self.optimizer,
        }

    def _log_mass(self, logits: torch.Tensor) -> torch.Tensor:
        """Logarithms of the unnormalised weights in float64, same shape as `logits`."""
        logits = logits.double()
        return logits - self._shift if self.activation == "softmax" else torch.nn.functional.logsigmoid(logits)

    def _mass(self, logits: torch.Tensor) -> torch.Tensor:
        return self._log_mass(logits).exp()

    def _normalize(self, mass: torch.Tensor) -> torch.Tensor:
        # w_i = N * mass_i / sum(mass)
        return (mass * (self.num_rows / self._total)).float()

    def _set_logits(self, row_indices: torch.Tensor, logits: torch.Tensor) -> None:
        before = self._mass(self.logits[row_indices]).sum().item()
        self.logits[row_indices] = logits
        if logits.max().item() - self._shift > _LARGEST_EXPONENT:
            self._refresh_normalizer()
            return
        self._total += self._mass(self.logits[row_indices]).sum().item() - before
        # Subtracting most of a sum leaves mainly its rounding error
        if self._total < _SMALLEST_TOTAL_RATIO * self._refreshed_total:
            self._refresh_normalizer()
        self._refreshed_total = max(self._refreshed_total, self._total)

    def _refresh_normalizer(self) -> None:
        self._shift = self.logits.max().item() if self.activation == "softmax" else 0.0
        self._total = self._mass(self.logits).sum().item()
        self._refreshed_total = self._total


def _once_and_finite(row_indices: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with a finite value, each once, and their values in fp32; both of shape (number of those rows,)."""
    finite = values.isfinite()
    row_indices, occurrence = row_indices[finite].unique(return_inverse=True)
    # One of a row's duplicates wins; which one does not matter, they were computed from the same parameters
    return row_indices, torch.empty(row_indices.numel()).scatter_(0, occurrence, values[finite].float())
