"""What every configuration of this package is: TRL's, without its deprecated default."""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from transformers import TrainingArguments
from trl import SFTConfig


@dataclass
class SFTConfigBase(SFTConfig):
    """[`~trl.SFTConfig`], whose default of activation checkpointing goes by its new name."""

    # As `gradient_checkpointing=True` it warns at every start
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Trade compute for memory by recomputing activations. On, as in `SFTConfig`, if not set."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Deprecated name of `activation_checkpointing`."},
    )

    def __post_init__(self) -> None:
        if self.gradient_checkpointing is None and self.activation_checkpointing is None:
            self.activation_checkpointing = True
        super().__post_init__()

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> Self:
        """The same options with the other defaults added, for scripts that still pass an [`~trl.SFTConfig`]."""
        options: dict[str, Any] = {
            option.name: getattr(args, option.name)
            for option in fields(args)
            if option.init and option.name in cls.__dataclass_fields__
        }
        return cls(**options)
