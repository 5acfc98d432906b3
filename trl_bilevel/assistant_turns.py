"""The tokens of a conversation that the assistant says, found by the chat template."""

import json
from typing import Any

from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError
from trl.data_utils import (
    _tokenize,
    common_prefix_length,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)

from .paired_batches import SAMPLE_INDEX_COLUMN, add_sample_indices


_CONVERSATIONS = ("messages", "conversations")
_STAND_IN = "the answer goes here"
_READ = (*_CONVERSATIONS, "prompt", "completion", "tools", "chat_template_kwargs")
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
        [`~trl_bilevel.paired_batches.read_sample_indices`]; without those that have no answer left after truncation,
        and conversations in which nothing is said or that the chat template refuses: one row stops no pass over many.
    """
    indexed = add_sample_indices(rows)
    if trainer._skip_prepare_dataset:
        return indexed
    formatting_func = trainer._formatting_func
    if formatting_func is None:
        indexed = _readable(indexed, trainer.processing_class, trainer.chat_template)
        if len(indexed) > 0 and is_conversation_without_prompt(indexed[0]):
            indexed = mark_assistant_turns(indexed, trainer.processing_class, trainer.chat_template)
            indexed = indexed.filter(lambda tokens: len(tokens) > 0, input_columns="input_ids")
    if len(indexed) == 0:
        types = Features({"input_ids": List(Value("int64")), SAMPLE_INDEX_COLUMN: Value("int64")})
        return Dataset.from_dict({name: [] for name in types}, features=types)
    return trainer._prepare_dataset(indexed, trainer.processing_class, trainer.args, False, formatting_func, name)


def _readable(rows: Dataset, processing_class: Any, chat_template: str | None) -> Dataset:
    """The rows but for conversations without a message, or that the chat template refuses; others are left to TRL."""
    read = [name for name in _READ if name in rows.column_names]
    if "input_ids" in rows.column_names or not read:
        return rows

    def is_readable(*values: Any) -> bool:
        row = dict(zip(read, values, strict=True))
        turns = [row[name] for name in ("prompt", "completion", *_CONVERSATIONS) if isinstance(row.get(name), list)]
        if not turns:
            return not any(name in row for name in _CONVERSATIONS)  # text, or a conversation that is not there
        if not all(turns):
            return False
        if "prompt" in row:
            row = {"messages": [*row["prompt"], *row["completion"]], **_template_columns(row)}
        try:
            row = maybe_convert_to_chatml(row)
            processing_class.apply_chat_template(
                row["messages"], tokenize=False, **_template_options(row, chat_template)
            )
        except (TemplateError, TypeError):  # a content that is no text is added to one
            return False
        return True

    return rows.filter(is_readable, input_columns=read)


def _template_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}


def _template_options(row: dict[str, Any], chat_template: str | None) -> dict[str, Any]:
    """What a row gives the chat template besides its messages."""
    tools = row.get("tools")
    return {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }


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
        try:
            input_ids, mask = _mark(row["messages"], processing_class, _template_options(row, chat_template))
        except TemplateError:  # for a conversation that is cut before an answer
            return {"input_ids": [], "assistant_masks": []}
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
