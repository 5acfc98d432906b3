"""
Quality filtering: one weight per source of a mixture, and the curated dataset without the sources that do harm.

```bash
accelerate launch examples/quality_filtering.py --config examples/configs/quality_filtering.yaml \
    --dataset_name me/mixture \
    --validation_dataset_name me/trusted \
    --output_dir Qwen3-0.6B-Filtered
```

A column of the mixture names each row's source: the dataset it came from, its author, its topic.
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


@dataclass
class ExampleArguments(ScriptArguments):
    validation_dataset_name: str = ""  # rows you trust
    min_source_weight: float = 0.5  # sources below are dropped; weights have mean 1 over the rows


@dataclass
class FilteringConfig(BilevelSFTConfig):
    source_column: str | None = "source"


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, FilteringConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    trainer = BilevelSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
        ),
        validation_dataset=load_dataset(script_args.validation_dataset_name, split=script_args.dataset_train_split),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)

    for source, weight in trainer.source_weights().items():  # the highest first
        trainer.accelerator.print(
            f"{weight:8.4f}  {'kept' if weight >= script_args.min_source_weight else 'dropped':8} {source}"
        )
    curated = trainer.curate().filter(lambda row: row["weight"] >= script_args.min_source_weight)
    if trainer.is_world_process_zero():
        curated.to_parquet(f"{training_args.output_dir}/curated/train.parquet")
    trainer.end()
