"""What row weights change in a loss of TRL's: tensors in, tensors out."""

import torch


def weighting_term(token_losses: torch.Tensor, weights: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """
    What is added to an unweighted loss to count each row by its weight.

    The weighted loss of a step divides by its n tokens, not by its weighted tokens:

        L(w) = 1/n * sum_i w_i * sum_t l_it  =  L(1) + 1/n * sum_i (w_i - 1) * sum_t l_it,    n = sum_i n_i

    L(1) is the loss of plain SFT and the second part what this function returns: for weights of 1 exactly 0, in value
    and in gradient. n counts rows of weight above 0 only, as others are in no batch. Why not divide by
    sum_i w_i * n_i? Weights would then compare the rows of one step with each other and nothing else: a step of bad
    rows would be as large as one of good rows, a step of one row would not know its weight at all, and the sum of
    steps would descend no weighted objective. Divided by n, a row moves the model in proportion to its weight whatever
    it shares a step with, so that steps are, but for their numbers of tokens, unbiased estimates of the gradient of
    sum_i w_i * sum_t l_it over the dataset.

    Args:
        token_losses (`torch.Tensor`): shape (B, T), 0 where there is no label.
        weights (`torch.Tensor`): of each sequence's row, fp32 of shape (B, 1), or of each token's row, shape (B, L),
            in the places of the labels: T is L - 1, or more with virtual tokens in front.
        num_tokens (`torch.Tensor` or `int`): n, over the whole optimizer step.

    Returns:
        `torch.Tensor`: a scalar, in nats per token.

    Example:

    ```python
    >>> import torch
    >>> losses, weights = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[1.0], [0.5]])
    >>> losses.sum() / 3 + weighting_term(losses, weights, num_tokens=3)  # (1 + 2 + 0.5 * 4) / 3
    tensor(1.6667)

    ```
    """
    if weights.shape[1] > 1:
        weights = weights[:, 1:]  # of the tokens that are predicted
        num_virtual = token_losses.shape[1] - weights.shape[1]
        weights = torch.nn.functional.pad(weights, (num_virtual, 0), value=1.0)
    return ((weights - 1) * token_losses).sum() / torch.as_tensor(num_tokens).clamp(min=1)
