"""The selector's updates against closed forms, finite differences and autograd, in float64."""

import pytest
import torch

from trl_bilevel.selector_updates import mirror_descent_step, selection_gradient


MASS = {"softmax": torch.exp, "sigmoid": torch.sigmoid}


def _batch_loss(logits, row_indices, losses, activation):
    """g_B(omega) = 1/B * sum_{i in B} w_i l_i with w = N * mass / sum(mass), written independently."""
    mass = MASS[activation](logits)
    weights = logits.numel() * mass / mass.sum()
    return (weights[row_indices] * losses).mean()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    row_indices = torch.tensor([7, 0, 4])
    losses = 3 * torch.rand(3, generator=generator, dtype=torch.float64)
    return logits, row_indices, losses


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_equals_finite_differences(problem, activation):
    logits, row_indices, losses = problem
    gradient = selection_gradient(MASS[activation](logits), row_indices, losses, activation)
    step = 1e-6
    for row in range(len(logits)):
        nudge = torch.zeros_like(logits)
        nudge[row] = step
        above = _batch_loss(logits + nudge, row_indices, losses, activation)
        below = _batch_loss(logits - nudge, row_indices, losses, activation)
        assert gradient[row].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-8)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_equals_autograd(problem, activation):
    logits, row_indices, losses = problem
    logits.requires_grad_()
    _batch_loss(logits, row_indices, losses, activation).backward()
    gradient = selection_gradient(MASS[activation](logits.detach()), row_indices, losses, activation)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-12)


def test_full_batch_gradient_is_the_closed_form():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)
    losses = torch.rand(6, generator=generator, dtype=torch.float64)
    # d g / d omega_i = sigma_i * (l_i - sum_k sigma_k l_k)
    sigma = logits.softmax(0)
    expected = sigma * (losses - (sigma * losses).sum())
    torch.testing.assert_close(selection_gradient(logits.exp(), torch.arange(6), losses, "softmax"), expected)


def test_mirror_descent_is_exponentiated_gradient_with_renormalisation():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)
    losses = torch.rand(6, generator=generator, dtype=torch.float64)
    new = mirror_descent_step(logits, logits, losses, learning_rate=0.7).softmax(0)
    # sigma_i <- sigma_i * exp(-eta * l_i) / Z
    unnormalised = logits.softmax(0) * torch.exp(-0.7 * losses)
    torch.testing.assert_close(new, unnormalised / unnormalised.sum(), rtol=1e-12, atol=1e-12)


def test_mirror_descent_with_sigmoid_is_the_step_in_the_entropy_of_the_box():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)
    losses = torch.rand(5, generator=generator, dtype=torch.float64)
    share = logits.sigmoid()
    new = mirror_descent_step(logits, share.log(), losses, learning_rate=0.7).sigmoid()
    # argmin_s <g, s> + 1/eta * KL(s || share), coordinate-wise for s in (0, 1), found by a fine grid
    gradient = losses - (share * losses).sum() / share.sum()
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    for row in range(5):
        divergence = grid * (grid / share[row]).log() + (1 - grid) * ((1 - grid) / (1 - share[row])).log()
        best = grid[(gradient[row] * grid + divergence / 0.7).argmin()]
        assert new[row].item() == pytest.approx(best.item(), abs=1e-5)


def test_equal_losses_move_nobody():
    logits = torch.tensor([0.0, 1.0, -2.0])
    torch.testing.assert_close(mirror_descent_step(logits, logits, torch.full((3,), 5.0), 1.0), logits)
