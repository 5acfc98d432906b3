"""The losses against torch's cross-entropy and against the objective written out."""

import pytest
import torch

from trl_bilevel.losses import (
    ObjectiveSize,
    WeightedRows,
    filter_threshold,
    lower_level_losses,
    objective_size,
    row_coefficients,
    row_losses,
)


def test_row_losses_are_the_rows_cross_entropies():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (3, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    log_probs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    losses = row_losses(log_probs, mask)

    for row in range(3):
        expected = torch.nn.functional.cross_entropy(logits[row][mask[row]], labels[row][mask[row]])
        torch.testing.assert_close(losses.mean[row], expected)
    assert losses.num_tokens.tolist() == [6, 2, 1]


@pytest.mark.parametrize("has_ratios", [False, True])
def test_dynamic_fine_tuning_weighs_tokens_by_their_probability(has_ratios):
    """-p log p, without a gradient through p; the importance ratios of refined answers multiply it."""
    probabilities = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.3, 0.4]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ratios = torch.tensor([[2.0, 3.0, 1.0], [1.0, 1.0, 5.0]]) if has_ratios else None
    log_probs = probabilities.log().requires_grad_()
    losses = lower_level_losses(log_probs, mask, "dft", ratios=ratios)
    factors = probabilities * mask * (1 if ratios is None else ratios)
    torch.testing.assert_close(losses, -(factors * probabilities.log()).sum(dim=1))
    losses.sum().backward()
    torch.testing.assert_close(log_probs.grad, -factors)


def test_mean_loss_of_a_row_without_completion_is_nan_not_zero():
    losses = row_losses(torch.full((1, 4), -1.0), torch.zeros(1, 4, dtype=torch.bool))
    assert losses.mean.isnan().all()


def _rows() -> WeightedRows:
    return WeightedRows(
        weights=torch.tensor([0.5, 2.0, 1.0]),
        kept=torch.tensor([False, True, True]),
        shares=torch.ones(3),
        num_training_tokens=torch.tensor([7, 2, 3]),
        num_validation_tokens=torch.tensor([4, 6]),
    )


def test_token_objective_is_the_formula_written_out():
    nll = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    size = objective_size(_rows(), "token")
    coefficients = row_coefficients(_rows(), size, validation_weight=0.3, normalization="token")
    # lambda * (40 + 50) / (4 + 6) + (1 - lambda) * (2 * 20 + 1 * 30) / (2 + 3); the first row is filtered out
    assert (coefficients * nll).sum().item() == pytest.approx(0.3 * 90 / 10 + 0.7 * 70 / 5)


def test_row_objective_is_the_mean_of_row_means():
    nll = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    size = objective_size(_rows(), "row")
    coefficients = row_coefficients(_rows(), size, validation_weight=0.3, normalization="row")
    expected = 0.3 * (40 / 4 + 50 / 6) / 2 + 0.7 * (2 * 20 / 2 + 1 * 30 / 3) / 2
    assert (coefficients * nll).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("normalization", ["token", "row"])
def test_micro_batches_add_up_to_the_whole_step(normalization):
    rows = _rows()
    parts = [WeightedRows(*(values[part] for values in rows)) for part in (slice(None, 1), slice(1, None))]
    sizes = [objective_size(part, normalization) for part in parts]
    total = ObjectiveSize(*(sum(values) for values in zip(*sizes, strict=True)))
    assert total == objective_size(rows, normalization)
    first, second = (row_coefficients(part, total, 0.3, normalization) for part in parts)
    whole = row_coefficients(rows, total, 0.3, normalization)
    torch.testing.assert_close(torch.cat([first[:1], second[:2], first[1:], second[2:]]), whole)


def test_filter_does_not_depend_on_the_order_of_the_rows():
    weights = torch.tensor([1.0, 0.2, 3.0, 0.1, 0.2, 2.0])
    threshold = filter_threshold(weights, filter_ratio=0.4)  # two of six rows: 0.1 and one of the tied 0.2
    assert (weights >= threshold).tolist() == [True, True, True, False, True, True]
    for _ in range(5):
        assert filter_threshold(weights[torch.randperm(6)], filter_ratio=0.4) == threshold
