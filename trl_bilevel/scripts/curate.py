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


@dataclass
class CurateArguments:
    """
    Arguments of the script.

    Args:
        run_dir (`str`): output folder, or a checkpoint, of a run; also the first argument without a name.
        output_dir (`str`): where `train.parquet` goes; required.
        keep_ratio (`float`, *optional*): share of the rows to keep, in (0, 1]; all of them, scored, by default.
    """

    run_dir: str = field(default="", metadata={"help": "Output folder, or a checkpoint, of a run."})
    output_dir: str = field(default="", metadata={"help": "Where `train.parquet` goes. Required."})
    keep_ratio: float | None = field(default=None, metadata={"help": "Share of the rows to keep, in (0, 1]."})

    def __post_init__(self) -> None:
        for name in ("run_dir", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is missing.")


def main(args: CurateArguments) -> None:
    from trl_bilevel.parquet_files import write_parquet
    from trl_bilevel.row_scores import count_proved_good
    from trl_bilevel.run_records import curate_run

    curated = curate_run(args.run_dir, args.keep_ratio)
    path = Path(args.output_dir) / "train.parquet"
    write_parquet(curated, path)
    print(f"🧹 Curated dataset of {len(curated):,} rows saved to {path.parent}.")
    if args.keep_ratio is None:
        num_good = count_proved_good(args.run_dir)
        cut = f": --keep_ratio {num_good / len(curated):.3g} keeps about as many" if num_good else ""
        print(
            f"⚖️ {num_good:,} rows have proved good, their weights risen above that of one of which nothing is known"
            f"{cut}."
        )


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(CurateArguments, __doc__, prog, "RUN_DIR")
