"""Sums over the weights of all rows, kept while single weights change."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .selector_updates import SelectorActivation


# The running sums are recomputed once their rounding error, or exp(), could matter
_LARGEST_EXPONENT = 200.0
_SMALLEST_TOTAL_RATIO = 1e-6


class SelectorStatistics(NamedTuple):
    """Health of the selector's weights; uniform weights give `entropy = log N` and `effective_sample_ratio = 1`."""

    entropy: float
    """Entropy of the normalised weights, in nats."""
    effective_sample_ratio: float
    """Effective number of rows over the number of rows, `(sum w)^2 / (N sum w^2)`, in (0, 1]."""
    weight_min: float
    weight_max: float


class WeightSums:
    """
    The normaliser of the weights, and what their statistics need: O(B) for each change of B logits.

    The mass of a logit is its weight before normalisation, in float64: `exp(omega - shift)` for softmax weights, where
    the shift is the largest logit of the last refresh, or `sigma(omega)`. A unit is what has a weight: a row, or a
    source of rows, which counts as often as it has rows.

    Args:
        activation (`"softmax"` or `"sigmoid"`): of the weights.
        unit_sizes (`torch.Tensor`, *optional*): rows of each unit, float64 of shape (U,); 1 each if not given.
        prior (`float`): mass that a sigmoid weight starts with.
    """

    def __init__(self, activation: SelectorActivation, unit_sizes: torch.Tensor | None = None, prior: float = 0.5):
        self.activation = activation
        self.unit_sizes = unit_sizes
        self.prior = prior
        self.shift = 0.0
        self.total = 0.0
        """Mass of all rows."""
        self._largest_total = 0.0  # since the last refresh
        # Sums over all rows of m^2 and of m log m, and the largest that the first has been; `None` until somebody asks
        self._moments: tuple[float, float, float] | None = None
        self._proved: float | None = None  # see `proved_rows`; `None` until somebody asks

    def log_mass(self, logits: torch.Tensor) -> torch.Tensor:
        """Logarithms of masses in float64, same shape as `logits`."""
        logits = logits.double()
        return logits - self.shift if self.activation == "softmax" else torch.nn.functional.logsigmoid(logits)

    def mass(self, logits: torch.Tensor) -> torch.Tensor:
        """Masses in float64, same shape as `logits`."""
        return self.log_mass(logits).exp()

    def refresh(self, unit_logits: torch.Tensor) -> None:
        """Compute the total anew from all logits, shape (U,)."""
        self.shift = unit_logits.max().item() if self.activation == "softmax" else 0.0
        self.total = sum(self._sums(unit_logits, units, False)[0] for units in _slices(len(unit_logits)))
        self._largest_total = self.total
        self._moments = self._proved = None

    def set_logits(self, unit_logits: torch.Tensor, units: torch.Tensor, logits: torch.Tensor) -> None:
        """Give some units, each once, other logits; both of shape (B,). Writes into `unit_logits`, shape (U,)."""
        with_moments = self._moments is not None
        before = self._sums(unit_logits, units, with_moments)
        proved_before = 0.0 if self._proved is None else self._proved_sum(unit_logits, units)
        unit_logits[units] = logits
        if self._is_too_large(logits):
            self.refresh(unit_logits)
            return
        self._add(self._sums(unit_logits, units, with_moments), before)
        if self._proved is not None:
            self._proved += self._proved_sum(unit_logits, units) - proved_before
        # Subtracting most of a sum leaves mainly its rounding error
        if self.total < _SMALLEST_TOTAL_RATIO * self._largest_total:
            self.refresh(unit_logits)
        self._largest_total = max(self._largest_total, self.total)
        if self._moments is not None and self._moments[0] <= _SMALLEST_TOTAL_RATIO * self._moments[2]:
            self._moments = None

    def grow(self, unit_logits: torch.Tensor, num_known: int) -> None:
        """Take in the units from the position `num_known` on, which are new."""
        new = slice(num_known, len(unit_logits))
        if self._is_too_large(unit_logits[new]):
            self.refresh(unit_logits)
            return
        self._add(self._sums(unit_logits, new, self._moments is not None))
        if self._proved is not None:
            self._proved += self._proved_sum(unit_logits, new)
        self._largest_total = max(self._largest_total, self.total)

    def _is_too_large(self, logits: torch.Tensor) -> bool:
        """Whether a mass of these would overflow; sigmoid masses, which are at most 1, never do."""
        return self.activation == "softmax" and logits.max().item() - self.shift > _LARGEST_EXPONENT

    def statistics(self, unit_logits: torch.Tensor, num_rows: int) -> SelectorStatistics:
        """Of the weights, which have mean 1; all but the extremes from running sums. NaN without rows."""
        if num_rows == 0:
            return SelectorStatistics(*[math.nan] * len(SelectorStatistics._fields))
        if self._moments is None:
            parts = [self._sums(unit_logits, units, True)[1:] for units in _slices(len(unit_logits))]
            squares, logs = (sum(column) for column in zip(*parts, strict=True))
            self._moments = (squares, logs, squares)
        sum_of_squares, sum_of_logs, _ = self._moments
        smallest, largest = self.mass(torch.stack(unit_logits.aminmax())).tolist()
        return SelectorStatistics(
            # of shares m / M: - sum (m / M) log(m / M) = log M - (sum m log m) / M
            entropy=math.log(self.total) - sum_of_logs / self.total,
            effective_sample_ratio=self.total**2 / (num_rows * sum_of_squares),
            weight_min=num_rows * smallest / self.total,
            weight_max=num_rows * largest / self.total,
        )

    def proved_rows(self, unit_logits: torch.Tensor) -> float:
        """
        Rows whose sigmoid weight has risen above the prior p, each counted by how far: sum of max(m - p, 0) / (1 - p).

        From a running sum once it was asked for; in [0, N], and 0 for the logits that all rows start with.
        """
        if self._proved is None:
            self._proved = sum(self._proved_sum(unit_logits, units) for units in _slices(len(unit_logits)))
        return max(self._proved, 0.0)  # which rounding may miss

    def state(self) -> dict[str, torch.Tensor]:
        """All of it as tensors, so that a resumed run goes on with the same rounding."""
        tensors = {"normalizer": torch.tensor([self.shift, self.total, self._largest_total], dtype=torch.float64)}
        if self._moments is not None:
            tensors["moments"] = torch.tensor(self._moments, dtype=torch.float64)
        if self._proved is not None:
            tensors["proved"] = torch.tensor(self._proved, dtype=torch.float64)
        return tensors

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on as `state` was."""
        self.shift, self.total, self._largest_total = tensors["normalizer"].tolist()
        self._moments = tuple(tensors["moments"].tolist()) if "moments" in tensors else None
        self._proved = tensors["proved"].item() if "proved" in tensors else None

    def _add(self, sums: list[float], instead_of: list[float] | None = None) -> None:
        difference = sums if instead_of is None else [new - old for new, old in zip(sums, instead_of, strict=True)]
        self.total += difference[0]
        if self._moments is not None:
            squares, logs = self._moments[0] + difference[1], self._moments[1] + difference[2]
            self._moments = (squares, logs, max(squares, self._moments[2]))

    def _proved_sum(self, unit_logits: torch.Tensor, units: torch.Tensor | slice) -> float:
        excess = (self.mass(unit_logits[units]) - self.prior).clamp(min=0) / (1 - self.prior)
        sizes = None if self.unit_sizes is None else self.unit_sizes[units]
        return (excess.sum() if sizes is None else torch.dot(sizes, excess)).item()

    def _sums(self, unit_logits: torch.Tensor, units: torch.Tensor | slice, with_moments: bool) -> list[float]:
        """Sums over all rows of some units: of their mass m, and with moments of m^2 and of m log m."""
        log_mass = self.log_mass(unit_logits[units])
        mass = log_mass.exp()
        terms = [mass, mass.square(), mass * log_mass] if with_moments else [mass]
        if self.unit_sizes is None:
            return [term.sum().item() for term in terms]
        return [torch.dot(self.unit_sizes[units], term).item() for term in terms]


def _slices(length: int, size: int = 100_000) -> Iterator[slice]:
    """Walk over many rows in pieces, so that float64 copies of them stay small."""
    return (slice(start, start + size) for start in range(0, length, size))
