"""Checks of what the rows look like, before a model is loaded: that TRL can read them, and both datasets alike."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational, is_conversational_from_value

from .bilevel_sft_config import BilevelSFTConfig
from .parquet_files import read_pieces


logger = get_logger(__name__)

_MOST_NAMED = 10


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
    are_talks: dict[str, bool] = {}
    for name, dataset in named.items():
        read = all_read[name]
        are_talks[name] = _are_conversations(first_rows[name], read)
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # which TRL refuses, and says why
            refuse_gaps(name, dataset, read)
            _warn_of_empty_answers(name, dataset, read[-1])
    if "validation_dataset" in named:
        _refuse_text_beside_conversations(are_talks, first_rows)
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


def name_some(rows: Sequence[Any]) -> str:
    """
    The first ten of some rows, for a message.

    Example:

    ```python
    >>> name_some([3, 9]), name_some(range(12))
    ('3, 9', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...')

    ```
    """
    others = ", ..." if len(rows) > _MOST_NAMED else ""
    return ", ".join(map(str, rows[:_MOST_NAMED])) + others


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


def _are_conversations(row: dict[str, Any], read: list[str]) -> bool:
    """By the columns, as a row may have no message."""
    return read in (["messages"], ["conversations"]) or (read[0] == "prompt" and isinstance(row["prompt"], list))


def _refuse_text_beside_conversations(are_talks: dict[str, bool], first_rows: dict[str, dict[str, Any]]) -> None:
    are_tokenized = any("input_ids" in row for row in first_rows.values())
    if are_tokenized or len({*are_talks.values()}) == 1:
        return
    talks = next(name for name, is_talk in are_talks.items() if is_talk)
    texts = next(name for name, is_talk in are_talks.items() if not is_talk)
    raise ValueError(
        f"`{talks}` holds conversations (columns {[*first_rows[talks]]}) and `{texts}` plain text (columns "
        f"{[*first_rows[texts]]}): one of them would be read with the chat template and the other without, so that "
        "what sets them apart is their format. Bring both into one, for instance `messages`."
    )


def _warn_of_empty_answers(name: str, dataset: Dataset, column: str) -> None:
    """Count the rows whose answer, or whose text, is blank; of a conversation its last message."""
    if column == "input_ids":
        return
    empty: list[int] = []
    start = 0
    for table in read_pieces(dataset.select_columns([column]).with_format(None)):
        empty += [start + row for row, answer in enumerate(table.column(column).to_pylist()) if _is_blank(answer)]
        start += len(table)
    if empty:
        logger.warning(
            f"{len(empty)} of {len(dataset)} rows of `{name}` have an empty answer, of which a model learns to say "
            f"nothing. Counted from 0 they are {name_some(empty)}. Drop them if that is not meant."
        )


def _is_blank(answer: Any) -> bool:
    if isinstance(answer, list):
        last = answer[-1] if answer else {}
        if not isinstance(last, dict) or last.get("tool_calls"):
            return False
        answer = last.get("content", last.get("value")) or ""
    return isinstance(answer, str) and not answer.strip()


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
