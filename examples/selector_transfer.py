"""
A small model finds the good rows, a larger one trains on them: the weights move over as they are.

```bash
accelerate launch examples/selector_transfer.py --config examples/configs/selector_transfer.yaml \
    --dataset_name me/mixture \
    --validation_dataset_name me/trusted \
    --output_dir Qwen3-8B-Transfer
```

Weights are joined by sample id, so the larger model may see other rows, too; those start with
the weight of a row of which nothing is known.
"""

from dataclasses import dataclass, replace

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


@dataclass
class ExampleArguments(ScriptArguments):
    validation_dataset_name: str = ""  # rows you trust
    small_model_name_or_path: str = "Qwen/Qwen3-0.6B"


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, BilevelSFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    if training_args.resume_from_checkpoint is not None:
        raise ValueError("There are two runs: go on with one of them by `trl-bilevel sft --resume_from_checkpoint`.")
    loading = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    datasets = {
        "train_dataset": load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
        ),
        "validation_dataset": load_dataset(script_args.validation_dataset_name, split=script_args.dataset_train_split),
    }

    selector = f"{training_args.output_dir}/selector"
    small = BilevelSFTTrainer(
        model=script_args.small_model_name_or_path,
        args=replace(training_args, output_dir=f"{training_args.output_dir}/small", model_init_kwargs=loading),
        peft_config=get_peft_config(model_args),
        **datasets,
    )
    small.train()
    small.data_selector.save_pretrained(selector)
    del small  # its memory

    large = BilevelSFTTrainer(
        model=model_args.model_name_or_path,
        args=replace(
            training_args,
            selector_learning_rate=0.0,  # keeps the weights; leave it out to go on learning
            model_init_kwargs={"revision": model_args.model_revision, **loading},
        ),
        data_selector=selector,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **datasets,
    )
    large.train()
    large.save_model(training_args.output_dir)
    large.end()
