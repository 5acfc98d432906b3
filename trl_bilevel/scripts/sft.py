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
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.checkpoint_files import read_resume_option
from trl_bilevel.command_line import make_command_parser, one_line_errors, print_in_any_locale
from trl_bilevel.curation import parse_keep_ratio
from trl_bilevel.dataset_loading import load_split
from trl_bilevel.parquet_files import write_parquet
from trl_bilevel.report_rows import plain_text
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

    def __post_init__(self) -> None:
        parse_keep_ratio(self.keep_ratio)


def main(
    script_args: BilevelScriptArguments,
    training_args: BilevelSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    from trl import get_peft_config, get_quantization_config

    if script_args.validation_dataset_name is None:
        raise ValueError("`--validation_dataset_name` is missing. Name the dataset you trust.")
    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("Give either `datasets` or `--dataset_name`, not both.")

    for name in (_CURATED_FOLDER_NAME, SELECTOR_TABLE_NAME):
        path = Path(training_args.output_dir) / name
        if training_args.push_to_hub and path.exists():
            raise ValueError(
                f"{path} is of an earlier run and would be pushed with the model. Move it away, or choose another "
                "`--output_dir`."
            )

    # Before anything is loaded
    resume_from_checkpoint = read_resume_option(training_args.resume_from_checkpoint, training_args.output_dir)

    train_dataset, eval_dataset = _load_datasets(script_args, training_args, dataset_args)
    validation_dataset = load_split(
        script_args.validation_dataset_name,
        script_args.validation_dataset_config,
        script_args.validation_dataset_split,
    )

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
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


def _load_datasets(
    script_args: BilevelScriptArguments, training_args: BilevelSFTConfig, dataset_args: DatasetMixtureConfig
) -> tuple[Any, Any]:
    """Training and evaluation dataset, the latter `None` without evaluation."""
    from trl import get_dataset

    eval_dataset = None
    if dataset_args.datasets:
        mixture = get_dataset(dataset_args)
        train_dataset = _split_of(mixture, script_args.dataset_train_split)
        if training_args.eval_strategy != "no":
            eval_dataset = _split_of(mixture, script_args.dataset_test_split)
    elif script_args.dataset_name:
        name, config = script_args.dataset_name, script_args.dataset_config
        train_dataset = load_split(
            name, config, script_args.dataset_train_split, streaming=script_args.dataset_streaming
        )
        if training_args.eval_strategy != "no":
            eval_dataset = load_split(name, config, script_args.dataset_test_split)
    else:
        raise ValueError("Either `datasets` or `--dataset_name` must be given.")
    return train_dataset, eval_dataset


def _split_of(mixture: Any, split: str) -> Any:
    if split not in mixture:
        raise ValueError(
            f"The mixture of `datasets` has no split {split!r}, only {sorted(mixture)}. `test_split_size` sets rows "
            "apart for the evaluation."
        )
    return mixture[split]


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


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(
        (BilevelScriptArguments, BilevelSFTConfig, ModelConfig, DatasetMixtureConfig), __doc__, prog
    )


if __name__ == "__main__":
    print_in_any_locale()
    with one_line_errors():
        # Options of `accelerate launch` may stand in the same YAML file
        main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
