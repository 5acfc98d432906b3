"""
`trl-bilevel demo`: find planted faults in a dataset while training on it. No network, no GPU, a few minutes.

```bash
trl-bilevel demo --output_dir demo_output
```
"""

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from trl import TrlParser

from trl_bilevel.command_line import make_command_parser
from trl_bilevel.demo.comparison import Comparison
from trl_bilevel.demo.problem import DemoArguments


if TYPE_CHECKING:
    from rich.console import Console


def main(args: DemoArguments) -> Comparison:
    import huggingface_hub.constants
    import transformers
    from datasets import disable_progress_bars
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from trl_bilevel.demo.comparison import STAGES, compare

    # Nothing is looked up or reported: the data is procedural and the models are built from a config. The environment
    # variable of that name was read when the Hub client was imported.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    # peft reads the old name of a transformers attribute; nothing a user of the demo could act on
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    console = Console()
    started = time.monotonic()
    console.print(
        f"{args.num_train_rows:,} training rows, {args.fault_ratio:.0%} of them with a bad answer; "
        f"{args.num_validation_rows:,} trusted rows; a model of 0.7 million parameters."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {stage: progress.add_task(stage, total=1, start=False, visible=False) for stage in STAGES}

        def advance(stage: str, share: float) -> None:
            progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=share, visible=True)

        comparison = compare(args, advance)

    _show(console, args, comparison)
    console.print(f"Done in {time.monotonic() - started:.0f} s.")
    return comparison


def _show(console: "Console", args: DemoArguments, comparison: "Comparison") -> None:
    from rich.table import Table

    from trl_bilevel.demo.figure import plot_weights

    output_dir = Path(args.output_dir)
    figure = output_dir / "weights.png"
    plot_weights(comparison.weights, comparison.faults, figure)

    table = Table(title=f"Planted faults, seed {args.seed}", title_justify="left")
    table.add_column("trained with", no_wrap=True)
    table.add_column("held-out exact match", justify="right")
    table.add_column("AUROC, good rows over bad", justify="right")
    table.add_column("good rows among those kept", justify="right")
    for score in comparison.scores:
        table.add_row(
            score.method,
            f"{score.exact_match:.3f}",
            "-" if score.auroc is None else f"{score.auroc:.3f}",
            "-" if score.kept_good is None else f"{score.kept_good:.1%}",
        )
    console.print(table)
    console.print("SFT ranks rows by the model's loss after training. Your numbers may differ a little.")
    num_dropped = args.num_train_rows - len(comparison.curated)
    console.print(
        f"Told nothing but the trusted rows, bilevel SFT holds {comparison.noise_rate:.0%} of the rows to be bad, and "
        f"drops {num_dropped:,}, of which {comparison.dropped_good:.0%} are good."
    )
    for place, row in (("first", comparison.best), ("last", comparison.worst)):
        text = f"{row['prompt']}{row['completion']}"
        console.print(
            f"The row that ranks {place}: {text!r}, weight {row['weight']:.2f}, good with a probability of "
            f"{row['good_probability']:.2f}",
            markup=False,
        )
    console.print(f"Run and adapter  {output_dir / 'adapter'}")
    console.print(f"Curated dataset  {output_dir / 'curated'} ({len(comparison.curated):,} rows)")
    console.print(f"Report           {output_dir / 'report.html'}")
    console.print(f"Figure           {figure}")
    console.print(f"Cut anew with    trl-bilevel curate {output_dir / 'adapter'} --keep_ratio 0.3 --output_dir best")


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(DemoArguments, __doc__, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
