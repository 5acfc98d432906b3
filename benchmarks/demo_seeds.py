"""
The demo's table over several seeds, mean and range, with training on the trusted rows alone beside it.

```bash
python benchmarks/demo_seeds.py
```
"""

import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from trl import TrlParser

from trl_bilevel.demo.comparison import DemoArguments, MethodScore
from trl_bilevel.scripts import demo


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        num_seeds (`int`): number of seeds, from 0.
    """

    num_seeds: int = 3


def main(args: BenchmarkArguments) -> None:
    """Run the demo with every seed and print the table."""
    scores: dict[str, list[MethodScore]] = defaultdict(list)
    for seed in range(args.num_seeds):
        with tempfile.TemporaryDirectory() as output_dir:
            for score in demo.main(DemoArguments(output_dir, seed, trusted_only=True)).scores:
                scores[score.method].append(score)

    table = Table(title=f"Demo over {args.num_seeds} seeds: mean (range)")
    for column in ("trained with", "held-out exact match", "AUROC, good rows over bad", "good rows among those kept"):
        table.add_column(column, no_wrap=column == "trained with")
    for method, results in scores.items():
        table.add_row(method, *(_spread([getattr(result, name) for result in results]) for name in _MEASURES))
    Console().print(table)


_MEASURES = ("exact_match", "auroc", "kept_good")


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
