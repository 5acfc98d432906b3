"""
The data selector: one logit per training row, and the weights it stands for.

In more than 400 lines: it is one class, whose methods share the running sums of the weights; what needs none of them
is in `selector_updates.py`, `selector_transfer.py` and `selector_files.py`.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from . import selector_files
from .selector_transfer import probability_logits, transferred_logits
from .selector_updates import (
    SelectorActivation,
    check_positions,
    count_rows_of_sources,
    mean_over_source,
    mirror_descent_step,
    once_and_finite,
    selection_gradient,
)
from .weight_sums import SelectorStatistics, WeightSums


SelectorOptimizer = Literal["mirror_descent", "adam"]
ValueFunctionRows = Literal["rejected", "all", "selected"]
DEFAULT_LEARNING_RATE: dict[SelectorOptimizer, float] = {"mirror_descent": 1.0, "adam": 5e-3}


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
        sources (`torch.Tensor`, *optional*): the source of each row, int64 of shape (N,), numbered from 0 without
            gaps. All rows of a source then share one weight (ScaleBiO, arXiv 2406.19976). A mirror-descent step moves
            it by the mean of the steps that its rows would take, so that an epoch moves a source as far as a row.
        sample_ids (`pyarrow.ChunkedArray`, *optional*): N unique ids, strings or integers, under which
            `save_pretrained` stores the rows; their positions if not given.
        centered (`bool`): compare the losses of a batch with their mean. `False` for excess losses in sigmoid
            weights, whose own zero tells good from bad, see [`~trl_bilevel.selector_updates.mirror_descent_step`].
        prior (`float`): sigma of the logit that a sigmoid selector starts with, in (0, 1): the probability that a row
            is good before anything is known of it.

    Raises:
        `ValueError`: for an empty dataset, an unknown activation or optimizer, a negative or non-finite rate, a
            prior out of range, sources or ids of another number of rows, or sources with gaps.

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
        sources: torch.Tensor | None = None,
        sample_ids: pa.ChunkedArray | None = None,
        centered: bool = True,
        prior: float = 0.5,
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
        self.activation: SelectorActivation = activation
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.centered = centered
        for name, values in (("sources", sources), ("sample_ids", sample_ids)):
            if values is not None and len(values) != num_rows:
                raise ValueError(f"{name} must have one entry per row, got {len(values)} for {num_rows} rows.")
        if not 0 < prior < 1 or (activation == "softmax" and prior != 0.5):
            raise ValueError(f"prior must be in (0, 1), and 0.5 for softmax weights, which ignore it; got {prior}.")
        self.prior = prior
        self._is_fixed = learning_rate == 0
        self._sample_ids = sample_ids
        self.sources = sources
        # A unit is what has a weight: a row, or a source
        unit_sizes = None if sources is None else count_rows_of_sources(sources)
        num_units = num_rows if unit_sizes is None else len(unit_sizes)
        self._sums = WeightSums(activation, unit_sizes, prior)
        self._unit_logits = torch.full((num_units,), math.log(prior / (1 - prior)))  # (U,)
        self._scored = torch.zeros(num_units, dtype=torch.bool)  # (U,)
        self._restarted = torch.zeros(num_units, dtype=torch.bool)  # (U,): since then no update
        self._adam = torch.optim.Adam([self._unit_logits], lr=learning_rate) if optimizer == "adam" else None
        self._sums.refresh(self._unit_logits)

    @property
    def sample_ids(self) -> pa.ChunkedArray:
        """Ids of the rows, N of them; their positions if none were given."""
        return pa.chunked_array([np.arange(self.num_rows)]) if self._sample_ids is None else self._sample_ids

    @property
    def logits(self) -> torch.Tensor:
        """omega of all rows, shape (N,), fp32, in the row order of the training dataset."""
        return self._unit_logits if self.sources is None else self._unit_logits[self.sources]

    def weights(self) -> torch.Tensor:
        """Weights of all rows, shape (N,), fp32, mean 1, in the row order of the training dataset."""
        return self._normalize(self._sums.mass(self.logits))

    def source_weights(self) -> torch.Tensor:
        """Weight of each source, shape (number of sources,), fp32; without sources those of the rows."""
        return self._normalize(self._sums.mass(self._unit_logits))

    def weights_of(self, row_indices: torch.Tensor) -> torch.Tensor:
        """Weights of some rows, in O(B): `row_indices` is int64 of shape (B,), the result fp32 of shape (B,)."""
        return self._normalize(self._sums.mass(self._unit_logits[self._units_of(row_indices)]))

    def value_function_weights_of(self, row_indices: torch.Tensor, rows: ValueFunctionRows) -> torch.Tensor:
        """
        How much some rows count for the value function, theta-hat.

        `"selected"` are the weights themselves: the lower level's solution to the letter of the penalty form, to which
        theta itself comes close, so that the excess loss vanishes. `"all"` are equal weights. `"rejected"` are the
        weights' counterpart, 1 / (1 + w) or for the sigmoid 1 - sigma, scaled to start at 1: theta-hat learns what the
        selector turned down, and the excess loss is a likelihood ratio of the two.

        Args:
            row_indices (`torch.Tensor`): positions of the rows in the training dataset, shape (B,), int64.
            rows (`"rejected"`, `"all"` or `"selected"`): which rows theta-hat learns.

        Returns:
            `torch.Tensor`: fp32, shape (B,), all 1 before the first update.
        """
        if rows == "selected":
            return self.weights_of(row_indices)
        if rows == "all":
            return torch.ones(row_indices.shape)
        logits = self._unit_logits[self._units_of(row_indices)]
        if self.activation == "softmax":
            logits = self.weights_of(row_indices).log()
        return torch.sigmoid(-logits) / (1 - self.prior)

    @property
    def scored(self) -> torch.Tensor:
        """Which rows an update has ever moved, bool of shape (N,); the others keep the logit they started with."""
        return self._scored.clone() if self.sources is None else self._scored[self.sources]

    @property
    def judged(self) -> torch.Tensor:
        """Rows whose present answer an update has moved, bool of shape (N,): `scored`, less those restarted since."""
        judged = self._scored & ~self._restarted
        return judged if self.sources is None else judged[self.sources]

    def update(self, row_indices: torch.Tensor, losses: torch.Tensor) -> None:
        """
        Move the weights of the rows of one global batch (the upper-level step).

        Rows with a NaN or infinite loss are left alone. A row that occurs twice, as when a sampler pads the last batch
        of an epoch, counts once. An `IndexError` for positions that are no row's, as in all methods that take some.

        Args:
            row_indices (`torch.Tensor`): positions of the rows in the training dataset, shape (B,), int64.
            losses (`torch.Tensor`): mean negative log-likelihood per completion token, shape (B,), in nats.
        """
        row_indices, losses = once_and_finite(row_indices, losses)
        units = self._units_of(row_indices)
        if row_indices.numel() == 0 or self.learning_rate == 0:  # weights that stay as they are learn of no row
            return
        self._scored[units], self._restarted[units] = True, False
        if self._adam is None:
            before = self._unit_logits[units]
            after = mirror_descent_step(before, self._sums.log_mass(before), losses, self.learning_rate, self.centered)
            if self._sums.unit_sizes is not None:
                units, after = mean_over_source(units, before, after, self._unit_logits, self._sums.unit_sizes)
            self._sums.set_logits(self._unit_logits, units, after)
        else:
            gradient = selection_gradient(self._sums.mass(self.logits), row_indices, losses.double(), self.activation)
            if self.sources is not None:
                gradient = gradient.new_zeros(self._unit_logits.shape).index_add_(0, self.sources, gradient)
            self._unit_logits.grad = gradient.float()
            self._adam.step()
            self._unit_logits.grad = None
            self._sums.refresh(self._unit_logits)

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
        if self.activation != "softmax" or self.sources is not None:
            raise ValueError("Only a softmax selector with one weight per row can be given weights.")
        row_indices, logits = once_and_finite(row_indices, log_weights)
        if row_indices.numel() == 0:
            return
        units = self._units_of(row_indices)
        self._scored[units], self._restarted[units] = True, False
        self._sums.set_logits(self._unit_logits, units, logits)

    @property
    def neutral_logit(self) -> float:
        """Logit of an answer of which nothing is known yet: of the mean weight, or for the sigmoid of the prior."""
        if self.activation == "sigmoid":
            return math.log(self.prior / (1 - self.prior))
        return self._sums.shift + math.log(self._sums.total / self.num_rows)

    @property
    def proved_good(self) -> torch.Tensor:
        """Rows whose answer stands above one of which nothing is known, bool of shape (N,)."""
        return self.scored & (self.logits > self.neutral_logit)

    def sunk(self, row_indices: torch.Tensor) -> torch.Tensor:
        """Which of some rows stand below one of which nothing is known: int64 of shape (B,) in, bool out."""
        return self._unit_logits[self._units_of(row_indices)] < self.neutral_logit

    @property
    def proved_rows(self) -> float:
        """How many rows have proved good in sigmoid weights, each counted by how far it has risen above the prior."""
        return self._sums.proved_rows(self._unit_logits)

    def restart(self, row_indices: torch.Tensor) -> None:
        """
        Forget what spoke against rows whose answers were replaced: their logits rise to the neutral one.

        Nothing happens where a weight is not the row's own to forget: with sources, or with `learning_rate=0` from the
        beginning.

        Args:
            row_indices (`torch.Tensor`): positions of the rows in the training dataset, shape (B,), int64.
        """
        if self.sources is not None or self._is_fixed or row_indices.numel() == 0:
            return
        units = self._units_of(row_indices)
        self._sums.set_logits(self._unit_logits, units, self._unit_logits[units].clamp(min=self.neutral_logit))
        self._restarted[units] = True

    def statistics(self) -> SelectorStatistics:
        """Entropy, effective sample ratio and extremes of the weights; all but the extremes from running sums."""
        return self._sums.statistics(self._unit_logits, self.num_rows)

    def save(self, directory: str | os.PathLike, fingerprint: str) -> Path:
        """
        Write the selector's state to `_data_selector.safetensors` in `directory`, whole or not at all.

        Args:
            directory (`str` or `os.PathLike`): an existing directory.
            fingerprint (`str`): identifies the training rows; `load` refuses a file written for other rows.

        Returns:
            `pathlib.Path`: the file written.
        """
        return selector_files.write_selector_state(directory, self._state(), self._identity(fingerprint))

    def load(self, directory: str | os.PathLike, fingerprint: str) -> None:
        """
        Restore what `save` wrote.

        Args:
            directory (`str` or `os.PathLike`): where it was written.
            fingerprint (`str`): as given to `save`; that of a stream has no meaning.

        Raises:
            `FileNotFoundError`: if the directory holds no selector state.
            `ValueError`: if the file is damaged, or belongs to other rows or to another kind of selector.
        """
        self._restore(selector_files.read_selector_state(directory, self._identity(fingerprint)))

    def _state(self) -> dict[str, torch.Tensor]:
        tensors = {"logits": self._unit_logits, "scored": self._scored, "restarted": self._restarted}
        tensors |= self._sums.state()
        if self._adam is not None:
            tensors |= {f"adam.{name}": value for name, value in self._adam.state[self._unit_logits].items()}
        return tensors

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self._unit_logits.copy_(tensors["logits"])
        self._scored.copy_(tensors["scored"])
        self._restarted.copy_(tensors["restarted"])
        self._sums.restore(tensors)
        if self._adam is not None:
            self._adam.state[self._unit_logits] = {
                name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")
            }

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """
        Write every row's logit and weight under its sample id, for other runs and other tools.

        Args:
            directory (`str` or `os.PathLike`): created if it does not exist.

        Returns:
            `pathlib.Path`: `data_selector.parquet`, with the columns `sample_id`, `logit`, `weight` and `scored`.
        """
        return selector_files.write_selector_table(directory, selector_files.selector_table(self))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        revision: str | None = None,
        token: str | None = None,
        split: str | None = None,
    ) -> "DataSelector":
        """
        Read a selector that `save_pretrained` wrote, or one that SEAL (arXiv 2410.07471) published.

        Args:
            name_or_path (`str` or `os.PathLike`): a directory; a curated dataset on the Hub; or a `.pt` file with a
                bare vector of softmax logits, whose ids are the positions.
            revision, token (`str`, *optional*): of the repository on the Hub, and to read it with.
            split (`str`, *optional*): of the dataset there; `train`, or the only one, if `None`.

        Raises:
            `FileNotFoundError`: if there is no selector.
            `ValueError`: if the file is damaged or holds something else.
        """
        table, activation, prior = selector_files.read_selector_table(name_or_path, revision, token, split)
        selector = cls(table.num_rows, activation=activation, prior=prior, sample_ids=table.column("sample_id"))
        selector._unit_logits.copy_(torch.tensor(table.column("logit").to_numpy()))
        selector._scored.copy_(torch.tensor(table.column("scored").to_numpy()))
        selector._sums.refresh(selector._unit_logits)
        return selector

    def start_with(self, probabilities: np.ndarray, neutral: float = 0.5) -> None:
        """
        Give every row the weight of a probability that it is good, found elsewhere.

        Args:
            probabilities (`numpy.ndarray`): shape (N,), in [0, 1]; NaN where nothing is known, which counts as one
                half and is not `scored`. A source gets the mean logit of its rows.
            neutral (`float`): probability of a row of which nothing is known, in (0, 1).

        Raises:
            `ValueError`: for softmax weights, which are no probabilities.
        """
        if self.activation != "sigmoid":
            raise ValueError("Only sigmoid weights can start with probabilities.")
        self.prior = neutral
        self._sums = WeightSums(self.activation, self._sums.unit_sizes, self.prior)
        self._start(*probability_logits(probabilities))

    def start_from(self, other: "DataSelector") -> int:
        """
        Take over the weights of another selector, joined by sample id.

        Rows that the other does not know, or never scored, start as rows of which nothing is known: with the prior,
        or softmax weights with the other's mean. A source starts with the mean logit of its rows.

        Args:
            other ([`DataSelector`]): for instance one that was trained with a smaller model.

        Returns:
            `int`: number of rows that were found in `other` with a score.

        Raises:
            `ValueError`: if no row was found, or the activations differ, which would change what logits mean.
        """
        if other.activation != self.activation:
            raise ValueError(
                f"The given selector has {other.activation!r} weights, this one {self.activation!r}. Set "
                f"`selector_activation={other.activation!r}`."
            )
        logits, known = transferred_logits(self, other)
        self._start(logits, known)
        return int(known.sum())

    def _start(self, logits: torch.Tensor, known: torch.Tensor) -> None:
        """Logits of all rows and of which something is known, both of shape (N,)."""
        if self._sums.unit_sizes is not None and self.sources is not None:
            total = torch.zeros_like(self._sums.unit_sizes).index_add_(0, self.sources, logits.double())
            logits = total / self._sums.unit_sizes
        self._unit_logits.copy_(logits)
        self._scored[self._units_of(known.nonzero().flatten())] = True
        self._sums.refresh(self._unit_logits)

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("num_rows", "activation", "optimizer", "prior")}
        return {"rows_fingerprint": fingerprint, **options}

    def _units_of(self, row_indices: torch.Tensor) -> torch.Tensor:
        check_positions(row_indices, self.num_rows)
        return row_indices if self.sources is None else self.sources[row_indices]

    def _normalize(self, mass: torch.Tensor) -> torch.Tensor:
        # w_i = N * mass_i / sum(mass)
        total = self._sums.total or 1.0  # 0 for a stream of which no row was seen: there is no weight to scale
        return (mass * (self.num_rows / total)).float()
