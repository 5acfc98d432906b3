"""Bilevel data curation for fine-tuning language models with TRL."""

from .bilevel_sft_config import BilevelSFTConfig
from .bilevel_sft_trainer import BilevelSFTTrainer
from .data_selector import DataSelector


__version__ = "0.1.0.dev0"

__all__ = ["BilevelSFTConfig", "BilevelSFTTrainer", "DataSelector", "__version__"]
