"""The forward pass of a step: what the model says of each row, and the loss that the lower level makes of it."""

from typing import Any

import torch
from trl import SFTTrainer

from .amortized_selector import AmortizedSelector, captured_hidden_states, pool_completions
from .batch_layout import BatchLayout, RowOutputs
from .bilevel_sft_config import BilevelSFTConfig
from .labelled_positions import full_forward, fused_forward
from .losses import RowLosses, lower_level_losses, row_losses
from .step_rows import StepRows


class RowForward(SFTTrainer):
    """The forward pass of both levels, and of the value function."""

    args: BilevelSFTConfig
    amortized_selector: AmortizedSelector | None
    _step_pooled: list[torch.Tensor]

    def _forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], layout: BatchLayout
    ) -> tuple[RowOutputs, RowLosses]:
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        unwrapped = self.accelerator.unwrap_model(self.model)
        try:
            if torch.is_grad_enabled() and self._label_smoothing:
                outputs = layout.unpack(*full_forward(model, unwrapped, inputs, self.args, **options))
            else:
                outputs = layout.unpack(fused_forward(model, unwrapped, inputs, self.args, **options))
        except ValueError as error:
            if "Image features and image tokens do not match" not in str(error):
                raise
            raise ValueError(
                f"`max_length={self.args.max_length}` cuts off tokens that stand for an image, but not the image. "
                "Raise `max_length`, or set it to `None`."
            ) from error
        return outputs, row_losses(outputs.log_probs, outputs.label_mask)

    def _forward_and_pool(
        self, model: torch.nn.Module, inputs: dict[str, Any], rows: StepRows
    ) -> tuple[RowOutputs, RowLosses]:
        if self.amortized_selector is None:
            return self._forward(model, inputs, rows.layout)
        with captured_hidden_states(self.accelerator.unwrap_model(self.model)) as hidden_states:
            outputs, losses = self._forward(model, inputs, rows.layout)
        pooled = pool_completions(hidden_states.pop(), inputs["labels"], rows.layout)  # (R, H)
        self._step_pooled.append(rows.row_means(pooled[: rows.num_sequences].cpu()))
        return outputs, losses

    @property
    def _label_smoothing(self) -> float:
        """As in [`~trl.SFTTrainer`], where dynamic fine-tuning leaves it out."""
        return self.args.label_smoothing_factor if self.args.loss_type == "nll" else 0.0

    def _lower_level_losses(self, outputs: RowOutputs, ratios: torch.Tensor | None = None) -> torch.Tensor:
        """Summed over the tokens of each row, shape (R,); `ratios` as in [`~trl_bilevel.losses.row_losses`]."""
        return lower_level_losses(
            outputs.log_probs,
            outputs.label_mask,
            self.args.loss_type,
            self._label_smoothing,
            outputs.uniform_nll,
            ratios,
        )
