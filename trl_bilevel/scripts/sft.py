r"""
`trl-bilevel sft`: fine-tune on a dataset of mixed quality, guided by a small dataset you trust.

```bash
trl-bilevel sft \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name mixture.jsonl \
    --validation_dataset_name trusted.jsonl \
    --use_peft \
    --learning_rate 2e-4 \
    --keep_ratio 0.7 \
    --output_dir Qwen3-0.6B-BilevelSFT
```

All options of `trl sft` work, a YAML file with `--config`, and those of `accelerate launch`. Datasets are names on the
Hub, local folders or files. `--dataset_streaming` reads the training rows as a stream; it needs `--max_steps` and
`--sample_id_column`.

Without a trusted dataset, `--weight_column weight` trains on a curated one: plain SFT whose rows count by that column.
`trl-bilevel sft --weight_column weight --help` lists its options.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.checkpoint_files import read_resume_option
from trl_bilevel.command_line import (
    make_command_parser,
    model_init_kwargs,
    one_line_errors,
    parse_known_options,
    print_in_any_locale,
)
from trl_bilevel.curation import parse_keep_ratio
from trl_bilevel.dataset_loading import load_split, load_training_datasets
from trl_bilevel.parquet_files import write_parquet
from trl_bilevel.report_rows import plain_text
from trl_bilevel.scripts import weighted_sft
from trl_bilevel.selector_files import SELECTOR_TABLE_NAME


_CURATED_FOLDER_NAME = "curated"


@dataclass
class BilevelScriptArguments(ScriptArguments):
    """
    Arguments of the script, besides those of TRL's scripts.

    Args:
        validation_dataset_name (`str`): the trusted dataset: a name on the Hub, a local folder or a file.
        validation_dataset_config (`str`, *optional*): its configuration.
        validation_dataset_split (`str`): its split, `train` by default.
        keep_ratio (`str`): rows of the curated dataset: `auto`, all but those that a screen says can be dropped; or a
            share in (0, 1].
        data_selector (`str`, *optional*): weights of another run to start from, joined by sample id: a folder, a
            dataset on the Hub, or a `.pt` file of SEAL.
        weight_column (`str`, *optional*): in place of a trusted dataset: column that says how much each row counts in
            plain SFT. All other options are then those of [`WeightedSFTConfig`], and no weights are learned.
    """

    validation_dataset_name: str | None = field(
        default=None, metadata={"help": "The trusted dataset: a name on the Hub, a local folder or a file."}
    )
    validation_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the trusted dataset."}
    )
    validation_dataset_split: str = field(default="train", metadata={"help": "Split of the trusted dataset."})
    keep_ratio: str = field(
        default="auto",
        metadata={
            "help": "Rows of the curated dataset: 'auto', all but what a screen says can be dropped; or a share."
        },
    )

    data_selector: str | None = field(
        default=None,
        metadata={"help": "Weights of another run to start from: a folder, a dataset on the Hub, or a `.pt` file."},
    )
    weight_column: str | None = field(
        default=None,
        metadata={"help": "In place of a trusted dataset: column that says how much each row counts in plain SFT."},
    )

    def __post_init__(self) -> None:
        parse_keep_ratio(self.keep_ratio)


def main(
    script_args: BilevelScriptArguments,
    training_args: BilevelSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    from trl import get_peft_config, get_quantization_config

    validation_name = _trusted_dataset_name(script_args)

    for name in (_CURATED_FOLDER_NAME, SELECTOR_TABLE_NAME):
        path = Path(training_args.output_dir) / name
        if training_args.push_to_hub and path.exists():
            raise ValueError(
                f"{path} is of an earlier run and would be pushed with the model. Move it away, or choose another "
                "`--output_dir`."
            )

    # Before anything is loaded
    resume_from_checkpoint = read_resume_option(training_args.resume_from_checkpoint, training_args.output_dir)

    train_dataset, eval_dataset = load_training_datasets(script_args, training_args, dataset_args)
    validation_dataset = load_split(
        validation_name,
        script_args.validation_dataset_config,
        script_args.validation_dataset_split,
    )

    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = BilevelSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        validation_dataset=validation_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        data_selector=script_args.data_selector,
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    try:
        # Before the curated dataset is in the same folder, all of which is pushed
        trainer.save_model(training_args.output_dir)
        trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
            trainer.accelerator.print(f"🤗 Model pushed to the Hub as {trainer.hub_model_id}.")
    finally:  # whether the Hub takes the model or not
        _save_curated(trainer, parse_keep_ratio(script_args.keep_ratio))
    trainer.end()


def _trusted_dataset_name(script_args: BilevelScriptArguments) -> str:
    _refuse_both(script_args.validation_dataset_name, script_args.weight_column)
    if script_args.validation_dataset_name is None:
        raise ValueError(
            "`--validation_dataset_name` is missing. Name the dataset you trust. Or train on weights that are there "
            "already: `--weight_column`."
        )
    return script_args.validation_dataset_name


def _save_curated(trainer: BilevelSFTTrainer, keep_ratio: float | str) -> None:
    """The curated dataset and the weights, into the output folder."""
    if not trainer.is_world_process_zero():
        return
    path = Path(trainer.args.output_dir) / _CURATED_FOLDER_NAME / "train.parquet"
    num_rows = write_parquet(trainer.curate(keep_ratio), path)
    trainer.accelerator.print(f"🧹 Curated dataset of {num_rows:,} rows saved to {path.parent}.")
    selector_path = trainer.data_selector.save_pretrained(trainer.args.output_dir)
    trainer.accelerator.print(f"⚖️ Weights for other runs saved to {selector_path}.")
    if trainer.args.source_column is not None:
        for source, weight in trainer.source_weights().items():
            trainer.accelerator.print(f"   {weight:8.4f}  {plain_text(str(source))[0]}")


@dataclass
class _Choice:
    """The two options that say which trainer the others are for."""

    validation_dataset_name: str | None = None
    weight_column: str | None = None


def _refuse_both(validation_dataset_name: str | None, weight_column: str | None) -> None:
    if validation_dataset_name is not None and weight_column is not None:
        raise ValueError(
            f"`--weight_column {weight_column}` has no effect with `--validation_dataset_name`, by which weights are "
            "learned. Leave one of them out; `--data_selector` starts from weights of another run."
        )


def is_weighted(options: Sequence[str]) -> bool:
    """
    Whether the options are those of plain SFT on a dataset that has its weights.

    Raises:
        `ValueError`: for a column of weights beside a trusted dataset.
    """
    if options[-1:] == ["--config"]:
        return False  # which the parser of all options reports
    choice, *_ = parse_known_options(TrlParser((_Choice,), add_help=False), list(options))
    _refuse_both(choice.validation_dataset_name, choice.weight_column)
    return choice.weight_column is not None


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(
        (BilevelScriptArguments, BilevelSFTConfig, ModelConfig, DatasetMixtureConfig), __doc__, prog
    )


def run(options: list[str]) -> None:
    """Train as the options say; those of `accelerate launch` may stand among them in the same YAML file."""
    script: Any = weighted_sft if is_weighted(options) else sys.modules[__name__]
    script.main(*script.make_parser().parse_args_and_config(options, fail_with_unknown_args=False))


if __name__ == "__main__":
    print_in_any_locale()
    with one_line_errors():
        run(sys.argv[1:])
