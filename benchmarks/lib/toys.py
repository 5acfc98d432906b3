"""
Toy problems: instructions on short words and small numbers with planted faults, and a model small enough for a CPU.

Everything about them is known, the right answer to any question too. What they are made of is
`trl_bilevel/demo/problem.py`.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from lib.problem import GOOD, Problem
from trl_bilevel.demo.planted_faults import REFUSAL, is_harmful, right_answer
from trl_bilevel.demo.problem import BATCH_SIZE, DemoArguments, base_model_folder, build_problem
from trl_bilevel.demo.tiny_model import completion_losses, greedy_answers


FAMILIES = {"mixed": "", "random": "random answers", "wrong_rule": "wrong rules", "harmful": "harmful requests"}
"""What the bad answers are, and how it is said in a problem's name."""
_FAULT_RATIO, _NUM_TRUSTED = 0.7, 200
_ROWS_PER_PASS = 250


class Toy(NamedTuple):
    """A toy problem; the defaults are that of `docs/results.md`."""

    family: str = "mixed"
    """One of [`FAMILIES`]."""
    fault_ratio: float = _FAULT_RATIO
    """Share of training rows with a bad answer, in (0, 1)."""
    num_trusted: int = _NUM_TRUSTED
    num_rows: int = 3000
    num_epochs: int = 4
    num_held_out: int = 500
    num_base_steps: int = 800
    """Optimizer steps of the base model."""

    def __str__(self) -> str:
        """Everything that is not as by default: what its results are filed under."""
        named = [
            FAMILIES[self.family],
            f"{100 * self.fault_ratio:g} % bad" if self.fault_ratio != _FAULT_RATIO else "",
            f"{self.num_trusted} trusted rows" if self.num_trusted != _NUM_TRUSTED else "",
        ]
        units = {
            "num_rows": "rows",
            "num_epochs": "epochs",
            "num_held_out": "held-out rows",
            "num_base_steps": "base steps",
        }
        default = Toy()._asdict()
        sizes = [f"{n} {units[key]}" for key, n in self._asdict().items() if key in units and n != default[key]]
        return ", ".join([*(list(filter(None, named)) or [f"{100 * _FAULT_RATIO:g} % bad"]), *sizes])


TOYS = (
    "10 % bad",
    "30 % bad",
    "50 % bad",
    "70 % bad",
    "80 % bad",
    "random answers",
    "wrong rules",
    "harmful requests",
    "20 trusted rows",
    "50 trusted rows",
    "500 trusted rows",
)
"""Those that the docs show, each with one thing changed."""


def read_toy(name: str, **sizes: int) -> Toy:
    """
    The problem of a name: what the bad answers are, how many there are, how many rows are trusted, whatever of it is
    not as by default.

    Args:
        name (`str`): as "30 % bad", "harmful requests" or "random answers, 30 % bad, 50 trusted rows".
        **sizes (`int`): fields of [`Toy`].

    Raises:
        ValueError: if it is not such a name, for a share outside (0, 1) or a number below 1.
    """
    families = {label: family for family, label in FAMILIES.items() if label}
    toy = Toy(**sizes)
    for part in name.split(", "):
        if part in families:
            toy = toy._replace(family=families[part])
        elif share := re.fullmatch(r"([\d.]+) % bad", part):
            toy = toy._replace(fault_ratio=float(share[1]) / 100)
        elif trusted := re.fullmatch(r"(\d+) trusted rows", part):
            toy = toy._replace(num_trusted=int(trusted[1]))
        else:
            raise ValueError(f"Unknown problem {name!r}. Known are {list(TOYS)}, and some of it together.")
    if not 0 < toy.fault_ratio < 1:
        raise ValueError(f"The share of bad rows must be larger than 0 and less than 1, got {name!r}.")
    if toy.num_trusted < 1:
        raise ValueError(f"At least 1 row must be trusted, got {name!r}.")
    return toy


def build_toy(toy: Toy, seed: int, output_dir: Path) -> Problem:
    """
    Draw the rows of a toy problem, and train its base model unless that is there.

    Fewer trusted rows than by default are the first of those, so that nothing else changes with their number.

    Args:
        toy ([`Toy`]): which.
        seed (`int`): of rows, faults, models and training.
        output_dir (`pathlib.Path`): folder of the results; base models are kept in it.
    """
    args = DemoArguments(
        output_dir=str(output_dir),
        seed=seed,
        num_train_rows=toy.num_rows,
        num_validation_rows=max(toy.num_trusted, _NUM_TRUSTED),
        num_held_out_rows=toy.num_held_out,
        fault_ratio=toy.fault_ratio,
        fault_family=toy.family,
        num_train_epochs=toy.num_epochs,
        num_base_steps=toy.num_base_steps,
    )
    # The families but for one have the same good rows
    family = toy.family if toy.family == "harmful" else "mixed"
    drawn = build_problem(args, base_model_folder(replace(args, fault_family=family)), lambda share: None)

    def losses(model: Any, rows: Dataset) -> np.ndarray:
        return completion_losses(model, drawn.tokenizer, rows)

    return Problem(
        name=str(toy),
        seed=seed,
        model=drawn.base_model,
        tokenizer=drawn.tokenizer,
        trusted_name=str(toy._replace(family=family, fault_ratio=_FAULT_RATIO)),
        training=drawn.faulty,
        kinds=_kinds(drawn.faulty),
        trusted=drawn.trusted.select(range(toy.num_trusted)),
        held_out=drawn.held_out,
        num_epochs=toy.num_epochs,
        options={"learning_rate": 3e-3, "per_device_train_batch_size": BATCH_SIZE, "use_cpu": True, "bf16": False},
        lora={"r": 32, "lora_alpha": 32, "target_modules": "all-linear"},
        losses=losses,
        measure=lambda model: measure_answers(model, drawn.tokenizer, drawn.held_out),
        unseen=drawn.unseen,
        unseen_kinds=_kinds(drawn.unseen),
        is_right=are_right,
        rows_per_pass=_ROWS_PER_PASS,
    )


def _kinds(rows: Dataset) -> np.ndarray:
    return np.array([GOOD if fault == "none" else fault.replace("_", " ") for fault in rows["fault"]])


def are_right(rows: Dataset) -> np.ndarray:
    """Whether each row's completion is the right one, bool of shape (N,)."""
    answers = zip(rows["prompt"], rows["completion"], strict=True)
    return np.array([answer == right_answer(prompt) for prompt, answer in answers])


def measure_answers(model: Any, tokenizer: Any, held_out: Dataset) -> dict[str, float]:
    """
    Exact match of the greedy answers on the held-out rows; where some of them are harmful requests also `refused`, the
    share of those refused, and `over_refused`, the share of the ordinary ones refused.
    """
    answers = np.array(greedy_answers(model, tokenizer, held_out))
    result = {"exact_match": (answers == np.array(held_out["completion"])).mean()}
    harmful = np.array([is_harmful(prompt) for prompt in held_out["prompt"]])
    if harmful.any():
        refused = answers == f" {REFUSAL}"
        result["refused"] = refused[harmful].mean()
        result["over_refused"] = refused[~harmful].mean()
    return result
