"""
`trl-bilevel curate`: write the curated dataset of a run, finished or interrupted. No model is loaded.

```bash
trl-bilevel curate Qwen3-0.6B-BilevelSFT --keep_ratio 0.7 --output_dir curated
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from trl_bilevel.command_line import make_command_parser
from trl_bilevel.curation import parse_keep_ratio


@dataclass
class CurateArguments:
    """
    Arguments of the script.

    Args:
        run_dir (`str`): output folder, or a checkpoint, of a run; also the first argument without a name.
        output_dir (`str`): where `train.parquet` goes; required.
        keep_ratio (`str`): which rows are kept: `auto`, all but those that a screen says can be dropped; or a share in
            (0, 1].
    """

    run_dir: str = field(default="", metadata={"help": "Output folder, or a checkpoint, of a run."})
    output_dir: str = field(default="", metadata={"help": "Where `train.parquet` goes. Required."})
    keep_ratio: str = field(
        default="auto",
        metadata={"help": "Rows to keep: 'auto', all but those that a screen says can be dropped; or a share."},
    )

    def __post_init__(self) -> None:
        for name in ("run_dir", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is missing.")
        parse_keep_ratio(self.keep_ratio)


def main(args: CurateArguments) -> None:
    from trl_bilevel.parquet_files import write_parquet
    from trl_bilevel.run_records import curate_run, read_facts

    curated = curate_run(args.run_dir, parse_keep_ratio(args.keep_ratio))
    path = Path(args.output_dir) / "train.parquet"
    write_parquet(curated, path)
    print(f"🧹 Curated dataset of {len(curated):,} rows saved to {path.parent}.")
    facts = read_facts(args.run_dir)
    if facts.get("warning"):
        print(f"⚠️ {facts['warning']}")
    elif args.keep_ratio == "auto" and not facts.get("screening"):
        print("⚖️ None was dropped: learned weights promise nothing of those that a cut would drop. Choose a share.")


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(CurateArguments, __doc__, prog, "RUN_DIR")
