"""What the responses of a run depend on: a run that goes on with something else must not take those on disk."""

import hashlib
from dataclasses import fields
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from trl import SFTConfig

from .bilevel_sft_config import BilevelSFTConfig
from .refinement_config import RefinementConfig
from .response_checks import RewardFunc
from .reward_identity import describe_reward_func


# Of the options of TRL: what changes the model that answers, whether a run has one process or several
_DECIDING_OPTIONS = (
    *("seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps"),
    *("num_train_epochs", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "max_length", "truncation_mode", "shuffle_dataset"),
    *("packing", "completion_only_loss", "assistant_only_loss", "router_aux_loss_coef", "chat_template_path"),
    *("loss_type", "label_smoothing_factor"),
)
_BATCH_SIZES = ("per_device_train_batch_size", "per_device_validation_batch_size")
# Ours that only say how rows are called and kept
_WITHOUT_EFFECT = ("save_training_rows", "sample_id_column")


def refinement_settings(
    config: RefinementConfig, training: TrainingArguments, reward_funcs: list[RewardFunc], *others: Any
) -> str:
    """
    Digest of the options that decide on the responses of a run, the same on all processes.

    Args:
        config ([`~trl_bilevel.refinement_config.RefinementConfig`]): of refinement.
        training (`TrainingArguments`): of the run.
        reward_funcs (`list[Callable]`): by their code and what is bound to them, see
            [`~trl_bilevel.reward_identity.describe_reward_func`].
        *others: what else decides, of a `repr` that is the same in every session.
    """
    rows_per_step = training.gradient_accumulation_steps * training.world_size
    options = {name: getattr(training, name, None) for name in _DECIDING_OPTIONS}
    options |= {name: rows_per_step * (getattr(training, name, None) or 0) for name in _BATCH_SIZES}
    own = {option.name for option in fields(RefinementConfig)}
    if isinstance(training, BilevelSFTConfig):
        own |= {option.name for option in fields(BilevelSFTConfig)} - {option.name for option in fields(SFTConfig)}
    options |= {name: getattr(config, name) for name in sorted(own) if name not in (*_WITHOUT_EFFECT, *_BATCH_SIZES)}
    functions = [describe_reward_func(function) for function in reward_funcs]
    digest = [hashlib.sha256(repr([options, functions, *others]).encode()).hexdigest()[:8]]
    broadcast_object_list(digest)  # an object may hold what differs between processes, as the time it was made
    return digest[0]
