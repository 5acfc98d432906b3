"""Why a row stands where it stands, in words."""

import numpy as np

from .answer_statistics import STATISTICS, AnswerStatistics
from .evidence import PIECES, Evidence


_MOST = 2  # reasons for a row
_NOTABLE = -np.log(0.05)  # a piece that one trusted row in twenty would have
_UNUSUAL = {
    "loss": ("easy to predict", "hard to predict"),
    "loss_std": ("evenly predictable", "unevenly predictable"),
    "loss_max": ("no surprising token", "a token of a very high loss"),
    "surprise": ("expected by the model", "unexpected by the model"),
    "entropy": ("the model is certain of what follows", "the model is uncertain of what follows"),
    "num_tokens": ("short", "long"),
    "certain_share": ("few certain tokens", "many certain tokens"),
    "begin_loss": ("an expected beginning", "an unexpected beginning"),
    "end_loss": ("an expected end", "an unexpected end"),
    "repetition": ("few repetitions", "many repetitions"),
    "copied_share": ("few words of the prompt", "many words of the prompt"),
}

_SAME = {"loss": "loss", "begin_loss": "beginning", "end_loss": "end", "copied_share": "copy"}
"""Pieces that are about one statistic, by that statistic."""


def give_reasons(evidence: Evidence, statistics: AnswerStatistics, trusted: AnswerStatistics) -> list[str]:
    """
    The two strongest pieces of evidence, if at most one trusted row in twenty would have them; empty where none is.

    A distance that comes from what another piece names already is not named again.

    Args:
        evidence ([`Evidence`]): against N rows.
        statistics ([`AnswerStatistics`]): of the rows.
        trusted ([`AnswerStatistics`]): of the trusted rows, whose medians are named beside.
    """
    usual = {name: _median(getattr(trusted, name)) for name in ("loss", "begin_loss", "end_loss")}
    first_copy = _first_copies(statistics.answer_hash)
    order = np.argsort(-evidence.pieces, axis=1, kind="stable")
    reasons = []
    for row, pieces in enumerate(order):
        notable = [PIECES[piece] for piece in pieces if evidence.pieces[row, piece] >= _NOTABLE]
        if _SAME.get(STATISTICS[evidence.strangest[row]]) in notable:
            notable = [piece for piece in notable if piece != "distance"]
        words = [_word(piece, row, evidence, statistics, usual, first_copy) for piece in notable[:_MOST]]
        reasons.append("; ".join(words))
    return reasons


def _word(
    piece: str,
    row: int,
    evidence: Evidence,
    statistics: AnswerStatistics,
    usual: dict[str, float],
    first_copy: np.ndarray,
) -> str:
    if piece == "loss":
        return f"hard to predict: {statistics.loss[row]:.2f} nats per token, trusted rows {usual['loss']:.2f}"
    if piece == "beginning":
        begin, known = statistics.begin_loss[row], usual["begin_loss"]
        return f"does not follow from the prompt: it begins with {begin:.2f} nats per token, trusted rows {known:.2f}"
    if piece == "end":
        return f"ends early: its end has {statistics.end_loss[row]:.2f} nats, trusted rows {usual['end_loss']:.2f}"
    if piece == "copy":
        return f"repeats the prompt: {statistics.copied_share[row]:.0%} of its tokens are in it"
    if piece == "duplicate":
        return f"same answer as row {first_copy[row]}"
    words = _UNUSUAL[STATISTICS[evidence.strangest[row]]]
    return f"unlike the trusted rows: {words[int(evidence.is_high[row])]}"


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _first_copies(hashes: np.ndarray) -> np.ndarray:
    """Position of another row with the same answer, the first there is, shape (N,); the row itself where none is."""
    _, inverse = np.unique(hashes, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(inverse[order]) > 0])
    first = order[starts][inverse]  # (N,)
    second = order[np.minimum(starts + 1, len(order) - 1)][inverse]
    is_first = first == np.arange(len(hashes))
    return np.where(is_first & (inverse[second] == inverse), second, first)
