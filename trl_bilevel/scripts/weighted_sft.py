r"""
`trl-bilevel sft --weight_column`: fine-tune on a dataset whose rows count by a column of weights, for instance a
curated one.

```bash
trl-bilevel sft \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name me/mixture-curated \
    --weight_column weight \
    --use_peft \
    --learning_rate 2e-4 \
    --output_dir Qwen3-0.6B-WeightedSFT
```

All options of `trl sft` work, a YAML file with `--config`, and those of `accelerate launch`. Datasets are names on the
Hub, local folders or files. `--dataset_streaming` reads the training rows as a stream; it needs `--max_steps` and
`--normalize_weights false`.
"""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_bilevel import WeightedSFTConfig, WeightedSFTTrainer
from trl_bilevel.checkpoint_files import LAST_INTACT, read_resume_option
from trl_bilevel.command_line import make_command_parser, model_init_kwargs
from trl_bilevel.dataset_loading import load_training_datasets


def main(
    script_args: ScriptArguments,
    training_args: WeightedSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    from trl import get_peft_config, get_quantization_config

    # Before anything is loaded
    resume_from_checkpoint = read_resume_option(training_args.resume_from_checkpoint, training_args.output_dir)
    if resume_from_checkpoint == LAST_INTACT:
        raise ValueError(
            f"`resume_from_checkpoint={LAST_INTACT!r}` is for runs with a trusted dataset, whose checkpoints have "
            "sums of their files. Use true for the newest checkpoint, or the folder of one."
        )
    train_dataset, eval_dataset = load_training_datasets(script_args, training_args, dataset_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = WeightedSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub as {trainer.hub_model_id}.")
    trainer.end()


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser((ScriptArguments, WeightedSFTConfig, ModelConfig, DatasetMixtureConfig), __doc__, prog)
