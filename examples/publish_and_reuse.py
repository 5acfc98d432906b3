"""
From a mixture to a dataset on the Hub, and from there, cut anew, to plain SFT.

```bash
accelerate launch examples/publish_and_reuse.py --config examples/configs/publish_and_reuse.yaml \
    --dataset_name me/mixture \
    --validation_dataset_name me/trusted \
    --repo_id me/mixture-curated \
    --output_dir Qwen3-0.6B-Curated
```

The second half is what somebody else does who has never seen the mixture.
"""

from dataclasses import dataclass, fields

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

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, load_curated_dataset


@dataclass
class ExampleArguments(ScriptArguments):
    validation_dataset_name: str = ""  # rows you trust
    repo_id: str = ""  # dataset repository to publish to
    license: str | None = None  # of the rows, where their source does not say
    published_ratio: float = 0.7
    reused_ratio: float = 0.5  # of the same rows, by the published scores


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, BilevelSFTConfig, ModelConfig))
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
    trainer.push_curated_dataset(
        script_args.repo_id, keep_ratio=script_args.published_ratio, license=script_args.license
    )
    trainer.accelerator.wait_for_everyone()  # one process has published it

    # Elsewhere
    curated = load_curated_dataset(script_args.repo_id, keep_ratio=script_args.reused_ratio)
    trainer.accelerator.print(
        f"{len(curated)} rows of {script_args.repo_id}, the best {script_args.reused_ratio:.0%} of the mixture."
    )
    sft_options = {option.name: getattr(training_args, option.name) for option in fields(SFTConfig) if option.init}
    sft = SFTTrainer(
        model=model_args.model_name_or_path,
        args=SFTConfig(**{**sft_options, "output_dir": f"{training_args.output_dir}/sft"}),
        train_dataset=curated,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    sft.train()
    sft.save_model(sft.args.output_dir)
    sft.end()
