"""
QLoRA with a value function: an 8B model on one GPU of 24 GB, and what the memory goes to.

```bash
accelerate launch examples/qlora_single_gpu.py \
    --model_name_or_path Qwen/Qwen3-8B \
    --dataset_name me/mixture \
    --validation_dataset_name me/trusted \
    --output_dir Qwen3-8B-BilevelSFT
```

`--estimate_only` prints the estimate and stops; it needs the model's configuration only. Without a GPU add
`--use_cpu`:

| Qwen3-8B, 2 + 2 sequences of 2,048 tokens | GiB |
|---|---|
| base model: linear layers in 4 bit, embeddings and head in bf16 | 5.66 |
| adapter and value function, LoRA of rank 16, bf16 | 0.16 |
| their gradients, one of the two at a time | 0.08 |
| their optimizers' states, 8 bit | 0.16 |
| inputs of the layers, kept for the backward pass | 2.25 |
| one layer computed again, with its gradients, and one matrix unpacked | 3.16 |
| total | 11.47 |

It leaves out what CUDA itself and fragmentation take, so that half of 24 GB is left for longer sequences or more of
them. Plain QLoRA by `SFTTrainer`, on as many rows per step, needs the same less half of the second and fourth lines:
the value function is a second set of adapter values. Not measured on a GPU yet; a run on one prints its peak.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from trl import ScriptArguments, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


# nf4, and 8-bit scales of 64 weights each, with fp32 scales of 256 of those ("double quantization", arXiv 2305.14314)
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
BF16 = 2


@dataclass
class ExampleArguments(ScriptArguments):
    model_name_or_path: str = "Qwen/Qwen3-8B"
    validation_dataset_name: str = ""  # rows you trust
    lora_r: int = 16
    keep_ratio: float = 0.7  # share of the rows in the curated dataset
    estimate_only: bool = False  # print what the memory goes to, and stop


@dataclass
class QLoRAConfig(BilevelSFTConfig):
    """The options that keep an 8B model within 24 GB; all can be changed on the command line."""

    per_device_train_batch_size: int = 2  # sequences; as many of trusted rows join them
    gradient_accumulation_steps: int = 8
    max_length: int | None = 2048
    packing: bool = True  # no padding, and the memory of a step is known
    optim: str = "paged_adamw_8bit"
    learning_rate: float = 2e-4
    activation_checkpointing: bool | None = True
    # What is not quantized; TRL's default, fp32, takes 2.3 GiB more
    model_init_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"dtype": "bfloat16"})


def estimate_memory(config: PreTrainedConfig, lora: LoraConfig, args: BilevelSFTConfig) -> dict[str, float]:
    """GiB that each part of a run takes. The model is never built: its shapes are enough."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        head = model.get_output_embeddings()
        linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
        num_quantized = sum(layer.weight.numel() for layer in linears)
        num_other = sum(value.numel() for value in model.parameters()) - num_quantized
        largest = max(layer.weight.numel() for layer in linears)
        adapted = get_peft_model(model, deepcopy(lora))  # which writes into its configuration
    num_trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    num_trusted = args.per_device_validation_batch_size or args.per_device_train_batch_size
    num_tokens = (args.per_device_train_batch_size + num_trusted) * (args.max_length or 0)
    layers = config.get_text_config()
    # Each linear layer keeps its input and output; the MLP its activation and product, too
    widths = sum(layer.in_features + layer.out_features for layer in linears) / layers.num_hidden_layers
    widths += 2 * layers.intermediate_size
    sets = 1 if args.value_function == "none" or args.selection_method == "bmo" else 2
    parts = {
        "base model: linear layers in 4 bit, embeddings and head in bf16": (
            num_quantized * BYTES_PER_WEIGHT + num_other * BF16
        ),
        "adapter and value function, LoRA, bf16": sets * num_trained * BF16,
        "their gradients, one of the two at a time": num_trained * BF16,
        "their optimizers' states, 8 bit": sets * num_trained * 2,
        "inputs of the layers, kept for the backward pass": layers.num_hidden_layers
        * num_tokens
        * layers.hidden_size
        * BF16,
        "one layer computed again, with its gradients, and one matrix unpacked": (
            2 * num_tokens * widths * BF16 + largest * BF16
        ),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def print_estimate(parts: dict[str, float]) -> None:
    table = Table(title="Estimate of the GPU memory, without what CUDA itself takes", show_footer=True)
    table.add_column("part", footer="total")
    table.add_column("GiB", justify="right", footer=f"{sum(parts.values()):.2f}")
    for name, size in parts.items():
        table.add_row(name, f"{size:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, QLoRAConfig))
    script_args, training_args = parser.parse_args_and_config()
    peft_config = LoraConfig(
        r=script_args.lora_r, lora_alpha=2 * script_args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model_config = AutoConfig.from_pretrained(script_args.model_name_or_path)
    print_estimate(estimate_memory(model_config, peft_config, training_args))
    if script_args.estimate_only:
        raise SystemExit(0)

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trusted = load_dataset(script_args.validation_dataset_name)
    trainer = BilevelSFTTrainer(
        model=script_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        validation_dataset=trusted[script_args.dataset_train_split],
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if torch.cuda.is_available():
        print(f"Peak of the GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        trainer.curate(script_args.keep_ratio).to_parquet(f"{training_args.output_dir}/curated/train.parquet")
    trainer.end()
