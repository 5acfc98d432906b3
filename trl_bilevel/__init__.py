"""Bilevel data curation for fine-tuning language models with TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .bilevel_sft_config import BilevelSFTConfig
    from .bilevel_sft_trainer import BilevelSFTTrainer
    from .data_selector import DataSelector
    from .hub import load_curated_dataset
    from .refinement_config import IMPROVE_ANSWER_TEMPLATE, RefinementConfig
    from .screening.screen import Screening, screen_dataset
    from .self_refining_callback import SelfRefiningCallback
    from .self_refining_collator import SelfRefiningCollator
    from .weighted_sft_config import WeightedSFTConfig
    from .weighted_sft_trainer import WeightedSFTTrainer


__version__ = "0.1.0.dev0"

__all__ = [
    "IMPROVE_ANSWER_TEMPLATE",
    "BilevelSFTConfig",
    "BilevelSFTTrainer",
    "DataSelector",
    "RefinementConfig",
    "Screening",
    "SelfRefiningCallback",
    "SelfRefiningCollator",
    "WeightedSFTConfig",
    "WeightedSFTTrainer",
    "__version__",
    "load_curated_dataset",
    "screen_dataset",
]

_MODULES = {
    "BilevelSFTConfig": "bilevel_sft_config",
    "BilevelSFTTrainer": "bilevel_sft_trainer",
    "DataSelector": "data_selector",
    "IMPROVE_ANSWER_TEMPLATE": "refinement_config",
    "RefinementConfig": "refinement_config",
    "load_curated_dataset": "hub",
    "Screening": "screening.screen",
    "screen_dataset": "screening.screen",
    "SelfRefiningCallback": "self_refining_callback",
    "SelfRefiningCollator": "self_refining_collator",
    "WeightedSFTConfig": "weighted_sft_config",
    "WeightedSFTTrainer": "weighted_sft_trainer",
}


def __getattr__(name: str) -> Any:
    # On first use, as in TRL: the command line answers without importing torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
