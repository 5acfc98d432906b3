"""Sums behind the logged training metrics, kept on the device until they are logged."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch

from .losses import ImportanceRatios, PreferenceLosses, RowLosses


class TokenSums(NamedTuple):
    """Sums over the tokens of some micro-batches: scalars on the training device, log-likelihoods in nats."""

    training_tokens: torch.Tensor
    training_nll: torch.Tensor
    entropy: torch.Tensor
    correct_tokens: torch.Tensor
    validation_units: torch.Tensor
    """Completion tokens, or preference pairs."""
    validation_loss: torch.Tensor
    input_tokens: torch.Tensor
    aux_loss: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    correct_pairs: torch.Tensor
    refined_tokens: torch.Tensor
    """Tokens of refined responses, which have an importance ratio."""
    ratios: torch.Tensor
    squared_ratios: torch.Tensor
    clipped_ratios: torch.Tensor


class RowCounts(NamedTuple):
    """Counts known on the host."""

    training_rows: int
    filtered_rows: int
    nonfinite_rows: int
    refined_rows: int = 0
    micro_batches: int = 1


class TrainingMetrics:
    """
    Adds up the metrics of micro-batches without waiting for the device, and averages them when they are logged.

    `entropy` and `mean_token_accuracy` are TRL's, over the training rows only, so that they compare with
    `SFTTrainer`'s.
    """

    def __init__(self) -> None:
        self._token_sums: torch.Tensor | None = None  # (len(TokenSums),), fp32
        self._row_counts: Counter[str] = Counter()
        self._noted: dict[str, list[float]] = defaultdict(list)

    def note(self, name: str, value: float) -> None:
        """Keep a value of the step that is the same on all processes; their mean is logged."""
        self._noted[name].append(value)

    def add(self, token_sums: TokenSums, row_counts: RowCounts) -> None:
        """Add the sums of one micro-batch."""
        stacked = torch.stack([value.detach().float() for value in token_sums])
        self._token_sums = stacked if self._token_sums is None else self._token_sums + stacked
        self._row_counts.update(row_counts._asdict())

    def pop_input_tokens(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> int:
        """
        Input tokens of all processes since the last call of this or of [`pop`], which then counts the later ones only.

        Args:
            gather (`Callable`): as in [`pop`].
        """
        if self._token_sums is None:
            return 0
        position = TokenSums._fields.index("input_tokens")
        num_tokens = gather(self._token_sums[position][None]).sum().item()
        self._token_sums[position] = 0
        return int(num_tokens)

    def pop(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Averages since the last call under the names they are logged by; empty if nothing was added.

        Losses are in nats per completion token (DPO's per pair). `num_tokens` counts the input tokens since the last
        call. The `rewards` mean something for preference pairs only.

        Args:
            gather (`Callable`): stacks a tensor of shape (1, K) of every process to (num_processes, K).
        """
        if self._token_sums is None:
            return {}
        counts = self._token_sums.new_tensor([self._row_counts[name] for name in RowCounts._fields])
        sums = gather(torch.cat([self._token_sums, counts])[None]).sum(dim=0).tolist()
        noted = {name: sum(values) / len(values) for name, values in self._noted.items()}
        self._token_sums = None
        self._row_counts.clear()
        self._noted.clear()
        total = dict(zip(TokenSums._fields + RowCounts._fields, sums, strict=True))
        training_tokens = max(total["training_tokens"], 1.0)
        validation_units = max(total["validation_units"], 1.0)
        return {
            "training_loss": total["training_nll"] / training_tokens,
            "validation_loss": total["validation_loss"] / validation_units,
            "rewards/chosen": total["chosen_rewards"] / validation_units,
            "rewards/rejected": total["rejected_rewards"] / validation_units,
            "rewards/margins": (total["chosen_rewards"] - total["rejected_rewards"]) / validation_units,
            "rewards/accuracies": total["correct_pairs"] / validation_units,
            "entropy": total["entropy"] / training_tokens,
            "mean_token_accuracy": total["correct_tokens"] / training_tokens,
            "aux_loss": total["aux_loss"] / total["micro_batches"],
            "num_tokens": total["input_tokens"],
            "selector/filtered_ratio": total["filtered_rows"] / max(total["training_rows"], 1.0),
            "selector/nonfinite_rows": total["nonfinite_rows"],
            "refine/row_ratio": total["refined_rows"] / max(total["training_rows"], 1.0),
            **(_ratio_metrics(total) if total["refined_tokens"] else {}),
            **noted,
        }


def _ratio_metrics(total: dict[str, float]) -> dict[str, float]:
    num_tokens = total["refined_tokens"]
    return {
        "refine/importance_ratio": total["ratios"] / num_tokens,
        "refine/clip_ratio": total["clipped_ratios"] / num_tokens,
        # (sum r)^2 / (n sum r^2), in (0, 1]
        "refine/effective_sample_ratio": total["ratios"] ** 2 / max(num_tokens * total["squared_ratios"], 1e-12),
    }


def sum_tokens(
    losses: RowLosses,
    entropy: torch.Tensor,
    is_top1: torch.Tensor,
    num_training_rows: int,
    input_tokens: torch.Tensor,
    aux_loss: torch.Tensor,
    preferences: PreferenceLosses | None = None,
    ratios: ImportanceRatios | None = None,
) -> TokenSums:
    """
    The sums of one paired micro-batch.

    Args:
        losses ([`~trl_bilevel.losses.RowLosses`]): of its rows, training rows first.
        entropy (`torch.Tensor`): of the next-token distributions, shape (B, L-1), nats, 0 on ignored positions.
        is_top1 (`torch.Tensor`): whether the label is the most likely token, shape (B, L-1), False on ignored ones.
        num_training_rows (`int`): how many rows come first.
        input_tokens (`torch.Tensor`): tokens the model read, prompts included, scalar.
        aux_loss (`torch.Tensor`): load-balancing loss of a mixture-of-experts model, scalar.
        preferences ([`~trl_bilevel.losses.PreferenceLosses`], *optional*): of the pairs that follow the training rows.
        ratios ([`~trl_bilevel.losses.ImportanceRatios`], *optional*): where there are refined responses.
    """
    zero = aux_loss.new_zeros(())
    if preferences is None:
        chosen_rewards, rejected_rewards, correct_pairs = zero, zero, zero
        validation_units = losses.num_tokens[num_training_rows:].sum()
        validation_loss = losses.nll[num_training_rows:].sum()
    else:
        chosen_rewards, rejected_rewards = preferences.chosen_rewards.sum(), preferences.rejected_rewards.sum()
        correct_pairs = (preferences.chosen_rewards > preferences.rejected_rewards).sum()
        validation_units = zero + preferences.losses.numel()
        validation_loss = preferences.losses.sum()
    return TokenSums(
        training_tokens=losses.num_tokens[:num_training_rows].sum(),
        training_nll=losses.nll[:num_training_rows].sum(),
        entropy=entropy[:num_training_rows].sum(),
        correct_tokens=is_top1[:num_training_rows].sum(),
        validation_units=validation_units,
        validation_loss=validation_loss,
        input_tokens=input_tokens,
        aux_loss=aux_loss,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        correct_pairs=correct_pairs,
        refined_tokens=zero if ratios is None else ratios.is_generated.sum(),
        ratios=zero if ratios is None else (ratios.ratios * ratios.is_generated).sum(),
        squared_ratios=zero if ratios is None else (ratios.ratios.square() * ratios.is_generated).sum(),
        clipped_ratios=zero if ratios is None else ratios.is_clipped.sum(),
    )


def count_input_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a batch without padding, a scalar."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
