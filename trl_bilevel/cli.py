"""The `trl-bilevel` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import resources

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its options follow its name."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel",
        description="Learn which rows of a fine-tuning dataset to trust, while training on it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-bilevel {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command")
    for name, (_, help_text) in _COMMANDS.items():
        subparsers.add_parser(name, help=help_text, add_help=False)
    options = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_known_args(options[:1])[0].command
    if command is None:
        parser.print_help()
        return 0
    run, _ = _COMMANDS[command]
    run(options[1:])
    return 0


def _run_demo(options: list[str]) -> None:
    from .scripts import demo

    (args,) = demo.make_parser(prog="trl-bilevel demo").parse_args_and_config(options)
    demo.main(args)


def _run_sft(options: list[str]) -> None:
    """Launch the script through accelerate: whatever is no option of the script is one of `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .scripts import sft

    *_, from_config, from_options = sft.make_parser(prog="trl-bilevel sft").parse_args_and_config(
        options, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_options = resolve_accelerate_config_argument(from_config + from_options)
    script = resources.files("trl_bilevel.scripts").joinpath("sft.py")
    script_options = _without_subsequence(options, from_options)
    launch_command(launch_command_parser().parse_args([*launch_options, str(script), *script_options]))


def _run_score(options: list[str]) -> None:
    from .scripts import score

    parser = score.make_parser(prog="trl-bilevel score")
    score.main(*parser.parse_args_and_config(_named(options, "run_dir")))


def _run_push(options: list[str]) -> None:
    from .scripts import push

    push.main(*push.make_parser(prog="trl-bilevel push").parse_args_and_config(_named(options, "run_dir", "repo_id")))


def _run_curate(options: list[str]) -> None:
    from .scripts import curate

    parser = curate.make_parser(prog="trl-bilevel curate")
    curate.main(*parser.parse_args_and_config(_named(options, "run_dir")))


def _run_report(options: list[str]) -> None:
    from .scripts import report

    parser = report.make_parser(prog="trl-bilevel report")
    report.main(*parser.parse_args_and_config(_named(options, "run_dir")))


def _named(options: list[str], *names: str) -> list[str]:
    """
    Options whose first values may stand without a name.

    Example:

    ```python
    >>> _named(["out", "me/rows", "--keep_ratio", "0.5"], "run_dir", "repo_id")
    ['--run_dir', 'out', '--repo_id', 'me/rows', '--keep_ratio', '0.5']

    ```
    """
    named: list[str] = []
    for name in names:
        if not options or options[0].startswith("-"):
            break
        named += [f"--{name}", options[0]]
        options = options[1:]
    return named + options


def _without_subsequence(options: list[str], removed: list[str]) -> list[str]:
    """
    Options without those removed, which occur among them in the same order.

    Example:

    ```python
    >>> _without_subsequence(["--lr", "1", "--num_processes", "2", "--seed", "2"], ["--num_processes", "2"])
    ['--lr', '1', '--seed', '2']

    ```
    """
    waiting = list(removed)
    return [option for option in options if not (waiting and option == waiting[0] and waiting.pop(0))]


_COMMANDS = {
    "curate": (_run_curate, "write the curated dataset of a run, finished or interrupted"),
    "demo": (_run_demo, "find planted faults in a dataset: no network, no GPU, a few minutes"),
    "push": (_run_push, "publish the curated dataset of a run on the Hub"),
    "report": (_run_report, "show what a run did, finished or interrupted, as one HTML page"),
    "score": (_run_score, "rank rows that were never trained on with the model of a finished run"),
    "sft": (_run_sft, "fine-tune with a trusted validation dataset; options as `trl sft`"),
}
