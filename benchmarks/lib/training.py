"""Training on a [`~lib.problem.Problem`]: what is the same for every method."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lib.problem import Problem
from lib.results import Files
from trl_bilevel import BilevelSFTTrainer


class Run(NamedTuple):
    """What a method leaves behind."""

    model: Any
    """`None` where all that is measured of it is in `measures`."""
    ranking: np.ndarray
    """Scores of the training rows, shape (N,), higher is better."""
    measures: dict[str, float]
    """`seconds` and `cpu_seconds` of training, and what the method alone has; missing for an untrained model."""
    trainer: BilevelSFTTrainer | None = None
    """Where there is one."""


def common_options(problem: Problem, files: Files, **changes: Any) -> dict[str, Any]:
    """Options of the training configuration, with as many steps as the epochs over the training rows take."""
    options = {
        "output_dir": str(files.folder / "trainer"),
        "seed": problem.seed,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        **problem.options,
        **changes,
    }
    return {"max_steps": problem.num_steps(options["per_device_train_batch_size"]), **options}


def adapter(problem: Problem) -> LoraConfig:
    return LoraConfig(**problem.lora, task_type="CAUSAL_LM")


def train(trainer: Any) -> dict[str, float]:
    """Train; `cpu_seconds` and `seconds` of it."""
    trainer.remove_callback(PrinterCallback)
    started = time.process_time(), time.perf_counter()
    trainer.train()
    return {"cpu_seconds": time.process_time() - started[0], "seconds": time.perf_counter() - started[1]}


def train_sft(
    problem: Problem, files: Files, rows: Dataset, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[SFTTrainer, dict[str, float]]:
    """Plain SFT on some rows: the trainer, trained, and the seconds that took."""
    trainer = SFTTrainer(
        problem.model,
        SFTConfig(**common_options(problem, files)),
        train_dataset=rows,
        processing_class=problem.tokenizer,
        peft_config=adapter(problem),
        callbacks=[*callbacks],
    )
    return trainer, train(trainer)


def base_model(problem: Problem) -> Any:
    """The model that training starts from, with the head that TRL gives it."""
    model = AutoModelForCausalLM.from_pretrained(problem.model, **problem.options.get("model_init_kwargs", {}))
    add_fused_lm_head(model)
    return model
