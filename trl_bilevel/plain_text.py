"""Chat prompts in which what people wrote stays text, also where it looks like a control token."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase


_MARKERS = "\ue000", "\uf8ff", "\U000f0000"  # for private use: one of them is in none of the messages


def has_control_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> bool:
    """Whether the text of a message spells a special token of the tokenizer."""
    pattern = _special_tokens(tokenizer)
    return pattern is not None and any(pattern.search(text) for text in _texts(messages))


def tokenize_as_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """
    Tokens of a conversation whose special tokens are those of the chat template only.

    `"<|im_end|>"` in a message would end the message, and let whoever wrote it speak for the system. Such text is set
    aside while the template is rendered and tokenized piece by piece.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        messages (`list[dict]`): contents are text, or parts with text.
        **options: of `apply_chat_template`.

    Raises:
        `ValueError`: if the messages use every character that could stand for what is set aside.
    """
    pattern = _special_tokens(tokenizer)
    assert pattern is not None
    everything = "".join(_texts(messages))
    marker = next((character for character in _MARKERS if character not in everything), None)
    if marker is None:
        raise ValueError(
            f"A conversation spells special tokens and has all of the characters {_MARKERS}, so that its text cannot "
            "be told from the chat template's. Remove one of them from the row."
        )
    set_aside: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        set_aside.append(match[0])
        return f"{marker}{len(set_aside) - 1}{marker}"

    changed = [_with_text(message, lambda text: pattern.sub(put_aside, text)) for message in messages]
    rendered = tokenizer.apply_chat_template(changed, tokenize=False, **options)
    tokens: list[int] = []
    # Odd pieces are numbers of what was set aside: a template may repeat a message, or leave it out
    for position, piece in enumerate(rendered.split(marker)):
        text = set_aside[int(piece)] if position % 2 else piece
        tokens += tokenizer(text, add_special_tokens=False, split_special_tokens=bool(position % 2))["input_ids"]
    return tokens


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    contents = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    if not contents:
        return None
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))


def _texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")  # of a call of a tool there may be none
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content or () if part.get("text"))


def _with_text(message: dict[str, Any], change: Any) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)}
    if content is None:
        return message
    parts = [{**part, "text": change(part["text"])} if part.get("text") else part for part in content]
    return {**message, "content": parts}
