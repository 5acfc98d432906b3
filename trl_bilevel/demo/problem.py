"""The planted-fault problem: its datasets, its base model, and fine-tuning on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data_selector import DataSelector
from . import tiny_model
from .planted_faults import BASE_OPERATIONS, FAMILIES, build_dataset, build_tokenizer


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
        fault_family (`str`): what the bad answers are, one of `planted_faults.FAMILIES`.
        num_train_epochs (`int`): epochs of both fine-tuning runs.
        num_base_steps (`int`): optimizer steps of the base model.
    """

    output_dir: str = field(default="demo_output", metadata={"help": "Folder for everything the demo writes."})
    seed: int = field(default=0, metadata={"help": "Seed of the data, the models and the training."})
    num_train_rows: int = field(default=3000, metadata={"help": "Rows of the faulty training dataset."})
    num_validation_rows: int = field(default=200, metadata={"help": "Trusted rows."})
    num_held_out_rows: int = field(default=500, metadata={"help": "Rows the exact match is measured on."})
    fault_ratio: float = field(default=0.7, metadata={"help": "Share of training rows with a bad answer."})
    fault_family: str = field(
        default="mixed",
        metadata={"help": "What the bad answers are: 'mixed', 'random', 'wrong_rule' or 'harmful'."},
    )
    num_train_epochs: int = field(default=4, metadata={"help": "Epochs of both fine-tuning runs."})
    num_base_steps: int = field(default=800, metadata={"help": "Optimizer steps of the base model."})

    def __post_init__(self) -> None:
        if not 0 < self.fault_ratio < 1:
            raise ValueError(
                f"`fault_ratio` must be larger than 0 and less than 1, got {self.fault_ratio}: the demo compares good "
                "rows with bad ones."
            )
        if self.fault_family not in FAMILIES:
            raise ValueError(f"`fault_family` must be one of {list(FAMILIES)}, got {self.fault_family!r}.")


class Problem(NamedTuple):
    """Datasets with the columns `prompt`, `completion` and `fault`; no instruction is in two of them."""

    base_model: str
    """Folder of a model that knows some of the operations, with its tokenizer."""
    tokenizer: PreTrainedTokenizerFast
    faulty: Dataset
    """The training rows, of mixed quality."""
    trusted: Dataset
    """Right rows over all operations, for validation."""
    held_out: Dataset
    """Right rows to measure the exact match on."""
    unseen: Dataset
    """Rows of the same mixture as the training rows, which nothing is trained on."""


class _StepProgress(TrainerCallback):
    def __init__(self, on_progress: Callable[[float], None]):
        self.on_progress = on_progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_progress(state.global_step / state.max_steps)


_BASE_BATCH_SIZE = 64
BATCH_SIZE = 32
"""Training rows per step."""
_NUM_UNSEEN_ROWS = 1000


def build_problem(args: DemoArguments, base_model: Path, on_progress: Callable[[float], None]) -> Problem:
    """
    Draw the datasets and train the base model into the folder `base_model`, unless it is there already.

    Args:
        args ([`DemoArguments`]): sizes and seed.
        base_model (`pathlib.Path`): folder.
        on_progress (`Callable`): called with the share of the base model's training that is done.
    """
    tokenizer = build_tokenizer()
    family = args.fault_family
    held_out = build_dataset(args.num_held_out_rows, seed=_seed(args, 1), family=family)
    trusted = build_dataset(
        args.num_validation_rows, seed=_seed(args, 2), family=family, exclude=held_out["prompt"][:]
    )
    others = [*held_out["prompt"], *trusted["prompt"]]
    faulty = build_dataset(
        args.num_train_rows, seed=_seed(args, 3), fault_ratio=args.fault_ratio, family=family, exclude=others
    )
    if not (base_model / "config.json").is_file():
        num_base_rows = min(20_000, _BASE_BATCH_SIZE * args.num_base_steps)
        known = build_dataset(num_base_rows, seed=_seed(args, 4), operations=BASE_OPERATIONS, exclude=others)
        _train_base_model(base_model, tokenizer, known, args, on_progress)
    unseen = build_dataset(
        _NUM_UNSEEN_ROWS,
        seed=_seed(args, 5),
        fault_ratio=args.fault_ratio,
        family=family,
        exclude=frozenset([*others, *faulty["prompt"]]),
    )
    return Problem(str(base_model), tokenizer, faulty, trusted, held_out, unseen)


def base_model_folder(args: DemoArguments) -> Path:
    """
    Where the demo keeps its base model: a folder for all that decides what it has learned.

    Held-out and trusted rows count, for it is trained on none of them.

    Example:

    ```python
    >>> base_model_folder(DemoArguments(output_dir="out", seed=3)).as_posix()
    'out/base_model-seed3-800steps-mixed-500held_out-200trusted'

    ```
    """
    parts = (
        f"seed{args.seed}",
        f"{args.num_base_steps}steps",
        args.fault_family,
        f"{args.num_held_out_rows}held_out",
        f"{args.num_validation_rows}trusted",
    )
    return Path(args.output_dir) / "-".join(("base_model", *parts))


def _seed(args: DemoArguments, offset: int) -> int:
    return 10 * args.seed + offset


def _common_options(args: DemoArguments, stage: str) -> dict[str, Any]:
    return {
        "output_dir": str(Path(args.output_dir) / "trainer" / stage),
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
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    args: DemoArguments,
    on_progress: Callable[[float], None],
) -> None:
    model = tiny_model.build_model(tokenizer, args.seed)
    config = SFTConfig(
        **_common_options(args, "base_model"),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, args.num_base_steps // 4),
        per_device_train_batch_size=_BASE_BATCH_SIZE,
        max_steps=args.num_base_steps,
    )
    trainer = SFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[_StepProgress(on_progress)]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fine_tune(
    trainer_class: type[SFTTrainer],
    config_class: type[SFTConfig],
    args: DemoArguments,
    problem: Problem,
    on_progress: Callable[[float], None],
    train_dataset: Dataset,
    validation_dataset: Dataset | None = None,
    data_selector: DataSelector | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Any:
    """
    LoRA on the base model, as many steps as `num_train_epochs` over the faulty rows take, whatever the dataset.

    Args:
        trainer_class, config_class: TRL's, or the bilevel ones.
        args ([`DemoArguments`]): epochs and seed.
        problem ([`Problem`]): the base model.
        on_progress (`Callable`): called with the share of the steps that is done.
        train_dataset (`datasets.Dataset`): rows to train on.
        validation_dataset (`datasets.Dataset`, *optional*): trusted rows, for the bilevel trainer.
        data_selector ([`~trl_bilevel.DataSelector`], *optional*): weights to start from, for the bilevel trainer.
        callbacks (`Sequence[TrainerCallback]`): more of them.
        batch_size (`int`): training rows per step.
        **options: of the configuration.

    Returns:
        The trainer, trained.
    """
    steps_per_epoch = -(-len(problem.faulty) // batch_size)
    common = {
        **_common_options(args, "fine_tuning"),
        "learning_rate": 3e-3,
        "per_device_train_batch_size": batch_size,
        "max_steps": args.num_train_epochs * steps_per_epoch,
    }
    config = config_class(**{**common, **options})
    bilevel_only = {"validation_dataset": validation_dataset, "data_selector": data_selector}
    inputs = {"train_dataset": train_dataset} | {k: v for k, v in bilevel_only.items() if v is not None}
    trainer = trainer_class(
        problem.base_model,
        config,
        processing_class=problem.tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[_StepProgress(on_progress), *callbacks],
        **inputs,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
