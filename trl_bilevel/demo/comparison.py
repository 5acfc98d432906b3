"""Plain SFT and bilevel SFT on the same faulty dataset, side by side."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..bilevel_sft_config import BilevelSFTConfig
from ..bilevel_sft_trainer import BilevelSFTTrainer
from ..report import build_report
from .problem import DemoArguments, base_model_folder, build_problem, fine_tune
from .tiny_model import completion_losses, exact_match, load_model


class MethodScore(NamedTuple):
    """How one training method did."""

    method: str
    exact_match: float
    """Share of held-out rows answered right, in [0, 1]."""
    auroc: float | None
    """Probability that a good training row ranks above a bad one; `None` for a method that does not rank."""
    kept_good: float | None
    """Share of good rows among the rows kept, as many as there are good ones."""


class Comparison(NamedTuple):
    """What the demo found."""

    scores: list[MethodScore]
    weights: np.ndarray
    """Learned weights of the training rows, shape (N,), mean 1."""
    faults: np.ndarray
    """What is planted in each row, shape (N,), of `planted_faults.FAULTS`."""
    curated: Dataset
    """The rows kept, nobody having said how many."""
    noise_rate: float
    """Share of the rows that the run holds to be bad, in [0, 1]."""
    dropped_good: float
    """Share of good rows among those dropped, in [0, 1]."""
    best: dict[str, Any]
    """The row that ranks first."""
    worst: dict[str, Any]
    """The row that ranks last."""


STAGES = (
    "Training the base model",
    "SFT on the faulty dataset",
    "Bilevel SFT on the same dataset",
    "Scoring",
)


def compare(args: DemoArguments, advance: Callable[[str, float], None]) -> Comparison:
    """
    Train a base model, then fine-tune it twice on the same faulty rows, and write the results to `args.output_dir`.

    Args:
        args ([`DemoArguments`]): options.
        advance (`Callable`): called with a stage of `STAGES` and the share of it that is done.
    """
    output_dir = Path(args.output_dir)
    problem = build_problem(args, base_model_folder(args), partial(advance, STAGES[0]))
    sft = fine_tune(SFTTrainer, SFTConfig, args, problem, partial(advance, STAGES[1]), train_dataset=problem.faulty)
    bilevel = fine_tune(
        BilevelSFTTrainer,
        BilevelSFTConfig,
        args,
        problem,
        partial(advance, STAGES[2]),
        train_dataset=problem.faulty,
        validation_dataset=problem.trusted,
        output_dir=str(output_dir / "adapter"),
    )
    bilevel.save_model()
    (output_dir / "report.html").write_text(build_report(output_dir / "adapter"))

    faults = np.array(problem.faulty["fault"])
    good = faults == "none"
    weights = bilevel.data_selector.weights().numpy()
    scored, curated = bilevel.curate(), bilevel.curate(keep_ratio="auto")
    curated.to_parquet(output_dir / "curated" / "train.parquet")
    rank = np.array(scored["rank"])
    is_dropped = rank > len(curated)

    methods = [
        ("base model", load_model(problem.base_model), None),
        ("SFT", sft.model, -completion_losses(sft.model, problem.tokenizer, problem.faulty)),
        ("bilevel SFT", bilevel.model, -rank),
    ]
    scores: list[MethodScore] = []
    for name, model, row_scores in methods:
        advance(STAGES[3], len(scores) / len(methods))
        scores.append(
            MethodScore(
                method=name,
                exact_match=exact_match(model, problem.tokenizer, problem.held_out),
                auroc=None if row_scores is None else area_under_roc(row_scores, good),
                kept_good=None if row_scores is None else precision_among_kept(row_scores, good),
            )
        )
    advance(STAGES[3], 1)
    return Comparison(
        scores,
        weights,
        faults,
        curated,
        noise_rate=bilevel.estimated_noise_rate,
        dropped_good=float(good[is_dropped].mean()) if is_dropped.any() else 0.0,
        best=scored[int(rank.argmin())],
        worst=scored[int(rank.argmax())],
    )


def precision_among_kept(scores: np.ndarray, good: np.ndarray) -> float:
    """
    Share of good rows among as many of the best-scored rows as there are good ones.

    Args:
        scores (`numpy.ndarray`): shape (N,), higher is better.
        good (`numpy.ndarray`): bool, shape (N,).

    Example:

    ```python
    >>> import numpy as np
    >>> precision_among_kept(np.array([0.9, 0.5, 0.4, 0.1]), np.array([True, False, True, False]))
    0.5

    ```
    """
    kept = np.argsort(-scores, kind="stable")[: good.sum()]
    return good[kept].mean().item()


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """
    Probability that a positive row has a higher score than a negative one; ties count half.

    Args:
        scores (`numpy.ndarray`): shape (N,).
        positive (`numpy.ndarray`): bool, shape (N,), with at least one row of each kind.

    Example:

    ```python
    >>> import numpy as np
    >>> area_under_roc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False]))
    0.875

    ```
    """
    # Mann-Whitney: the mean rank of the positives, ties sharing their mean rank
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_positive = positive.sum()
    num_negative = len(positive) - num_positive
    wins = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))
