"""Checks of what the rows look like, before a model is loaded: that TRL can read them, and both datasets alike."""

from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational, is_conversational_from_value

from .bilevel_sft_config import BilevelSFTConfig


def check_row_formats(
    training: Dataset | IterableDataset, validation: Dataset, args: BilevelSFTConfig, has_formatting_func: bool
) -> None:
    """
    Check that TRL can make sequences of the rows, and that the loss covers the same tokens of both datasets' rows.

    Args:
        training, validation: not empty; a stream's first row speaks for all.
        args ([`~trl_bilevel.BilevelSFTConfig`]): which column is read, and which tokens count.
        has_formatting_func (`bool`): whether the user's own function makes text of the rows, of any columns.

    Raises:
        `ValueError`: naming the dataset, its columns and the cure.
    """
    if has_formatting_func or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    named = {"train_dataset": training}
    if args.validation_loss_type == "nll":
        named["validation_dataset"] = validation
    first_rows = {name: next(iter(dataset)) for name, dataset in named.items()}
    all_read = {name: columns_read(name, row, args.dataset_text_field) for name, row in first_rows.items()}
    if {"image", "images"} & {*first_rows["train_dataset"]} and len({*map(tuple, all_read.values())}) > 1:
        raise ValueError(
            f"Rows with images are tokenized in batches, which must be read alike, but of the datasets {all_read} are "
            "read. Give both the same columns."
        )
    for name, dataset in named.items():
        read = all_read[name]
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # which TRL refuses, and says why
            refuse_gaps(name, dataset, read)
    if "validation_dataset" in named:
        _refuse_other_tokens(first_rows, args)


def columns_read(name: str, row: dict[str, Any], text_field: str) -> list[str]:
    """
    The columns that TRL makes text of, as it looks for them, in this order.

    Raises:
        `ValueError`: if there are none.
    """
    if "input_ids" in row:
        return ["input_ids"]
    if "prompt" in row:
        if "completion" in row:
            return ["prompt", "completion"]
        raise ValueError(
            f"`{name}` has a column 'prompt' and no 'completion', but {[*row]}. Add the completions, or drop the "
            f"prompts: `{name}.remove_columns('prompt')`."
        )
    if "messages" in row:
        return ["messages"]
    if is_conversational_from_value(row):
        return ["conversations"]
    if text_field in row:
        return [text_field]
    raise ValueError(
        f"`{name}` has the columns {[*row]}, of which TRL can make no text. It reads 'messages', 'prompt' with "
        f"'completion', 'conversations' of 'from' and 'value', or {text_field!r} (`dataset_text_field`). Rename yours "
        f"with `{name}.rename_column(...)`, or pass a `formatting_func`."
    )


def refuse_gaps(name: str, dataset: Dataset, columns: list[str]) -> None:
    """Raise a `ValueError` that counts the rows with nothing in one of some columns."""
    for column in columns:
        is_missing = dataset.data.column(column).is_null()
        if dataset._indices is not None:
            is_missing = is_missing.take(dataset._indices.column(0))
        if num_missing := pa.compute.sum(is_missing).as_py():
            raise ValueError(
                f"{num_missing} of {len(dataset)} rows of `{name}` have nothing in the column {column!r}. Drop them: "
                f"`{name}.filter(lambda row: row[{column!r}] is not None)`."
            )


def _refuse_other_tokens(first_rows: dict[str, dict[str, Any]], args: BilevelSFTConfig) -> None:
    are_tokenized = "input_ids" in first_rows["validation_dataset"]
    masks = {name: _masks(row, args.completion_only_loss) for name, row in first_rows.items()}
    if are_tokenized and len({*map(bool, masks.values())}) > 1:
        raise ValueError(
            "Of one dataset a column says which tokens count, of the other none does, so that the losses would cover "
            f"other tokens: {masks}. Give both of them `labels`, or neither."
        )
    row = first_rows["validation_dataset"]
    is_conversation = is_conversational(row) or is_conversational_from_value(row)
    if args.assistant_only_loss and not are_tokenized and not is_conversation:
        raise ValueError(
            "`assistant_only_loss=True` needs conversations in `validation_dataset` too, so that both losses cover "
            f"the same tokens; its columns are {[*row]}. Make messages of them, or leave the option out."
        )


def _masks(row: dict[str, Any], completion_only_loss: bool | None) -> list[str]:
    """The columns of a tokenized row that TRL takes the loss's tokens from."""
    if "labels" in row:
        return [] if list(row["labels"]) == list(row["input_ids"]) else ["labels"]
    read = ["assistant_masks", "completion_mask"] if completion_only_loss else ["assistant_masks"]
    return [name for name in read if name in row]
