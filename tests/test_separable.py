"""
Invariant 7: on separable data BDS and BMO find the same solution, which direct mixing does not.

The model is a table, one row of logits per question, so that nothing learned about one question says anything about
another. Each question has a trusted answer, a training row with that answer and one with a wrong answer.
"""

import pytest
import torch

from trl_bilevel.losses import closed_form_log_weights
from trl_bilevel.selector_updates import mirror_descent_step


NUM_QUESTIONS, NUM_ANSWERS = 4, 3
TRUSTED = torch.arange(NUM_QUESTIONS) % NUM_ANSWERS
QUESTIONS = torch.arange(NUM_QUESTIONS).repeat(2)
ANSWERS = torch.cat([TRUSTED, (TRUSTED + 1) % NUM_ANSWERS])  # useful rows first, then useless ones


def bds(logits, losses):
    return mirror_descent_step(logits, logits, losses, learning_rate=0.5)


def bmo(logits, losses):
    return closed_form_log_weights(losses, temperature=0.5)


def mixing(logits, losses):
    return logits


def bds_with_the_wrong_sign(logits, losses):
    return mirror_descent_step(logits, logits, losses, learning_rate=-0.5)


def bmo_with_the_wrong_sign(logits, losses):
    return -closed_form_log_weights(losses, temperature=0.5)


def solve(selector_step, validation_weight=0.5, num_steps=4000):
    """Alternate both levels; returns the answers' probabilities (questions, answers) and the rows' weights (N,)."""
    table = torch.zeros(NUM_QUESTIONS, NUM_ANSWERS, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(len(QUESTIONS), dtype=torch.float64)
    for _ in range(num_steps):
        log_probabilities = table.log_softmax(-1)
        losses = -log_probabilities[QUESTIONS, ANSWERS]
        weights = len(logits) * logits.softmax(0)
        validation_loss = -log_probabilities[torch.arange(NUM_QUESTIONS), TRUSTED].mean()
        objective = validation_weight * validation_loss + (1 - validation_weight) * (weights * losses).mean()
        (gradient,) = torch.autograd.grad(objective, table)
        with torch.no_grad():
            table -= 2.0 * gradient
            logits = selector_step(logits, losses.detach())
    return table.detach().softmax(-1), len(logits) * logits.softmax(0)


@pytest.fixture(scope="module")
def solutions():
    methods = (bds, bmo, mixing, bds_with_the_wrong_sign, bmo_with_the_wrong_sign)
    return {method: solve(method) for method in methods}


def _distance(first, second):
    """Largest total variation between the answers to one question."""
    return ((first - second).abs().sum(-1) / 2).max().item()


def test_both_methods_agree_and_give_the_trusted_answers(solutions):
    (bds_answers, bds_weights), (bmo_answers, bmo_weights) = solutions[bds], solutions[bmo]
    assert _distance(bds_answers, bmo_answers) < 0.01
    for answers in (bds_answers, bmo_answers):
        assert answers[torch.arange(NUM_QUESTIONS), TRUSTED].min() > 0.99
    for weights in (bds_weights, bmo_weights):
        # useless rows vanish, and every useful one keeps its share: coverage of the questions stays whole
        assert weights[NUM_QUESTIONS:].max() < 0.01
        torch.testing.assert_close(weights[:NUM_QUESTIONS], torch.full((4,), 2.0).double(), rtol=0.01, atol=0)


def test_direct_mixing_keeps_the_wrong_answers(solutions):
    answers, _ = solutions[mixing]
    # of each question's mass, lambda = 1/2 is trusted; of the other half, half is the useless row
    wrong = answers[torch.arange(NUM_QUESTIONS), (TRUSTED + 1) % NUM_ANSWERS]
    torch.testing.assert_close(wrong, torch.full((4,), 0.25).double(), rtol=0, atol=0.01)
    assert _distance(answers, solutions[bds][0]) > 0.2


@pytest.mark.parametrize("broken", [bds_with_the_wrong_sign, bmo_with_the_wrong_sign])
def test_agreement_is_lost_when_a_method_is_broken(solutions, broken):
    assert _distance(solutions[broken][0], solutions[bds][0]) > 0.2
    assert _distance(solutions[broken][0], solutions[bmo][0]) > 0.2
