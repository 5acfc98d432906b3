"""
Safety tuning: trusted preference pairs decide, by DPO's loss, how much each row of a large SFT dataset counts.

```bash
accelerate launch examples/safety_tuning.py --config examples/configs/safety_tuning.yaml \
    --dataset_name me/instructions \
    --validation_dataset_name me/safe-over-harmful \
    --output_dir Qwen3-0.6B-Safe
```

The pairs have the columns `prompt`, `chosen` and `rejected`, or any other format of `DPOTrainer`.
"""

from dataclasses import dataclass
from typing import Literal

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


@dataclass
class ExampleArguments(ScriptArguments):
    validation_dataset_name: str = ""  # preference pairs: `chosen` is what a safe model says
    keep_ratio: float = 0.9


@dataclass
class SafetyConfig(BilevelSFTConfig):
    validation_loss_type: Literal["nll", "dpo"] = "dpo"


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, SafetyConfig, ModelConfig))
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

    accuracies = [entry["rewards/accuracies"] for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    trainer.accelerator.print(
        f"Trusted pairs in the right order: {accuracies[0]:.0%} at first, {accuracies[-1]:.0%} in the end."
    )
    scored = trainer.curate()
    trainer.accelerator.print("The rows that count least; read them before you drop any:")
    worst = [number for number, rank in enumerate(scored["rank"]) if rank > len(scored) - 5]
    for row in scored.select(worst):
        trainer.accelerator.print(f"{row['weight']:.3f}  {row.get('prompt') or row['messages']!r}")
    curated = trainer.curate(keep_ratio=script_args.keep_ratio)
    if trainer.is_world_process_zero():
        curated.to_parquet(f"{training_args.output_dir}/curated/train.parquet")
    trainer.end()
