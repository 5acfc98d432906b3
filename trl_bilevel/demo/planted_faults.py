"""
Procedural instructions with planted faults: a dataset whose good and bad rows are known.

Seven operations on short words and small numbers. A bad answer is random, or follows a *consistent wrong rule* of its
operation, which a model learns as easily as the right one, so that a row's loss alone cannot tell good from bad.
"""

import random
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Operation(NamedTuple):
    """An instruction, its right answer, and a wrong rule that looks like an answer."""

    arguments: Callable[[random.Random], tuple[str, ...]]
    right: Callable[..., str]
    wrong: Callable[..., str]


def _word(rng: random.Random) -> tuple[str, ...]:
    return ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5))),)


def _two_numbers(rng: random.Random) -> tuple[str, ...]:
    return str(rng.randint(1, 30)), str(rng.randint(1, 30))


OPERATIONS: dict[str, Operation] = {
    "reverse": Operation(_word, lambda word: word[::-1], lambda word: word[1:] + word[0]),
    "upper": Operation(_word, str.upper, str.capitalize),
    "sort": Operation(_word, lambda word: "".join(sorted(word)), lambda word: "".join(sorted(word, reverse=True))),
    "last": Operation(_word, lambda word: word[-1], lambda word: word[0]),
    "double": Operation(_word, lambda word: word * 2, lambda word: word + word[::-1]),
    "length": Operation(_word, lambda word: str(len(word)), lambda word: str(len(word) + 1)),
    "add": Operation(_two_numbers, lambda a, b: str(int(a) + int(b)), lambda a, b: str(int(a) + int(b) + 1)),
}
BASE_OPERATIONS = ("reverse", "upper", "sort", "add")
"""What the base model knows before it is fine-tuned; the others are new to it."""

FAULTS = ("none", "random", "wrong_rule")


def build_dataset(
    num_rows: int,
    seed: int,
    operations: Sequence[str] = tuple(OPERATIONS),
    fault_ratio: float = 0.0,
    random_share: float = 0.2,
    exclude: Collection[str] = (),
) -> Dataset:
    """
    Rows `{"prompt", "completion", "fault"}`; `fault` says what is planted in the completion, one of `FAULTS`.

    Args:
        num_rows (`int`): number of rows; their instructions are drawn independently.
        seed (`int`): seed of the instructions, the faults and their places.
        operations (`Sequence[str]`): names from `OPERATIONS` to draw from.
        fault_ratio (`float`): share of rows with a bad answer, in [0, 1].
        random_share (`float`): share of the bad answers that are random; the others follow the wrong rule.
        exclude (`Collection[str]`): prompts that other datasets use and this one must not.

    Example:

    ```python
    >>> build_dataset(2, seed=0, operations=["upper"])["completion"][:]
    [' GNK', ' JXFD']

    ```
    """
    rng = random.Random(seed)
    num_faults = round(fault_ratio * num_rows)
    num_random = round(random_share * num_faults)
    faults = ["random"] * num_random + ["wrong_rule"] * (num_faults - num_random) + ["none"] * (num_rows - num_faults)
    rng.shuffle(faults)
    excluded = frozenset(exclude)
    return Dataset.from_list([_row(rng, rng.choice(list(operations)), fault, excluded) for fault in faults])


def _row(rng: random.Random, name: str, fault: str, exclude: frozenset[str]) -> dict[str, Any]:
    operation = OPERATIONS[name]
    while True:
        arguments = operation.arguments(rng)
        prompt = f"{name} {' '.join(arguments)} ="
        if prompt not in exclude:
            break
    answer = operation.right(*arguments)
    if fault == "random":
        answer = _random_answer(rng, answer)
    elif fault == "wrong_rule":
        wrong = operation.wrong(*arguments)
        # On some arguments both rules agree (the sorted "aab" of "aab"), and a right answer would be no fault
        answer = wrong if wrong != answer else _random_answer(rng, answer)
    return {"prompt": prompt, "completion": f" {answer}", "fault": fault}


def right_answer(prompt: str) -> str:
    """
    The right completion of an instruction.

    Example:

    ```python
    >>> right_answer("reverse abc =")
    ' cba'

    ```
    """
    name, *arguments = prompt.removesuffix(" =").split(" ")
    return f" {OPERATIONS[name].right(*arguments)}"


def _random_answer(rng: random.Random, answer: str) -> str:
    """Another string of the same length and alphabet."""
    alphabet = string.digits if answer.isdigit() else string.ascii_letters
    while True:
        other = "".join(rng.choices(alphabet, k=len(answer)))
        if other != answer:
            return other


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the instructions and answers."""
    characters = string.ascii_letters + string.digits + " ="
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
