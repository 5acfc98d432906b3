"""A model of well under a million parameters, trained on the spot, and its score."""

from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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


@torch.no_grad()
def exact_match(model: Any, tokenizer: PreTrainedTokenizerFast, rows: Dataset, batch_size: int = 250) -> float:
    """
    Share of rows whose greedy answer equals the completion, in [0, 1].

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model; left in the mode it was in.
        tokenizer (`PreTrainedTokenizerFast`): pads on the left.
        rows (`datasets.Dataset`): right answers, columns `prompt` and `completion`.
        batch_size (`int`): rows per call of `generate`.
    """
    was_training = model.training
    model.eval()
    correct = 0
    for batch in rows.iter(batch_size=batch_size):
        inputs = tokenizer(batch["prompt"], return_tensors="pt", padding=True, return_token_type_ids=False)
        longest = max(len(completion) for completion in batch["completion"])
        outputs = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
        answers = outputs[:, inputs["input_ids"].shape[1] :]
        for answer, completion in zip(answers, batch["completion"], strict=True):
            tokens = (
                answer[: (answer == tokenizer.eos_token_id).nonzero()[0]]
                if tokenizer.eos_token_id in answer
                else answer
            )
            correct += "".join(tokenizer.convert_ids_to_tokens(tokens)) == completion
    model.train(was_training)
    return correct / len(rows)
