"""Plain SFT and bilevel SFT on the same faulty dataset, side by side."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..bilevel_sft_config import BilevelSFTConfig
from ..bilevel_sft_trainer import BilevelSFTTrainer
from . import tiny_model
from .planted_faults import BASE_OPERATIONS, build_dataset, build_tokenizer


@dataclass
class DemoArguments:
    """
    Options of `trl-bilevel demo`.

    Args:
        output_dir (`str`): folder for the adapter, the curated dataset and the figure.
        seed (`int`): seed of the data, the models and the training.
        num_train_rows (`int`): rows of the faulty training dataset.
        num_validation_rows (`int`): trusted rows.
        num_held_out_rows (`int`): rows that the exact match is measured on.
        fault_ratio (`float`): share of training rows with a bad answer, in [0, 1].
        num_train_epochs (`int`): epochs of both fine-tuning runs.
        num_base_steps (`int`): optimizer steps of the base model.
        trusted_only (`bool`): also train on the trusted rows alone, for as many steps as the others.
    """

    output_dir: str = field(default="demo_output", metadata={"help": "Folder for everything the demo writes."})
    seed: int = field(default=0, metadata={"help": "Seed of the data, the models and the training."})
    num_train_rows: int = field(default=3000, metadata={"help": "Rows of the faulty training dataset."})
    num_validation_rows: int = field(default=200, metadata={"help": "Trusted rows."})
    num_held_out_rows: int = field(default=500, metadata={"help": "Rows the exact match is measured on."})
    fault_ratio: float = field(default=0.7, metadata={"help": "Share of training rows with a bad answer."})
    num_train_epochs: int = field(default=4, metadata={"help": "Epochs of both fine-tuning runs."})
    num_base_steps: int = field(default=800, metadata={"help": "Optimizer steps of the base model."})
    trusted_only: bool = field(
        default=False,
        metadata={"help": "Also train on the trusted rows alone, for as many steps as the others."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.fault_ratio < 1:
            raise ValueError(
                f"`fault_ratio` must be larger than 0 and less than 1, got {self.fault_ratio}: the demo compares good "
                "rows with bad ones."
            )


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
    """The rows kept by their weights."""


class _StepProgress(TrainerCallback):
    def __init__(self, advance: Callable[[str, float], None], stage: str):
        self.advance = advance
        self.stage = stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.stage, state.global_step / state.max_steps)


_BASE_BATCH_SIZE = 64
STAGES = (
    "Training the base model",
    "SFT on the faulty dataset",
    "Bilevel SFT on the same dataset",
    "SFT on the trusted rows",
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
    tokenizer = build_tokenizer()
    held_out = build_dataset(args.num_held_out_rows, seed=_seed(args, 1))
    # No instruction is in two of the datasets
    trusted = build_dataset(args.num_validation_rows, seed=_seed(args, 2), exclude=held_out["prompt"][:])
    others = [*held_out["prompt"], *trusted["prompt"]]
    faulty = build_dataset(args.num_train_rows, seed=_seed(args, 3), fault_ratio=args.fault_ratio, exclude=others)
    num_base_rows = min(20_000, _BASE_BATCH_SIZE * args.num_base_steps)
    known = build_dataset(num_base_rows, seed=_seed(args, 4), operations=BASE_OPERATIONS, exclude=others)

    base_model = tiny_model.build_model(tokenizer, args.seed)
    _train_base_model(base_model, tokenizer, known, args, advance)
    base_model.save_pretrained(output_dir / "base_model")
    tokenizer.save_pretrained(output_dir / "base_model")

    sft = _fine_tune(SFTTrainer, SFTConfig, args, tokenizer, advance, stage=STAGES[1], train_dataset=faulty)
    bilevel = _fine_tune(
        BilevelSFTTrainer,
        BilevelSFTConfig,
        args,
        tokenizer,
        advance,
        stage=STAGES[2],
        train_dataset=faulty,
        validation_dataset=trusted,
    )
    bilevel.save_model(str(output_dir / "adapter"))

    faults = np.array(faulty["fault"])
    good = faults == "none"
    weights = bilevel.data_selector.weights().numpy()
    curated = bilevel.curate(keep_ratio=good.mean())
    curated.to_parquet(output_dir / "curated" / "train.parquet")

    methods = [
        ("base model", base_model, None),
        ("SFT", sft.model, -tiny_model.completion_losses(sft.model, tokenizer, faulty)),
        ("bilevel SFT", bilevel.model, weights),
    ]
    if args.trusted_only:
        trusted_sft = _fine_tune(
            SFTTrainer, SFTConfig, args, tokenizer, advance, stage=STAGES[3], max_steps=bilevel.state.max_steps,
            train_dataset=trusted,
        )  # fmt: skip
        losses = tiny_model.completion_losses(trusted_sft.model, tokenizer, faulty)
        methods.append(("SFT on the trusted rows", trusted_sft.model, -losses))

    scores: list[MethodScore] = []
    for name, model, row_scores in methods:
        advance(STAGES[4], len(scores) / len(methods))
        kept = None if row_scores is None else np.argsort(-row_scores, kind="stable")[: good.sum()]
        scores.append(
            MethodScore(
                method=name,
                exact_match=tiny_model.exact_match(model, tokenizer, held_out),
                auroc=None if row_scores is None else area_under_roc(row_scores, good),
                kept_good=None if kept is None else good[kept].mean().item(),
            )
        )
    advance(STAGES[4], 1)
    return Comparison(scores, weights, faults, curated)


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


def _seed(args: DemoArguments, offset: int) -> int:
    return 10 * args.seed + offset


def _common_options(args: DemoArguments, stage: str) -> dict[str, Any]:
    return {
        "output_dir": str(Path(args.output_dir) / "trainer" / stage.lower().replace(" ", "_")),
        "seed": args.seed,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _train_base_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    args: DemoArguments,
    advance: Callable[[str, float], None],
) -> None:
    config = SFTConfig(
        **_common_options(args, STAGES[0]),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, args.num_base_steps // 4),
        per_device_train_batch_size=_BASE_BATCH_SIZE,
        max_steps=args.num_base_steps,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[_StepProgress(advance, STAGES[0])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _fine_tune(
    trainer_class: type[SFTTrainer],
    config_class: type[SFTConfig],
    args: DemoArguments,
    tokenizer: PreTrainedTokenizerFast,
    advance: Callable[[str, float], None],
    stage: str,
    max_steps: int = -1,
    **datasets: Dataset,
) -> Any:
    config = config_class(
        **_common_options(args, stage),
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        num_train_epochs=args.num_train_epochs,
        max_steps=max_steps,
    )
    trainer = trainer_class(
        str(Path(args.output_dir) / "base_model"),
        config,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[_StepProgress(advance, stage)],
        **datasets,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
