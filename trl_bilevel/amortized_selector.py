"""
A data selector that generalizes: a small head that reads a row's weight off the model's hidden states.

One logit per row says nothing about rows that were not trained on. The head learns from the same signal as the logits,
on hidden states that the training forward computes anyway, and scores any row with one forward pass.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file

from .batch_layout import BatchLayout
from .whole_files import damage_explained, write_whole


AMORTIZED_SELECTOR_FILE_NAME = "amortized_selector.safetensors"
_HIDDEN_UNITS = 128
_CURE = "Use another checkpoint."


def hidden_width(model: Any) -> int:
    """H of the last hidden states: what the head reads, which some models make narrower than their layers."""
    config = model.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # of OPT


@contextmanager
def captured_hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the last hidden states, shape (B, L, H), of every forward pass of `model` inside the block."""
    backbone = (model.get_base_model() if is_peft_model(model) else model).base_model
    captured: list[torch.Tensor] = []
    handle = backbone.register_forward_hook(
        lambda module, args, outputs: captured.append(outputs.last_hidden_state.detach())
    )
    try:
        yield captured
    finally:
        handle.remove()


def pool_completions(hidden_states: torch.Tensor, labels: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """
    Mean hidden state over each row's completion tokens.

    Args:
        hidden_states (`torch.Tensor`): shape (B, L, H), or (1, tokens, H) of a padding-free batch.
        labels (`torch.Tensor`): shape (B, L) or (1, tokens), -100 where ignored.
        layout ([`~trl_bilevel.batch_layout.BatchLayout`]): where the rows are in them.

    Returns:
        `torch.Tensor`: fp32, shape (B, H).

    Example:

    ```python
    >>> import torch
    >>> from trl_bilevel.batch_layout import PaddedLayout
    >>> pool_completions(torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[-100, 7, 8]]), PaddedLayout())
    tensor([[2.]])

    ```
    """
    return layout.pool(hidden_states, labels.ne(-100).to(hidden_states.device))


class _Head(torch.nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.hidden = torch.nn.Linear(hidden_size + 1, _HIDDEN_UNITS)
        self.output = torch.nn.Linear(_HIDDEN_UNITS, 1)

    def forward(self, pooled: torch.Tensor, row_means: torch.Tensor) -> torch.Tensor:
        features = torch.cat([self.norm(pooled), row_means[:, None]], dim=1)  # (B, H + 1)
        return self.output(torch.nn.functional.gelu(self.hidden(features))).squeeze(-1)


class AmortizedSelector:
    """
    A two-layer head from a row's pooled hidden states and its loss to a score: what a hard row may lose, the hidden
    states tell. On the CPU in fp32, like the selector it amortizes.

    Args:
        hidden_size (`int`): H, of the model.
        seed (`int`): of its first values.
        learning_rate (`float`): Adam's.
    """

    def __init__(self, hidden_size: int, seed: int, learning_rate: float = 1e-3):
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)  # the head lives on the CPU
            self._head = _Head(hidden_size)
        self._optimizer = torch.optim.Adam(self._head.parameters(), lr=learning_rate)

    @torch.no_grad()
    def score(self, pooled: torch.Tensor, row_means: torch.Tensor) -> torch.Tensor:
        """
        Scores of rows, higher is better, shape (B,).

        Args:
            pooled (`torch.Tensor`): their pooled hidden states, shape (B, H).
            row_means (`torch.Tensor`): their mean negative log-likelihoods per completion token, shape (B,), in nats.
        """
        return self._head(pooled, row_means)

    def update(self, pooled: torch.Tensor, row_means: torch.Tensor, losses: torch.Tensor) -> None:
        """
        One step down the gradient of the lower level in sigmoid weights, through the head:

            1/B * sum_i sigma(s_i) * (l_i - mean l)

        Args:
            pooled (`torch.Tensor`): of the training rows of a global batch, shape (B, H).
            row_means (`torch.Tensor`): their losses under the model, shape (B,), in nats.
            losses (`torch.Tensor`): what the selector is updated with, losses or excess losses, shape (B,), in nats.
                Rows with a NaN or infinite one are left out.
        """
        finite = losses.isfinite() & row_means.isfinite() & pooled.isfinite().all(dim=1)
        if not finite.any():
            return
        losses = losses[finite]
        weights = self._head(pooled[finite], row_means[finite]).sigmoid()  # (B,)
        self._optimizer.zero_grad()
        (weights * (losses - losses.mean())).mean().backward()
        self._optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """The head's parameters by name."""
        return dict(self._head.state_dict())

    def save(self, directory: str | os.PathLike) -> None:
        """Write the head and its optimizer to `amortized_selector.safetensors`, whole or not at all."""
        tensors = {f"head.{name}": value for name, value in self.state().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        write_whole(Path(directory) / AMORTIZED_SELECTOR_FILE_NAME, lambda partial: save_file(tensors, partial))

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restore what `save` wrote.

        Raises:
            `FileNotFoundError`: if the directory holds no head.
            `ValueError`: if the file is damaged or belongs to a model of another size.
        """
        path = Path(directory) / AMORTIZED_SELECTOR_FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so the amortized selector cannot be restored. Resume from a checkpoint that "
                "was written with `amortized_selector=True`, or train from the start."
            )
        with damage_explained(path, _CURE):
            tensors = load_file(path)
        head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
        try:
            self._head.load_state_dict(head)
        except RuntimeError as error:
            raise ValueError(f"{path} is of a model of another size ({' '.join(str(error).split())}).") from error
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def load_amortized_selector(directory: str | os.PathLike) -> AmortizedSelector | None:
    """
    The head in a run's folder, of whatever size, or `None` if the run had none.

    Raises:
        `ValueError`: if the file is damaged.
    """
    path = Path(directory) / AMORTIZED_SELECTOR_FILE_NAME
    if not path.is_file():
        return None
    with damage_explained(path, _CURE):
        hidden_size = load_file(path)["head.hidden.weight"].shape[1] - 1
    selector = AmortizedSelector(hidden_size, seed=0)
    selector.load(directory)
    return selector
