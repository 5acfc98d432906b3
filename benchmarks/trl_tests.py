"""
TRL's own tests of `SFTTrainer`, run with `BilevelSFTTrainer` in its place: which pass with the one and not with the
other.

```bash
python benchmarks/trl_tests.py --trl_dir path/to/trl --report_path trl_tests.json
```

TRL's source distribution holds no tests: `trl_dir` is a checkout of its repository at the installed version. Most of
the tests load tiny models from the Hub; without it they pass with neither, and say nothing. The trusted rows are the
training rows, as the tests have no others.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import trl
from rich.console import Console
from rich.table import Table
from trl import TrlParser


TEST_FILE = Path("tests") / "test_sft_trainer.py"
IMPORT = "from trl import SFTConfig, SFTTrainer\n"
SWAPPED = "from .swapped_trainer import SFTConfig, SFTTrainer\n"
SWAPPED_TRAINER = '''
from trl_bilevel import BilevelSFTConfig as SFTConfig
from trl_bilevel import BilevelSFTTrainer


class SFTTrainer(BilevelSFTTrainer):
    """The trusted rows are the training rows."""

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, *rest, **options):
        options.setdefault("validation_dataset", train_dataset)
        super().__init__(model, args, data_collator, train_dataset, *rest, **options)
'''


@dataclass
class TestArguments:
    """
    Options of the comparison.

    Args:
        trl_dir (`str`): a checkout of TRL's repository.
        select (`str`): which tests, an expression of `pytest -k`; by default those of the trainer.
        report_path (`str`, *optional*): where the outcomes are written, JSON.
        any_version (`bool`): also run the tests of another version than the installed one.
    """

    __test__ = False  # no test of pytest's

    trl_dir: str = ""
    select: str = "TestSFTTrainer and not Slow"
    report_path: str | None = None
    any_version: bool = False


def check_checkout(trl_dir: Path, any_version: bool) -> None:
    """
    Check that a folder holds the tests of the installed TRL.

    Raises:
        `FileNotFoundError`: without the tests.
        `ValueError`: if they are of another version, or import the trainer otherwise than this script knows.
    """
    path = trl_dir / TEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. `--trl_dir` must be a checkout of TRL's repository, whose package on the index "
            f"comes without tests: `git clone --branch v{trl.__version__} <repository of TRL>`."
        )
    version = (trl_dir / "VERSION").read_text().strip()
    if version != trl.__version__ and not any_version:
        raise ValueError(
            f"{trl_dir} is TRL {version}, and {trl.__version__} is installed. Check out that version, or add "
            "`--any_version True`."
        )
    if path.read_text().count(IMPORT) != 1:
        raise ValueError(f"{path} does not import the trainer as {IMPORT.strip()!r}, which this script replaces.")


def run_tests(trl_dir: Path, select: str, is_swapped: bool) -> dict[str, str]:
    """
    The outcome of each test, "passed", "skipped" or the first line of its error, from a copy of the tests.

    Raises:
        `RuntimeError`: if pytest did not get as far as running them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        shutil.copytree(trl_dir / "tests", copy / "tests")
        if is_swapped:
            path = copy / TEST_FILE
            path.write_text(path.read_text().replace(IMPORT, SWAPPED))
            (copy / "tests" / "swapped_trainer.py").write_text(SWAPPED_TRAINER)
        results = copy / "results.xml"
        options = ["-q", "--rootdir", scratch, "-p", "no:cacheprovider", f"--junitxml={results}", "-k", select]
        command = [sys.executable, "-m", "pytest", *options, str(TEST_FILE)]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if not results.is_file() or done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return {case.attrib["name"]: _outcome(case) for case in ElementTree.parse(results).getroot().iter("testcase")}


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            return (found.attrib.get("message") or kind).strip().splitlines()[0]
    return "passed" if case.find("skipped") is None else "skipped"


def main() -> None:
    """Run the tests twice and say where the swap breaks a script; the exit status is 1 where it does."""
    (arguments,) = TrlParser([TestArguments]).parse_args_and_config()
    trl_dir = Path(arguments.trl_dir)
    check_checkout(trl_dir, arguments.any_version)
    with_sft, swapped = (run_tests(trl_dir, arguments.select, is_swapped) for is_swapped in (False, True))
    passing = [name for name, outcome in with_sft.items() if outcome == "passed"]
    broken = {name: swapped.get(name, "not run") for name in passing if swapped.get(name) != "passed"}
    if arguments.report_path is not None:
        Path(arguments.report_path).write_text(json.dumps({"SFTTrainer": with_sft, "swapped": swapped}, indent=1))
    table = Table("passes with SFTTrainer only", "error of BilevelSFTTrainer")
    for name, outcome in broken.items():
        table.add_row(name, outcome)
    console = Console()
    if broken:
        console.print(table)
    console.print(
        f"Of {len(passing)} tests that pass with SFTTrainer {len(passing) - len(broken)} pass with BilevelSFTTrainer; "
        f"{len(with_sft) - len(passing)} pass with neither or were skipped."
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
