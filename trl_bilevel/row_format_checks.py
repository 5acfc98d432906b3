"""Checks of what the rows look like, before a model is loaded: that TRL can read them, and both datasets alike."""

from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational

from .bilevel_sft_config import BilevelSFTConfig


_MASKS = {"labels", "completion_mask", "assistant_masks"}


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
    is_prepared = bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))
    if is_prepared or has_formatting_func:
        return
    named = {"train_dataset": training}
    if args.validation_loss_type == "nll":
        named["validation_dataset"] = validation
    first_rows = {name: next(iter(dataset)) for name, dataset in named.items()}
    for name, dataset in named.items():
        read = _columns_read(name, first_rows[name], args.dataset_text_field)
        if isinstance(dataset, Dataset):
            _refuse_gaps(name, dataset, read)
    if "validation_dataset" in named:
        _refuse_other_tokens(first_rows, args.assistant_only_loss)


def _columns_read(name: str, row: dict[str, Any], text_field: str) -> list[str]:
    for needed in (["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"], [text_field]):
        if all(column in row for column in needed):
            return needed
    raise ValueError(
        f"`{name}` has the columns {[*row]}, of which TRL can make no text. It reads 'messages', 'prompt' with "
        f"'completion', or {text_field!r} (`dataset_text_field`): rename yours, `{name}.rename_column(...)`, or pass "
        "a `formatting_func`."
    )


def _refuse_gaps(name: str, dataset: Dataset, columns: list[str]) -> None:
    for column in columns:
        is_missing = dataset.data.column(column).is_null()
        if dataset._indices is not None:
            is_missing = is_missing.take(dataset._indices.column(0))
        if num_missing := pa.compute.sum(is_missing).as_py():
            raise ValueError(
                f"{num_missing} of {len(dataset)} rows of `{name}` have nothing in the column {column!r}. Drop them: "
                f"`{name}.filter(lambda row: row[{column!r}] is not None)`."
            )


def _refuse_other_tokens(first_rows: dict[str, dict[str, Any]], assistant_only_loss: bool) -> None:
    masks = {name: sorted(_MASKS & row.keys()) for name, row in first_rows.items() if "input_ids" in row}
    if masks and len({*map(bool, masks.values())}) > 1:
        raise ValueError(
            "Of one dataset a column says which tokens count, of the other none does, so that the losses would cover "
            f"other tokens: {masks}. Give both of them `labels`, or neither."
        )
    row = first_rows["validation_dataset"]
    if assistant_only_loss and not masks and not is_conversational(row):
        raise ValueError(
            "`assistant_only_loss=True` needs conversations in `validation_dataset` too, so that both losses cover "
            f"the same tokens; its columns are {[*row]}. Make messages of them, or leave the option out."
        )
