"""
What training adds to a screen whose model misses some of the faults: where its weights start, and what they end with.

Arrays in, arrays out; how the evidence is gathered is `value_function.py`.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from sklearn.isotonic import IsotonicRegression

from .calibration import LARGEST_BAD, PROMISE, noise_rate_given_power
from .verdict import Verdict


_ENDS = (1e-6, 1 - 1e-6)


class Prior(NamedTuple):
    """What training starts from."""

    good_probability: np.ndarray
    """Of each row, shape (N,), in (0, 1); NaN without an answer."""
    good_share: float
    """pi_0, share of good rows."""


def careful_prior(verdict: Verdict, smallest_share: float) -> Prior:
    """
    Probabilities that rows are good, for training to start from.

    Where the screen does not suffice it says how many rows are bad, and training which: to such a model hard rows look
    bad too, and a row that starts as a bad one is not learned. The share is a careful one, as what is believed too
    early is learned, and then believed more. The noise rate is the upper end of its interval, corrected by how much of
    the faults the model sees, and those are taken to be half as visible as those of the positive control. (Ours.)

    Args:
        verdict ([`Verdict`]): of the screen.
        smallest_share (`float`): of good rows, in (0, 1).
    """
    rate, power = verdict.facts["noise_rate"], verdict.facts["control_power"]
    if verdict.suffices:
        return Prior(verdict.good_probability, max(smallest_share, 1 - rate["estimate"]))
    visible = LARGEST_BAD + max(0.0, power - LARGEST_BAD) / 2
    share = max(smallest_share, 1 - noise_rate_given_power(rate["high"], visible))
    return Prior(np.where(np.isnan(verdict.score), np.nan, share), share)


def good_share(probabilities: np.ndarray, prior: float) -> float:
    r"""
    The share of good rows that explains the evidence best, to which EM comes (Saerens, Latinne, Decaestecker, 2002).

        max over pi of  sum_i log( pi r_i + 1 - pi ),    r_i = odds P(good_i) / odds pi_0

    The sum is concave, so that the root of its slope is the maximum, or an end where there is none.

    Args:
        probabilities (`np.ndarray`): P(good_i), found with the prior, shape (N,), in [0, 1], N at least 1.
        prior (`float`): pi_0, in (0, 1).

    Returns:
        `float`: in (0, 1); the prior if there is no evidence.
    """
    good, bad = probabilities / prior, (1 - probabilities) / (1 - prior)

    def slope(share: float) -> float:
        return float(((good - bad) / (share * good + (1 - share) * bad)).sum())

    smallest, largest = _ENDS
    if np.allclose(good, bad):
        return prior
    if slope(smallest) <= 0:
        return smallest
    if slope(largest) >= 0:
        return largest
    return float(brentq(slope, smallest, largest))


def with_prior(probabilities: np.ndarray, prior: float, other: float) -> np.ndarray:
    """
    Probabilities, shape (N,), that were found with one share of good rows, with another one.

    Example:

    ```python
    >>> with_prior(np.array([0.2, 0.5]), prior=0.2, other=0.5)
    array([0.5, 0.8])

    ```
    """
    good, bad = probabilities * other / prior, (1 - probabilities) * (1 - other) / (1 - prior)
    return good / (good + bad)


def loss_probabilities(losses: np.ndarray, good_probability: np.ndarray) -> np.ndarray:
    r"""
    Probability that a row is good, given its loss: how many rows of that loss other evidence holds to be good.

        r(l) = the function that never rises with the loss and is closest to P(good), in squares

    Args:
        losses (`np.ndarray`): of the rows, shape (N,), nats per token; NaN where it is not known.
        good_probability (`np.ndarray`): by the other evidence, shape (N,), in [0, 1], or NaN.

    Returns:
        `np.ndarray`: shape (N,), in [0, 1], with the mean of `good_probability`; that itself without a loss.

    Example:

    ```python
    >>> loss_probabilities(np.array([0.1, 2.0, 0.2, 3.0]), np.array([0.9, 0.2, 0.8, 0.4])).round(2)
    array([0.9, 0.3, 0.8, 0.3])

    ```
    """
    known = np.flatnonzero(~np.isnan(losses) & ~np.isnan(good_probability))
    found = good_probability.copy()
    if len(known) > 0:
        fit = IsotonicRegression(y_min=0, y_max=1, increasing=False)
        found[known] = fit.fit_transform(losses[known], good_probability[known])
    return found


def after_training(verdict: Verdict, good_probability: np.ndarray, losses: np.ndarray, prior: float) -> Verdict:
    """
    A verdict by what training has found.

    What the weights have come to gives the share of good rows, by [`good_share`], and with it a probability for each
    row. The loss under the trained model ranks the rows: it is better than the weights at that where most rows are
    good, and as good where most are bad. A row's probability is that of its loss, by [`loss_probabilities`]; a row of
    at most a tenth is dropped. (Ours.) The p-values, the reasons and the interval of the noise rate stay the screen's.

    Args:
        verdict ([`Verdict`]): of the screen.
        good_probability (`np.ndarray`): sigma of the rows' logits, shape (N,), in [0, 1].
        losses (`np.ndarray`): of the rows under the trained model, shape (N,), nats per token; NaN where not known.
        prior (`float`): share of good rows that the logits started from, in (0, 1).
    """
    has_answer = ~np.isnan(verdict.score)
    share = good_share(good_probability[has_answer], prior)
    good = np.where(has_answer, with_prior(good_probability, prior, share), np.nan)
    good = loss_probabilities(losses, good)
    dropped = good <= PROMISE
    facts = {
        **verdict.facts,
        "noise_rate_after_training": float(1 - good[has_answer].mean()),
        "num_dropped": int(dropped.sum()),
        "num_left_out": int((dropped | ~has_answer).sum()),
        "is_informative": bool(verdict.facts["is_informative"] or dropped.any()),
    }
    score = np.where(has_answer & ~np.isnan(losses), losses, verdict.score)
    return verdict._replace(score=score, good_probability=good, dropped=dropped, facts=facts)


def noise_rate_of(verdict: Verdict) -> float:
    """Share of the rows that are held to be bad, in [0, 1]: after training where it added evidence."""
    rate = verdict.facts["noise_rate"]["estimate"]
    return float(verdict.facts.get("noise_rate_after_training", rate))
