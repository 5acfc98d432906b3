"""The losses of the two levels: tensors in, tensors out."""

import math
from typing import Literal, NamedTuple

import torch

from .refinement_config import ImportanceSamplingLevel
from .token_losses import token_losses


LossNormalization = Literal["token", "row"]


class RowLosses(NamedTuple):
    """Negative log-likelihood of each row's completion, in nats."""

    nll: torch.Tensor
    """Summed over the row's completion tokens, shape (B,)."""
    num_tokens: torch.Tensor
    """Completion tokens of the row, shape (B,), int64."""

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the row's completion tokens, shape (B,), nats per token; NaN for a row without any."""
        return self.nll / self.num_tokens


class ImportanceRatios(NamedTuple):
    """Ratios of the policy to the one that generated a response, per token; 1 on tokens of original answers."""

    ratios: torch.Tensor
    """After clipping, without gradient, shape (B, L-1)."""
    is_clipped: torch.Tensor
    """Bool, shape (B, L-1)."""
    is_generated: torch.Tensor
    """Which tokens are of a refined response, bool, shape (B, L-1)."""


class PreferenceLosses(NamedTuple):
    """What DPO makes of P preference pairs, each of shape (P,)."""

    losses: torch.Tensor
    """-log sigmoid of the reward margin, in nats."""
    chosen_rewards: torch.Tensor
    """beta times the log-ratio of policy and reference on the chosen completion."""
    rejected_rewards: torch.Tensor
    """The same on the rejected completion."""


class WeightedRows(NamedTuple):
    """
    The rows of a micro-batch: S training sequences, one for each training row or G for one with G refined responses,
    and V validation rows or preference pairs.
    """

    weights: torch.Tensor
    """Weight of each training sequence's row, shape (S,), fp32, mean 1 over the rows of the dataset."""
    kept: torch.Tensor
    """Which of them take part in the lower level, shape (S,), bool; see [`filter_threshold`]."""
    shares: torch.Tensor
    """1 for an answer, 1/G for each of a row's G refined responses, shape (S,), fp32."""
    num_training_tokens: torch.Tensor
    """Completion tokens of the training sequences, shape (S,), int64."""
    num_validation_tokens: torch.Tensor
    """Completion tokens of the validation rows, shape (V,), int64; 1 for a preference pair."""


class ObjectiveSize(NamedTuple):
    """Divisors of the two losses, in tokens or rows."""

    training: torch.Tensor
    """Scalar, fp32; exact up to 2^24 tokens an optimizer step."""
    validation: torch.Tensor
    """Scalar, fp32."""


def row_losses(log_probs: torch.Tensor, label_mask: torch.Tensor, ratios: torch.Tensor | None = None) -> RowLosses:
    """
    Negative log-likelihood of every row on its own.

    Args:
        log_probs (`torch.Tensor`): log-probabilities of the next tokens, shape (B, L-1), in nats.
        label_mask (`torch.Tensor`): which of them belong to a completion, shape (B, L-1), bool.
        ratios (`torch.Tensor`, *optional*): what each token's part is multiplied by, shape (B, L-1).

    Example:

    ```python
    >>> import torch
    >>> losses = row_losses(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[True, True, False]]))
    >>> losses.nll, losses.mean
    (tensor([3.]), tensor([1.5000]))

    ```
    """
    if ratios is not None:
        log_probs = ratios * log_probs
    nll = -(log_probs * label_mask).sum(dim=1)  # (B,)
    return RowLosses(nll=nll, num_tokens=label_mask.sum(dim=1))


def lower_level_losses(
    log_probs: torch.Tensor,
    label_mask: torch.Tensor,
    loss_type: str,
    label_smoothing: float = 0.0,
    uniform_nll: torch.Tensor | None = None,
    ratios: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What the model descends on the training rows, summed over the tokens of each, shape (B,), as TRL has it:

        nll_t = -log p(y_t)                                                            (loss_type="nll")
        sg( p(y_t) ) * nll_t                                                           (loss_type="dft")
        (1 - eps) * nll_t - eps * mean_v log p(v)                                      (label smoothing)

    Args:
        log_probs, label_mask, ratios: as for [`row_losses`].
        loss_type (`"nll"` or `"dft"`): dynamic fine-tuning (arXiv 2508.05629) multiplies by the probability.
        label_smoothing (`float`): eps.
        uniform_nll (`torch.Tensor`, *optional*): -mean_v log p(v), shape (B, L-1), for label smoothing.

    Example:

    ```python
    >>> import torch
    >>> log_probs, mask = torch.tensor([[0.5, 0.25]]).log(), torch.ones(1, 2, dtype=bool)
    >>> lower_level_losses(log_probs, mask, "dft") / torch.tensor(2.0).log()  # 0.5 * 1 bit + 0.25 * 2 bits
    tensor([1.])

    ```
    """
    losses = row_losses(-token_losses(log_probs, loss_type), label_mask, ratios).nll
    if uniform_nll is None or label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + label_smoothing * row_losses(-uniform_nll, label_mask, ratios).nll


def importance_ratios(
    log_probs: torch.Tensor,
    label_mask: torch.Tensor,
    generation_log_probs: torch.Tensor,
    clip: float,
    level: ImportanceSamplingLevel,
) -> ImportanceRatios:
    """
    Importance ratios of refined responses (arXiv 2511.21056, online self-refining generation).

        r_t = sg( min( pi(y_t) / pi_gen(y_t), clip ) )                           (level="token")
        r_t = sg( min( exp( mean_t log( pi(y_t) / pi_gen(y_t) ) ), clip ) )      (level="sequence")

    The response's loss is then mean_t [ r_t * -log pi(y_t) ], see [`row_losses`].

    Args:
        log_probs (`torch.Tensor`): of the tokens under the policy pi, shape (B, L-1), in nats.
        label_mask (`torch.Tensor`): which of them belong to a completion, shape (B, L-1), bool.
        generation_log_probs (`torch.Tensor`): under the policy and prompt that generated them, shape (B, L-1); NaN for
            tokens that were not generated, whose ratio is 1.
        clip (`float`): upper limit, at least 1.
        level (`"token"` or `"sequence"`): a ratio per token, or one for a whole sequence.

    Example:

    ```python
    >>> import torch
    >>> before, now = torch.tensor([[0.5, 0.1, 0.2]]), torch.tensor([[0.25, 0.8, 0.2]])
    >>> importance_ratios(now.log(), torch.ones(1, 3, dtype=bool), before.log(), clip=5.0, level="token").ratios
    tensor([[0.5000, 5.0000, 1.0000]])

    ```
    """
    log_ratios = log_probs.detach().float() - generation_log_probs.float()
    generated = label_mask & ~generation_log_probs.isnan()
    log_ratios = log_ratios.masked_fill(~generated, 0.0)  # (B, L-1)
    if level == "sequence":
        means = log_ratios.sum(dim=1) / generated.sum(dim=1).clamp(min=1)  # (B,)
        log_ratios = torch.where(generated, means[:, None], 0.0)
    ratios = log_ratios.clamp(max=math.log(clip)).exp()
    return ImportanceRatios(ratios, log_ratios > math.log(clip), generated)


def mean_over_responses(values: torch.Tensor, row_of_sequence: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    Mean of each row's G sequences: 1/G * sum_j values_ij.

    Args:
        values (`torch.Tensor`): one per sequence, shape (S, ...).
        row_of_sequence (`torch.Tensor`): shape (S,), int64.
        num_rows (`int`): T; every row has a sequence.

    Example:

    ```python
    >>> import torch
    >>> mean_over_responses(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([0, 1, 1]), num_rows=2)
    tensor([5., 2.])

    ```
    """
    counts = row_of_sequence.bincount(minlength=num_rows).to(values)  # (T,)
    sums = values.new_zeros((num_rows, *values.shape[1:])).index_add_(0, row_of_sequence, values)
    return sums / counts.view(-1, *[1] * (values.dim() - 1))


def preference_losses(nll: torch.Tensor, reference_nll: torch.Tensor, beta: float) -> PreferenceLosses:
    """
    Direct preference optimisation (DPO, arXiv 2305.18290, equation 7) as a validation loss.

        r(y) = beta * ( log pi(y|x) - log pi_ref(y|x) ),    loss = -log sigmoid( r(chosen) - r(rejected) )

    Args:
        nll (`torch.Tensor`): negative log-likelihood of the completions under the policy, summed over their tokens,
            shape (2P,), in nats; the chosen and the rejected completion of a pair follow each other.
        reference_nll (`torch.Tensor`): the same under the reference, shape (2P,).
        beta (`float`): strength of the pull towards the reference.

    Example:

    ```python
    >>> import torch
    >>> nll = torch.tensor([2.0, 5.0])
    >>> preference_losses(nll, reference_nll=nll, beta=0.1).losses  # log 2: the policy is the reference
    tensor([0.6931])

    ```
    """
    rewards = beta * (reference_nll - nll)  # (2P,)
    chosen, rejected = rewards.view(-1, 2).unbind(dim=1)  # (P,) each
    return PreferenceLosses(-torch.nn.functional.logsigmoid(chosen - rejected), chosen, rejected)


def validation_weight_at(epoch: float, initial: float, decay: float) -> float:
    """
    lambda during an epoch: `initial` in the first, `decay` less in each that follows, never below 0.

    Example:

    ```python
    >>> [round(validation_weight_at(epoch, initial=0.5, decay=0.2), 1) for epoch in (0, 0.99, 1, 2, 3)]
    [0.5, 0.5, 0.3, 0.1, 0.0]

    ```
    """
    return max(0.0, initial - decay * int(epoch))


def adaptive_validation_weight(num_validation_rows: int, proved_rows: float, largest: float) -> float:
    """
    lambda at which each row that has proved good counts as much as a validation row: M / (M + R), at most `largest`.

    Args:
        num_validation_rows (`int`): M, rows.
        proved_rows (`float`): R, training rows that have proved good, not necessarily whole ones.
        largest (`float`): lambda before any has.

    Example:

    ```python
    >>> [adaptive_validation_weight(200, proved, largest=0.9) for proved in (0, 200, 600)]
    [0.9, 0.5, 0.25]

    ```
    """
    return min(largest, num_validation_rows / (num_validation_rows + proved_rows))


def closed_form_log_weights(row_means: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Logarithms of the closed-form weights of bilevel multi-objective optimisation (BMO, arXiv 2511.21056).

    The rows' losses are N objectives, of which the lower level seeks a weakly Pareto-optimal point. Smoothing the
    merit function min_i l_i with a log-sum-exp,

        u(theta) = -tau * log( 1/B * sum_i exp(-l_i / tau) ),

    gives a gradient that weighs rows by w = softmax(-l / tau): for tau = 1 and summed losses in proportion to the
    likelihood of the response. (This derivation is ours.)

    Args:
        row_means (`torch.Tensor`): mean negative log-likelihood per completion token of the training rows of a whole
            optimizer step, shape (B,), in nats.
        temperature (`float`): tau, in nats.

    Returns:
        `torch.Tensor`: log w, scaled so that w has mean 1 over the rows with a finite loss, shape (B,); -inf for the
        others.

    Example:

    ```python
    >>> import torch
    >>> likelihoods = torch.tensor([0.75, 0.25])
    >>> closed_form_log_weights(-likelihoods.log(), temperature=1.0).exp()
    tensor([1.5000, 0.5000])

    ```
    """
    finite = row_means.isfinite()
    log_weights = (-row_means / temperature).masked_fill(~finite, -torch.inf)
    # log w_i = -l_i / tau - log( 1/B * sum_k exp(-l_k / tau) )
    log_weights = log_weights - log_weights.logsumexp(dim=0) + finite.sum().to(log_weights).log()
    return log_weights.masked_fill(~finite, -torch.inf)


def filter_threshold(weights: torch.Tensor, filter_ratio: float) -> float:
    """
    The weight below which a row takes no part in the lower-level step, so that the `filter_ratio` lowest are left out.

    Rows that tie with a kept row are kept. So nothing is filtered while all weights are still equal, and the result
    does not depend on the order of the rows, hence not on how a batch is split into micro-batches or processes.

    Args:
        weights (`torch.Tensor`): weights of the rows of a global batch, shape (B,).
        filter_ratio (`float`): share of rows to leave out, in [0, 1); rounded down to whole rows.

    Returns:
        `float`: rows with `weight >= threshold` are kept.

    Example:

    ```python
    >>> import torch
    >>> weights = torch.tensor([0.5, 2.0, 0.5, 1.0])
    >>> weights >= filter_threshold(weights, filter_ratio=0.5)
    tensor([False,  True, False,  True])
    >>> torch.ones(4) >= filter_threshold(torch.ones(4), filter_ratio=0.5)
    tensor([True, True, True, True])

    ```
    """
    num_filtered = int(filter_ratio * weights.numel())
    return weights.sort().values[num_filtered].item() if num_filtered else 0.0


def objective_size(rows: WeightedRows, normalization: LossNormalization) -> ObjectiveSize:
    """
    What some rows add to the divisors of the two losses; the sum over an optimizer step divides its losses.

    Args:
        rows ([`WeightedRows`]): rows of a micro-batch.
        normalization (`"token"` or `"row"`): divide by completion tokens, as TRL does, or by rows.
    """
    kept = rows.kept * rows.shares  # (S,)
    if normalization == "row":
        return ObjectiveSize(training=kept.sum(), validation=kept.new_tensor(rows.num_validation_tokens.numel()))
    return ObjectiveSize(
        training=(rows.num_training_tokens * kept).sum(), validation=rows.num_validation_tokens.sum().float()
    )


def row_coefficients(
    rows: WeightedRows, size: ObjectiveSize, validation_weight: float, normalization: LossNormalization
) -> torch.Tensor:
    """
    How much each row's summed negative log-likelihood counts in the objective of the theta step.

    The penalty form of the bilevel problem (SEAL, arXiv 2410.07471; BDS, arXiv 2511.21056) is linear in the rows'
    losses, so one dot product with these coefficients is the whole objective:

        lambda * L_val + (1 - lambda) * L_train(w)
        L_train(w) = sum_i w_i * sum_t nll_it / sum_i n_i            (normalization="token", as TRL)
        L_train(w) = 1/T * sum_i w_i * mean_t nll_it                 (normalization="row", the papers' codes)

    with T the training rows of the step that are kept. A row with G refined responses has the mean of theirs in place
    of its terms; each has a coefficient of its own.

    Args:
        rows ([`WeightedRows`]): rows of a micro-batch.
        size ([`ObjectiveSize`]): divisors, over the whole optimizer step.
        validation_weight (`float`): lambda, in [0, 1].
        normalization (`"token"` or `"row"`): what `size` counts.

    Returns:
        `torch.Tensor`: fp32, shape (S + V,): training sequences first.
    """
    kept = rows.kept * rows.shares  # (S,)
    # No kept row at all: 0 / tiny
    training = (1 - validation_weight) * rows.weights * kept / size.training.clamp(min=1e-6)  # (S,)
    validation = validation_weight / size.validation.clamp(min=1)
    coefficients = torch.cat([training, validation.expand(rows.num_validation_tokens.shape)])  # (S + V,)
    if normalization == "row":
        num_tokens = torch.cat([rows.num_training_tokens, rows.num_validation_tokens])
        coefficients = coefficients / num_tokens.clamp(min=1)
    return coefficients
