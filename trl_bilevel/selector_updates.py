"""The two updates of the data selector (the upper level's variable), as pure functions.

Notation: `logits` are omega in R^N; a row's *mass* is `exp(omega)` (softmax) or `sigmoid(omega)`; its weight is
`w_i = N * mass_i / sum(mass)`, so that weights have mean 1 and equal logits give `w_i = 1`.
"""

from collections.abc import Callable
from typing import Literal

import torch


SelectorActivation = Literal["softmax", "sigmoid"]

# d mass / d omega, written in terms of the mass itself
_MASS_DERIVATIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda mass: mass,
    "sigmoid": lambda mass: mass * (1 - mass),
}


def mirror_descent_step(
    logits: torch.Tensor, log_mass: torch.Tensor, losses: torch.Tensor, learning_rate: float, centered: bool = True
) -> torch.Tensor:
    """
    One mirror-descent step on the rows of a batch; all other rows stay where they are, so its cost is O(B).

    With the entropy as mirror map the logits are the dual variables, and a gradient step on the weights is a plain
    step on the logits: exponentiated gradient on the simplex (softmax), its counterpart for the Fermi-Dirac entropy on
    the box (sigmoid). Subtracting the weighted batch mean leaves softmax weights unchanged up to normalisation and
    keeps the step centred, so that a batch of equally good rows moves nobody.

    Args:
        logits (`torch.Tensor`): omega of the batch's rows, shape (B,).
        log_mass (`torch.Tensor`): logarithms of their unnormalised weights, shape (B,); any constant may be added.
        losses (`torch.Tensor`): mean negative log-likelihood per completion token of each row, shape (B,), in nats.
        learning_rate (`float`): eta, the step in logits per nat.
        centered (`bool`): subtract the batch mean. Not for excess losses in sigmoid weights: their zero says whether
            a row is good, each on its own, and sigma of the accumulated log-likelihood ratio is its probability.

    Returns:
        `torch.Tensor`: the new logits, shape (B,).

    Example:

    ```python
    >>> import torch
    >>> logits = torch.zeros(2)
    >>> mirror_descent_step(logits, logits, losses=torch.tensor([1.0, 3.0]), learning_rate=0.5)
    tensor([ 0.5000, -0.5000])

    ```
    """
    # omega_i <- omega_i - eta * (l_i - sum_B mass_k l_k / sum_B mass_k)
    weighted_mean = (log_mass.softmax(dim=0) * losses).sum() if centered else 0.0
    return logits - learning_rate * (losses - weighted_mean)


def selection_gradient(
    mass: torch.Tensor, row_indices: torch.Tensor, losses: torch.Tensor, activation: SelectorActivation
) -> torch.Tensor:
    """
    Gradient of the batch's lower-level loss `g_B(omega) = 1/B * sum_{i in B} w_i l_i` in all N logits.

    Dense: the normaliser couples every row to the batch, so rows outside the batch move too, which is what the public
    codes' Adam does. For the full batch and softmax it is `sigma_i * (l_i - sum_k sigma_k l_k)`.

    Args:
        mass (`torch.Tensor`): unnormalised weights of all rows, shape (N,).
        row_indices (`torch.Tensor`): the batch's rows, shape (B,), int64, without repetition.
        losses (`torch.Tensor`): their mean negative log-likelihood per completion token, shape (B,), in nats.
        activation (`"softmax"` or `"sigmoid"`): how logits become mass.

    Returns:
        `torch.Tensor`: the gradient, shape (N,), in nats.
    """
    total = mass.sum()
    scale = mass.numel() / row_indices.numel()
    batch_loss = (mass[row_indices] * losses).sum() / total
    # d g_B / d omega_j = N/B * mass'_j * (1[j in B] l_j - sum_{i in B} mass_i l_i / sum(mass)) / sum(mass)
    excess = -batch_loss.expand(mass.shape).clone()
    excess[row_indices] += losses
    return scale * _MASS_DERIVATIVE[activation](mass) * excess / total


def once_and_finite(row_indices: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with a finite value, each once, and their values in fp32; both of shape (number of those rows,)."""
    finite = values.isfinite()
    row_indices, occurrence = row_indices[finite].unique(return_inverse=True)
    # One of a row's duplicates wins; which one does not matter, they were computed from the same parameters
    return row_indices, torch.empty(row_indices.numel()).scatter_(0, occurrence, values[finite].float())


def check_positions(row_indices: torch.Tensor, num_rows: int) -> None:
    """Raise an `IndexError` for positions that are no row's: PyTorch takes negative ones, and counts from the end."""
    if row_indices.numel():
        first, last = torch.stack(row_indices.aminmax()).tolist()
        if first < 0 or last >= num_rows:
            raise IndexError(f"Rows are numbered from 0 to {num_rows - 1}, got {first if first < 0 else last}.")


def count_rows_of_sources(sources: torch.Tensor) -> torch.Tensor:
    """
    How many rows each source has, float64 of shape (U,).

    Args:
        sources (`torch.Tensor`): the source of each row, int64 of shape (N,).

    Raises:
        `ValueError`: if they are not numbered from 0 without gaps.
    """
    first, last = torch.stack(sources.aminmax()).tolist()
    sizes = sources.bincount() if first == 0 and last < len(sources) else sources.new_zeros(1)
    if not sizes.all():
        raise ValueError(
            f"sources must be numbered from 0 without gaps, got {len(sources.unique())} of them in {first} to {last}."
            " `torch.unique(sources, return_inverse=True)` numbers them so."
        )
    return sizes.double()


def mean_over_source(
    sources: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    source_logits: torch.Tensor,
    source_sizes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The step of each source of a batch: `omega_s <- omega_s + 1/n_s * sum_{i in B and s} (step of row i)`.

    Args:
        sources (`torch.Tensor`): source of each row of the batch, int64 of shape (B,).
        before (`torch.Tensor`): logits of the rows, shape (B,).
        after (`torch.Tensor`): what the rows on their own would move to, shape (B,).
        source_logits (`torch.Tensor`): logits of all sources, shape (U,).
        source_sizes (`torch.Tensor`): rows of all sources in the dataset, float64 of shape (U,).

    Returns:
        The sources of the batch, each once, and their new logits.
    """
    steps = (after - before) / source_sizes[sources]
    moved, position = sources.unique(return_inverse=True)
    return moved, source_logits[moved] + torch.zeros(moved.shape).index_add_(0, position, steps.float())
