r"""
From scores to calibrated quantities: p-values, the share of bad rows, a probability for each row, and a cut.

Everything here rests on one assumption: **good rows are exchangeable with the trusted ones**, that is, drawn as the
trusted rows were drawn. Then the p-value of a good row is uniform whatever the score is, and a score that is bad at
its job finds less but promises nothing false. What breaks it: trusted rows of another task, style, length or source
than the good rows (good rows then look bad), trusted rows that the scoring model has learned (all rows look bad), and
trusted rows that were chosen by the score itself. No score can tell a bad row that looks like a trusted one.

Arrays in, arrays out; nothing here knows what a row or a model is. Scores are higher for worse rows. SciPy has
Benjamini-Hochberg and scikit-learn isotonic regression. Conformal p-values and Storey's estimate are a line or two of
NumPy each; packages that have them (MAPIE, crepes, nonconformist) wrap them around predictors that are fitted to
labels, and here there are none.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control
from sklearn.isotonic import IsotonicRegression


PROMISE = 0.1
"""Share of good rows among those dropped that the cut stays under, on average over draws of the trusted rows."""
LARGEST_BAD = 0.2
"""P-values above it are taken to be those of good rows."""
_LARGEST_NOISE_RATE = 0.95
_NUM_RESAMPLES = 400
_INTERVAL = (0.05, 0.95)


class NoiseRate(NamedTuple):
    """Share of bad rows, in [0, 1]."""

    estimate: float
    low: float
    """Ends of a 90 % interval, from drawing rows and trusted rows again."""
    high: float


class Calibrated(NamedTuple):
    """What the scores of N rows and of n trusted ones say together."""

    p_values: np.ndarray
    """Shape (N,), see [`conformal_p_values`]."""
    good_probability: np.ndarray
    """Shape (N,), see [`good_probabilities`]."""
    dropped: np.ndarray
    """Which rows the cut drops, bool of shape (N,), see [`rows_to_drop`]."""
    noise_rate: NoiseRate

    @property
    def is_informative(self) -> bool:
        """Whether anything tells the rows from the trusted ones; if not, their ranking is noise, or all are good."""
        return bool(self.dropped.any() or self.noise_rate.low > 0)


def calibrate(scores: np.ndarray, calibration: np.ndarray) -> Calibrated:
    """
    All of it.

    Args:
        scores (`np.ndarray`): of the rows, shape (N,), higher is worse; NaN for a row without a score.
        calibration (`np.ndarray`): of the trusted rows, by the same measure, shape (n,).

    Returns:
        [`Calibrated`]: NaN, and not dropped, for rows without a score.
    """
    known = ~np.isnan(scores)
    p_values, good = np.full(len(scores), np.nan), np.full(len(scores), np.nan)
    dropped = np.zeros(len(scores), dtype=bool)
    calibration = calibration[~np.isnan(calibration)]
    rate = noise_rate(scores[known], calibration)
    p_values[known] = conformal_p_values(scores[known], calibration)
    good[known] = good_probabilities(p_values[known], len(calibration), 1 - rate.estimate)
    dropped[known] = rows_to_drop(p_values[known])
    return Calibrated(p_values, good, dropped, rate)


def conformal_p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    r"""
    Share of the calibration rows that are at least as bad, the row itself among them.

        p_i = (1 + #{ j : c_j >= s_i }) / (n + 1)

    For a good row, exchangeable with the calibration rows, P(p_i <= t) <= t for every t (Vovk et al., 2005; Bates et
    al., 2023, arXiv 2104.08279, equation 1).

    Args:
        scores (`np.ndarray`): of the rows, shape (N,), higher is worse.
        calibration (`np.ndarray`): scores of n trusted rows that had no part in making the score, shape (n,).

    Returns:
        `np.ndarray`: shape (N,), in [1 / (n + 1), 1].

    Example:

    ```python
    >>> conformal_p_values(np.array([0.0, 2.5, 9.0]), calibration=np.array([1.0, 2.0, 3.0]))
    array([1.  , 0.5 , 0.25])

    ```
    """
    below = np.searchsorted(np.sort(calibration), scores, side="left")
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def storey_estimate(p_values: np.ndarray) -> float:
    r"""
    Share of good rows by Storey's estimate (2002): of the p-values above lambda, all are those of good rows.

        pi_0 = #{p_i > lambda} / (N (1 - lambda))

    Bad rows among them raise it, so that it is at least the share of good rows, and the noise rate is never called too
    high by faults that the score cannot see. Storey's usual lambda of 1/2 wants many rows: with n trusted ones the
    standard deviation is sqrt(lambda / (1 - lambda) (1/n + 1/N)) where all rows are good, 0.15 for 60 trusted and 200
    rows. Here lambda is 0.2, which halves it.

    Returns:
        `float`: in [0, 1].
    """
    return float(min(1.0, (p_values > LARGEST_BAD).mean() / (1 - LARGEST_BAD)))


def noise_rate(scores: np.ndarray, calibration: np.ndarray, seed: int = 0) -> NoiseRate:
    """
    Share of bad rows: 1 minus [`storey_estimate`], with an interval from drawing both samples again.

    Args:
        scores (`np.ndarray`): of the rows, shape (N,), higher is worse.
        calibration (`np.ndarray`): of the trusted rows, shape (n,).
        seed (`int`): of the draws.
    """
    generator = np.random.default_rng(seed)
    ordered, reference, num_trusted = np.sort(scores), np.sort(calibration), len(calibration)
    # p > lambda for scores up to the k-th largest of the trusted ones
    num_larger = int(np.floor(LARGEST_BAD * (num_trusted + 1)))
    if num_larger == 0:  # too few trusted rows for any p-value as small as that
        return NoiseRate(0.0, 0.0, 1.0)
    place = np.sort(generator.integers(num_trusted, size=(_NUM_RESAMPLES, num_trusted)), axis=1)[:, -num_larger]
    shares = np.searchsorted(ordered, reference[place], side="right") / len(scores)  # (_NUM_RESAMPLES,)
    shares = generator.binomial(len(scores), shares) / len(scores)
    low, high = np.quantile(np.clip(1 - shares / (1 - LARGEST_BAD), 0, 1), _INTERVAL)
    estimate = 1 - storey_estimate(conformal_p_values(scores, calibration))
    return NoiseRate(estimate, min(float(low), estimate), max(float(high), estimate))


def good_probabilities(p_values: np.ndarray, num_trusted: int, good_share: float) -> np.ndarray:
    r"""
    Probability that a row is good, given its p-value: the local false discovery rate (Efron et al., 2001).

        P(good | p) = pi_0 f_0(p) / f(p),    f_0 uniform

    f is the density of all p-values, estimated as the decreasing one of highest likelihood (Grenander, 1956): isotonic
    regression of their histogram, without a bandwidth.

    Args:
        p_values (`np.ndarray`): shape (N,), multiples of 1 / (n + 1).
        num_trusted (`int`): n.
        good_share (`float`): pi_0, in [0, 1].

    Returns:
        `np.ndarray`: shape (N,), in [0, 1], never falling with the p-value.
    """
    cells = np.rint(p_values * (num_trusted + 1)).astype(np.int64) - 1  # (N,), in [0, n]
    density = np.bincount(cells, minlength=num_trusted + 1) * (num_trusted + 1) / len(p_values)  # (n + 1,)
    smooth = IsotonicRegression(increasing=False).fit_transform(np.arange(num_trusted + 1), density)
    return np.minimum(1.0, good_share / np.maximum(smooth, 1e-12))[cells]


def noise_rate_given_power(estimate: float, power: float) -> float:
    r"""
    The noise rate where bad rows have small p-values only with a known probability.

    Storey's estimate takes every p-value above t = 0.2 for a good row's. A share 1 - power of bad rows is there too:

        P(p <= t) = pi_0 t + pi_1 power,    so    pi_1 = (P(p <= t) - t) / (power - t) = estimate (1 - t) / (power - t)

    Args:
        estimate (`float`): 1 minus [`storey_estimate`], in [0, 1].
        power (`float`): share of bad rows with p <= t, in [0, 1].

    Returns:
        `float`: at least the estimate, and at most 0.95, or the estimate where that is more.

    Example:

    ```python
    >>> round(noise_rate_given_power(0.3, power=0.68), 3), noise_rate_given_power(0.3, power=1.0)
    (0.5, 0.3)

    ```
    """
    if power <= LARGEST_BAD:
        return max(estimate, _LARGEST_NOISE_RATE) if estimate > 0 else 0.0
    return max(estimate, min(_LARGEST_NOISE_RATE, estimate * (1 - LARGEST_BAD) / (power - LARGEST_BAD)))


def rows_to_drop(p_values: np.ndarray, promise: float = PROMISE) -> np.ndarray:
    """
    The rows that Benjamini and Hochberg (1995) reject: of those, a share of at most `promise` is good on average.

    It holds for conformal p-values, which depend on each other through the trusted rows (Bates et al., 2023,
    arXiv 2104.08279, theorem 2), over draws of rows and trusted rows.

    Args:
        p_values (`np.ndarray`): shape (N,).
        promise (`float`): in (0, 1).

    Returns:
        `np.ndarray`: bool, shape (N,).
    """
    if len(p_values) == 0:
        return np.zeros(0, dtype=bool)
    return false_discovery_control(p_values, method="bh") <= promise


def trusted_rows_needed(bad_share: float, promise: float = PROMISE) -> int:
    """
    Trusted rows from which on a share of bad rows can be dropped with a promise at all.

    The smallest p-value is 1 / (n + 1), and a share b of rows is rejected only at p-values up to b times the promise.

    Example:

    ```python
    >>> trusted_rows_needed(0.25), trusted_rows_needed(0.1)
    (39, 99)

    ```
    """
    return math.ceil(round(1 / (bad_share * promise), 6)) - 1
