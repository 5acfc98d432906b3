"""The results of many runs of the planted-fault benchmark in one file: tables can be printed without the runs."""

import json
import os
import re
from pathlib import Path


_NAME = re.compile(r"seed\d+/\d+ epochs, .+\.json")


def collect(folder: Path, file: Path) -> int:
    """
    Add the results in an output folder to a file; results that the file has already stay as the folder has them.

    Args:
        folder (`pathlib.Path`): output folder of the benchmark.
        file (`pathlib.Path`): JSON, measures by `seed0/4 epochs, METHOD [SETTING].json`; made if it is not there.

    Returns:
        `int`: results in the file now.
    """
    results = json.loads(file.read_text()) if file.is_file() else {}
    for path in sorted(folder.glob("seed*/*.json")):
        name = path.relative_to(folder).as_posix()
        if _NAME.fullmatch(name):
            results[name] = {key: round(value, 6) for key, value in json.loads(path.read_text()).items()}
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line per run: a difference shows which
    os.replace(partial, file)
    return len(results)


def restore(file: Path, folder: Path) -> int:
    """
    Write the results of a file that an output folder lacks.

    Returns:
        `int`: results that were written.

    Raises:
        ValueError: for a name that is not one of this benchmark's results.
    """
    written = 0
    for name, measures in json.loads(file.read_text()).items():
        if not _NAME.fullmatch(name) or ".." in name:
            raise ValueError(f"{file} has a result of the name {name!r}, which is not one of this benchmark.")
        path = folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measures))
            written += 1
    return written
