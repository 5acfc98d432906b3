"""
Preference pairs as validation rows (`validation_loss_type="dpo"`).

A pair becomes two rows of the batch, so that one forward pass still serves both levels. The reference model's part is
fixed, hence computed once, before training: no second model and no second pass.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from tqdm.auto import tqdm
from trl import DPOTrainer

from .losses import RowLosses


logger = get_logger(__name__)

REFERENCE_NLL = "reference_nll"
"""Batch key: list of float, negative log-likelihoods of the pairs' completions under the reference, in nats."""
_SIDES = ("chosen", "rejected")
_FIELDS = ("input_ids", "labels", REFERENCE_NLL)


def is_paired(dataset: Dataset) -> bool:
    """Whether a prepared dataset holds preference pairs."""
    return "chosen_input_ids" in dataset.column_names


def split_pair(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The two rows of a prepared pair: the chosen one, then the rejected one.

    Example:

    ```python
    >>> split_pair({"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3]})
    [{'input_ids': [1, 2]}, {'input_ids': [1, 3]}]

    ```
    """
    return [{name: pair[f"{side}_{name}"] for name in _FIELDS if f"{side}_{name}" in pair} for side in _SIDES]


def prepare_pairs(dataset: Dataset, trainer: Any) -> Dataset:
    """
    Tokenize preference pairs exactly as [`~trl.DPOTrainer`] does, in any of its formats.

    Args:
        dataset (`datasets.Dataset`): P rows with `chosen` and `rejected`, and mostly `prompt`; text or messages.
        trainer ([`~trl.SFTTrainer`]): its tokenizer, maximum length and truncation are used.

    Returns:
        `datasets.Dataset`: `chosen_input_ids`, `chosen_labels` and the same for `rejected`. Pairs without a
        completion token after truncation are dropped.
    """
    args = trainer.args
    # DPOTrainer's own preparation; of `self` it uses only the tokenizer, which SFTTrainer has under the same name
    tokenized = DPOTrainer._prepare_dataset(trainer, dataset, trainer.processing_class, args, "validation")
    keeps_end = args.truncation_mode == "keep_end" and args.max_length is not None
    window = slice(-args.max_length, None) if keeps_end else slice(args.max_length)

    def to_rows(pair: dict[str, Any]) -> dict[str, list[int]]:
        rows = {}
        for side in _SIDES:
            completion = pair[f"{side}_ids"]
            rows[f"{side}_input_ids"] = (pair["prompt_ids"] + completion)[window]
            rows[f"{side}_labels"] = ([-100] * len(pair["prompt_ids"]) + completion)[window]
        return rows

    rows = tokenized.map(to_rows, remove_columns=tokenized.column_names, desc="Building validation pairs")
    # The first token is predicted by nothing
    return rows.filter(
        lambda pair: all(any(label != -100 for label in pair[f"{side}_labels"][1:]) for side in _SIDES),
        desc="Dropping pairs truncated to their prompt",
    )


@torch.no_grad()
def add_reference_likelihoods(
    pairs: Dataset,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    row_losses_of: Callable[[dict[str, Any]], RowLosses],
    batch_size: int,
) -> Dataset:
    """
    Add the reference's negative log-likelihood of each completion, in nats: a column per side.

    Args:
        pairs (`datasets.Dataset`): what [`prepare_pairs`] returned, P rows.
        collator (`Callable`): makes a batch of rows.
        row_losses_of (`Callable`): the reference model's losses of the rows of a batch.
        batch_size (`int`): pairs per forward pass.

    Raises:
        `ValueError`: if no pair has a finite loss.
    """
    columns: dict[str, list[float]] = {f"{side}_{REFERENCE_NLL}": [] for side in _SIDES}
    batches = range(0, len(pairs), batch_size)
    for start in tqdm(batches, desc="Reference likelihoods of the validation pairs", disable=len(batches) < 10):
        rows = [
            row for pair in pairs.select(range(start, min(start + batch_size, len(pairs)))) for row in split_pair(pair)
        ]
        nll = row_losses_of(collator(rows)).nll.float().cpu().view(-1, 2)
        for column, values in zip(columns.values(), nll.T, strict=True):
            column.extend(values.tolist())
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    finite = [
        index for index, sides in enumerate(zip(*columns.values(), strict=True)) if all(map(math.isfinite, sides))
    ]
    if not finite:
        raise ValueError(
            f"All {len(pairs)} pairs of `validation_dataset` have a NaN or infinite loss under the reference, so none "
            "is left to train on. Check the model: its parameters may be broken, or overflow in its precision; try "
            "`bf16=True` or fp32."
        )
    if len(finite) < len(pairs):
        logger.warning(
            f"{len(pairs) - len(finite)} of {len(pairs)} validation pairs have a NaN or infinite loss under the "
            "reference and are left out."
        )
    return pairs.select(finite) if len(finite) < len(pairs) else pairs
