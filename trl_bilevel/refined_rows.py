"""Refined answers in the user's own format: text, messages or tokens."""

from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value

from .refine_prompts import start_of_last_answer
from .refined_responses import RESPONSE_SCHEMA, returns_to_original
from .refinement import mean_log_prob
from .response_checks import answer_to_keep


ORIGINAL_COLUMN = "original_completion"
RESPONSES_COLUMN = "refined_responses"
_TEMPORARY = "bilevel_refined_column"
_THOUGHT_KEYS = ("reasoning_content", "thinking")
_TOKEN_MASKS = ("completion_mask", "assistant_masks")
_STORED_FIELDS = ("step", "response", "used", "flaw", "text", "weight", "settings")
_RESPONSE_FIELDS = ("step", "response", "used", "flaw", "text", "weight", "log_prob", "settings")


def original_answer(columns: dict[str, Any]) -> Any:
    """What a refined answer replaces: text, the completion's messages, the last message's text, or tokens."""
    if "input_ids" in columns:
        return list(columns["input_ids"])[_answer_start(columns) :]
    if "completion" in columns:
        return columns["completion"]
    message = _messages(columns)[1][-1]
    return message[_content_key(message)]


def with_answer(columns: dict[str, Any], text: str, completion_ids: list[int]) -> dict[str, Any]:
    """
    The columns of a row that change when its last answer is replaced.

    Args:
        columns (`dict`): the row, in any format that can be refined.
        text (`str`): the new answer.
        completion_ids (`list[int]`): its tokens, for a tokenized row.

    Example:

    ```python
    >>> with_answer({"prompt": "1 + 1 =", "completion": " 3"}, " 2", [])
    {'completion': ' 2'}
    >>> with_answer({"input_ids": [7, 8, 3], "labels": [-100, -100, 3]}, "2", [2, 9])
    {'input_ids': [7, 8, 2, 9], 'labels': [-100, -100, 2, 9]}

    ```
    """
    if "input_ids" in columns:
        start = _answer_start(columns)
        prompt_ids = list(columns["input_ids"])[:start]
        changed: dict[str, Any] = {"input_ids": prompt_ids + completion_ids}
        if "labels" in columns:
            changed["labels"] = list(columns["labels"])[:start] + completion_ids
        for name in _TOKEN_MASKS:
            if name in columns:
                changed[name] = list(columns[name])[:start] + [1] * len(completion_ids)
        if "attention_mask" in columns:
            changed["attention_mask"] = [1] * (start + len(completion_ids))
        return changed
    if isinstance(columns.get("completion"), str):
        return {"completion": text}
    name, messages = _messages(columns)
    *before, last = messages
    thoughts = {key: None for key in _THOUGHT_KEYS if last.get(key)}  # they led to the old answer
    return {name: [*before, {**last, **thoughts, _content_key(last): text}]}


def _messages(columns: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    name = next(name for name in ("completion", "messages", "conversations") if name in columns)
    return name, columns[name]


def _content_key(message: dict[str, Any]) -> str:
    return "content" if "content" in message else "value"


def _answer_start(columns: dict[str, Any]) -> int:
    if "labels" in columns:
        return start_of_last_answer([label != -100 for label in columns["labels"]])
    return start_of_last_answer([bool(bit) for bit in columns["completion_mask"]])


def apply_refined(dataset: Dataset, responses: pa.Table) -> tuple[Dataset, dict[str, Any]]:
    """
    Put refined answers in place of the originals.

    Of the responses that took a row's place in training, those of its last refresh, the one given most often is kept,
    among those the most likely one. A row whose last refresh came back to the original answer has that one.

    Args:
        dataset (`datasets.Dataset`): N rows as the user passed them.
        responses (`pyarrow.Table`): of a run, see [`~trl_bilevel.refined_responses.RESPONSE_SCHEMA`].

    Returns:
        `tuple[Dataset, dict]`: the rows, unchanged but for the refined answers; and the columns to add, with N
        entries: `response_source`, `original_completion` (null for a row that kept its own answer) and
        `refined_responses`, all responses that were generated for the row, used or not.
    """
    responses = responses.cast(RESPONSE_SCHEMA)
    completion_ids = responses.column("completion_ids")
    by_row: dict[int, list[dict[str, Any]]] = {}
    # Of the tokens only those of the answers are needed, and as Python objects they would take many times the memory
    for line, response in enumerate(responses.select(["row", *_STORED_FIELDS]).to_pylist()):
        response["line"] = line
        response["log_prob"] = mean_log_prob(responses.column("log_probs")[line])
        by_row.setdefault(response["row"], []).append(response)
    changed: dict[str, dict[int, Any]] = {}  # column -> row -> value
    originals: dict[int, Any] = {}
    for row, of_row in by_row.items():
        newest = _in_use(of_row)
        if not newest:
            continue
        answer = newest[
            answer_to_keep([response["text"] for response in newest], [response["log_prob"] for response in newest])
        ]
        columns = dataset[row]
        originals[row] = original_answer(columns)
        for name, value in with_answer(columns, answer["text"], completion_ids[answer["line"]].as_py()).items():
            changed.setdefault(name, {})[row] = value
    num_rows = len(dataset)
    for name, values in changed.items():
        dataset = _replace(dataset, name, values)
    records = [
        [{field: response[field] for field in _RESPONSE_FIELDS} for response in by_row.get(row, [])]
        for row in range(num_rows)
    ]
    record_type = pa.list_(
        pa.struct(
            [
                pa.field(name, pa.float64() if name == "log_prob" else RESPONSE_SCHEMA.field(name).type)
                for name in _RESPONSE_FIELDS
            ]
        )
    )
    return dataset, {
        "response_source": pa.array(["refined" if row in originals else "original" for row in range(num_rows)]),
        ORIGINAL_COLUMN: _encode([originals.get(row) for row in range(num_rows)], _answer_feature(dataset)),
        RESPONSES_COLUMN: pa.array(records, type=record_type),
    }


def _in_use(responses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a row's responses, oldest first, those that training has in the end; none if that is the original answer."""
    in_use: list[dict[str, Any]] = []
    for _, of_step in groupby(responses, key=lambda response: response["step"]):
        group = [*of_step]
        used = [response for response in group if response["used"]]
        if used or returns_to_original([response["flaw"] for response in group]):
            in_use = used
    return in_use


def _answer_feature(dataset: Dataset) -> Any:
    for name in ("input_ids", "completion"):
        if name in dataset.features:
            return dataset.features[name]
    return Value("string")


def _encode(values: list[Any], feature: Any) -> pa.Array:
    """Values as the type of a column, which Arrow alone cannot always make of them."""
    encoded = Dataset.from_dict({"values": values}, features=Features({"values": feature}))
    column = encoded.with_format("arrow")[:].column("values")
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _replace(dataset: Dataset, name: str, values: dict[int, Any]) -> Dataset:
    """The dataset with other values in some rows of a column; its type and place stay."""
    column = dataset.with_format("arrow").select_columns([name])[:].column(name)
    feature = dataset.features[name]
    replacements = _encode(list(values.values()), feature).cast(column.type)
    replaced = _with_replacements(column, np.array([*values]), replacements)
    order = dataset.column_names
    dataset = dataset.add_column(_TEMPORARY, replaced, feature=feature)
    return dataset.remove_columns([name]).rename_column(_TEMPORARY, name).select_columns(order)


def _with_replacements(column: pa.ChunkedArray, rows: np.ndarray, replacements: pa.Array) -> pa.ChunkedArray:
    """
    A column with other values in some rows, chunk by chunk: Arrow can hold no more than 2 GiB of text in one array.

    Args:
        column (`pyarrow.ChunkedArray`): N values.
        rows (`numpy.ndarray`): R numbers of rows, none twice.
        replacements (`pyarrow.Array`): R values of the same type.
    """
    in_order = np.argsort(rows)
    rows, chunks, start = rows[in_order], [], 0
    for chunk in column.chunks:
        first, last = np.searchsorted(rows, [start, start + len(chunk)])
        if first < last:
            indices = np.arange(len(chunk))
            indices[rows[first:last] - start] = len(chunk) + np.arange(last - first)
            chunks.append(pa.concat_arrays([chunk, replacements.take(pa.array(in_order[first:last]))]).take(indices))
        else:
            chunks.append(chunk)
        start += len(chunk)
    return pa.chunked_array(chunks, type=column.type)
