"""
A positive control: answers that are wrong on purpose, to see whether a model can tell them from right ones.

Every trusted prompt is given the answer of another trusted row of about the same length. A model that does not see
that, for instance one of random weights, sees no fault that depends on the prompt, and its ranking is noise. One that
does see it may still be blind to others: an answer with a wrong number follows from its prompt too.
"""

import numpy as np
from datasets import Dataset
from scipy.stats import mannwhitneyu

from .answer_statistics import AnswerStatistics
from .evidence import gather_evidence


SEES = 0.75
"""AUROC from which on a model counts as seeing: it tells three of four pairs apart, where chance gives two."""
_IGNORED = -100


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


def control_auroc(swapped: AnswerStatistics, trusted: AnswerStatistics) -> float:
    """
    Probability that a swapped answer has more evidence against it than a right one, in [0, 1]; 0.5 is chance.

    Args:
        swapped ([`AnswerStatistics`]): of n trusted prompts, each with another answer.
        trusted ([`AnswerStatistics`]): of the n trusted rows.
    """
    # Every swapped answer is there twice: that they are copies must not give them away
    swapped = swapped._replace(answer_hash=trusted.answer_hash.min() - 1 - np.arange(len(swapped.loss)))
    of_swapped, of_trusted = gather_evidence(swapped, trusted)
    num_pairs = len(of_swapped.score) * len(of_trusted.score)
    return float(mannwhitneyu(of_swapped.score, of_trusted.score).statistic / num_pairs)
