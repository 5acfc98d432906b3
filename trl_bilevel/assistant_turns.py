"""The tokens of a conversation that the assistant says, found by the chat template."""

import json
from typing import Any

from datasets import Dataset
from trl.data_utils import (
    _tokenize,
    common_prefix_length,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)


ANSWERING_ROLES = ("assistant", "gpt", "model")  # TRL keeps the roles of other formats


def is_conversation_without_prompt(row: dict[str, Any]) -> bool:
    """Whether a row is one conversation, of which [`~trl.SFTTrainer`] by default learns all turns alike."""
    is_chat = is_conversational_from_value(row) or is_conversational(row)
    return is_chat and "prompt" not in row and "input_ids" not in row


def mark_assistant_turns(rows: Dataset, processing_class: Any, chat_template: str | None) -> Dataset:
    """
    Tokenize conversations and say which tokens are the assistant's.

    Needs no `{% generation %}` in the template: a turn is what the template adds to the conversation before it and the
    mark that asks for an answer. Turns that the template changes once more follow, as it leaves out their thoughts,
    are passed over; the last turn always counts.

    Args:
        rows (`datasets.Dataset`): rows of which [`is_conversation_without_prompt`] is true.
        processing_class (`transformers.PreTrainedTokenizerBase`): with a chat template, unless one is given.
        chat_template (`str`, *optional*): instead of the tokenizer's.

    Returns:
        `datasets.Dataset`: the other columns, `input_ids`, and `assistant_masks` of zeros and ones.
    """

    def mark(row: dict[str, Any]) -> dict[str, list[int]]:
        row = maybe_convert_to_chatml(row)
        tools = row.get("tools")
        options = {
            "chat_template": chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        input_ids, mask = _mark(row["messages"], processing_class, options)
        return {"input_ids": input_ids, "assistant_masks": mask}

    read = [name for name in ("messages", "conversations") if name in rows.column_names]
    return rows.map(mark, remove_columns=read)


def _mark(
    messages: list[dict[str, Any]], processing_class: Any, options: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids, and which of them the assistant says."""

    def tokens(count: int, **more: Any) -> list[int]:
        return _tokenize(processing_class, messages[:count], **options, **more)["input_ids"]

    input_ids = tokens(len(messages))
    mask = [0] * len(input_ids)
    for number, message in enumerate(messages):
        is_last = number == len(messages) - 1
        if message["role"] not in ANSWERING_ROLES:
            continue
        start = common_prefix_length(tokens(number, add_generation_prompt=True), input_ids) if number else 0
        spoken = input_ids if is_last else tokens(number + 1)
        end = common_prefix_length(spoken, input_ids)
        if end < len(spoken) or end <= start:
            continue
        mask[start:end] = [1] * (end - start)
    return input_ids, mask
