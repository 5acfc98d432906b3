"""
The forward pass of TRL's fused head, without the positions that have no label.

Without Triton TRL's head projects every position to the vocabulary, prompts and padding included, and masks out what
comes of it: on a CPU the largest part of a step. With Triton it leaves them out itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from transformers import TrainingArguments


_LABELS_AT_ONCE = 128


class HeadOutputs(NamedTuple):
    """Fields of TRL's `FusedCausalLMOutput`, each of shape (B, L-1); 0 where there is no label."""

    log_probs: torch.Tensor
    label_mask: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    aux_loss: torch.Tensor | None
    """A scalar; `None` of models without a mixture of experts."""


def leaves_out_unlabelled(model: Any, args: TrainingArguments) -> bool:
    """
    Whether [`fused_forward`] hands labelled positions only to the head.

    Only on a CPU: with Triton TRL does it, and other devices, like a compiled model, want the same shapes in every
    step. Not with prompt learning either, whose virtual tokens move the positions of a row's own.
    """
    has_virtual_tokens = is_peft_model(model) and model.active_peft_config.is_prompt_learning
    return args.device.type == "cpu" and not args.torch_compile and not has_virtual_tokens


def fused_forward(
    model: Any, unwrapped: Any, inputs: dict[str, torch.Tensor], args: TrainingArguments, **options: Any
) -> Any:
    """
    `model(**inputs, **options, fused_lm_head=True)`: log-probabilities and metrics of the labels, (B, L-1) each.

    The model is given `shift_labels`, those of the labelled positions one after the other, and the hidden states of
    the others are dropped between its backbone and its head. Everything else remains TRL's.

    Args:
        model (`torch.nn.Module`): what is called, prepared by accelerate or not.
        unwrapped (`torch.nn.Module`): the same model without what accelerate put around it, PEFT's included.
        inputs (`dict`): of the model, with `labels` of shape (B, L).
        args (`transformers.TrainingArguments`): device, and whether the model is compiled.
        options: passed on.
    """
    if not leaves_out_unlabelled(unwrapped, args):
        return model(**inputs, **options, use_cache=False, fused_lm_head=True)
    labels = inputs["labels"][:, 1:]
    mask = labels != -100  # (B, L-1)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    with _labelled_hidden_states(unwrapped, mask):
        outputs = model(**others, **options, shift_labels=labels[mask][None], use_cache=False, fused_lm_head=True)

    def at_positions(values: torch.Tensor) -> torch.Tensor:
        # `masked_scatter` keeps the outputs connected to the model where nothing has a label
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return HeadOutputs(
        at_positions(outputs.log_probs),
        mask,
        at_positions(outputs.entropy),
        at_positions(outputs.is_top1),
        outputs.aux_loss,
    )


def full_forward(
    model: Any, unwrapped: Any, inputs: dict[str, torch.Tensor], args: TrainingArguments, **options: Any
) -> tuple[HeadOutputs, torch.Tensor]:
    """
    The same from the logits of the labelled positions, which TRL's fused head never has, for label smoothing.

    Args:
        model, unwrapped, inputs, args, options: as for [`fused_forward`].

    Returns:
        The outputs, and the mean negative log-likelihood of all tokens of the vocabulary, shape (B, L-1), in nats; 0
        where there is no label.
    """
    labels = inputs["labels"][:, 1:]
    mask = labels != -100  # (B, L-1)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    if leaves_out_unlabelled(unwrapped, args):
        with _labelled_hidden_states(unwrapped, mask):
            outputs = model(**others, **options, use_cache=False)
        logits = outputs.logits[0]  # (n, V), n labels
    else:
        outputs = model(**others, **options, use_cache=False)
        logits = outputs.logits[:, -inputs["labels"].shape[1] : -1][mask]  # without virtual tokens
    wanted = labels[mask]
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)

    def at_positions(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    found = HeadOutputs(
        at_positions(log_p.gather(1, wanted[:, None])[:, 0]),
        mask,
        at_positions(entropy),
        at_positions(logits.argmax(-1) == wanted),
        outputs.aux_loss if "aux_loss" in outputs else None,
    )
    return found, at_positions(-log_p.mean(-1))


class LabelScores(NamedTuple):
    """What a model says of the labels, each of shape (B, L-1)."""

    log_probs: torch.Tensor
    """Nats; 0 where there is no label."""
    entropy: torch.Tensor
    """Of the next-token distributions, nats; 0 where there is no label."""
    label_mask: torch.Tensor


@torch.no_grad()
def score_labels(model: Any, inputs: dict[str, torch.Tensor], args: TrainingArguments) -> LabelScores:
    """
    Log-probabilities and entropies of the labels, without gradient.

    On a CPU by the model's own head and two passes over its logits, where TRL's fused head takes ten; elsewhere by
    the fused head, which never holds all logits.

    Args:
        model (`torch.nn.Module`): not prepared by accelerate; with TRL's fused head.
        inputs (`dict`): of the model, with `labels` of shape (B, L).
        args (`transformers.TrainingArguments`): as for [`fused_forward`].
    """
    if not leaves_out_unlabelled(model, args):
        outputs = fused_forward(model, model, inputs, args)
        return LabelScores(outputs.log_probs, outputs.entropy, outputs.label_mask)
    labels = inputs["labels"][:, 1:]
    mask = labels != -100  # (B, L-1)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    with _labelled_hidden_states(model, mask):
        logits = model(**others, use_cache=False).logits[0]  # (n, V), n labels
    found, entropies = [], []
    for part, wanted in zip(logits.split(_LABELS_AT_ONCE), labels[mask].split(_LABELS_AT_ONCE), strict=True):
        log_p = part.log_softmax(-1, dtype=torch.float32)
        found.append(log_p.gather(1, wanted[:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    zeros = torch.zeros(mask.shape)
    return LabelScores(
        zeros.masked_scatter(mask, torch.cat(found)), zeros.masked_scatter(mask, torch.cat(entropies)), mask
    )


@contextmanager
def _labelled_hidden_states(model: Any, mask: torch.Tensor) -> Iterator[None]:
    """Inside the block the backbone ends with the hidden states of shape (1, n, H) that `mask` (B, L-1) marks."""
    backbone = (model.get_base_model() if is_peft_model(model) else model).base_model

    def drop_others(module: torch.nn.Module, args: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][mask][None]
        return outputs

    handle = backbone.register_forward_hook(drop_others)
    try:
        yield
    finally:
        handle.remove()
