"""A model of well under a million parameters, and what it makes of rows of instructions and answers."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..losses import row_losses


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about 0.7 million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def load_model(folder: str) -> LlamaForCausalLM:
    """A model that was saved to a folder."""
    return LlamaForCausalLM.from_pretrained(folder)


def exact_match(model: Any, tokenizer: PreTrainedTokenizerFast, rows: Dataset) -> float:
    """
    Share of rows whose greedy answer equals the completion, in [0, 1].

    Args:
        model (`PreTrainedModel` or `PeftModel`): left in eval mode.
        tokenizer (`PreTrainedTokenizerFast`): pads on the left.
        rows (`datasets.Dataset`): right answers, columns `prompt` and `completion`.
    """
    answers = greedy_answers(model, tokenizer, rows)
    return sum(map(str.__eq__, answers, rows["completion"])) / len(rows)


@torch.no_grad()
def greedy_answers(model: Any, tokenizer: PreTrainedTokenizerFast, rows: Dataset, batch_size: int = 250) -> list[str]:
    """
    The model's greedy completion of each row's prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`): left in eval mode.
        tokenizer (`PreTrainedTokenizerFast`): pads on the left.
        rows (`datasets.Dataset`): columns `prompt` and `completion`; answers are cut at one token more than the
            longest completion of a batch.
        batch_size (`int`): rows per call of `generate`.
    """
    model.eval()
    answers = []
    for batch in rows.iter(batch_size=batch_size):
        inputs = tokenizer(batch["prompt"], return_tensors="pt", padding=True, return_token_type_ids=False)
        longest = max(len(completion) for completion in batch["completion"])
        outputs = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
        for answer in outputs[:, inputs["input_ids"].shape[1] :]:
            tokens = "".join(tokenizer.convert_ids_to_tokens(answer))
            answers.append(tokens.partition(tokenizer.eos_token)[0])
    return answers


@torch.no_grad()
def completion_losses(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: Dataset, batch_size: int = 250
) -> np.ndarray:
    """
    Mean negative log-likelihood per completion token of each row, in nats, shape (N,).

    Args:
        model (`PreTrainedModel` or `PeftModel`): with TRL's fused head; left in eval mode.
        tokenizer (`PreTrainedTokenizerFast`): one token per character, so that a prompt's length is its token count.
        rows (`datasets.Dataset`): columns `prompt` and `completion`.
        batch_size (`int`): rows per forward pass.
    """
    model.eval()
    pad = DataCollatorWithPadding(tokenizer)
    losses = []
    for batch in rows.iter(batch_size=batch_size):
        texts = [
            prompt + completion + tokenizer.eos_token
            for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
        ]
        inputs = pad(tokenizer(texts, return_token_type_ids=False)).data
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, prompt in enumerate(batch["prompt"]):
            start = int(inputs["attention_mask"][row].argmax())
            labels[row, start : start + len(prompt)] = -100
        outputs = model(**inputs, labels=labels, fused_lm_head=True)
        losses.append(row_losses(outputs.log_probs, outputs.label_mask).mean)
    return torch.cat(losses).numpy()
