"""What is measured of a ranking of rows and of their weights; which rows a ranking keeps that is told nothing."""

import numpy as np
from datasets import Dataset

from lib.problem import GOOD
from trl_bilevel.demo.comparison import area_under_roc, precision_among_kept


def measure_ranking(ranking: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """
    AUROC of good rows over bad ones, overall and by kind of fault, and the share of good rows among as many of the
    best as there are good ones; empty where all rows are good.

    Args:
        ranking (`np.ndarray`): shape (N,), higher is better.
        kinds (`np.ndarray`): shape (N,), str.
    """
    good = kinds == GOOD
    if good.all():
        return {}
    measured = {"auroc": area_under_roc(ranking, good), "kept_good": precision_among_kept(ranking, good)}
    for kind in sorted(set(kinds[~good])):
        some = good | (kinds == kind)
        measured[f"auroc, {kind}"] = area_under_roc(ranking[some], good[some])
    return measured


def measure_weights(weights: np.ndarray, good: np.ndarray) -> dict[str, float]:
    """How far the weights, mean 1, spread, and how much of them is on good rows."""
    return {
        "weight_p5": float(np.quantile(weights, 0.05)),
        "weight_p95": float(np.quantile(weights, 0.95)),
        "good_weight": float(weights[good].sum() / weights.sum()),
        **({} if good.all() else {"bad_over_good": float(weights[~good].mean() / weights[good].mean())}),
    }


def measure_cut(kept: np.ndarray, good: np.ndarray) -> dict[str, float]:
    """How many rows a cut keeps, how many of them are good, and of those that it drops; positions of shape (K,)."""
    dropped = np.setdiff1d(np.arange(len(good)), kept)
    return {
        "kept_ratio": len(kept) / len(good),
        **({"kept_precision": float(good[kept].mean())} if len(kept) else {}),
        **({"dropped_good": float(good[dropped].mean())} if len(dropped) else {}),
    }


def below_trusted(losses: np.ndarray, trusted_losses: np.ndarray) -> np.ndarray:
    """Positions of the rows whose loss is at most what 95 % of the trusted rows stay under."""
    return np.flatnonzero(losses <= np.quantile(trusted_losses, 0.95))


def easy_mode(losses: np.ndarray) -> np.ndarray:
    """
    Positions of the rows in the mode of the lower losses, of two Gaussians fitted by maximum likelihood
    (arXiv 2002.07394; arXiv 1904.11238 fits Beta distributions).
    """
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(2, random_state=0, n_init=5).fit(losses[:, None])
    return np.flatnonzero(mixture.predict(losses[:, None]) == mixture.means_.argmin())


def best_rows(scores: np.ndarray, num_rows: int) -> np.ndarray:
    """Positions of the rows of the highest scores, ascending; among equals the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:num_rows])


def measure_answers(
    right: np.ndarray, refined: np.ndarray, proved_good: np.ndarray, good: np.ndarray
) -> dict[str, float]:
    """
    The answers that a run ends with, those included that the model wrote anew.

    Args:
        right (`np.ndarray`): whether a row's answer is right now, bool of shape (N,), as all others.
        refined (`np.ndarray`): whether it was written anew.
        proved_good (`np.ndarray`): whether the run holds the row to be good.
        good (`np.ndarray`): whether the row's own answer was right.
    """
    result = {"right": float(right.mean()), "proved_right": float((proved_good & right).mean())}
    if refined.any():
        result["refined"] = float(refined.mean())
        result["refined_right"] = float(right[refined & ~good].mean())
        result["refined_spoiled"] = float((~right)[refined & good].sum() / good.sum())
    return result


def measure_unseen(scored: Dataset, kinds: np.ndarray) -> dict[str, float]:
    """AUROC of the columns that `trainer.score` gives to rows of known kinds."""
    columns = {"unseen_auroc": "score", "unseen_auroc_loss": "loss", "unseen_auroc_head": "selector_score"}
    result = {}
    for measure, column in columns.items():
        if column in scored.column_names:
            values = np.array(scored[column])
            result[measure] = area_under_roc(-values if column == "loss" else values, kinds == GOOD)
    return result
