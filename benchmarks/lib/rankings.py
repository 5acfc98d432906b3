"""Rankings of the rows by the losses of plain models or by other tools, then plain SFT on the rows they prefer."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from lib.alternatives import TOOLS, Context, characters, tokenized
from lib.measures import below_trusted, best_rows, easy_mode, measure_cut
from lib.method_names import BASE, BASE_LOSS, DIFFERENCE, OWN_CUT, SFT, SFT_LOSS, TRUSTED, TRUSTED_LOSS
from lib.problem import Problem
from lib.results import Files
from lib.training import Run, train_sft


class Ranking(NamedTuple):
    """A ranking of the rows by the losses of models, and the rows that it keeps by itself."""

    needs: tuple[str, ...]
    """Methods whose models' losses it is made from."""
    rank: Callable[..., np.ndarray]
    """Of the losses of the rows under each of them to scores of shape (N,), higher is better."""
    kept: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Positions of the rows kept; of its scores, and of the trusted rows' losses under the first model."""
    package: str | None = None
    """The module that its own cut needs."""


RANKINGS: dict[str, Ranking] = {
    BASE_LOSS: Ranking((BASE,), lambda base: -base, lambda scores, trusted: below_trusted(-scores, trusted)),
    SFT_LOSS: Ranking((SFT,), lambda sft: -sft, lambda scores, _: easy_mode(-scores), "sklearn"),
    TRUSTED_LOSS: Ranking((TRUSTED,), lambda trusted: -trusted, lambda scores, _: easy_mode(-scores), "sklearn"),
    # Moore and Lewis, 2010; RHO-loss, arXiv 2206.07137
    DIFFERENCE: Ranking(
        (TRUSTED, SFT), lambda trusted, sft: sft - trusted, lambda scores, _: np.flatnonzero(scores > 0)
    ),
}
"""Each told how many rows are good, and by a cut of its own, with [`OWN_CUT`] after its name."""
OWN_CUTS = tuple(f"{name}{OWN_CUT}" for name in RANKINGS)
MODEL_MEASURES = (
    *("cpu_seconds", "seconds", "held_out_loss", "exact_match", "complied", "refused", "over_refused"),
    "auroc_loss",
)
"""Of a trained model, whatever ranking its rows come from."""


def run_ranking(name: str, problem: Problem, files: Files) -> Run:
    """
    Plain SFT on the rows that a ranking keeps, told how many are good, or by a cut of its own; and the trusted.

    Returns:
        Without a model, but with what is known of it, where another ranking trained one on the same rows.
    """
    scores, kept = _rank_by_tool(name, problem, files) if name in TOOLS else _rank_by_losses(name, problem, files)
    measures, model = _trained_on(kept, files), None
    if measures is None:
        rows = concatenate_datasets([problem.training.select(kept), problem.trusted])
        trainer, measures = train_sft(problem, files, rows)
        model = trainer.model
    with files.kept(name).open("wb") as file:
        np.save(file, kept)
    return Run(model, scores, {**measures, **measure_cut(kept, problem.good)})


def _rank_by_losses(name: str, problem: Problem, files: Files) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the training rows, shape (N,), and the positions kept, shape (K,)."""
    ranking = RANKINGS[name.removesuffix(OWN_CUT)]
    losses = [np.load(files.losses(earlier)) for earlier in ranking.needs]
    num_rows = len(problem.good)
    scores = ranking.rank(*(values[:num_rows] for values in losses))
    if name.endswith(OWN_CUT):
        return scores, ranking.kept(scores, losses[0][num_rows:])
    return scores, best_rows(scores, problem.good.sum())


def _rank_by_tool(name: str, problem: Problem, files: Files) -> tuple[np.ndarray, np.ndarray]:
    def train(
        rows: Dataset, *, epochs_of: Dataset, num_epochs: int | None = None, callbacks: Sequence[TrainerCallback] = ()
    ) -> Any:
        changed = problem._replace(training=epochs_of, num_epochs=num_epochs or problem.num_epochs)
        return train_sft(changed, files, rows, callbacks)[0]

    TOOLS[name].require()
    tokenize = partial(tokenized, tokenizer=problem.tokenizer)
    scores = TOOLS[name].rank(Context(problem.training, problem.trusted, problem.seed, train, tokenize, characters))
    if not np.isfinite(scores).all():
        raise ValueError(f"The ranking of {name!r} has {(~np.isfinite(scores)).sum()} scores that are not finite.")
    return scores, best_rows(scores, problem.good.sum())


def _trained_on(kept: np.ndarray, files: Files) -> dict[str, float] | None:
    """What is known of a model that was trained on the same rows, as another ranking keeps them."""
    for other in files.folder.glob(files.kept("*").name):
        result = files.folder / other.name.replace(", kept.npy", ".json")
        if result.is_file() and np.array_equal(np.load(other), kept):
            known = json.loads(result.read_text())
            return {key: known[key] for key in MODEL_MEASURES if key in known}
    return None
