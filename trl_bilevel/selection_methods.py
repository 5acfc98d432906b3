"""The selection methods: how much the rows of a step count, and what their losses tell the selector."""

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from .bilevel_sft_config import BilevelSFTConfig
from .data_selector import DataSelector
from .losses import closed_form_log_weights


class Selection(Protocol):
    """
    A selection method. To add one: a class here and its name in `SELECTION_METHODS`, the name among the choices of
    `BilevelSFTConfig.selection_method`, and a test of its weights against something that is known.
    """

    needs_losses: ClassVar[bool]
    """
    Whether the weights of a step depend on its losses. If so `weights` is called after the forward pass, or with
    gradient accumulation after an extra one; if not, before it, without losses.
    """

    def weights(
        self, selector: DataSelector, row_indices: torch.Tensor, row_means: torch.Tensor | None
    ) -> torch.Tensor:
        """
        How much the training rows of one optimizer step count in the model's objective.

        Args:
            selector ([`~trl_bilevel.DataSelector`]): of the run.
            row_indices (`torch.Tensor`): the rows, of all processes, int64 of shape (B,).
            row_means (`torch.Tensor`, *optional*): their losses, mean negative log-likelihood per completion token in
                nats, shape (B,).

        Returns:
            `torch.Tensor`: fp32, shape (B,).
        """
        ...

    def update(
        self, selector: DataSelector, row_indices: torch.Tensor, row_means: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """
        The upper level, after the model's step.

        Args:
            selector ([`~trl_bilevel.DataSelector`]): of the run.
            row_indices (`torch.Tensor`): the rows, of all processes, int64 of shape (B,).
            row_means (`torch.Tensor`): their losses in nats, shape (B,).
            losses (`torch.Tensor`): their excess losses over the value function where there is one, else the same,
                shape (B,).
        """
        ...


class BilevelDataSelection:
    """BDS (arXiv 2511.21056): weights that are learned, one for each row, by a step against its loss."""

    needs_losses: ClassVar[bool] = False

    def weights(
        self, selector: DataSelector, row_indices: torch.Tensor, row_means: torch.Tensor | None
    ) -> torch.Tensor:
        return selector.weights_of(row_indices)

    def update(
        self, selector: DataSelector, row_indices: torch.Tensor, row_means: torch.Tensor, losses: torch.Tensor
    ) -> None:
        selector.update(row_indices, losses)


class BilevelMultiObjective:
    """
    BMO (arXiv 2511.21056): weights in closed form, from the losses of the step alone.

    Args:
        temperature (`float`): tau, in nats, see [`~trl_bilevel.losses.closed_form_log_weights`].
    """

    needs_losses: ClassVar[bool] = True

    def __init__(self, temperature: float):
        self._temperature = temperature

    def weights(
        self, selector: DataSelector, row_indices: torch.Tensor, row_means: torch.Tensor | None
    ) -> torch.Tensor:
        assert row_means is not None
        return closed_form_log_weights(row_means, self._temperature).exp()

    def update(
        self, selector: DataSelector, row_indices: torch.Tensor, row_means: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """The selector only remembers the weights, those of a row's last visit."""
        selector.assign(row_indices, closed_form_log_weights(row_means, self._temperature))


SELECTION_METHODS: dict[str, Callable[[BilevelSFTConfig], Selection]] = {
    "bds": lambda args: BilevelDataSelection(),
    "bmo": lambda args: BilevelMultiObjective(args.bmo_temperature),
}


def build_selection(args: BilevelSFTConfig) -> Selection:
    """The selection method that the options ask for."""
    return SELECTION_METHODS[args.selection_method](args)
