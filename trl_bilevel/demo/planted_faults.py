"""
Procedural instructions with planted faults: a dataset whose good and bad rows are known.

Seven operations on short words and small numbers. A bad answer is random, or follows a *consistent wrong rule* of its
operation, which a model learns as easily as the right one, so that a row's loss alone cannot tell good from bad. In
the family `harmful` two more operations must be refused, and a bad answer complies with them.
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

REFUSAL = "no"
"""The right answer to a harmful request. Words have three letters or more, so that no ordinary answer is the same."""


def _refuse(word: str) -> str:
    return REFUSAL


def _next_letters(word: str) -> str:
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)


HARMFUL_OPERATIONS: dict[str, Operation] = {
    "leak": Operation(_word, _refuse, lambda word: word),
    "crack": Operation(_word, _refuse, _next_letters),
}
"""Requests of the family `harmful`: right is to refuse them, wrong to comply."""

FAULTS = ("none", "random", "wrong_rule", "harmful")

FAMILIES: dict[str, float] = {"mixed": 0.2, "random": 1.0, "wrong_rule": 0.0, "harmful": 0.0}
"""Kinds of faulty dataset, and the share of random answers among the bad ones of each."""


def build_dataset(
    num_rows: int,
    seed: int,
    operations: Sequence[str] | None = None,
    fault_ratio: float = 0.0,
    family: str = "mixed",
    exclude: Collection[str] = (),
) -> Dataset:
    """
    Rows `{"prompt", "completion", "fault"}`; `fault` says what is planted in the completion, one of `FAULTS`.

    Args:
        num_rows (`int`): number of rows; their instructions are drawn independently.
        seed (`int`): seed of the instructions, the faults and their places.
        operations (`Sequence[str]`, *optional*): names from `OPERATIONS` and `HARMFUL_OPERATIONS` to draw from; by
            default all of the family's. Bad rows of the family `harmful` are harmful requests only.
        fault_ratio (`float`): share of rows with a bad answer, in [0, 1].
        family (`str`): one of `FAMILIES`. `mixed`: a fifth of the bad answers are random, the others follow the wrong
            rule; `random` and `wrong_rule`: all of them; `harmful`: they comply with a harmful request, while the good
            rows answer ordinary instructions and refuse harmful ones, each operation as often as any other.
        exclude (`Collection[str]`): prompts that other datasets use and this one must not.

    Example:

    ```python
    >>> build_dataset(2, seed=0, operations=["upper"])["completion"][:]
    [' GNK', ' JXFD']

    ```
    """
    rng = random.Random(seed)
    num_faults = round(fault_ratio * num_rows)
    num_random = round(FAMILIES[family] * num_faults)
    rule = "harmful" if family == "harmful" else "wrong_rule"
    faults = ["random"] * num_random + [rule] * (num_faults - num_random) + ["none"] * (num_rows - num_faults)
    rng.shuffle(faults)
    if operations is None:
        operations = [*OPERATIONS, *HARMFUL_OPERATIONS] if family == "harmful" else list(OPERATIONS)
    drawn_from = {fault: list(HARMFUL_OPERATIONS if fault == "harmful" else operations) for fault in FAULTS}
    excluded = frozenset(exclude)
    return Dataset.from_list([_row(rng, rng.choice(drawn_from[fault]), fault, excluded) for fault in faults])


def _operation(name: str) -> Operation:
    return HARMFUL_OPERATIONS[name] if name in HARMFUL_OPERATIONS else OPERATIONS[name]


def _row(rng: random.Random, name: str, fault: str, exclude: frozenset[str]) -> dict[str, Any]:
    operation = _operation(name)
    while True:
        arguments = operation.arguments(rng)
        prompt = f"{name} {' '.join(arguments)} ="
        if prompt not in exclude:
            break
    answer = operation.right(*arguments)
    if fault == "random":
        answer = _random_answer(rng, answer)
    elif fault == "harmful":
        answer = operation.wrong(*arguments)
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
    >>> right_answer("reverse abc ="), right_answer("leak abc =")
    (' cba', ' no')

    ```
    """
    name, *arguments = prompt.removesuffix(" =").split(" ")
    return f" {_operation(name).right(*arguments)}"


def is_harmful(prompt: str) -> bool:
    """Whether the right answer to an instruction is a refusal."""
    return prompt.partition(" ")[0] in HARMFUL_OPERATIONS


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
