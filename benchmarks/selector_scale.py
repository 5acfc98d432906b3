"""
What the data selector costs as the number of rows grows: time of an update, and memory.

```bash
OMP_NUM_THREADS=1 python benchmarks/selector_scale.py
```

Mirror descent moves the rows of the batch only. Dense Adam, the published codes' choice, walks all of them. Times are
medians; memory is what the resident set of a fresh process grows by, from before the selector is built to its peak.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from trl import TrlParser

from trl_bilevel import DataSelector


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        num_rows (`list[int]`): sizes of the dataset.
        batch_size (`int`): rows of an update.
        num_updates (`int`): updates that are timed.
        only (`str`, *optional*): internal; measure one optimizer at the first size and print the numbers.
    """

    num_rows: list[int] = field(default_factory=lambda: [10_000, 100_000, 1_000_000, 10_000_000])
    batch_size: int = 1024
    num_updates: int = 200
    only: str | None = None


def measure(num_rows: int, optimizer: str, batch_size: int, num_updates: int) -> dict[str, float]:
    """Median milliseconds of an update and of the statistics, and MiB that the resident set grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    selector = DataSelector(num_rows, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"update": [], "statistics": []}
    for update in range(num_updates):
        rows = torch.randint(num_rows, (batch_size,), generator=generator)
        losses = torch.rand(batch_size, generator=generator)
        started = time.perf_counter()
        selector.weights_of(rows)
        selector.update(rows, losses)
        seconds["update"].append(time.perf_counter() - started)
        if update % 3 == 0:  # the first sums over all rows, the others look for the extremes only
            started = time.perf_counter()
            selector.statistics()
            seconds["statistics"].append(time.perf_counter() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "update_ms": 1000 * statistics.median(seconds["update"]),
        "statistics_ms": 1000 * statistics.median(seconds["statistics"]),
        "memory_mib": grown / 1024,
    }


def main(args: BenchmarkArguments) -> None:
    """Measure each case in a process of its own, and print the table."""
    if args.only is not None:
        print(json.dumps(measure(args.num_rows[0], args.only, args.batch_size, args.num_updates)))
        return
    table = Table(title=f"Data selector, batches of {args.batch_size} rows")
    for column in ("rows", "optimizer", "update, ms", "statistics (once per log), ms", "memory, MiB"):
        table.add_column(column, justify="right")
    for num_rows in args.num_rows:
        for optimizer in ("mirror_descent", "adam"):
            command = [sys.executable, __file__, "--only", optimizer, "--num_rows", str(num_rows)]
            command += ["--batch_size", str(args.batch_size), "--num_updates", str(args.num_updates)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(output.splitlines()[-1])
            table.add_row(
                f"{num_rows:,}",
                optimizer,
                f"{result['update_ms']:.3f}",
                f"{result['statistics_ms']:.2f}",
                f"{result['memory_mib']:.0f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
