"""What the commands share: help out of a script's docstring, and errors of one line that say what to do."""

import dis
import io
import logging
import os
import sys
import textwrap
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trl
from yaml import YAMLError


TRACEBACK_VARIABLE = "TRL_BILEVEL_TRACEBACK"
_CONFIG_HELP = "All options can also stand in a YAML file: --config options.yaml"


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Examples keep their lines, and a default is shown where there is one."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def make_command_parser(
    dataclass_types: Any, documentation: str | None, prog: str | None, values: str = ""
) -> trl.TrlParser:
    """
    Parser of a command whose help is the docstring of its script.

    Args:
        dataclass_types: what the options are parsed into.
        documentation (`str`, *optional*): docstring: a line that starts with the command's name, then examples.
        prog (`str`, *optional*): name of the command.
        values (`str`): what may follow the command without a name.
    """
    summary, _, rest = (documentation or "").strip().partition("\n\n")
    summary = " ".join(summary.partition(": ")[2].split())
    prose, *blocks = rest.split("```")  # and in turn an example and prose
    for number, block in enumerate(blocks):
        example = "examples:\n" + textwrap.indent(block.removeprefix("bash\n"), "  ")
        prose += block if number % 2 else example
    return trl.TrlParser(
        dataclass_types,
        prog=prog,
        usage=" ".join(f"%(prog)s {values} [options]".split()),
        description=summary[:1].upper() + summary[1:],
        epilog=f"{prose.strip()}\n\n{_CONFIG_HELP}",
        formatter_class=_HelpFormatter,
    )


def parse_options(parser: trl.TrlParser, options: list[str]) -> tuple[Any, ...]:
    """Parsed options; unknown ones, here or in the YAML file, end the command with exit code 2, wrong ones with 1."""
    *parsed, unknown_in_file, unknown = parse_known_options(parser, options)
    if unknown_in_file:
        parser.error(f"unrecognized options in the YAML file: {' '.join(unknown_in_file[::2])}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def parse_known_options(parser: trl.TrlParser, options: list[str]) -> tuple[Any, ...]:
    """The same, and at the end the unknown options of the YAML file and those of the command line."""
    if options[-1:] == ["--config"]:
        parser.error("argument --config: expected a YAML file")
    with one_line_errors(everywhere=True):
        return parser.parse_args_and_config(options, return_remaining_strings=True, separate_remaining_strings=True)


@contextmanager
def one_line_errors(everywhere: bool = False) -> Iterator[None]:
    """
    End the process with exit code 1 and one line for errors that are meant for the user.

    Those are the errors that this package and TRL raise on purpose, and those of files and connections. Others keep
    their traceback, as all do where the environment variable `TRL_BILEVEL_TRACEBACK` is set.

    Args:
        everywhere (`bool`): take all errors for the user's, wherever they come from: while options are read.
    """
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError, YAMLError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not (everywhere or _is_for_the_user(error)):
            raise
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None


@contextmanager
def quiet_launcher() -> Iterator[None]:
    """
    End with exit code 1 where one of several launched processes has failed, which has said why itself.

    The launcher's traceback and records of which process failed first are shown where `TRL_BILEVEL_TRACEBACK` is set.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if os.environ.get(TRACEBACK_VARIABLE):
        yield
        return
    records = logging.getLogger("torch.distributed.elastic")
    level = records.level
    records.setLevel(logging.CRITICAL)
    try:
        yield
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say anything
            raise SystemExit(f"error: process {rank} was ended by {failure.signal_name()}") from None
        raise SystemExit(1) from None
    finally:
        records.setLevel(level)


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    innermost = error.__traceback__
    assert innermost is not None
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    folders = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, *trl.__path__))
    # A `TypeError` of a bug comes out of a line that does something else than `raise`
    is_on_purpose = code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_on_purpose and code.co_filename.startswith(folders)


def print_in_any_locale() -> None:
    """Where the locale has no emoji, print question marks instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper) and "utf" not in sys.stdout.encoding.lower():
        sys.stdout.reconfigure(errors="replace")


def model_init_kwargs(model_args: trl.ModelConfig, training_args: trl.SFTConfig) -> dict[str, Any]:
    """How a script loads its model, as `trl sft` does; what `training_args` says of it goes before."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
