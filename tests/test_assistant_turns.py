"""The assistant's tokens of a conversation, against TRL's masks from a template that marks them."""

import pytest
from datasets import Dataset
from trl.data_utils import _tokenize

from trl_bilevel.assistant_turns import is_conversation_without_prompt, mark_assistant_turns


UNMARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As templates of thinking models do: thoughts of earlier turns are left out
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = [
    _conversation(("user", "hello"), ("assistant", "good day")),
    _conversation(("system", "be kind"), ("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")),
    _conversation(("user", "ünïcode 🙂"), ("assistant", "読む 🙂")),
    _conversation(("assistant", "I begin"), ("user", "go on"), ("assistant", "so I do")),
    _conversation(("user", "nobody answers")),
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_turns_are_those_that_a_marking_template_marks(tokenizer, messages):
    expected = _tokenize(tokenizer, messages, return_assistant_tokens_mask=True)
    (row,) = mark_assistant_turns(Dataset.from_list([{"messages": messages, "id": 3}]), tokenizer, UNMARKED)
    assert row["input_ids"] == expected["input_ids"]
    assert row["id"] == 3
    assert "messages" not in row
    # The line break after a turn counts here, as it does for a prompt and its completion in TRL
    line_break = tokenizer("\n")["input_ids"]
    marked = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    pieces = []
    for message in messages:
        if message["role"] == "assistant":
            pieces += tokenizer(message["content"] + "<|im_end|>")["input_ids"] + line_break
    if messages[0]["role"] == "assistant":  # nothing comes before: its header counts too
        pieces = tokenizer("<|im_start|>assistant\n")["input_ids"] + pieces
    assert marked == pieces


def test_turns_that_the_template_changes_later_are_passed_over(tokenizer):
    messages = _conversation(
        ("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "<think>so</think>d")
    )
    (row,) = mark_assistant_turns(Dataset.from_list([{"messages": messages}]), tokenizer, FORGETFUL)
    marked = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "<think>so</think>d<|im_end|>\n"


def test_other_formats_of_conversations(tokenizer):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    row = {"conversations": turns}
    assert is_conversation_without_prompt(row)
    (found,) = mark_assistant_turns(Dataset.from_list([row]), tokenizer, UNMARKED)
    marked = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked).endswith("good day<|im_end|>\n")
    assert "hello" not in tokenizer.decode(marked)
    assert not is_conversation_without_prompt({"prompt": turns, "completion": turns})
    assert not is_conversation_without_prompt({"text": "hello"})
    assert not is_conversation_without_prompt({"input_ids": [1]})
