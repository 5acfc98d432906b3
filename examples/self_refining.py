"""
Bilevel SFT that answers the questions of bad rows anew, and shows what became of them.

```bash
accelerate launch examples/self_refining.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name me/mixture \
    --validation_dataset_name me/trusted \
    --refine_ratio 0.1 \
    --use_peft \
    --learning_rate 2e-4 \
    --output_dir Qwen3-0.6B-SelfRefining
```
"""

from dataclasses import dataclass

from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


@dataclass
class ExampleArguments(ScriptArguments):
    validation_dataset_name: str = ""  # rows you trust


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, BilevelSFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trusted = load_dataset(script_args.validation_dataset_name)

    trainer = BilevelSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,  # refine_ratio > 0 is all it takes
        train_dataset=dataset[script_args.dataset_train_split],
        validation_dataset=trusted[script_args.dataset_train_split],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)

    curated = trainer.curate()
    if trainer.is_world_process_zero():
        curated.to_parquet(f"{training_args.output_dir}/curated/train.parquet")
    refined = [index for index, source in enumerate(curated["response_source"]) if source == "refined"]
    table = Table(title=f"{len(refined)} of {len(curated)} answers were regenerated; the first of them:")
    for column in ("question", "original answer", "refined answer", "weight"):
        table.add_column(column)
    for row in curated.select(refined[:10]):
        question = row.get("prompt") or row["messages"][:-1]
        answer = row.get("completion") or row["messages"][-1]["content"]
        cells = [Text(str(cell)) for cell in (question, row["original_completion"], answer)]  # rows are not markup
        table.add_row(*cells, f"{row['weight']:.2f}")
    if trainer.is_world_process_zero():
        Console().print(table)
    trainer.end()
