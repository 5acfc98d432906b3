"""Options of the trainer whose rows count by a column."""

from dataclasses import dataclass, field

from .sft_config_base import SFTConfigBase


@dataclass
class WeightedSFTConfig(SFTConfigBase):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight_column:
            raise ValueError("`weight_column` is empty. Name the column that says how much each row counts.")
