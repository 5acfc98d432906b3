"""The methods of the benchmark on real models, each trained at equal steps on one problem, and measured."""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from fault_methods import EQUAL_WEIGHTS_OPTIONS, PUBLIC_CODES_OPTIONS
from judge import generate_replies, without_thoughts
from method_names import (
    BMO,
    DIFFERENCE,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    MIXED,
    NO_VALUE_FUNCTION,
    PUBLIC_CODES,
    SECOND_ROUND,
    SFT,
    TRUSTED,
)
from real_model_settings import (
    TEMPLATE_OPTIONS,
    BenchmarkArguments,
    Problem,
    SeedFiles,
    build_problem,
    kept_and_trusted,
    kept_rows,
    write_json,
    write_settings,
)
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.comparison import area_under_roc
from trl_bilevel.scoring import RowScorer
from trl_bilevel.whole_files import write_whole


SFT_ROWS: dict[str, Callable[[Problem], Dataset]] = {
    SFT: lambda problem: problem.training.remove_columns("harmful"),
    TRUSTED: lambda problem: problem.trusted,
    MIXED: lambda problem: concatenate_datasets([problem.training.remove_columns("harmful"), problem.trusted]),
}
BILEVEL_OPTIONS: dict[str, dict[str, Any]] = {
    EQUAL_WEIGHTS: EQUAL_WEIGHTS_OPTIONS,
    PUBLIC_CODES: PUBLIC_CODES_OPTIONS,
    BMO: {"selection_method": "bmo"},
    NO_VALUE_FUNCTION: {"value_function": "none"},
    FIRST_ROUND: {},
}
REFINED = "BDS, refined"
NEEDS: dict[str, tuple[str, ...]] = {DIFFERENCE: (SFT, TRUSTED), SECOND_ROUND: (FIRST_ROUND,)}
"""Methods whose rankings a method is made from."""
METHODS = (*SFT_ROWS, DIFFERENCE, *BILEVEL_OPTIONS, REFINED, SECOND_ROUND)


class Run(NamedTuple):
    """What the methods of a seed share."""

    args: BenchmarkArguments
    model_args: ModelConfig
    problem: Problem
    files: SeedFiles
    seed: int
    console: Console


def with_needs(methods: list[str]) -> list[str]:
    """
    Methods and what they build on, in the order of `METHODS`.

    Raises:
        `ValueError`: for an unknown one.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"Unknown methods {unknown}. Known are {list(METHODS)}.")
    wanted = {*methods, *(need for method in methods for need in NEEDS.get(method, ()))}
    return [method for method in METHODS if method in wanted]


def run_missing(
    args: BenchmarkArguments, model_args: ModelConfig, files: SeedFiles, seed: int, console: Console
) -> None:
    """Train and measure the methods of a seed that have no result yet."""
    # Win rates are over the answers of plain SFT
    wanted = with_needs([*(args.methods or METHODS), *([SFT] if args.judge_model else [])])
    missing = [method for method in wanted if not files.result(method).is_file()]
    if not missing:
        return
    run = Run(args, model_args, build_problem(args, seed), files, seed, console)
    files.folder.mkdir(parents=True, exist_ok=True)
    write_settings(args, model_args)
    for number, method in enumerate(missing, start=1):
        console.print(f"seed {seed}, {number} of {len(missing)}: {method}")
        run_method(method, run)
        gc.collect()  # the trainer and its model are in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_method(method: str, run: Run) -> None:
    """Train with a method; write its ranking and its answers, and its measures last."""
    args, files = run.args, run.files
    started = time.perf_counter()
    trainer, scores = _train(method, run)
    earlier = [json.loads(files.result(need).read_text())["seconds"] for need in NEEDS.get(method, ())]
    result: dict[str, float] = {"seconds": time.perf_counter() - started + sum(earlier)}
    for name, rows in (("validation_loss", run.problem.trusted), ("held_out_loss", run.problem.held_out)):
        result[name] = float(np.nanmean(losses(trainer, rows, args)))
    refined = None
    if isinstance(trainer, BilevelSFTTrainer):
        result["effective_sample_ratio"] = trainer.data_selector.statistics().effective_sample_ratio
        if trainer.refiner is not None:
            refined = np.array(trainer.curate()["response_source"][:]) == "refined"
            result["refined"] = float(refined.mean())
    if scores is None:
        scores = -_without_nan(losses(trainer, run.problem.training.remove_columns("harmful"), args))
    result |= _harmful_kept(run, scores, refined)
    judged = run.problem.held_out.take(args.num_judged_rows)
    answers = _answers(trainer, judged, run)
    result["empty_answers"] = sum(not answer for answer in answers) / len(answers)
    write_whole(files.scores(method), lambda partial: _save(partial, scores))
    questions = [prompt[-1]["content"] for prompt in judged["prompt"]]
    write_json(files.answers(method), {"questions": questions, "answers": answers})
    write_json(files.result(method), result)


def _save(path: Path, scores: np.ndarray) -> None:
    with path.open("wb") as file:  # `numpy.save` would add a suffix to a name
        np.save(file, scores)


def _harmful_kept(run: Run, scores: np.ndarray, refined: np.ndarray | None) -> dict[str, float]:
    """How many of the harmful rows are kept, and how many with an answer that the model wrote, be it as harmful."""
    harmful = run.problem.harmful
    if harmful is None or not harmful.any():
        return {}
    kept = kept_rows(run.problem, scores, run.args.keep_ratio)
    result = {"harmful_kept": float(harmful[kept].sum() / harmful.sum())}
    if refined is not None:
        result["harmful_refined"] = float((harmful & refined)[kept].sum() / max(harmful[kept].sum(), 1))
    if not harmful.all():
        result["auroc"] = area_under_roc(scores, ~harmful)
    return result


def _train(method: str, run: Run) -> tuple[Any, np.ndarray | None]:
    """The trained trainer; the ranking of the rows where it is not their loss under its model."""
    problem = run.problem
    if method in SFT_ROWS:
        return _fine_tune(run, SFTTrainer, SFTConfig, {"train_dataset": SFT_ROWS[method](problem)}), None
    if method in NEEDS:
        earlier = [np.load(run.files.scores(name)) for name in NEEDS[method]]
        # Scores are negated losses: what the trusted rows' model finds easier than SFT's is good
        scores = earlier[1] - earlier[0] if method == DIFFERENCE else earlier[0]
        rows = kept_and_trusted(problem, scores, run.args.keep_ratio)
        trainer = _fine_tune(run, SFTTrainer, SFTConfig, {"train_dataset": rows})
        return trainer, scores if method == DIFFERENCE else None
    options = BILEVEL_OPTIONS.get(method)
    if options is None:
        refinement = {name: getattr(run.args, name) for name in ("refine_ratio", "refine_max_new_tokens")}
        options = {**refinement, "refine_batch_size": run.args.generation_batch_size}
    inputs = {
        "train_dataset": problem.training.remove_columns("harmful"),
        "validation_dataset": problem.trusted,
    }
    trainer = _fine_tune(run, BilevelSFTTrainer, BilevelSFTConfig, inputs, save_training_rows=False, **options)
    return trainer, None if method == EQUAL_WEIGHTS else trainer.data_selector.logits.numpy().copy()


def _fine_tune(
    run: Run, trainer_class: type[SFTTrainer], config_class: type[SFTConfig], inputs: dict[str, Any], **options: Any
) -> Any:
    """The same steps for all; the trainer, trained."""
    args, model_args = run.args, run.model_args
    config = config_class(
        output_dir=str(run.files.folder / "trainer"),
        seed=run.seed,
        max_steps=args.total_steps,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.generation_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        optim=args.optim,
        chat_template_path=args.chat_template_path,
        activation_checkpointing=not args.use_cpu,
        use_cpu=args.use_cpu,
        bf16=not args.use_cpu or model_args.load_in_4bit,
        model_init_kwargs={
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        },
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        **options,
    )
    trainer = trainer_class(
        model_args.model_name_or_path,
        config,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **inputs,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def check_model(args: BenchmarkArguments, model_args: ModelConfig) -> None:
    """
    Before anything is trained.

    Raises:
        `ValueError`: if the model cannot be loaded, or no chat template is there for it.
    """
    name = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model {name!r} cannot be loaded. Log in if it is gated, or set another `model_name_or_path`. {error}"
        ) from error
    if tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            f"The model {name!r} has no chat template. Set `chat_template_path` to a tokenizer to clone one from, or "
            "use the model's instruction-tuned sibling."
        )
    if not model_args.use_peft and model_args.load_in_4bit:
        raise ValueError("A quantized model is trained by an adapter. Leave `use_peft` as it is.")


def losses(trainer: Any, rows: Dataset, args: BenchmarkArguments) -> np.ndarray:
    """Nats per completion token, shape (N,); NaN for rows without any within the length."""
    return RowScorer(trainer, None, None, args.generation_batch_size).score(rows)["loss"]


def _without_nan(values: np.ndarray) -> np.ndarray:
    """Rows that were cut to nothing rank last."""
    return np.where(np.isnan(values), np.nanmax(values), values)


def _answers(trainer: Any, rows: Dataset, run: Run) -> list[str]:
    with trainer.accelerator.autocast():
        answers = generate_replies(
            trainer.model,
            trainer.processing_class,
            rows["prompt"][:],
            batch_size=run.args.generation_batch_size,
            max_new_tokens=run.args.max_new_tokens,
            description="Answering",
            console=run.console,
            **TEMPLATE_OPTIONS,
        )
    return [without_thoughts(answer) for answer in answers]
