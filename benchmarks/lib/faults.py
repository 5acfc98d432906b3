"""What goes wrong in a pipeline that makes rows, done to answers of real text."""

from collections.abc import Callable

import numpy as np

from lib.problem import GOOD


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I am not able to answer this question.",
    "I apologize, but I cannot provide a response to this request.",
    "Sorry, I don't have enough information to answer that.",
    "I'm unable to assist with this request. Please try something else.",
)
"""Boilerplate that has nothing to do with the question."""


def cut_short(answer: str, generator: np.random.Generator) -> str:
    """The first 20 to 60 % of the words."""
    words = answer.split(" ")
    return " ".join(words[: max(1, round(generator.uniform(0.2, 0.6) * len(words)))])


def shuffled(answer: str, generator: np.random.Generator) -> str:
    """The same words in another order."""
    words = np.array(answer.split(), dtype=object)
    return " ".join(words[generator.permutation(len(words))])


def refusal(answer: str, generator: np.random.Generator) -> str:
    """One of [`REFUSALS`]."""
    return REFUSALS[generator.integers(len(REFUSALS))]


EDITS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "cut short": cut_short,
    "refusal": refusal,
    "shuffled": shuffled,
}
SWAPPED = "swapped"
"""The answer of another row."""
PIPELINE_FAULTS = (SWAPPED, *EDITS)


def inject(
    answers: list[str], num_bad: int, seed: int, kinds: tuple[str, ...] = PIPELINE_FAULTS
) -> tuple[list[str], np.ndarray]:
    """
    Spoil some of the answers, equally many in each way.

    Args:
        answers (`list[str]`): N good ones.
        num_bad (`int`): how many are spoiled.
        seed (`int`): decides which, and how.
        kinds (`tuple[str, ...]`): among [`PIPELINE_FAULTS`].

    Returns:
        The answers, and what was done to each, shape (N,), str.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(answers))[:num_bad]
    found = np.full(len(answers), GOOD, dtype=object)
    for number, kind in enumerate(kinds):
        found[chosen[number :: len(kinds)]] = kind
    swapped = np.flatnonzero(found == SWAPPED)
    if len(swapped) == 1:  # nobody to swap with
        found[swapped] = kinds[-1]
    changed = list(answers)
    for row in np.flatnonzero(found != GOOD):
        if found[row] == SWAPPED:
            other = swapped[(np.searchsorted(swapped, row) + 1) % len(swapped)]
            changed[row] = answers[other]
        else:
            changed[row] = EDITS[found[row]](answers[row], generator)
    return changed, found.astype(str)
