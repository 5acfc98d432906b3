"""Settings of the planted-fault benchmark: which faults, how many, how many trusted rows; and their files."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trl_bilevel.demo.planted_faults import FAMILIES
from trl_bilevel.demo.problem import DemoArguments, Problem, build_problem


FAULT_RATIO = 0.7
VALIDATION_SIZE = 200
RESULT_NAMES = re.compile(r"seed\d+/\d+ epochs, [^/]+\.json")
"""Files of results within the output folder."""


class Setting(NamedTuple):
    """A point of the sweeps; the defaults are the problem of `docs/results.md`."""

    family: str = "mixed"
    """One of `FAMILIES`."""
    fault_ratio: float = FAULT_RATIO
    """Share of training rows with a bad answer, in (0, 1)."""
    validation_size: int = VALIDATION_SIZE
    """Trusted rows."""

    @property
    def suffix(self) -> str:
        """What its files are told apart by; empty for the default setting."""
        parts = [
            self.family if self.family != "mixed" else "",
            f"{self.fault_ratio:g} faulty" if self.fault_ratio != FAULT_RATIO else "",
            f"{self.validation_size} trusted" if self.validation_size != VALIDATION_SIZE else "",
        ]
        named = ", ".join(filter(None, parts))
        return f" [{named}]" if named else ""

    def __str__(self) -> str:
        return f"{self.family} faults, {self.fault_ratio:.0%} of the rows, {self.validation_size} trusted rows"


PROBLEMS = {
    "10 % bad": Setting(fault_ratio=0.1),
    "30 % bad": Setting(fault_ratio=0.3),
    "50 % bad": Setting(fault_ratio=0.5),
    "70 % bad": Setting(),
    "80 % bad": Setting(fault_ratio=0.8),
    "random answers": Setting("random"),
    "wrong rules": Setting("wrong_rule"),
    "harmful compliance": Setting("harmful"),
    "20 trusted rows": Setting(validation_size=20),
    "50 trusted rows": Setting(validation_size=50),
    "500 trusted rows": Setting(validation_size=500),
}
"""Those that the docs show, each with one thing changed."""


def sweep(families: list[str], fault_ratios: list[float], validation_sizes: list[int]) -> list[Setting]:
    """
    One axis at a time, per family: the fault ratios at the default number of trusted rows, then the numbers of trusted
    rows at the default fault ratio.

    Raises:
        ValueError: for an unknown family, a ratio outside (0, 1) or a size below 1.
    """
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"Unknown families {unknown}. Known are {list(FAMILIES)}.")
    if wrong := [ratio for ratio in fault_ratios if not 0 < ratio < 1]:
        raise ValueError(f"`fault_ratios` must be larger than 0 and less than 1, got {wrong}.")
    if wrong := [size for size in validation_sizes if size < 1]:
        raise ValueError(f"`validation_sizes` must be at least 1, got {wrong}.")
    settings = []
    for family in families:
        settings += [Setting(family, fault_ratio=ratio) for ratio in fault_ratios]
        settings += [Setting(family, validation_size=size) for size in validation_sizes]
    return list(dict.fromkeys(settings))


class SeedFiles(NamedTuple):
    """Where the results of a seed and setting are."""

    folder: Path
    num_train_epochs: int
    setting: Setting

    def result(self, method: str) -> Path:
        return self.folder / f"{self.num_train_epochs} epochs, {method}{self.setting.suffix}.json"

    def scores(self, method: str) -> Path:
        """The row ranking of a method, shape (N,), higher is better."""
        return self.folder / f"{self.num_train_epochs} epochs, {method}{self.setting.suffix}.npy"

    @property
    def first_round(self) -> Path:
        """The selector that a second round starts from."""
        return self.folder / f"first_round{self.setting.suffix}"

    @property
    def base_model(self) -> Path:
        """Settings whose trusted and held-out rows are among the default ones' share the default base model."""
        if self.setting.family != "harmful" and self.setting.validation_size <= VALIDATION_SIZE:
            return self.folder / "base_model"
        own = Setting(
            "harmful" if self.setting.family == "harmful" else "mixed",
            validation_size=max(self.setting.validation_size, VALIDATION_SIZE),
        )
        return self.folder / f"base_model{own.suffix}"

    def write_result(self, method: str, result: dict[str, float], scores: np.ndarray) -> None:
        """A result that is there stays as it is: its ranking alone was missing."""
        partial = self.scores(method).with_suffix(".npy.partial")
        with partial.open("wb") as file:
            np.save(file, scores)
        os.replace(partial, self.scores(method))
        if self.result(method).is_file():
            return
        partial = self.result(method).with_suffix(".json.partial")
        partial.write_text(json.dumps(result))
        os.replace(partial, self.result(method))


def build_setting(args: DemoArguments, files: SeedFiles) -> Problem:
    """
    The problem of a setting. Fewer trusted rows than the default are the first of the default ones, so that nothing
    else changes with their number.

    Args:
        args ([`DemoArguments`]): sizes and seed; what a setting says is taken from the setting.
        files ([`SeedFiles`]): the setting, and where the base model is.
    """
    changed: dict[str, Any] = {
        "fault_family": files.setting.family,
        "fault_ratio": files.setting.fault_ratio,
        "num_validation_rows": max(files.setting.validation_size, VALIDATION_SIZE),
    }
    problem = build_problem(DemoArguments(**{**vars(args), **changed}), files.base_model, lambda share: None)
    return problem._replace(trusted=problem.trusted.select(range(files.setting.validation_size)))
