"""The loss of each token, as TRL sums them: tensors in, tensors out."""

import torch


def token_losses(log_probs: torch.Tensor, loss_type: str) -> torch.Tensor:
    """
    The loss of each token, as [`~trl.SFTTrainer`] sums them.

    Args:
        log_probs (`torch.Tensor`): log-probabilities of the labels, in nats, 0 where there is no label, shape (B, T).
        loss_type (`"nll"` or `"dft"`): negative log-likelihood, or the same times the token's own probability, through
            which no gradient goes (dynamic fine-tuning, arXiv 2508.05629).

    Example:

    ```python
    >>> import torch
    >>> token_losses(torch.tensor([[0.5]]).log(), "nll"), token_losses(torch.tensor([[0.5]]).log(), "dft")
    (tensor([[0.6931]]), tensor([[0.3466]]))

    ```
    """
    nll = -log_probs
    return nll * log_probs.exp().detach() if loss_type == "dft" else nll


def smoothed_token_losses(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """
    The loss of each token with label smoothing, as transformers' `LabelSmoother` sums them.

        (1 - epsilon) * -log p(label) + epsilon * 1/V * sum_v -log p(v)

    Args:
        logits (`torch.Tensor`): of the next tokens, shape (B, L, V).
        labels (`torch.Tensor`): -100 where the loss does not count, shape (B, L); the first is nobody's next token.
        epsilon (`float`): `label_smoothing_factor`.

    Returns:
        `torch.Tensor`: nats, 0 where there is no label, shape (B, L-1).
    """
    labels = labels[:, 1:]
    nll = -logits[:, :-1].log_softmax(dim=-1, dtype=torch.float32)  # (B, L-1, V)
    of_labels = nll.gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (B, L-1)
    return ((1 - epsilon) * of_labels + epsilon * nll.mean(dim=-1)).masked_fill(labels == -100, 0.0)
