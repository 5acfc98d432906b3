"""
`trl-bilevel report`: what a run did, finished or interrupted, as one HTML page. No model is loaded.

```bash
trl-bilevel report Qwen3-0.6B-BilevelSFT --keep_ratio 0.7 --output report.html
```
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_bilevel.command_line import make_command_parser
from trl_bilevel.curation import parse_keep_ratio


@dataclass
class ReportArguments:
    """
    Arguments of the script.

    Args:
        run_dir (`str`): output folder, or a checkpoint, of a run; also the first argument without a name.
        output (`str`): file to write. It shows rows of the dataset.
        keep_ratio (`str`): which rows count as kept: `auto`, all but those that a screen says can be dropped; or a
            share in (0, 1].
        source_column (`str`, *optional*): column to count the rows by; that of the run by default.
    """

    run_dir: str = field(default="", metadata={"help": "Output folder, or a checkpoint, of a run."})
    output: str = field(default="report.html", metadata={"help": "File to write."})
    keep_ratio: str = field(
        default="auto",
        metadata={"help": "Rows that count as kept: 'auto', all but those a screen says can be dropped; or a share."},
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Column to count the rows by; that of the run by default."}
    )

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ValueError("`--run_dir` is missing.")
        parse_keep_ratio(self.keep_ratio)


def main(args: ReportArguments) -> None:
    from trl_bilevel.report import build_report, write_report

    write_report(build_report(args.run_dir, parse_keep_ratio(args.keep_ratio), args.source_column), args.output)
    print(f"📄 Report saved to {args.output}.")


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(ReportArguments, __doc__, prog, "RUN_DIR")
