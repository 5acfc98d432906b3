"""The results of many runs of a benchmark in one file: tables can be printed without the runs."""

import json
import os
import re
from pathlib import Path


def collect(folder: Path, file: Path, names: re.Pattern[str]) -> int:
    """
    Add the results in an output folder to a file. Those that the file has stay as they are: what a method builds on is
    run again where only its ranking is missing, and published numbers do not change by that.

    Args:
        folder (`pathlib.Path`): output folder of the benchmark, with a JSON file of measures per run.
        file (`pathlib.Path`): JSON, measures by the path of the run's file within the folder; made if it is not there.
        names (`re.Pattern`): of the whole path of a run's file; others are left alone.

    Returns:
        `int`: results in the file now.
    """
    results = json.loads(file.read_text()) if file.is_file() else {}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if names.fullmatch(name):
            found = {key: round(value, 6) for key, value in json.loads(path.read_text()).items()}
            results[name] = found | results.get(name, {})
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line per run: a difference shows which
    os.replace(partial, file)
    return len(results)


def restore(file: Path, folder: Path, names: re.Pattern[str]) -> int:
    """
    Write the results of a file that an output folder lacks.

    Args:
        file (`pathlib.Path`): as [`collect`] leaves it.
        folder (`pathlib.Path`): output folder of the benchmark.
        names (`re.Pattern`): as for [`collect`].

    Returns:
        `int`: results that were written.

    Raises:
        ValueError: for a name that is not one of this benchmark's results.
    """
    written = 0
    for name, measures in json.loads(file.read_text()).items():
        if not names.fullmatch(name) or ".." in name:
            raise ValueError(f"{file} has a result of the name {name!r}, which is not one of this benchmark.")
        path = folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measures))
            written += 1
    return written
