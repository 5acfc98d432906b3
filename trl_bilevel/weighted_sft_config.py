"""Options of the trainer whose rows count by a column."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig


@dataclass
class WeightedSFTConfig(SFTConfig):
    """
    [`~trl.SFTConfig`] and the weights of the rows.

    Args:
        weight_column (`str`, *optional*, defaults to `'weight'`):
            Column of the training dataset that says how much each row counts, the name that curated datasets have it
            by. A row of weight 0 is left out.
        normalize_weights (`bool`, *optional*, defaults to `True`):
            Scale the weights so that those above 0 have mean 1 over the training dataset. The learning rate then means
            what it means in plain SFT, whatever the column's scale. `False` takes them as they are: weights of 2
            double the loss. A stream, whose mean nobody knows, needs `False`.

    Example:

    ```python
    >>> from trl_bilevel import WeightedSFTConfig
    >>> WeightedSFTConfig(output_dir="out", use_cpu=True, bf16=False).weight_column
    'weight'

    ```
    """

    weight_column: str = field(
        default="weight",
        metadata={"help": "Column of the training dataset that says how much each row counts; 0 leaves a row out."},
    )
    normalize_weights: bool = field(
        default=True,
        metadata={
            "help": "Scale the weights to mean 1 over the rows of weight above 0. A stream needs false: its weights "
            "are taken as they are."
        },
    )

    # TRL's default under its new name: as `gradient_checkpointing=True` it warns at every start
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
        if not self.weight_column:
            raise ValueError("`weight_column` is empty. Name the column that says how much each row counts.")

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "WeightedSFTConfig":
        """The same options and the default weight column, for scripts that still pass an [`~trl.SFTConfig`]."""
        options: dict[str, Any] = {
            option.name: getattr(args, option.name)
            for option in fields(args)
            if option.init and option.name in cls.__dataclass_fields__
        }
        return cls(**options)
