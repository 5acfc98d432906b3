"""
What training adds to a screen: its probabilities are the prior, and those that training ends with the posterior.

Arrays in, arrays out; how the evidence is gathered is `value_function.py`.
"""

import numpy as np
from sklearn.isotonic import IsotonicRegression

from .calibration import PROMISE, noise_rate_given_power
from .verdict import Verdict


def prior_probabilities(verdict: Verdict) -> np.ndarray:
    r"""
    Probabilities that rows are good, for training to start from, where the model misses some of the faults.

    A screen calls few rows bad if it sees few faults, and what is believed at the start is learned. So the share of
    good rows pi_0, and with it each probability, is a careful one: the noise rate is the upper end of its interval,
    corrected by how many of the faults of the positive control the model misses.

        P(good | p) = pi_0' f_0(p) / f(p),    1 - pi_0' from [`~.calibration.noise_rate_given_power`]

    (Ours; the faults of the rows need not be as easy to see as those of the control.)

    Returns:
        `np.ndarray`: shape (N,), in [0, 1], at most `verdict.good_probability`; NaN without an answer.
    """
    rate = verdict.facts["noise_rate"]
    if rate["estimate"] >= 1:
        return verdict.good_probability
    corrected = noise_rate_given_power(rate["high"], verdict.facts["control_power"])
    return verdict.good_probability * (1 - corrected) / (1 - rate["estimate"])


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
        found[known] = IsotonicRegression(increasing=False).fit_transform(losses[known], good_probability[known])
    return found


def after_training(verdict: Verdict, good_probability: np.ndarray, losses: np.ndarray) -> Verdict:
    """
    A verdict whose probabilities are those that training ends with.

    They are the means of two: what the weights have come to, and what the trained model's loss says by
    [`loss_probabilities`]. The first is the better one where most rows are bad, the second where most are good. A row
    is dropped if both hold it to be good with a probability of at most a tenth. (Ours.) The p-values, the reasons and
    the interval of the noise rate stay the screen's.

    Args:
        verdict ([`Verdict`]): of the screen.
        good_probability (`np.ndarray`): by the weights, shape (N,), in [0, 1].
        losses (`np.ndarray`): of the rows under the trained model, shape (N,), nats per token; NaN where not known.
    """
    has_answer = ~np.isnan(verdict.score)
    learned = np.where(has_answer, good_probability, np.nan)
    by_loss = loss_probabilities(losses, learned)
    good = (learned + by_loss) / 2
    dropped = np.maximum(learned, by_loss) <= PROMISE
    facts = {
        **verdict.facts,
        "noise_rate_after_training": float(1 - good[has_answer].mean()),
        "num_dropped": int(dropped.sum()),
        "num_left_out": int((dropped | ~has_answer).sum()),
        "is_informative": bool(verdict.facts["is_informative"] or dropped.any()),
    }
    return verdict._replace(good_probability=good, dropped=dropped, facts=facts)


def noise_rate_of(verdict: Verdict) -> float:
    """Share of the rows that are held to be bad, in [0, 1]: after training where it added evidence."""
    rate = verdict.facts["noise_rate"]["estimate"]
    return float(verdict.facts.get("noise_rate_after_training", rate))
