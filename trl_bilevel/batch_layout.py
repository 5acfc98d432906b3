"""Where the rows of a batch are in the model's inputs: one under the other with padding, or one after the other."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .paired_batches import HAS_IMAGES, ROW_LENGTHS, ROW_WIDTHS


class RowOutputs(NamedTuple):
    """What the model says of the tokens of R rows, each of shape (R, L-1); 0 where a label is ignored."""

    log_probs: torch.Tensor
    """Log-probabilities of the next tokens, in nats."""
    label_mask: torch.Tensor
    """Which of them belong to a completion, bool."""
    entropy: torch.Tensor
    """Of the next-token distributions, in nats."""
    is_top1: torch.Tensor
    """Whether the label is the most likely token, bool."""
    aux_loss: Any
    """Load-balancing loss of a mixture-of-experts model, scalar tensor; `None` of other models."""
    uniform_nll: torch.Tensor | None = None
    """Mean negative log-likelihood of all tokens of the vocabulary, in nats, for label smoothing; else `None`."""


class PaddedLayout:
    """
    A sequence of the batch per row.

    Args:
        widths (`torch.Tensor`, *optional*): columns that each row needs, int64 of shape (R,), on the CPU: after them
            there is only padding, in inputs that are all of shape (R, L). With it [`select`] drops columns that none
            of the selected rows needs.
    """

    can_select = True

    def __init__(self, widths: torch.Tensor | None = None):
        self.widths = widths

    def unpack(self, outputs: Any, uniform_nll: torch.Tensor | None = None) -> RowOutputs:
        """The model's outputs by row; takes TRL's `FusedCausalLMOutput` of shape (R, L-1)."""
        return RowOutputs(
            outputs.log_probs, outputs.label_mask, outputs.entropy, outputs.is_top1, outputs.aux_loss, uniform_nll
        )

    def select(self, inputs: dict[str, Any], rows: torch.Tensor) -> tuple[dict[str, Any], "PaddedLayout"]:
        """The inputs of some rows only, bool of shape (R,) on the CPU, and their layout."""
        # Numbers, not a mask, whose sum would have to come from the device
        numbers = rows.nonzero().flatten()
        widths = None if self.widths is None else self.widths[rows]
        if widths is not None:
            inputs = {name: value[:, : int(widths.max())] for name, value in inputs.items()}
        selected = {name: value.index_select(0, numbers.to(value.device)) for name, value in inputs.items()}
        return selected, PaddedLayout(widths)

    def pool(self, token_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Means of (R, L, H) over the tokens of each row that `mask` of shape (R, L) marks, fp32 of shape (R, H)."""
        return (token_values.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


class ImageLayout(PaddedLayout):
    """A sequence of the batch per row, and images of which no input says whose they are."""

    can_select = False

    def select(self, inputs: dict[str, Any], rows: torch.Tensor) -> tuple[dict[str, Any], PaddedLayout]:
        """All rows as they are; no others can be selected."""
        assert rows.all()
        return inputs, self


class PaddingFreeLayout:
    """
    All rows in one sequence, one after the other, as TRL's collator lays out packed and padding-free batches.

    Args:
        lengths (`torch.Tensor`): tokens of each row, int64 of shape (R,), on the CPU.
        device (`torch.device`): of the model's inputs.
    """

    can_select = True

    def __init__(self, lengths: torch.Tensor, device: torch.device):
        self.lengths = lengths
        self.device = device
        # On the CPU, where nothing waits for the device: which prediction of the sequence is at (row, position)
        starts = lengths.cumsum(0) - lengths  # (R,)
        positions = torch.arange(max(1, int(lengths.max()) - 1))  # (L-1,)
        predicted = positions < lengths[:, None] - 1  # (R, L-1)
        index = torch.where(predicted, starts[:, None] + positions, 0)
        self._index = index.to(device, non_blocking=True)
        self._predicted = predicted.to(device, non_blocking=True)

    def unpack(self, outputs: Any, uniform_nll: torch.Tensor | None = None) -> RowOutputs:
        """The model's outputs by row, (R, L-1); takes TRL's `FusedCausalLMOutput` of shape (1, tokens - 1)."""
        return RowOutputs(
            self._unpack(outputs.log_probs),
            self._unpack(outputs.label_mask),
            self._unpack(outputs.entropy),
            self._unpack(outputs.is_top1),
            outputs.aux_loss,
            None if uniform_nll is None else self._unpack(uniform_nll),
        )

    def _unpack(self, values: torch.Tensor) -> torch.Tensor:
        by_row = values[0].gather(0, self._index.flatten()).view(self._index.shape)
        return by_row.masked_fill(~self._predicted, 0)

    def select(self, inputs: dict[str, Any], rows: torch.Tensor) -> tuple[dict[str, Any], "PaddingFreeLayout"]:
        """The inputs of some rows only, bool of shape (R,) on the CPU, and their layout."""
        tokens = rows.repeat_interleave(self.lengths).nonzero().flatten().to(self.device, non_blocking=True)
        layout = PaddingFreeLayout(self.lengths[rows], self.device)
        selected = {name: inputs[name].index_select(1, tokens) for name in ("input_ids", "labels", "position_ids")}
        return {**selected, **layout.sequence_boundaries()}, layout

    def sequence_boundaries(self) -> dict[str, Any]:
        """What tells attention where a row ends, under the names of TRL's collator."""
        boundaries = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(self.device, torch.int32)
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        longest = int(self.lengths.max())
        return {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": numbers.repeat_interleave(self.lengths)[None].to(self.device),
        }

    def pool(self, token_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Means of (1, tokens, H) over the tokens of each row that `mask` marks, fp32 of shape (R, H)."""
        row_of_token = torch.arange(len(self.lengths)).repeat_interleave(self.lengths).to(self.device)
        mask = mask[0, : len(row_of_token)].float()  # without the padding to a multiple
        marked = token_values[0, : len(row_of_token)].float() * mask[:, None]
        sums = marked.new_zeros((len(self.lengths), marked.shape[1])).index_add_(0, row_of_token, marked)
        counts = mask.new_zeros(len(self.lengths)).index_add_(0, row_of_token, mask)
        return sums / counts.clamp(min=1)[:, None]


BatchLayout = PaddedLayout | PaddingFreeLayout


def pop_layout(batch: dict[str, Any], device: torch.device) -> BatchLayout:
    """The layout of a paired batch, out of what its collator said of it; `device` is that of the model's inputs."""
    lengths, widths = batch.pop(ROW_LENGTHS, None), batch.pop(ROW_WIDTHS, None)
    if batch.pop(HAS_IMAGES, False):
        return ImageLayout()
    if lengths is not None:
        return PaddingFreeLayout(torch.tensor(lengths), device)
    return PaddedLayout(None if widths is None else torch.tensor(widths))


def padded(collator: Any) -> Any:
    """A collator with a sequence per row, for what is not training: TRL's without `padding_free`, or as it is."""
    if isinstance(collator, DataCollatorForLanguageModeling):
        return replace(collator, padding_free=False)
    return collator
