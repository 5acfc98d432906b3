r"""
Evidence against a row: in how many ways, and how far, its answer is unlike the trusted ones.

Six pieces, each turned into -log p against the trusted rows, then added up (Fisher's method): what a row's fault shows
in is not known beforehand. The pieces are no independent tests, so that the sum is calibrated anew by the same sums of
the trusted rows; nothing in it is tuned. Arrays in, arrays out.
"""

from typing import NamedTuple

import numpy as np
from sklearn.covariance import LedoitWolf

from .answer_statistics import STATISTICS, AnswerStatistics


PIECES = ("loss", "beginning", "end", "copy", "distance", "duplicate")
"""What the evidence is made of, see [`Evidence`]."""
NUM_FOLDS = 5
FEWEST_TRUSTED = 10
_TAIL = 0.2  # of the trusted rows, whose values are taken to fall off exponentially


class Evidence(NamedTuple):
    """Evidence against some rows."""

    pieces: np.ndarray
    """-log p of each piece, shape (N, 6), nats, in the order of [`PIECES`]."""
    strangest: np.ndarray
    """The statistic by which the distance is largest, shape (N,), index into `STATISTICS`."""
    is_high: np.ndarray
    """Whether it is larger than in trusted rows, bool, shape (N,)."""

    @property
    def score(self) -> np.ndarray:
        """Sum of the pieces, shape (N,), nats; higher is worse."""
        return self.pieces.sum(axis=1)


def gather_evidence(rows: AnswerStatistics, trusted: AnswerStatistics, seed: int = 0) -> tuple[Evidence, Evidence]:
    """
    Evidence against N rows and, by the same measure, against n trusted ones.

    A trusted row has no part in what it is measured by: its distance comes from a fit to the other folds, and its
    p-values from the other trusted rows. So the scores of trusted rows calibrate those of the others.

    Args:
        rows ([`AnswerStatistics`]): of N rows.
        trusted ([`AnswerStatistics`]): of n rows, at least [`FEWEST_TRUSTED`].
        seed (`int`): of the folds.

    Returns:
        Evidence against the rows, and against the trusted rows.

    Raises:
        `ValueError`: for too few trusted rows.
    """
    if len(trusted.loss) < FEWEST_TRUSTED:
        raise ValueError(
            f"{len(trusted.loss)} trusted rows are too few to tell what good answers look like. Give at least "
            f"{FEWEST_TRUSTED}, better 100."
        )
    distances, strangest, is_high = _distances(rows, trusted, seed)
    copies = _num_copies(rows.answer_hash, trusted.answer_hash)
    measured = [
        (rows.loss, trusted.loss),
        (rows.begin_loss, trusted.begin_loss),
        (rows.end_loss, trusted.end_loss),
        (rows.copied_share, trusted.copied_share),
        distances,
    ]
    of_rows = [surprise(values, reference) for values, reference in measured]
    of_trusted = [surprise_of_reference(reference) for _, reference in measured]
    of_rows.append(-np.log(_share_at_least(copies[0], copies[1])))
    of_trusted.append(-np.log(_share_at_least_of_others(copies[1])))
    return (
        Evidence(np.stack(of_rows, axis=1), strangest[0], is_high[0]),
        Evidence(np.stack(of_trusted, axis=1), strangest[1], is_high[1]),
    )


def surprise(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    r"""
    -log of the share of reference values that are at least as high, smooth where there are few of them.

    Up to the 80 % quantile q it is the share itself; above, an exponential tail of the same mean excess m.

        -log p(x) = -log( (1 + #{r_j >= x}) / (n + 1) ),  x <= q;      -log 0.2 + (x - q) / m,  x > q

    Args:
        values (`np.ndarray`): shape (N,); NaN for unknown, which is no evidence.
        reference (`np.ndarray`): shape (n,), NaN likewise.

    Returns:
        `np.ndarray`: shape (N,), nats, at least 0.
    """
    reference = reference[~np.isnan(reference)]
    if len(reference) < 2:
        return np.zeros(len(values))
    quantile = np.quantile(reference, 1 - _TAIL)
    excess = reference[reference > quantile] - quantile
    return _with_tail(values, _share_at_least(values, reference), quantile, excess.mean() if len(excess) else 0.0)


def surprise_of_reference(reference: np.ndarray) -> np.ndarray:
    """[`surprise`] of each of the reference values against the others, shape (n,)."""
    found = np.zeros(len(reference))
    known = np.flatnonzero(~np.isnan(reference))
    if len(known) < 2:
        return found
    values = reference[known]
    quantile = np.quantile(values, 1 - _TAIL)
    excess = np.maximum(values - quantile, 0)
    num_above = (excess > 0).sum() - (excess > 0)
    means = (excess.sum() - excess) / np.maximum(num_above, 1)
    found[known] = _with_tail(values, _share_at_least_of_others(values), quantile, means)
    return found


def _with_tail(values: np.ndarray, shares: np.ndarray, quantile: float, mean_excess: np.ndarray | float) -> np.ndarray:
    in_tail = -np.log(_TAIL) + np.maximum(values - quantile, 0) / np.maximum(mean_excess, 1e-9)
    within = -np.log(np.maximum(shares, _TAIL))
    return np.where(np.isnan(values), 0.0, np.where(values > quantile, in_tail, within))


def _share_at_least(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(1 + #{r_j >= x}) / (n + 1), shape (N,)."""
    below = np.searchsorted(np.sort(reference), values, side="left")
    return (1 + len(reference) - below) / (len(reference) + 1)


def _share_at_least_of_others(values: np.ndarray) -> np.ndarray:
    """The same of each value against the others: (1 + #{j != i: r_j >= r_i}) / n, shape (n,)."""
    below = np.searchsorted(np.sort(values), values, side="left")
    return (len(values) - below) / len(values)


def _num_copies(rows: np.ndarray, trusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many other rows have the same answer, shapes (N,) and (n,)."""
    known, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
    place = np.minimum(np.searchsorted(known, trusted), len(known) - 1)
    return (counts[inverse] - 1).astype(float), np.where(known[place] == trusted, counts[place], 0).astype(float)


def _distances(
    rows: AnswerStatistics, trusted: AnswerStatistics, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """
    Mahalanobis distances from the trusted rows' statistics, squared, with the covariance of Ledoit and Wolf (2004).

    Those of trusted rows come from a fit without their fold, those of the others are means over the fits. Also the
    statistic that adds most to each, and whether it is high.
    """
    x, reference = _features(rows), _features(trusted)  # (N, F), (n, F)
    fold = np.random.default_rng(seed).permutation(len(reference)) % NUM_FOLDS
    parts, own_parts = np.zeros_like(x), np.zeros_like(reference)
    for number in range(NUM_FOLDS):
        others = reference[fold != number]
        mean, scale = others.mean(axis=0), others.std(axis=0) + 1e-9
        precision = LedoitWolf(assume_centered=True).fit((others - mean) / scale).precision_
        z, own = (x - mean) / scale, (reference[fold == number] - mean) / scale
        parts += z * (z @ precision) / NUM_FOLDS
        own_parts[fold == number] = own * (own @ precision)
    center = np.median(reference, axis=0)
    strangest, own_strangest = parts.argmax(axis=1), own_parts.argmax(axis=1)
    is_high = np.take_along_axis(x > center, strangest[:, None], axis=1)[:, 0]
    own_is_high = np.take_along_axis(reference > center, own_strangest[:, None], axis=1)[:, 0]
    return (parts.sum(axis=1), own_parts.sum(axis=1)), (strangest, own_strangest), (is_high, own_is_high)


def _features(statistics: AnswerStatistics) -> np.ndarray:
    """Shape (N, F), in the order of `STATISTICS`: lengths by their logarithm, an unknown end as a usual one."""
    values = statistics._asdict()
    values["num_tokens"] = np.log(values["num_tokens"])
    end = values["end_loss"]
    values["end_loss"] = np.where(np.isnan(end), np.nanmedian(end) if (~np.isnan(end)).any() else 0.0, end)
    return np.stack([values[name] for name in STATISTICS], axis=1)
