"""Guard rails: which regenerated responses are fit to train on."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from trl.trainer.utils import is_async_callable


if TYPE_CHECKING:
    from .refine_prompts import Question


Flaw = Literal["empty", "repeated", "truncated", "nonfinite", "identical", "outvoted", "unsure", "rejected"]
FLAWS: tuple[Flaw, ...] = get_args(Flaw)
"""What can be wrong with a response: no text; goes round in circles; hit the length limit; has no finite likelihood;
is the original answer; stands against a majority for the original; less likely than is asked for; is turned down by
the reward functions."""
RewardFunc = Callable[..., Sequence[float | None]]

_NGRAM = 4
_SHORTEST_REPETITION = 24  # tokens: short answers repeat themselves for good reasons
_LEAST_DISTINCT_SHARE = 0.5


def find_flaws(
    texts: list[str],
    completion_ids: list[list[int]],
    log_probs: list[list[float]],
    finished: list[bool],
    original: str,
    min_probability: float = 0.0,
) -> list[Flaw | None]:
    """
    What is wrong with each of a question's responses, `None` if nothing.

    Args:
        texts (`list[str]`): the responses, without special tokens.
        completion_ids (`list[list[int]]`): their tokens.
        log_probs (`list[list[float]]`): of the tokens, in nats.
        finished (`list[bool]`): whether each ended by a stop token, not by the length limit.
        original (`str`): the answer it would replace.
        min_probability (`float`): of a token, geometric mean over the response, in [0, 1].
    """
    confirmed = confirms_original(texts, original)
    flaws: list[Flaw | None] = []
    for text, tokens, likelihoods, ended in zip(texts, completion_ids, log_probs, finished, strict=True):
        if not all(map(math.isfinite, likelihoods)):
            flaws.append("nonfinite")
        elif not text.strip():
            flaws.append("empty")
        elif is_repetitive(tokens):
            flaws.append("repeated")
        elif not ended:
            flaws.append("truncated")
        elif text.strip() == original.strip():
            flaws.append("identical")
        elif confirmed:
            flaws.append("outvoted")
        else:
            is_sure = math.exp(sum(likelihoods) / len(likelihoods)) >= min_probability
            flaws.append(None if is_sure else "unsure")
    return flaws


def is_repetitive(tokens: list[int]) -> bool:
    """
    Whether fewer than half of the 4-grams of a long response are distinct, as in a model that goes round in circles.

    Example:

    ```python
    >>> is_repetitive(list(range(40)))
    False
    >>> is_repetitive([1, 2, 3] * 14)
    True

    ```
    """
    if len(tokens) < _SHORTEST_REPETITION:
        return False
    ngrams = [tuple(tokens[start : start + _NGRAM]) for start in range(len(tokens) - _NGRAM + 1)]
    return len(set(ngrams)) < _LEAST_DISTINCT_SHARE * len(ngrams)


def confirms_original(texts: list[str], original: str) -> bool:
    """
    Whether at least half of a question's responses give the original answer again.

    Example:

    ```python
    >>> confirms_original([" 12", "13", "12 "], original="12")
    True

    ```
    """
    return 2 * sum(text.strip() == original.strip() for text in texts) >= len(texts)


def check_reward_funcs(reward_funcs: RewardFunc | list[RewardFunc] | None) -> list[RewardFunc]:
    """
    Reward functions as a list.

    Raises:
        `TypeError`: for what cannot be called or is async; TRL's GRPO trainer also takes reward models.
    """
    functions = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
    for function in functions:
        if not callable(function) or is_async_callable(function):
            raise TypeError(
                f"`reward_funcs` must be functions that are not async, got {function!r}. Wrap a reward model in a "
                "function `(prompts, completions, **columns) -> list[float]`."
            )
    return functions


def sum_rewards(
    reward_funcs: list[RewardFunc], questions: "list[Question]", texts: list[str], completion_ids: list[list[int]]
) -> list[float | None]:
    """
    Sum of the rewards of each response, called as TRL's GRPO trainer calls its functions.

    Args:
        reward_funcs (`list[Callable]`): take `prompts`, `completions`, `completion_ids` and the columns of the dataset
            as keywords, and return a reward per completion, `None` where they do not apply.
        questions (`list[Question]`): one per response.
        texts (`list[str]`): the responses.
        completion_ids (`list[list[int]]`): their tokens.

    Returns:
        `list`: `None` for responses that no function applies to.

    Raises:
        `ValueError`: if a function returns another number of rewards.
    """
    columns = {name for question in questions for name in question.columns} - {"prompt", "completion"}
    inputs = {
        "prompts": [question.prompt for question in questions],
        "completions": [question.completion(text) for question, text in zip(questions, texts, strict=True)],
        "completion_ids": completion_ids,
        **{name: [question.columns.get(name) for question in questions] for name in sorted(columns)},
    }
    totals: list[float | None] = [None] * len(questions)
    for function in reward_funcs:
        rewards = function(**inputs)
        if len(rewards) != len(questions):
            raise ValueError(
                f"The reward function {function!r} returned {len(rewards)} rewards for {len(questions)} completions. "
                "Return one per completion, `None` where it does not apply."
            )
        for index, reward in enumerate(rewards):
            if reward is not None:
                totals[index] = (totals[index] or 0.0) + float(reward)
    return totals


def answer_to_keep(texts: Sequence[str], mean_log_probs: Sequence[float]) -> int:
    """
    Which of a question's responses to publish: the one given most often, of those the most likely one.

    Self-consistency (arXiv 2203.11171) where answers are short enough to agree, the model's own opinion otherwise.

    Example:

    ```python
    >>> answer_to_keep(["12", "13", " 12"], mean_log_probs=[-0.9, -0.1, -0.8])
    2

    ```
    """
    votes = Counter(text.strip() for text in texts)
    return max(range(len(texts)), key=lambda index: (votes[texts[index].strip()], mean_log_probs[index]))
