"""Rows as a page shows them: short, and without characters that a reader would not see."""

import unicodedata
from typing import Any, NamedTuple

from datasets import Dataset

from .curation import CURATION_COLUMNS, SAMPLE_ID_COLUMN
from .refined_rows import ORIGINAL_COLUMN


LONGEST_TEXT = 600  # characters
_MOST_ITEMS = 8  # of a list: messages, tools
_MOST_TOKENS = 60
_MOST_COLUMNS = 10
# Invisible, but what joins letters of many scripts, and emoji
_JOINERS = "\u200c\u200d"


class Field(NamedTuple):
    """A part of a row, plain text: whoever puts it into a page escapes it."""

    name: str
    text: str
    note: str
    """What was left out, empty if nothing was."""


class ReportRow(NamedTuple):
    """A row with its score."""

    sample_id: str
    weight: float
    rank: int
    scored: bool
    is_refined: bool
    fields: list[Field]
    original: list[Field]
    """The answer that a refined one replaced."""
    ranks: tuple[int, int] | None = None
    """At the first checkpoint and now, among the rows scored by then; `None` where it is of no interest."""
    reason: str = ""
    """What a screen said of the row."""


def plain_text(value: Any, longest: int = LONGEST_TEXT) -> tuple[str, str]:
    """
    Text for a page and a note of what was left out; control characters are shown as U+FFFD.

    Args:
        value (`Any`): of a cell.
        longest (`int`): characters to show.

    Example:

    ```python
    >>> plain_text("tab\\tand\\x00 bell\\x07", longest=9)
    ('tab\\tand\\ufffd ', 'the first 9 of 14 characters')

    ```
    """
    text = value if isinstance(value, str) else "" if value is None else str(value)
    note = "" if len(text) <= longest else f"the first {longest:,} of {len(text):,} characters"
    shown = [character if _is_shown(character) else "\ufffd" for character in text[:longest].replace("\r\n", "\n")]
    return "".join(shown), note


def _is_shown(character: str) -> bool:
    """Letters and signs, and the spaces of all scripts, which are no control characters."""
    return character.isprintable() or character in "\n\t" + _JOINERS or unicodedata.category(character) == "Zs"


def read_message(entry: Any) -> tuple[str, str] | None:
    """
    Role and text of a message, `None` for anything else, such as a call of a tool.

    Example:

    ```python
    >>> read_message({"from": "human", "value": "Hi"})
    ('human', 'Hi')

    ```
    """
    if not isinstance(entry, dict) or entry.get("tool_calls"):
        return None
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    return (role, content) if isinstance(role, str) and isinstance(content, str) else None


def cell_fields(name: str, value: Any) -> list[Field]:
    """
    A cell as fields: each message of a conversation is one.

    Example:

    ```python
    >>> cell_fields("messages", [{"role": "user", "content": "Hi"}])
    [Field(name='messages: user', text='Hi', note='')]
    >>> cell_fields("input_ids", [7, 8, 9])
    [Field(name='input_ids', text='7 8 9', note='')]

    ```
    """
    label = plain_text(name, longest=60)[0]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        first, last, note = _both_ends(value, _MOST_ITEMS)
        found = [_message_field(label, message) for message in first]
        if note:
            found.append(Field(label, "…", note))
        return found + [_message_field(label, message) for message in last]
    if isinstance(value, list):
        first, last, note = _both_ends(value, _MOST_TOKENS)
        text, cut = plain_text(" ".join(map(str, [*first, *["…"] * bool(note), *last])))
        return [Field(label, text, note or cut)]
    return [Field(label, *plain_text(value))]


def _both_ends(values: list[Any], most: int) -> tuple[list[Any], list[Any], str]:
    """A list's beginning and end, where the answer is, and a note of what was left out between them."""
    if len(values) <= most:
        return values, [], ""
    half = most // 2
    return values[:half], values[-half:], f"the first and the last {half} of {len(values):,} entries"


def _message_field(label: str, message: Any) -> Field:
    role, content = read_message(message) or (None, message)
    return Field(label if role is None else f"{label}: {plain_text(role, longest=20)[0]}", *plain_text(content))


def report_rows(
    scored: Dataset, indices: list[int], ranks: dict[int, tuple[int, int]] | None = None
) -> list[ReportRow]:
    """
    Some rows, in the order given.

    Args:
        scored (`datasets.Dataset`): all rows with their scores, see [`~trl_bilevel.curation.curate_dataset`].
        indices (`list[int]`): which.
        ranks (`dict[int, tuple]`, *optional*): of those rows, at the first checkpoint and now.
    """
    own_columns = [name for name in scored.column_names if name not in (SAMPLE_ID_COLUMN, *CURATION_COLUMNS)]
    rows = []
    for index in indices:
        row = scored[index]
        parts: list[Field] = []
        for name in own_columns[:_MOST_COLUMNS]:
            parts += cell_fields(name, row[name])
        if len(own_columns) > _MOST_COLUMNS:
            parts.append(Field("…", "", f"the first {_MOST_COLUMNS} of {len(own_columns)} columns"))
        is_refined = row["response_source"] == "refined"
        rows.append(
            ReportRow(
                plain_text(row[SAMPLE_ID_COLUMN], longest=80)[0],
                row["weight"],
                row["rank"],
                row["scored"],
                is_refined,
                parts,
                cell_fields(ORIGINAL_COLUMN, row[ORIGINAL_COLUMN]) if is_refined else [],
                None if ranks is None else ranks[index],
                plain_text(row.get("screen_reason", ""))[0],
            )
        )
    return rows
