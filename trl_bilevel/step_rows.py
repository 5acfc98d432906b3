"""How the rows of an optimizer step count in the objective, worked out before its first forward pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .batch_layout import BatchLayout
from .losses import (
    LossNormalization,
    ObjectiveSize,
    WeightedRows,
    mean_over_responses,
    objective_size,
    row_coefficients,
)
from .paired_batches import RefinedSpan


STEP_ROWS = "step_rows"
"""Batch key of the micro-batch's [`StepRows`]."""


@dataclass
class StepRows:
    """
    What the trainer knows of a micro-batch besides its tokens: T training rows in S sequences, as a row with refined
    responses has one for each, then the validation rows.

    An object and not tensors of the batch: those would be cast to the precision of the model under DeepSpeed.
    """

    num_training: int
    """T."""
    row_of_sequence: torch.Tensor
    """Which training row each training sequence answers, int64 of shape (S,), on the CPU."""
    refined_spans: list[RefinedSpan | None]
    """Of each training sequence: where a refined response is; `None` for an original answer."""
    num_tokens: torch.Tensor
    """Completion tokens of each of the R sequences, int64 of shape (R,), on the CPU."""
    layout: BatchLayout
    """Where the sequences are in the model's inputs."""
    reference_nll: torch.Tensor
    """Of preference pairs: negative log-likelihoods under the reference, (2P,), fp32, in nats. Empty without pairs."""
    num_filtered: int = 0
    """Training rows that take no part in the model's step."""
    coefficients: torch.Tensor | None = None
    """Factor of each sequence's summed loss, or pair's loss, in the objective, fp32, on the device: (S + V,) for rows,
    (S + P,) for pairs."""
    value_coefficients: torch.Tensor | None = None
    """Factor of each training sequence's summed loss in the value function's objective, fp32, on the device: (S,)."""

    @property
    def num_sequences(self) -> int:
        """S, training sequences."""
        return len(self.row_of_sequence)

    @property
    def is_refined(self) -> torch.Tensor:
        """Which training sequences are refined responses, bool of shape (S,)."""
        return torch.tensor([span is not None for span in self.refined_spans], dtype=torch.bool)

    @property
    def num_refined(self) -> int:
        """Training rows with refined responses."""
        return len(self.row_of_sequence[self.is_refined].unique())

    def row_means(self, sequence_means: torch.Tensor) -> torch.Tensor:
        """Means over the responses of each training row, shape (T, ...); takes (S, ...)."""
        return mean_over_responses(sequence_means, self.row_of_sequence, self.num_training)

    def dense_generation_log_probs(self, log_probs: torch.Tensor) -> torch.Tensor:
        """
        The refined responses' log-probabilities when they were generated, fp32, NaN elsewhere, shape (R, L-1).

        Args:
            log_probs (`torch.Tensor`): those of now, of all R sequences, shape (R, L-1).
        """
        dense = torch.full(log_probs.shape, torch.nan)
        for sequence, span in enumerate(self.refined_spans):
            if span is not None:
                dense[sequence, span.start : span.start + len(span.log_probs)] = torch.from_numpy(span.log_probs)
        return dense.to(log_probs.device, non_blocking=True)

    def with_whole_pairs(self, finite: torch.Tensor) -> torch.Tensor:
        """Sequences to learn from, bool of shape (R,): `finite` ones, and of a pair both completions or none."""
        if not self.reference_nll.numel():
            return finite
        pairs = finite[self.num_sequences :].view(-1, 2).all(dim=1)  # (P,)
        return torch.cat([finite[: self.num_sequences], pairs.repeat_interleave(2)])

    def only(self, staying: torch.Tensor, layout: BatchLayout) -> "StepRows":
        """
        The same without the sequences that do not stay; `staying` is bool of shape (R,), pairs being whole. The counts
        of rows and the value function's coefficients stay those of the whole micro-batch.
        """
        assert self.coefficients is not None
        training, validation = staying.tensor_split([self.num_sequences])
        has_pairs = self.reference_nll.numel() > 0
        units = torch.cat([training, validation[::2] if has_pairs else validation])
        reference_nll = self.reference_nll
        return replace(
            self,
            row_of_sequence=self.row_of_sequence[training],
            refined_spans=[span for span, stays in zip(self.refined_spans, training, strict=True) if stays],
            num_tokens=self.num_tokens[staying],
            layout=layout,
            reference_nll=reference_nll[validation.to(reference_nll.device)] if has_pairs else reference_nll,
            coefficients=self.coefficients[units.to(self.coefficients.device)],
        )

    def weighted(self, weights: torch.Tensor, kept: torch.Tensor) -> WeightedRows:
        """
        Join the micro-batch's rows with their weights, on the CPU.

        Args:
            weights (`torch.Tensor`): of its training rows, shape (T,).
            kept (`torch.Tensor`): which of them take part in the model's step, bool, shape (T,).
        """
        shares = 1 / self.row_of_sequence.bincount(minlength=self.num_training).float()  # (T,)
        weights, shares = weights.float()[self.row_of_sequence], shares[self.row_of_sequence]  # (S,) each
        training_tokens, validation_tokens = self.num_tokens.tensor_split([self.num_sequences])
        if self.reference_nll.numel():
            validation_tokens = torch.ones_like(validation_tokens[::2])  # (P,): a pair counts as a whole
        return WeightedRows(weights, kept[self.row_of_sequence], shares, training_tokens, validation_tokens)


def row_coefficients_of_step(
    step_rows: list[StepRows],
    weights: torch.Tensor,
    kept: torch.Tensor,
    validation_weight: float,
    normalization: LossNormalization,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None,
) -> list[torch.Tensor]:
    """
    How much each row counts in the objective, see [`~trl_bilevel.losses.row_coefficients`], per micro-batch.

    Args:
        step_rows (`list[StepRows]`): the step's micro-batches on this process.
        weights (`torch.Tensor`): of their training rows, one micro-batch after the other.
        kept (`torch.Tensor`): which of them take part in the model's step, bool, in the same order.
        validation_weight (`float`): lambda.
        normalization (`"token"` or `"row"`): what losses are divided by, over the whole step.
        reduce (`Callable`, *optional*): adds up the divisors over processes.

    Returns:
        `list[torch.Tensor]`: fp32 on the CPU, shape (S + V,) each.
    """
    sizes = [rows.num_training for rows in step_rows]
    micro_batches = [
        rows.weighted(row_weights, row_kept)
        for rows, row_weights, row_kept in zip(step_rows, weights.split(sizes), kept.split(sizes), strict=True)
    ]
    size = torch.stack([torch.stack(objective_size(rows, normalization)) for rows in micro_batches]).sum(dim=0)
    if reduce is not None:
        size = reduce(size)
    return [row_coefficients(rows, ObjectiveSize(*size), validation_weight, normalization) for rows in micro_batches]
