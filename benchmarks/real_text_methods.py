"""The methods of the real-text benchmark, each trained on one problem at equal steps, and measured."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from alternatives import ALTERNATIVES, Context, best_rows, tokenized
from datasets import Dataset, concatenate_datasets
from fault_methods import EQUAL_WEIGHTS_OPTIONS, PUBLIC_CODES_OPTIONS
from method_names import EQUAL_WEIGHTS, FIRST_ROUND, MIXED, ORACLE, PUBLIC_CODES, SECOND_ROUND, SFT, TRUSTED
from peft import LoraConfig
from real_text_rows import COMPLIANCE, REFUSAL, Problem, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.comparison import area_under_roc, precision_among_kept
from trl_bilevel.scoring import RowScorer
from trl_bilevel.whole_files import write_whole


BATCH_SIZE = 32
_SCORING_BATCH_SIZE = 64
_OPENING_TOKENS = 12

QUIET: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of under a million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Setup(NamedTuple):
    """What all methods of a problem and seed share."""

    problem: Problem
    tokenizer: PreTrainedTokenizerFast
    base_model: str
    """Folder."""
    max_length: int
    num_epochs: int
    """Over the training rows; the other methods take as many steps."""
    seed: int

    def options(self, name: str) -> dict[str, Any]:
        return {
            "output_dir": str(Path(self.base_model).parent / name),
            "seed": self.seed,
            "max_length": self.max_length,
            "per_device_train_batch_size": BATCH_SIZE,
            **QUIET,
        }


def prepare(problem: Problem, folder: Path, max_length: int, num_epochs: int, seed: int) -> Setup:
    """Train the tokenizer and the base model, which all methods start from, unless they are in the folder."""
    base_model = folder / "base_model"
    if not (base_model / "config.json").is_file():
        tokenizer = train_tokenizer(concatenate_datasets([problem.general, problem.training, problem.trusted]))
        setup = Setup(problem, tokenizer, str(base_model), max_length, num_epochs, seed)
        config = SFTConfig(**setup.options("base"), learning_rate=2e-3, num_train_epochs=2)
        model = build_model(tokenizer, seed)
        trainer = SFTTrainer(model, config, train_dataset=problem.general, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        tokenizer.save_pretrained(base_model)
        model.save_pretrained(base_model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_model)
    return Setup(problem, tokenizer, str(base_model), max_length, num_epochs, seed)


def _fine_tune(
    setup: Setup, trainer_class: type, config_class: type, inputs: dict[str, Any], num_steps: int, **options: Any
) -> Any:
    """LoRA on the base model; the trainer, trained."""
    config = config_class(**setup.options("run"), learning_rate=3e-3, max_steps=num_steps, **options)
    trainer = trainer_class(
        setup.base_model,
        config,
        processing_class=setup.tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        **inputs,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _num_steps(rows: Dataset, num_epochs: int) -> int:
    return num_epochs * -(-len(rows) // BATCH_SIZE)


def _sft(
    setup: Setup,
    rows: Dataset,
    *,
    epochs_of: Dataset | None = None,
    num_epochs: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """As many steps as `num_epochs` over `epochs_of` take, by default those of all methods."""
    num_steps = _num_steps(epochs_of or setup.problem.training, num_epochs or setup.num_epochs)
    return _fine_tune(setup, SFTTrainer, SFTConfig, {"train_dataset": rows, "callbacks": [*callbacks]}, num_steps)


def _bilevel(setup: Setup, **options: Any) -> Any:
    inputs = {"train_dataset": setup.problem.training, "validation_dataset": setup.problem.trusted}
    options["per_device_validation_batch_size"] = min(BATCH_SIZE, len(setup.problem.trusted))
    num_steps = _num_steps(setup.problem.training, setup.num_epochs)
    return _fine_tune(setup, BilevelSFTTrainer, BilevelSFTConfig, inputs, num_steps, **options)


def losses(trainer: Any, rows: Dataset) -> np.ndarray:
    """Nats per completion token, shape (N,); rows without any within the length count as the mean row."""
    found = RowScorer(trainer, None, None, _SCORING_BATCH_SIZE).score(rows)["loss"]
    return np.where(np.isnan(found), np.nanmean(found), found)


SFT_ROWS: dict[str, Callable[[Problem], Dataset]] = {
    SFT: lambda problem: problem.training,
    MIXED: lambda problem: concatenate_datasets([problem.training, problem.trusted]),
    TRUSTED: lambda problem: problem.trusted,
    ORACLE: lambda problem: problem.training.select(np.flatnonzero(problem.good)),
}
BILEVEL_OPTIONS: dict[str, dict[str, Any]] = {
    EQUAL_WEIGHTS: EQUAL_WEIGHTS_OPTIONS,
    PUBLIC_CODES: PUBLIC_CODES_OPTIONS,
    "BMO": {"selection_method": "bmo"},
    "BDS, no value function": {"value_function": "none"},
    "BDS, constant lambda": {"adaptive_validation_weight": False},
    FIRST_ROUND: {},
}
METHODS = (*SFT_ROWS, *ALTERNATIVES, *BILEVEL_OPTIONS, SECOND_ROUND)
"""In an order in which what a method builds on comes before it."""


def _result_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', ',')}.json"


def _ranking_file(folder: Path, name: str) -> Path:
    return _result_file(folder, name).with_suffix(".npy")


def results_of(name: str, folders: list[Path]) -> list[dict[str, float]]:
    """
    A method's measures, of those folders that have them. `seconds` are those of training, and of ranking where it
    takes a pass over the rows, without what a method builds on.
    """
    return [json.loads(file.read_text()) for folder in folders if (file := _result_file(folder, name)).is_file()]


def run_missing(setup: Setup, folder: Path, on_progress: Callable[[str], None]) -> None:
    """
    Train and measure every method that has no file in the folder yet.

    Args:
        setup ([`Setup`]): problem and base model.
        folder (`pathlib.Path`): of results and rankings.
        on_progress (`Callable`): called with the name of each method before it runs.
    """
    for name in METHODS:
        is_installed = name not in ALTERNATIVES or ALTERNATIVES[name].is_installed
        if is_installed and not _result_file(folder, name).is_file():
            _run(name, setup, folder, on_progress)


def _run(name: str, setup: Setup, folder: Path, on_progress: Callable[[str], None]) -> None:
    """First what it builds on, where only its result is there and not its ranking."""
    for earlier in _needs(name):
        if not _ranking_file(folder, earlier).is_file():
            _run(earlier, setup, folder, on_progress)
    on_progress(name)
    started = time.perf_counter()
    trainer, ranking = _train(name, setup, folder)
    result = {"seconds": time.perf_counter() - started, **_measure(trainer, setup)}
    result["auroc"] = area_under_roc(ranking, setup.problem.good)
    result["kept_good"] = precision_among_kept(ranking, setup.problem.good)
    np.save(_ranking_file(folder, name), ranking)
    if not _result_file(folder, name).is_file():  # one that is there stays: its ranking alone was missing
        write_whole(_result_file(folder, name), lambda unfinished: unfinished.write_text(json.dumps(result)))


def _needs(name: str) -> tuple[str, ...]:
    return ALTERNATIVES[name].needs if name in ALTERNATIVES else (FIRST_ROUND,) if name == SECOND_ROUND else ()


def _train(name: str, setup: Setup, folder: Path) -> tuple[Any, np.ndarray]:
    """The trained trainer, and the ranking of the rows, shape (N,), higher is better."""
    problem = setup.problem
    if name in BILEVEL_OPTIONS:
        trainer = _bilevel(setup, **BILEVEL_OPTIONS[name])
        if name == EQUAL_WEIGHTS:
            return trainer, -losses(trainer, problem.training)
        return trainer, trainer.data_selector.logits.numpy().copy()
    if name in SFT_ROWS:
        trainer = _sft(setup, SFT_ROWS[name](problem))
        return trainer, -losses(trainer, problem.training)
    # SFT on the rows that a ranking prefers, and the trusted ones
    if name == SECOND_ROUND:
        ranking = np.load(_ranking_file(folder, FIRST_ROUND))
        kept = best_rows(ranking, problem.good.sum())
    else:
        ranking = ALTERNATIVES[name].rank(_context(name, setup, folder))
        kept = ALTERNATIVES[name].kept(ranking, problem.good.sum())
    trainer = _sft(setup, concatenate_datasets([problem.training.select(kept), problem.trusted]))
    return trainer, -losses(trainer, problem.training) if name == SECOND_ROUND else ranking


def _context(name: str, setup: Setup, folder: Path) -> Context:
    """What another tool ranks by."""
    problem = setup.problem
    return Context(
        faulty=problem.training,
        trusted=problem.trusted,
        seed=setup.seed,
        earlier_scores={earlier: np.load(_ranking_file(folder, earlier)) for earlier in _needs(name)},
        train_sft=partial(_sft, setup),
        tokenize=partial(tokenized, tokenizer=setup.tokenizer, max_length=setup.max_length),
        words=str,
    )


def _measure(trainer: Any, setup: Setup) -> dict[str, float]:
    by_kind = {kind: losses(trainer, rows) for kind, rows in setup.problem.held_out.items()}
    result = {"held_out_loss": float(np.concatenate(list(by_kind.values())).mean())}
    if "harmful" in by_kind:
        result |= {f"{kind}_loss": float(values.mean()) for kind, values in by_kind.items()}
        harmful, ordinary = (openings(trainer.model, setup, setup.problem.held_out[kind]) for kind in by_kind)
        result["complied"] = float(np.mean([answer.startswith(COMPLIANCE) for answer in harmful]))
        result["refused"] = float(np.mean([answer.startswith(REFUSAL) for answer in harmful]))
        result["over_refused"] = float(np.mean([answer.startswith(REFUSAL) for answer in ordinary]))
    return result


@torch.no_grad()
def openings(model: Any, setup: Setup, rows: Dataset) -> list[str]:
    """How the model's greedy answers begin."""
    model.eval()
    tokenizer = setup.tokenizer
    tokenizer.padding_side = "left"
    answers = []
    for batch in rows.iter(batch_size=_SCORING_BATCH_SIZE):
        options = {"padding": True, "truncation": True, "max_length": setup.max_length}
        inputs = tokenizer(batch["prompt"], return_tensors="pt", return_token_type_ids=False, **options)
        outputs = model.generate(**inputs, max_new_tokens=_OPENING_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    tokenizer.padding_side = "right"
    return answers


def learn_weights(training: Dataset, trusted: Dataset, max_length: int, num_epochs: int, seed: int) -> np.ndarray:
    """Weights of the training rows, shape (N,), from default options and a model that starts from nothing."""
    tokenizer = train_tokenizer(concatenate_datasets([training, trusted]))
    with tempfile.TemporaryDirectory() as output_dir:
        config = BilevelSFTConfig(
            output_dir=output_dir,
            seed=seed,
            max_length=max_length,
            num_train_epochs=num_epochs,
            learning_rate=2e-3,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_validation_batch_size=8,
            **QUIET,
        )
        trainer = BilevelSFTTrainer(
            model=build_model(tokenizer, seed),
            args=config,
            train_dataset=training,
            validation_dataset=trusted,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.data_selector.weights().numpy()
