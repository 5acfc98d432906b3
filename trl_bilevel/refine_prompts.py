"""What the model is asked when a row's answer is regenerated: the tokens before the last assistant turn."""

import json
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple

from datasets import Dataset
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from trl.data_utils import _tokenize, is_conversational, is_conversational_from_value, maybe_convert_to_chatml

from .assistant_turns import ANSWERING_ROLES, tokens_before_answer
from .plain_text import has_control_tokens, tokenize_as_text
from .response_checks import RewardFunc, sum_rewards


_ROWS_TO_TRY = 100
_END_OF_THOUGHT = "</think>"


class Question(NamedTuple):
    """A row to answer anew."""

    row: int
    """Its position in the training dataset."""
    prompt_ids: list[int]
    """Tokens that training puts before the answer."""
    generation_ids: list[int]
    """Tokens that the model is asked with; the same without a prompt template."""
    prompt: Any
    """Text or messages, as reward functions of TRL take them."""
    original: str
    """Text of the original answer."""
    columns: dict[str, Any]
    """The row itself."""

    def completion(self, text: str) -> Any:
        """A response in the form of the prompt: text or messages."""
        return [{"role": "assistant", "content": text}] if isinstance(self.prompt, list) else text


def check_refinable(
    reader: "QuestionReader", has_formatting_func: bool, reward_funcs: list[RewardFunc] | None = None
) -> None:
    """
    Check that the rows of a dataset have a prompt, by the first of them, and that reward functions take them.

    Raises:
        `ValueError`: for language-modeling rows, which have none, and for tokenized rows with a prompt template; and
            what a reward function raises.
    """
    row = reader.dataset[0]
    if "input_ids" in row:
        if "labels" not in row and "completion_mask" not in row:
            raise ValueError(
                "`refine_ratio` needs rows with a prompt, but these have `input_ids` without `labels` or "
                "`completion_mask`, which would tell where the answer starts. Add one of them."
            )
        if reader.template is not None:
            raise ValueError(
                "`refine_prompt_template` needs the text of the rows, but these are tokenized already. Pass them to "
                "BilevelSFTTrainer as text, or leave the template out."
            )
    elif has_formatting_func or not ("prompt" in row or is_conversational_from_value(row) or is_conversational(row)):
        raise ValueError(
            "`refine_ratio` needs rows with a prompt to answer anew, but these are language-modeling rows (columns "
            f"{sorted(row)}{', formatted by `formatting_func`' if has_formatting_func else ''}). Use rows with "
            "`prompt` and `completion`, or `messages`; or `refine_ratio=0`."
        )
    num_tried = min(_ROWS_TO_TRY, len(reader.dataset))
    question = next((found for index in range(num_tried) if (found := reader.read(index)) is not None), None)
    if question is None:
        raise ValueError(
            f"None of the first {num_tried} rows can be refined: they do not end with an assistant message in text "
            "after a prompt, or the loss covers the prompt too. Use `prompt` and `completion`, or `messages` (in a "
            "plain SFTTrainer with `assistant_only_loss=True`)."
        )
    if reward_funcs:
        # Now, not when the first answers are there: half of the training may have passed by then
        tokens = reader.tokenizer(question.original)["input_ids"]
        sum_rewards(reward_funcs, [question], [question.original], [tokens])


class QuestionReader:
    """
    Reads questions from the training rows.

    Args:
        dataset (`datasets.Dataset`): the rows as the user passed them.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        chat_template (`str`, *optional*): instead of the tokenizer's own.
        prompt_template (`str`, *optional*): see [`~trl_bilevel.refinement_config.RefinementConfig`].
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        prompt_template: str | None,
    ):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template = None if prompt_template is None else SandboxedEnvironment().from_string(prompt_template)

    def read(self, row: int) -> Question | None:
        """The question of a row, or `None` if it does not end with an answer in text, but for instance a tool call."""
        columns = self.dataset[row]
        if "input_ids" in columns:
            return self._tokenized_question(row, columns)
        messages_row = maybe_convert_to_chatml(deepcopy(columns)) if is_conversational_from_value(columns) else columns
        if is_conversational(messages_row):
            messages = (
                messages_row["messages"]
                if "messages" in messages_row
                else [*messages_row["prompt"], *messages_row["completion"]]
            )
            return self._conversation(row, columns, messages)
        prompt, original = columns["prompt"], columns["completion"]
        asked = prompt if self.template is None else self.template.render(prompt=prompt, completion=original)
        prompt_ids = self._text_tokens(prompt)
        generation_ids = prompt_ids if self.template is None else self._text_tokens(asked)
        if not prompt_ids:
            return None
        if self.tokenizer.eos_token is not None:
            original = original.removesuffix(self.tokenizer.eos_token)
        return Question(row, prompt_ids, generation_ids, prompt, original, columns)

    def _text_tokens(self, prompt: str) -> list[int]:
        tokens = self._tokens(prompt)
        eos_token = self.tokenizer.eos_token
        if tokens and tokens[-1] == self.tokenizer.eos_token_id and not (eos_token and prompt.endswith(eos_token)):
            tokens.pop()  # added by the tokenizer: nothing is to end here
        return tokens

    def _conversation(self, row: int, columns: dict[str, Any], messages: list[dict[str, Any]]) -> Question | None:
        if len(messages) < 2 or messages[-1]["role"] not in ANSWERING_ROLES or messages[-1].get("tool_calls"):
            return None
        if not isinstance(messages[-1].get("content"), str):
            return None
        *prompt, answer = messages
        tools = columns.get("tools")
        options = {
            "add_generation_prompt": True,
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(columns.get("chat_template_kwargs") or {}),
        }
        prompt_ids = self._ask(prompt, answer, options)
        generation_ids = prompt_ids
        if self.template is not None:
            asked = self.template.render(prompt=prompt[-1].get("content"), completion=answer["content"])
            generation_ids = self._ask([*prompt[:-1], {**prompt[-1], "content": asked}], answer, options)
        if prompt_ids is None or generation_ids is None:  # the template does not show such an answer
            return None
        return Question(row, prompt_ids, generation_ids, prompt, answer["content"], columns)

    def _ask(self, prompt: list[dict[str, Any]], answer: dict[str, Any], options: dict[str, Any]) -> list[int] | None:
        """The prompt under the header that the row's answer is trained with, which may be of another role."""
        if answer["role"] == "assistant":
            return self._tokens(prompt, **options)
        options = {name: value for name, value in options.items() if name != "add_generation_prompt"}
        return tokens_before_answer([*prompt, answer], self.tokenizer, options)

    def _tokenized_question(self, row: int, columns: dict[str, Any]) -> Question | None:
        tokens = list(columns["input_ids"])
        if "labels" in columns:
            is_answer = [label != -100 for label in columns["labels"]]
        else:
            is_answer = [bool(bit) for bit in columns["completion_mask"]]
        start = start_of_last_answer(is_answer)
        if start == 0:
            return None
        prompt_ids, answer_ids = tokens[:start], after_last(tokens[start:], self._answer_header)
        return Question(
            row,
            prompt_ids,
            prompt_ids,
            self.tokenizer.decode(prompt_ids),
            decode_response(self.tokenizer, prompt_ids, answer_ids),
            columns,
        )

    def text_of(self, question: Question, completion_ids: list[int], stop_ids: list[int]) -> str:
        """
        A response as the rows write an answer: of a row in text with all that it has but the token that ends it, of a
        conversation without what the chat template puts around it, and without the thoughts that the original lacks.

        Args:
            question ([`Question`]): what was asked.
            completion_ids (`list[int]`): the response.
            stop_ids (`list[int]`): tokens that end a response.
        """
        if isinstance(question.prompt, str) and "input_ids" not in question.columns:
            tokens = completion_ids[:-1] if completion_ids and completion_ids[-1] in stop_ids else completion_ids
            text = decode_response(self.tokenizer, question.prompt_ids, tokens, skip_special_tokens=False)
            if not decode_response(self.tokenizer, question.prompt_ids, tokens).strip():
                return ""  # a mark at the end of nothing
        else:
            tokens = after_last(completion_ids, self._answer_header)
            text = decode_response(self.tokenizer, question.prompt_ids, tokens)
        return visible_answer(text, question.original)

    @cached_property
    def _answer_header(self) -> list[int]:
        """Control tokens, and what is between them, that the chat template puts between prompt and answer."""
        if (self.chat_template or self.tokenizer.chat_template) is None:
            return []
        marker = "an answer"
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": marker}]
        prompt, whole = (
            self.tokenizer.apply_chat_template(
                part, tokenize=False, chat_template=self.chat_template, add_generation_prompt=part is not messages
            )
            for part in (messages[:1], messages)
        )
        if not whole.startswith(prompt):
            return []
        header = self.tokenizer(whole[len(prompt) :].partition(marker)[0], add_special_tokens=False)["input_ids"]
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return header if special & set(header) else []

    def _tokens(self, prompt: Any, **options: Any) -> list[int]:
        # A prompt in text may be a conversation that the user has rendered: its special tokens are meant
        if isinstance(prompt, list) and has_control_tokens(self.tokenizer, prompt):
            return tokenize_as_text(self.tokenizer, prompt, **options)
        return list(_tokenize(self.tokenizer, prompt, **options)["input_ids"])


def start_of_last_answer(is_answer: list[bool]) -> int:
    """
    Where the last run of answer tokens starts; 0 if there is none.

    Example:

    ```python
    >>> start_of_last_answer([False, True, False, False, True, True, False])
    4

    ```
    """
    position = len(is_answer)
    while position > 0 and not is_answer[position - 1]:
        position -= 1
    while position > 0 and is_answer[position - 1]:
        position -= 1
    return position


def after_last(tokens: list[int], header: list[int]) -> list[int]:
    """
    The tokens after the last occurrence of others; all of them if there is none.

    Example:

    ```python
    >>> after_last([7, 1, 2, 8, 9, 1, 2, 5], header=[1, 2])
    [5]
    >>> after_last([7, 8], header=[1, 2])
    [7, 8]

    ```
    """
    for start in range(len(tokens) - len(header), -1, -1) if header else ():
        if tokens[start : start + len(header)] == header:
            return tokens[start + len(header) :]
    return tokens


def decode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    completion_ids: list[int],
    skip_special_tokens: bool = True,
) -> str:
    """
    Text of a response, by default without special tokens.

    It is cut from the text of prompt and response together: some tokenizers drop the space before a text's first word.
    """
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    prompt = tokenizer.decode(prompt_ids, **options)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], **options)
    return whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(completion_ids, **options)


def visible_answer(text: str, original: str) -> str:
    """
    The part of a response that answers, without the thoughts before it, unless the original shows its thoughts too.

    Chat templates of reasoning models add an empty thought before an answer that has none, which the model repeats.

    Example:

    ```python
    >>> visible_answer("<think>\\n\\n</think>\\n\\n13", original="12")
    '13'

    ```
    """
    if _END_OF_THOUGHT not in text or _END_OF_THOUGHT in original:
        return text
    return text.rpartition(_END_OF_THOUGHT)[2].lstrip()


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, eos_token_ids: Any, chat_template: str | None, row: dict[str, Any]
) -> list[int]:
    """
    Tokens that end a response: the tokenizer's and the model's, and what the chat template puts after an answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        eos_token_ids (`int` or `list[int]`, *optional*): of the model's generation config.
        chat_template (`str`, *optional*): instead of the tokenizer's own.
        row (`dict`): a training row, to tell whether the chat template applies.
    """
    ids = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    has_template = (chat_template or tokenizer.chat_template) is not None
    if has_template and ("input_ids" in row or is_conversational(row) or is_conversational_from_value(row)):
        marker = "an answer"
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": marker}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template)
        after = tokenizer(text.rpartition(marker)[2].lstrip(), add_special_tokens=False)["input_ids"]
        # Tokenized rows may be of another format
        fits = "input_ids" not in row or set(after[:1]) <= set(row["input_ids"])
        if after and after[0] in tokenizer.added_tokens_encoder.values() and fits:
            ids.append(after[0])
    return sorted(set(ids))
