"""What the tokens of an answer look like to a model: a few numbers for each row, from one forward pass."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch


BEGINNING = 4
"""Tokens of an answer that count as its beginning."""
_CERTAIN = 0.1  # nats: a token of a lower loss was as good as known
STATISTICS = (
    "loss",
    "loss_std",
    "loss_max",
    "surprise",
    "entropy",
    "num_tokens",
    "certain_share",
    "begin_loss",
    "end_loss",
    "repetition",
    "copied_share",
)


class AnswerStatistics(NamedTuple):
    """Statistics of N answers, each of shape (N,), float64; NaN where a row has no token that counts."""

    loss: np.ndarray
    """Mean negative log-likelihood, nats per token."""
    loss_std: np.ndarray
    """Its standard deviation over the tokens, nats."""
    loss_max: np.ndarray
    """That of the least expected token, nats."""
    surprise: np.ndarray
    """Mean of negative log-likelihood minus entropy, nats: 0 for what the model would say itself."""
    entropy: np.ndarray
    """Mean entropy of the next-token distributions, nats."""
    num_tokens: np.ndarray
    """Tokens of the answer."""
    certain_share: np.ndarray
    """Share of tokens whose loss is under 0.1 nats, in [0, 1]."""
    begin_loss: np.ndarray
    """Mean loss of the first four tokens, nats: high if the answer does not follow from its prompt."""
    end_loss: np.ndarray
    """Loss of the token that ends the answer, nats: high if it ends early. NaN if no such token is there."""
    repetition: np.ndarray
    """Share of the answer's pairs of neighbors that were there before, in [0, 1]."""
    copied_share: np.ndarray
    """Share of the answer's tokens that are in its prompt too, in [0, 1]."""
    answer_hash: np.ndarray
    """int64, equal for equal answers."""

    def select(self, rows: np.ndarray) -> "AnswerStatistics":
        """Those of some rows."""
        return AnswerStatistics(*(values[rows] for values in self))


def answer_statistics(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    input_ids: torch.Tensor,
    is_answer: torch.Tensor,
    is_read: torch.Tensor,
    end_ids: set[int],
) -> AnswerStatistics:
    """
    Statistics of a batch. An answer may be in several turns; each has a beginning and an end.

    Args:
        log_probs (`torch.Tensor`): of the next tokens, shape (B, L-1), nats.
        entropy (`torch.Tensor`): of the next-token distributions, shape (B, L-1), nats.
        input_ids (`torch.Tensor`): shape (B, L).
        is_answer (`torch.Tensor`): which of the next tokens belong to an answer, bool, shape (B, L-1).
        is_read (`torch.Tensor`): which tokens are no padding, bool, shape (B, L).
        end_ids (`set[int]`): tokens that end a turn.
    """
    log_probs, entropy, input_ids, is_answer, is_read = (
        values.cpu() for values in (log_probs.double(), entropy.double(), input_ids, is_answer, is_read)
    )
    rows = [
        _row_statistics(-log_probs[row].numpy(), entropy[row].numpy(), input_ids[row].numpy(), answer, read, end_ids)
        for row, (answer, read) in enumerate(zip(is_answer.numpy(), is_read.numpy(), strict=True))
    ]
    numbers = np.array([numbers for numbers, _ in rows]).reshape(len(rows), len(STATISTICS))
    hashes = np.array([answer_hash for _, answer_hash in rows], dtype=np.int64)
    return AnswerStatistics(**dict(zip(STATISTICS, numbers.T, strict=True)), answer_hash=hashes)


def _row_statistics(
    nll: np.ndarray,
    entropy: np.ndarray,
    ids: np.ndarray,
    is_answer: np.ndarray,
    is_read: np.ndarray,
    end_ids: set[int],
) -> tuple[list[float], int]:
    """Of one row, in the order of [`STATISTICS`]; `nll`, `entropy` and `is_answer` of shape (L-1,), others (L,)."""
    positions = np.flatnonzero(is_answer)
    if len(positions) == 0:
        return [float("nan")] * len(STATISTICS), 0
    answer, losses = ids[1:][positions], nll[positions]
    turns = np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) > 1) + 1)
    begins = np.concatenate([turn[:BEGINNING] for turn in turns])
    ends = [turn[found[-1]] for turn in turns if len(found := np.flatnonzero(np.isin(answer[turn], [*end_ids])))]
    pairs = {*zip(answer[:-1].tolist(), answer[1:].tolist(), strict=True)}
    is_prompt = is_read.copy()
    is_prompt[1:][positions] = False
    return [
        losses.mean(),
        losses.std(),
        losses.max(),
        (losses - entropy[positions]).mean(),
        entropy[positions].mean(),
        float(len(positions)),
        (losses < _CERTAIN).mean(),
        losses[begins].mean(),
        losses[ends].mean() if ends else float("nan"),
        1 - len(pairs) / max(1, len(answer) - 1) if len(answer) > 1 else 0.0,
        np.isin(answer, ids[is_prompt]).mean(),
    ], _hash(answer)


def _hash(ids: np.ndarray) -> int:
    digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
