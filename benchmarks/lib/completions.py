"""A chat model on conversations: the loss of each answer, and its own answers."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence


_TOKENS_PER_BATCH = 2048


def prompt_and_answer(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Both as messages, of a row with `prompt` and `completion` or with `messages`, whose last one is the answer."""
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    return row["prompt"], row["completion"]


def encode(tokenizer: Any, rows: Dataset, max_length: int) -> list[tuple[list[int], int]]:
    """Token ids of each row, cut at `max_length`, and how many of them are the prompt's."""
    encoded = []
    for row in rows:
        prompt, answer = prompt_and_answer(row)
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
        encoded.append((ids[:max_length], len(start)))
    return encoded


@torch.no_grad()
def answer_losses(model: Any, tokenizer: Any, rows: Dataset, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Loss of each row's answer, summed over its tokens, in nats, and how many there are; shape (N,) each.

    The head is applied to the answers' positions only.
    """
    model.eval()
    causal_lm = model.get_base_model() if is_peft_model(model) else model
    encoded = encode(tokenizer, rows, max_length)
    sums, counts = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=np.int64)
    for batch in _by_length([len(ids) for ids, _ in encoded]):
        ids = [torch.tensor(encoded[row][0]) for row in batch]
        inputs = pad_sequence(ids, batch_first=True).to(causal_lm.device)  # (B, L)
        lengths = torch.tensor([len(row) for row in ids])
        positions = torch.arange(inputs.shape[1])
        starts = torch.tensor([encoded[row][1] for row in batch])
        is_read = (positions < lengths[:, None]).to(inputs.device)  # (B, L)
        is_answer = is_read.cpu() & (positions >= starts[:, None])
        hidden = causal_lm.base_model(input_ids=inputs, attention_mask=is_read.long()).last_hidden_state[:, :-1]
        is_target = is_answer[:, 1:].to(inputs.device)  # (B, L-1)
        logits = causal_lm.get_output_embeddings()(hidden[is_target]).float()  # (T, V)
        nll = torch.nn.functional.cross_entropy(logits, inputs[:, 1:][is_target], reduction="none").cpu()  # (T,)
        per_row = is_answer[:, 1:].sum(dim=1)  # (B,)
        row_of_token = torch.repeat_interleave(torch.arange(len(batch)), per_row)
        sums[batch] = torch.zeros(len(batch)).index_add_(0, row_of_token, nll).numpy()
        counts[batch] = per_row.numpy()
    return sums, counts


def _by_length(lengths: list[int]) -> list[list[int]]:
    """Rows of similar length, in batches of a number of tokens."""
    batches: list[list[int]] = [[]]
    for row in np.argsort(lengths, kind="stable").tolist():
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > _TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(row)
    return [batch for batch in batches if batch]


@torch.no_grad()
def greedy_answers(model: Any, tokenizer: Any, rows: Dataset, max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """The model's own answer to each row's prompt."""
    model.eval()
    answers = []
    for first in range(0, len(rows), batch_size):
        batch = rows.select(range(first, min(first + batch_size, len(rows))))
        prompts = [
            tokenizer.apply_chat_template(prompt_and_answer(row)[0], add_generation_prompt=True, tokenize=False)
            for row in batch
        ]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
