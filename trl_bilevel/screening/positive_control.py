"""
A positive control: answers that are wrong on purpose, to see whether a model can tell them from right ones.

Every trusted prompt is given the answer of another trusted row of about the same length. A model that does not see
that, for instance one of random weights, sees no fault that depends on the prompt, and its ranking is noise. One that
does see it may still be blind to others: an answer with a wrong number follows from its prompt too.
"""

from typing import NamedTuple

import numpy as np
from datasets import Dataset
from scipy.stats import mannwhitneyu

from .answer_statistics import AnswerStatistics
from .calibration import LARGEST_BAD, conformal_p_values
from .evidence import gather_evidence


SEES = 0.75
"""AUROC from which on a model counts as seeing: it tells three of four pairs apart, where chance gives two."""
SUFFICES = 0.8
"""Power from which on the screen is taken as it is, the usual one of a test; below it training adds evidence."""
_IGNORED = -100


class Control(NamedTuple):
    """How well a model tells swapped answers from right ones."""

    auroc: float
    """Probability that a swapped answer has more evidence against it than a right one, in [0, 1]; 0.5 is chance."""
    power: float
    """Share of the swapped answers whose p-value is at most 0.2, in [0, 1]."""


def swap_answers(prepared: Dataset) -> Dataset:
    """
    Prepared rows, each with the last answer of another one. Rows of text without a prompt swap their second halves.

    Args:
        prepared (`datasets.Dataset`): at least two rows with `input_ids` and `labels`, which ignore the prompt.
    """
    rows = [_split(row["input_ids"], row.get("labels", row["input_ids"])) for row in prepared]
    # Neighbors in a ring that is ordered by length: the length gives nothing away
    order = np.argsort([len(answer) for _, answer in rows], kind="stable")
    answer_of = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
    swapped = []
    for number, (prompt, _) in enumerate(rows):
        answer = rows[answer_of[number]][1]
        swapped.append({"input_ids": prompt + answer, "labels": [_IGNORED] * len(prompt) + answer})
    return Dataset.from_list(swapped)


def _split(input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Tokens before the last answer, and the answer."""
    is_answer = np.array(labels) != _IGNORED
    end = int(np.flatnonzero(is_answer)[-1]) + 1
    start = end - int(np.argmin(np.r_[is_answer[:end][::-1], False]))
    if start <= 1:  # nothing before it but a token that begins every row
        start = end // 2
    return input_ids[:start], input_ids[start:end]


def run_control(swapped: AnswerStatistics, trusted: AnswerStatistics) -> Control:
    """
    Compare swapped answers with right ones.

    Args:
        swapped ([`AnswerStatistics`]): of n trusted prompts, each with another answer.
        trusted ([`AnswerStatistics`]): of the n trusted rows.
    """
    # Every swapped answer is there twice: that they are copies must not give them away
    swapped = swapped._replace(answer_hash=trusted.answer_hash.min() - 1 - np.arange(len(swapped.loss)))
    of_swapped, of_trusted = gather_evidence(swapped, trusted)
    num_pairs = len(of_swapped.score) * len(of_trusted.score)
    p_values = conformal_p_values(of_swapped.score, of_trusted.score)
    return Control(
        auroc=float(mannwhitneyu(of_swapped.score, of_trusted.score).statistic / num_pairs),
        power=float((p_values <= LARGEST_BAD).mean()),
    )
