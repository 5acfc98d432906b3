"""
TRL's own `SFTTrainer` on the dataset that another run curated: a small model finds the good rows, a large one learns
them. Nothing of `trl-bilevel` is needed here.

```bash
trl-bilevel sft --model_name_or_path Qwen/Qwen3-0.6B --use_peft \
    --dataset_name mixture.jsonl --validation_dataset_name trusted.jsonl --output_dir small
trl-bilevel push small me/mixture-curated --keep_ratio 0.7

accelerate launch examples/train_on_curated.py --model_name_or_path Qwen/Qwen3-8B --use_peft \
    --dataset_name me/mixture-curated --keep_ratio 0.5 --output_dir large
```

From the disk: `trl-bilevel curate small --keep_ratio 0.7 --output_dir curated`, and `--dataset_name curated`. This
script's `--keep_ratio` is a share of the rows of that dataset.

To let the larger run go on learning the weights, give them to it instead: `trl-bilevel sft ... --data_selector small`.
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)


@dataclass
class ExampleArguments(ScriptArguments):
    keep_ratio: float = 1.0  # share of the published rows to train on, the best first


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, SFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    curated = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )
    num_kept = round(script_args.keep_ratio * len(curated))
    curated = curated.filter(lambda row: row["scored"] and row["rank"] <= num_kept)  # 1 is the best rank

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=curated,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
