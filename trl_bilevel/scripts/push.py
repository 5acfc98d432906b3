"""
`trl-bilevel push`: publish the curated dataset of a run, finished or interrupted. No model is loaded.

```bash
trl-bilevel push Qwen3-0.6B-BilevelSFT me/mixture-curated --keep_ratio 0.7
```
"""

import sys
from dataclasses import dataclass, field

from trl import TrlParser

from trl_bilevel.command_line import make_command_parser
from trl_bilevel.curation import parse_keep_ratio


@dataclass
class PushArguments:
    """
    Arguments of the script.

    Args:
        run_dir (`str`): output folder, or a checkpoint, of a run; also the first argument without a name.
        repo_id (`str`): dataset repository; also the second.
        keep_ratio (`str`): which rows are kept: `auto`, all but those that a screen says can be dropped; or a share in
            (0, 1].
        private (`bool`, *optional*): whether a new repository is private.
        revision (`str`, *optional*): branch to push to.
        commit_message (`str`, *optional*): of the commit.
        license (`str`, *optional*): of the dataset, where its source does not say; asked for in a terminal.
        language (`list[str]`, *optional*): of the rows, ISO 639 codes; that of the source by default.
        sensitive (`bool`): show no rows in the card.
    """

    run_dir: str = field(default="", metadata={"help": "Output folder, or a checkpoint, of a run."})
    repo_id: str = field(default="", metadata={"help": "Dataset repository to push to."})
    keep_ratio: str = field(
        default="auto",
        metadata={"help": "Rows to keep: 'auto', all but those that a screen says can be dropped; or a share."},
    )
    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private.", "nargs": "?", "const": True}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    license: str | None = field(default=None, metadata={"help": "License, where the source does not say."})
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the rows, ISO 639 codes."})
    sensitive: bool = field(default=False, metadata={"help": "Show no rows in the card."})

    def __post_init__(self) -> None:
        for name in ("run_dir", "repo_id"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is missing.")
        parse_keep_ratio(self.keep_ratio)


def main(args: PushArguments) -> None:
    from trl_bilevel.hub import publish_curated_dataset
    from trl_bilevel.row_scores import find_scores
    from trl_bilevel.run_records import curate_run, push_command, read_facts, read_selector

    directory = find_scores(args.run_dir)  # once: a running job may save a checkpoint meanwhile
    commit = publish_curated_dataset(
        curate_run(directory),
        read_facts(directory),
        args.repo_id,
        keep_ratio=parse_keep_ratio(args.keep_ratio),
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message,
        license=args.license,
        language=args.language,
        sensitive=args.sensitive,
        retry_command=push_command(**vars(args)),
        ask_license=_ask_license if sys.stdin.isatty() else None,
        selector=read_selector(directory),
    )
    print(f"🤗 Curated dataset pushed to the Hub as {args.repo_id}, commit {commit.oid[:8]}.")


def _ask_license() -> str | None:
    from rich.prompt import Prompt

    return Prompt.ask("License of the dataset, for instance `cc-by-4.0` (empty for none)", default="") or None


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(PushArguments, __doc__, prog, "RUN_DIR REPO_ID")
