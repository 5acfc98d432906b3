"""
The selector's gradient against the true bilevel objective, on a problem small enough to solve exactly in float64.

Each row's loss is a parabola in theta, so that the lower level's solution is a linear system.
"""

import pytest
import torch

from trl_bilevel.selector_updates import selection_gradient


NUM_ROWS, SIZE = 6, 3
_GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(NUM_ROWS, SIZE, generator=_GENERATOR, dtype=torch.float64)
TARGETS = torch.randn(NUM_ROWS, generator=_GENERATOR, dtype=torch.float64)
TRUSTED_FEATURES = torch.randn(4, SIZE, generator=_GENERATOR, dtype=torch.float64)
TRUSTED_TARGETS = torch.randn(4, generator=_GENERATOR, dtype=torch.float64)
LOGITS = torch.randn(NUM_ROWS, generator=_GENERATOR, dtype=torch.float64)
ACTIVATIONS = {"softmax": torch.exp, "sigmoid": torch.sigmoid}


def _losses(theta):
    """l_i(theta), shape (N,); the ridge keeps every solution unique."""
    return 0.5 * (FEATURES @ theta - TARGETS).square() + 0.05 * theta.square().sum()


def _validation_loss(theta):
    return 0.5 * (TRUSTED_FEATURES @ theta - TRUSTED_TARGETS).square().mean()


def _solve(shares, penalty=None):
    """argmin of sum_i sigma_i l_i(theta), or of L_val + penalty * that."""
    matrix = FEATURES.T @ (shares[:, None] * FEATURES) + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    vector = FEATURES.T @ (shares * TARGETS)
    if penalty is not None:
        matrix = penalty * matrix + TRUSTED_FEATURES.T @ TRUSTED_FEATURES / 4
        vector = penalty * vector + TRUSTED_FEATURES.T @ TRUSTED_TARGETS / 4
    return torch.linalg.solve(matrix, vector)


def _shares(logits, activation):
    mass = ACTIVATIONS[activation](logits)
    return mass / mass.sum()


def _finite_differences(function, nudge=1e-6):
    steps = nudge * torch.eye(NUM_ROWS, dtype=torch.float64)
    return torch.stack([(function(LOGITS + step) - function(LOGITS - step)) / (2 * nudge) for step in steps])


def _gradient(losses, activation):
    return selection_gradient(ACTIVATIONS[activation](LOGITS), torch.arange(NUM_ROWS), losses, activation)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_excess_loss_is_the_gradient_of_the_penalty(activation):
    """d/d omega of g(theta, omega) - min g(., omega), the minimum solved anew for every nudge."""
    theta = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)

    def penalty(logits):
        shares = _shares(logits, activation)
        return shares @ _losses(theta) - shares @ _losses(_solve(shares))

    theta_hat = _solve(_shares(LOGITS, activation))
    gradient = _gradient(_losses(theta) - _losses(theta_hat), activation)
    torch.testing.assert_close(gradient, _finite_differences(penalty), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_for_a_large_penalty_it_is_the_gradient_of_the_bilevel_objective(activation):
    """d/d omega of L_val(theta*(omega)): theta descends lambda * L_val + (1 - lambda) * L_train, lambda near 0."""
    penalty = 1e5  # (1 - lambda) / lambda
    shares = _shares(LOGITS, activation)
    theta, theta_hat = _solve(shares, penalty), _solve(shares)
    gradient = penalty * _gradient(_losses(theta) - _losses(theta_hat), activation)
    expected = _finite_differences(lambda logits: _validation_loss(_solve(_shares(logits, activation))))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_without_the_value_function_it_is_not():
    """What SEAL's memory-efficient variant leaves out matters: the loss alone points elsewhere."""
    shares = _shares(LOGITS, "softmax")
    expected = _finite_differences(lambda logits: _validation_loss(_solve(_shares(logits, "softmax"))))
    gradient = _gradient(_losses(_solve(shares, 1e5)), "softmax")
    assert torch.cosine_similarity(gradient, expected, dim=0) < 0.9
