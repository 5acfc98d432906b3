"""The results of the benchmark: a file per run while they are made, one file for all of them, tables in the docs."""

import json
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lib.problem import Problem


RESULT_NAMES = re.compile(r"[^/]+/seed\d+/[^/]+\.json")
"""Of the results within the output folder, and in the file of all: problem, seed, method."""


class Files(NamedTuple):
    """Where the results of a problem and seed are."""

    output_dir: Path
    problem: Problem

    @property
    def folder(self) -> Path:
        return self.output_dir / self.problem.name / f"seed{self.problem.seed}"

    @property
    def trusted_adapter(self) -> Path:
        """What SFT on the trusted rows learned, which other problems may share."""
        return self.output_dir / self.problem.trusted_name / f"seed{self.problem.seed}" / "trusted_adapter"

    @property
    def first_round(self) -> Path:
        """What a second round needs of the first: `logits` and `proved_good`, shape (N,) each."""
        return self.folder / "first_round.npz"

    def result(self, method: str) -> Path:
        return self.folder / f"{method.replace('/', '-')}.json"

    def losses(self, method: str) -> Path:
        """Losses of the training rows, then of the trusted ones, in nats per token, shape (N + V,)."""
        return self.folder / f"{method}.npy"

    def kept(self, method: str) -> Path:
        """Positions of the rows that a ranking keeps, shape (K,)."""
        return self.folder / f"{method}, kept.npy"


def collect(folder: Path, file: Path) -> int:
    """
    Add the results in an output folder to a file. Those that the file has stay as they are: what a method builds on is
    run again where only its ranking is missing, and published numbers do not change by that.

    Args:
        folder (`pathlib.Path`): output folder of the benchmark, with a JSON file of measures per run.
        file (`pathlib.Path`): JSON, measures by the path of the run's file within the folder; made if it is not there.

    Returns:
        `int`: results in the file now.
    """
    results = json.loads(file.read_text()) if file.is_file() else {}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if RESULT_NAMES.fullmatch(name):
            found = {key: round(value, 6) for key, value in json.loads(path.read_text()).items()}
            results[name] = found | results.get(name, {})
    write_results(results, file)
    return len(results)


def write_results(results: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """The file of all results, by name: a line per run, so that a difference shows which."""
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(partial, file)


def restore(file: Path, folder: Path) -> int:
    """
    Write the results of a file that an output folder lacks.

    Args:
        file (`pathlib.Path`): as [`collect`] leaves it.
        folder (`pathlib.Path`): output folder of the benchmark.

    Returns:
        `int`: results that were written.

    Raises:
        ValueError: for a name that is not one of a result.
    """
    written = 0
    for name, measures in json.loads(file.read_text()).items():
        if not RESULT_NAMES.fullmatch(name) or ".." in name:
            raise ValueError(f"{file} has a result of the name {name!r}, which is not one of this benchmark.")
        path = folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measures))
            written += 1
    return written


class Results(NamedTuple):
    """What a file of [`collect`] says."""

    by_name: dict[str, dict[str, float]]

    @classmethod
    def read(cls, file: Path) -> "Results":
        return cls(json.loads(file.read_text()))

    def of_method(self, problem: str, method: str) -> dict[int, dict[str, float]]:
        """Measures by seed, in the seeds' order."""
        names = re.compile(rf"{re.escape(problem)}/seed(\d+)/{re.escape(method.replace('/', '-'))}\.json")
        found = {int(match[1]): name for name in self.by_name if (match := names.fullmatch(name))}
        return {seed: self.by_name[found[seed]] for seed in sorted(found)}

    def values(self, problem: str, method: str, measure: str) -> dict[int, float]:
        """Of the seeds that have it, in their order."""
        by_seed = self.of_method(problem, method)
        return {seed: result[measure] for seed, result in by_seed.items() if measure in result}


def spread(values: list[float | None]) -> str:
    """Mean and range; a single number is of one seed."""
    known = [value for value in values if value is not None]
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


def spread_and_seeds(values: list[float], most: int) -> str:
    """The same, and of how many seeds where others have more."""
    return f"{spread([*values])}{f', {len(values)}' * (0 < len(values) < most)}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def fill_in(page: str, tables: Mapping[str, str]) -> str:
    """
    A page of the docs with its tables as the results have them.

    Args:
        page (`str`): Markdown. A table's place is what stands between `<!-- table: NAME -->` and
            `<!-- end of table -->`.
        tables (`Mapping[str, str]`): by name; a page need not show all.

    Raises:
        ValueError: for the name of a table that there is not.
    """

    def table(place: re.Match[str]) -> str:
        if place[1] not in tables:
            raise ValueError(f"The page asks for the table {place[1]!r}. Known are {list(tables)}.")
        return f"<!-- table: {place[1]} -->\n\n{tables[place[1]]}\n\n<!-- end of table -->"

    return re.sub(r"<!-- table: (.+?) -->.*?<!-- end of table -->", table, page, flags=re.DOTALL)
