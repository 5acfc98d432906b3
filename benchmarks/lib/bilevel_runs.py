"""Runs of the bilevel trainer, what is measured of them, and second rounds of plain SFT on what they kept."""

from typing import Any

import numpy as np
from datasets import concatenate_datasets

from lib.bilevel_options import OPTIONS
from lib.measures import best_rows, measure_answers, measure_cut, measure_unseen, measure_weights
from lib.method_names import DEFAULT, FIRST_ROUND, NO_VALUE_FUNCTION, SECOND_ROUND
from lib.problem import Problem
from lib.results import Files
from lib.training import Run, adapter, common_options, train, train_sft
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.comparison import area_under_roc


def run_bilevel(name: str, problem: Problem, files: Files) -> Run:
    """The bilevel trainer with the options of a method; ranked by the learned weights, where it learns them."""
    chosen: dict[str, Any] = {**problem.options, **OPTIONS[name]}
    options = {
        "per_device_validation_batch_size": None
        if name == DEFAULT
        else min(chosen["per_device_train_batch_size"], len(problem.trusted)),
        # Its scores are measured on rows that nothing was trained on
        "amortized_selector": problem.unseen is not None and name in (NO_VALUE_FUNCTION, FIRST_ROUND),
        **OPTIONS[name],
    }
    trainer = BilevelSFTTrainer(
        problem.model,
        BilevelSFTConfig(save_training_rows=False, **common_options(problem, files, **options)),
        train_dataset=problem.training,
        validation_dataset=problem.trusted,
        processing_class=problem.tokenizer,
        peft_config=adapter(problem),
    )
    measures = train(trainer)
    if name == DEFAULT:
        curated = trainer.curate()
        is_dropped = ~np.isin(np.arange(len(curated)), trainer.curate("auto")["sample_id"])
        assert trainer.estimated_noise_rate is not None
        measures |= {
            "noise_rate": trainer.estimated_noise_rate,
            "learns": float(trainer.value_function is not None),
            "dropped": float(is_dropped.mean()),
            "good_among_dropped": float(problem.good[is_dropped].mean()) if is_dropped.any() else 0.0,
            **_calibration(np.array(curated["good_probability"]), problem.good),
        }
        if trainer.screening is not None:
            measures["control_auroc"] = trainer.screening.facts["control_auroc"]
            measures["control_power"] = trainer.screening.facts["control_power"]
        return Run(trainer.model, -np.array(curated["rank"], dtype=float), measures, trainer)
    selector = trainer.data_selector
    if name == FIRST_ROUND:
        with files.first_round.open("wb") as file:
            np.savez(file, logits=selector.logits.numpy(), proved_good=selector.proved_good.numpy())
    if options.get("selector_learning_rate") == 0:  # no ranking was learned
        return Run(trainer.model, -problem.losses(trainer.model, problem.training), measures, trainer)
    return Run(trainer.model, selector.logits.numpy().copy(), measures, trainer)


def _calibration(good_probability: np.ndarray, good: np.ndarray) -> dict[str, float]:
    """Rows, and good ones among them, by their probability in ten equal parts of [0, 1]: for a reliability figure."""
    part = np.minimum((np.nan_to_num(good_probability, nan=0.5) * 10).astype(int), 9)
    counts, of_good = np.bincount(part, minlength=10), np.bincount(part, weights=good, minlength=10)
    sums = np.bincount(part, weights=np.nan_to_num(good_probability, nan=0.5), minlength=10)
    return {
        f"{name} {place}": float(value)
        for name, values in (("rows", counts), ("good", of_good), ("believed", sums))
        for place, value in enumerate(values)
        if counts[place]
    }


def measure_bilevel(name: str, run: Run, problem: Problem) -> dict[str, float]:
    """
    The weights; AUROC of the model's own loss and of a last pass over the rows; where there are unseen rows, of these
    too; where any answer can be checked, the answers that the run ends with.
    """
    assert run.trainer is not None
    selector = run.trainer.data_selector
    result = measure_weights(selector.weights().numpy(), problem.good)
    result["effective_sample_ratio"] = selector.statistics().effective_sample_ratio
    result["proved_good"] = float(selector.proved_good.float().mean())
    if problem.is_right is not None:
        curated = run.trainer.curate()
        refined = np.array(curated["response_source"][:]) == "refined"
        result |= measure_answers(problem.is_right(curated), refined, selector.proved_good.numpy(), problem.good)
    if problem.unseen is not None:
        assert problem.unseen_kinds is not None
        scored = run.trainer.score(problem.unseen, batch_size=problem.rows_per_pass)
        result |= measure_unseen(scored, problem.unseen_kinds)
    if problem.good.all():
        return result
    result["auroc_loss"] = area_under_roc(-problem.losses(run.model, problem.training), problem.good)
    if name == FIRST_ROUND or problem.unseen is not None:
        scored = run.trainer.score(problem.training, batch_size=problem.rows_per_pass)
        result["auroc_score"] = area_under_roc(np.array(scored["score"]), problem.good)
    return result


def run_second_round(name: str, problem: Problem, files: Files) -> Run:
    """Plain SFT on the trusted rows and on rows of a first round, ranked by the loss of its own model."""
    with np.load(files.first_round) as first:
        logits, proved_good = first["logits"], first["proved_good"]
    kept = best_rows(logits, int(problem.good.sum() if name == SECOND_ROUND else proved_good.sum()))
    rows = concatenate_datasets([problem.training.select(kept), problem.trusted])
    trainer, seconds = train_sft(problem, files, rows)
    ranking = -problem.losses(trainer.model, problem.training)
    return Run(trainer.model, ranking, {**seconds, **measure_cut(kept, problem.good)})
