"""The `trl-bilevel` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import resources

from . import __version__
from .command_line import one_line_errors, parse_known_options, parse_options, print_in_any_locale, quiet_launcher


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand; its options follow its name.

    Exit codes: 0; 1 for an error, which is one line where it is the user's to mend; 2 for options that do not exist.
    """
    parser = argparse.ArgumentParser(
        prog="trl-bilevel",
        description="Learn which rows of a fine-tuning dataset to trust, while training on it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-bilevel {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="command")
    for name, (_, help_text) in _COMMANDS.items():
        subparsers.add_parser(name, help=help_text, add_help=False)
    options = _with_config_apart(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(options[:1]).command
    if command is None:
        parser.print_help()
        return 0
    print_in_any_locale()
    run, _ = _COMMANDS[command]
    with one_line_errors():
        run(options[1:])
    return 0


def _run_demo(options: list[str]) -> None:
    from .scripts import demo

    demo.main(*parse_options(demo.make_parser(prog="trl-bilevel demo"), options))


def _run_sft(options: list[str]) -> None:
    """Launch the script through accelerate: whatever is no option of the script is one of `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .scripts import sft, weighted_sft

    make_parser = weighted_sft.make_parser if sft.is_weighted(options) else sft.make_parser
    *_, from_config, from_options = parse_known_options(make_parser(prog="trl-bilevel sft"), options)
    launch_parser = launch_command_parser()
    flags = {name for action in launch_parser._actions if action.nargs == 0 for name in action.option_strings}
    launch_options = resolve_accelerate_config_argument(_with_bare_flags(from_config, flags) + from_options)
    script = resources.files("trl_bilevel.scripts").joinpath("sft.py")
    script_options = _without_subsequence(options, from_options)
    # Quiet: the script has said what went wrong; the launcher's own traceback adds nothing
    launch = launch_parser.parse_args(["--quiet", *launch_options, str(script), *script_options])
    _set_launch_defaults(launch)
    with quiet_launcher():
        launch_command(launch)


def _set_launch_defaults(launch: argparse.Namespace) -> None:
    """What accelerate takes by itself and warns of; several devices it may well mention."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if launch.config_file is not None or os.path.isfile(default_config_file):
        return
    if launch.num_processes is None and torch.accelerator.device_count() <= 1:
        launch.num_processes = 1
    for name, value in (("num_machines", 1), ("mixed_precision", "no"), ("dynamo_backend", "no")):
        if getattr(launch, name) is None:
            setattr(launch, name, value)


def _run_score(options: list[str]) -> None:
    from .scripts import score

    score.main(*parse_options(score.make_parser(prog="trl-bilevel score"), _named(options, "run_dir")))


def _run_push(options: list[str]) -> None:
    from .scripts import push

    push.main(*parse_options(push.make_parser(prog="trl-bilevel push"), _named(options, "run_dir", "repo_id")))


def _run_curate(options: list[str]) -> None:
    from .scripts import curate

    curate.main(*parse_options(curate.make_parser(prog="trl-bilevel curate"), _named(options, "run_dir")))


def _run_report(options: list[str]) -> None:
    from .scripts import report

    report.main(*parse_options(report.make_parser(prog="trl-bilevel report"), _named(options, "run_dir")))


def _run_screen(options: list[str]) -> None:
    from .scripts import screen

    screen.main(*parse_options(screen.make_parser(prog="trl-bilevel screen"), options))


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


def _with_config_apart(options: Sequence[str]) -> list[str]:
    """
    Options with `--config=FILE` as two words, the only way in which TRL's parser knows it.

    Example:

    ```python
    >>> _with_config_apart(["sft", "--config=options.yaml", "--seed=1"])
    ['sft', '--config', 'options.yaml', '--seed=1']

    ```
    """
    name = "--config="
    words = (["--config", word.removeprefix(name)] if word.startswith(name) else [word] for word in options)
    return [word for pair in words for word in pair]


def _with_bare_flags(options: list[str], flags: set[str]) -> list[str]:
    """
    Names and values of a YAML file, where flags that take no value are true or false, as they are typed.

    Example:

    ```python
    >>> _with_bare_flags(["--tpu", "false", "--multi_gpu", "True", "--num_processes", "2"], {"--tpu", "--multi_gpu"})
    ['--multi_gpu', '--num_processes', '2']

    ```
    """
    words: list[str] = []
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name not in flags:
            words += [name, value]
        elif value.lower() == "true":
            words.append(name)
    return words


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
    "screen": (_run_screen, "find the bad rows of a dataset by one forward pass, before anybody trains"),
    "sft": (_run_sft, "fine-tune with a trusted validation dataset; options as `trl sft`"),
}

_EPILOG = """examples:
  trl-bilevel demo
  trl-bilevel screen --model_name_or_path Qwen/Qwen3-0.6B --dataset_name mixture.jsonl \\
      --validation_dataset_name trusted.jsonl --output_dir screened
  trl-bilevel sft --model_name_or_path Qwen/Qwen3-0.6B --use_peft --learning_rate 2e-4 \\
      --dataset_name mixture.jsonl --validation_dataset_name trusted.jsonl --output_dir out
  trl-bilevel curate out --keep_ratio 0.7 --output_dir curated
  trl-bilevel sft --model_name_or_path Qwen/Qwen3-8B --use_peft --learning_rate 2e-4 \\
      --dataset_name curated --weight_column weight --output_dir better

`trl-bilevel COMMAND --help` lists the options of a command. Errors are one line; with TRL_BILEVEL_TRACEBACK=1 in the
environment, also where they came from.
"""
