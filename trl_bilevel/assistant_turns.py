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

from .paired_batches import add_sample_indices


_CONVERSATIONS = ("messages", "conversations")
_STAND_IN = "the answer goes here"
_ROWS_TO_TRY = 100  # that may have no message
ANSWERING_ROLES = ("assistant", "gpt", "model")  # TRL keeps the roles of other formats


def is_conversation_without_prompt(row: dict[str, Any]) -> bool:
    """Whether a row is one conversation, of which [`~trl.SFTTrainer`] by default learns all turns alike."""
    is_chat = is_conversational_from_value(row) or is_conversational(row)
    return is_chat and "prompt" not in row and "input_ids" not in row


def prepare_answers(trainer: Any, rows: Dataset, name: str) -> Dataset:
    """
    Prepare rows as a trainer does, but so that the labels are those of the answers, whatever its training counts.

    Args:
        trainer ([`~trl.SFTTrainer`]): prepares them.
        rows (`datasets.Dataset`): in any format that it takes.
        name (`str`): of the rows, for the progress bars.

    Returns:
        `datasets.Dataset`: prepared rows with their numbers, see
        [`~trl_bilevel.paired_batches.read_sample_indices`]; without those that have no answer left after truncation.
    """
    indexed = add_sample_indices(rows)
    if trainer._skip_prepare_dataset:
        return indexed
    formatting_func = trainer._formatting_func
    first = next((row for row in rows.take(_ROWS_TO_TRY) if any(row.get(key) for key in _CONVERSATIONS)), rows[0])
    if formatting_func is None and is_conversation_without_prompt(first):
        indexed = mark_assistant_turns(indexed, trainer.processing_class, trainer.chat_template)
    return trainer._prepare_dataset(indexed, trainer.processing_class, trainer.args, False, formatting_func, name)


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
        if not any(row.get(key) for key in _CONVERSATIONS):
            return {"input_ids": [], "assistant_masks": []}  # nothing is said
        row = maybe_convert_to_chatml(row)
        tools = row.get("tools")
        options = {
            "chat_template": chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        input_ids, mask = _mark(row["messages"], processing_class, options)
        return {"input_ids": input_ids, "assistant_masks": mask}

    read = [name for name in _CONVERSATIONS if name in rows.column_names]
    return rows.map(mark, remove_columns=read)


def tokens_before_answer(
    messages: list[dict[str, Any]], processing_class: Any, options: dict[str, Any]
) -> list[int] | None:
    """
    What a model is given before it says the last message of a conversation, where that is of another role than the
    template's own mark of an answer.

    Args:
        messages (`list[dict]`): the conversation.
        processing_class (`transformers.PreTrainedTokenizerBase`): with a chat template, unless `options` has one.
        options (`dict`): of `apply_chat_template`.

    Returns:
        `list[int]` or `None`: `None` if the template does not show the message.
    """
    stand_in = [*messages[:-1], {**messages[-1], "content": _STAND_IN}]
    text = processing_class.apply_chat_template(stand_in, tokenize=False, **options)
    before, found, _ = text.rpartition(_STAND_IN)
    return processing_class(before, add_special_tokens=False)["input_ids"] if found else None


def _mark(
    messages: list[dict[str, Any]], processing_class: Any, options: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids, and which of them the assistant says."""

    def tokens(count: int, **more: Any) -> list[int]:
        return _tokenize(processing_class, messages[:count], **options, **more)["input_ids"]

    def asked(number: int) -> list[int]:
        if messages[number]["role"] == "assistant":
            return tokens(number, add_generation_prompt=True)
        return tokens_before_answer(messages[: number + 1], processing_class, options) or []

    input_ids = tokens(len(messages))
    mask = [0] * len(input_ids)
    for number, message in enumerate(messages):
        is_last = number == len(messages) - 1
        if message["role"] not in ANSWERING_ROLES:
            continue
        start = common_prefix_length(asked(number), input_ids) if number else 0
        spoken = input_ids if is_last else tokens(number + 1)
        end = common_prefix_length(spoken, input_ids)
        if end < len(spoken) or end <= start:
            continue
        mask[start:end] = [1] * (end - start)
    return input_ids, mask
