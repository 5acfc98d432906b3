"""The options of a run that cards and reports show, and that give the run again."""

import os
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from peft import LoraConfig
from trl import ModelConfig, SFTConfig

from .bilevel_sft_config import BilevelSFTConfig


_ALWAYS_SHOWN = ("selection_method", "validation_weight", "num_train_epochs", "learning_rate", "seed")
# Of TRL's and Trainer's options those that decide what is learned. An allow-list: nothing else of them, such as paths,
# tokens and addresses, may reach a card
_TRAINING_OPTIONS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "router_aux_loss_coef",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "chat_template_path",
    "dataset_text_field",
    "eos_token",
    "pad_token",
    "max_length",
    "truncation_mode",
    "loss_type",
    "label_smoothing_factor",
    "completion_only_loss",
    "assistant_only_loss",
    "packing",
    "padding_free",
    "shuffle_dataset",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "seed",
    "data_seed",
)
_SERVER_OPTIONS = "vllm_"  # where answers are generated, an address among them


def card_options(args: BilevelSFTConfig) -> dict[str, Any]:
    """
    Options that differ from their defaults, JSON values: all of ours, and those of TRL that decide what is learned.

    Of a path on this machine only the last part is given.
    """
    inherited = {option.name for option in fields(SFTConfig)}
    own = [option.name for option in fields(BilevelSFTConfig) if option.name not in inherited]
    # The method first, then its refinement, which the dataclass inherits
    refinement = [name for name in own if name.startswith("refine_")]
    names = [*(name for name in own if name not in refinement), *refinement, *_TRAINING_OPTIONS]
    defaults = BilevelSFTConfig.__dataclass_fields__
    return {
        name: _json_value(name, getattr(args, name))
        for name in names
        if not name.startswith(_SERVER_OPTIONS)
        and (name in _ALWAYS_SHOWN or getattr(args, name) != defaults[name].default)
    }


def model_options(model: Any) -> dict[str, Any]:
    """Options of TRL's `ModelConfig` that give the same adapter and quantization, as far as it has them."""
    found: dict[str, Any] = {}
    quantization: Any = getattr(model.config, "quantization_config", None)
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(quantization, name, False):
            found[name] = True
    if "load_in_4bit" in found:
        found["bnb_4bit_quant_type"] = quantization.bnb_4bit_quant_type
        found["use_bnb_nested_quant"] = quantization.bnb_4bit_use_double_quant
    if is_peft_model(model) and isinstance(lora := model.peft_config[model.active_adapter], LoraConfig):
        found |= {"use_peft": True, "lora_r": lora.r, "lora_alpha": lora.lora_alpha}
        found |= {"lora_dropout": lora.lora_dropout, "use_rslora": lora.use_rslora, "use_dora": bool(lora.use_dora)}
        for name, modules in (
            ("lora_target_modules", lora.target_modules),
            ("lora_modules_to_save", lora.modules_to_save),
        ):
            if isinstance(modules, (list, set)):
                found[name] = sorted(modules)
    defaults = ModelConfig.__dataclass_fields__
    needed = ("lora_r", "lora_alpha")
    return {name: value for name, value in found.items() if name in needed or value != defaults[name].default}


def _json_value(name: str, value: Any) -> Any:
    if name == "chat_template_path" and value is not None and os.path.isabs(value):
        return Path(value).name
    return value.value if isinstance(value, Enum) else value
