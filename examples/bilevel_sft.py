"""
TRL's `sft` example with the two names swapped and a dataset you trust.

```bash
accelerate launch examples/bilevel_sft.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name me/mixture \
    --validation_dataset_name me/trusted \
    --use_peft \
    --learning_rate 2e-4 \
    --output_dir Qwen3-0.6B-BilevelSFT
```
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer  # was: from trl import SFTConfig, SFTTrainer


@dataclass
class ExampleArguments(ScriptArguments):
    validation_dataset_name: str = ""  # new: rows you trust
    keep_ratio: float = 0.7  # new: share of the rows in the curated dataset


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, BilevelSFTConfig, ModelConfig))  # was: SFTConfig
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trusted = load_dataset(script_args.validation_dataset_name)

    trainer = BilevelSFTTrainer(  # was: SFTTrainer
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        validation_dataset=trusted[script_args.dataset_train_split],  # new
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        curated = trainer.curate(script_args.keep_ratio)  # new
        curated.to_parquet(f"{training_args.output_dir}/curated/train.parquet")
    trainer.end()
