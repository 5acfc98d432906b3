"""
The beds of real text on one page: a table for each measure, from the results of `compare.py`.

```bash
python benchmarks/bed_overview.py --page docs/real_models.md
```
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lib.beds import ARITHMETIC, BAD_SHARES, FIRST_CONTACT, FORMATS, HALLUCINATION, PIPELINE, Bed
from lib.method_names import BMO, DEFAULT, FIRST_ROUND, PUBLIC_CODES
from lib.methods import ON_BEDS
from lib.results import Results, fill_in, markdown, spread
from rich.console import Console
from rich.table import Table
from trl import TrlParser


@dataclass
class OverviewArguments:
    """
    Options of the overview.

    Args:
        results (`str`): file of the results.
        seeds (`list[int]`): that count.
        page (`str`, *optional*): Markdown file whose tables are written anew.
    """

    results: str = "docs/data/results.json"
    seeds: list[int] = field(default_factory=lambda: [0])
    page: str | None = None


Rows = tuple[list[str], list[list[str]]]
"""Header and rows of a table."""
_BEDS = {
    **{f"{share:.0%} bad": Bed(PIPELINE, bad_share=share) for share in BAD_SHARES},
    ARITHMETIC: Bed(ARITHMETIC),
    HALLUCINATION: Bed(HALLUCINATION),
}
_WEIGHTS = {"weight_p5": "5th percentile", "weight_p95": "95th percentile", "good_weight": "share on good rows"}
_CUT = {
    "noise_rate": "estimated noise rate",
    "control_auroc": "positive control",
    "dropped": "dropped by `auto`",
    "good_among_dropped": "good among them",
}
_FIRST_CONTACT = {
    "held_out_loss": "held-out loss",
    "auroc": "AUROC of the ranking",
    "auroc_score": "of `score`",
    "auroc_loss": "of its own loss",
    "weight_p5": "weights: 5th percentile",
    "weight_p95": "95th percentile",
    "proved_good": "rows said to have proved good",
}


def across_beds(results: Results, row_format: str, measure: str, seeds: list[int]) -> Rows:
    """A measure of every method on every bed of a format; a dash where there is no result."""
    rows = []
    for method in ON_BEDS:
        cells = [
            _cell(results, str(bed._replace(row_format=row_format)), method, measure, seeds) for bed in _BEDS.values()
        ]
        if any(cell != "-" for cell in cells):
            rows.append([method, *cells])
    shown = [number for number in range(1, len(_BEDS) + 1) if any(row[number] != "-" for row in rows)]
    names = ["method", *_BEDS]
    return [names[number] for number in [0, *shown]], [[row[number] for number in [0, *shown]] for row in rows]


def weights_across_beds(results: Results, seeds: list[int]) -> Rows:
    """How far the learned weights spread, by method, format and bed."""
    rows = []
    for row_format in FORMATS:
        for method in (DEFAULT, FIRST_ROUND, PUBLIC_CODES, BMO):
            for name, bed in _BEDS.items():
                problem = str(bed._replace(row_format=row_format))
                cells = [_cell(results, problem, method, measure, seeds) for measure in _WEIGHTS]
                if any(cell != "-" for cell in cells):
                    rows.append([method, row_format, name, *cells])
    return ["method", "format", "bed", *_WEIGHTS.values()], rows


def cut_of_the_screen(results: Results, seeds: list[int]) -> Rows:
    """What a run that starts from a screen says of the number of bad rows, and what `keep_ratio="auto"` drops."""
    rows = []
    for row_format in FORMATS:
        for name, bed in _BEDS.items():
            problem = str(bed._replace(row_format=row_format))
            cells = [_cell(results, problem, DEFAULT, measure, seeds) for measure in _CUT]
            if any(cell != "-" for cell in cells):
                rows.append([row_format, name, *cells])
    return ["format", "bed", *_CUT.values()], rows


def first_contact(results: Results, seeds: list[int]) -> Rows:
    """The README's swap with the defaults of peft, two epochs."""
    rows = []
    for row_format in FORMATS:
        problem = str(Bed(FIRST_CONTACT, row_format, 0.2, num_epochs=2))
        for method in ON_BEDS:
            cells = [_cell(results, problem, method, measure, seeds) for measure in _FIRST_CONTACT]
            if any(cell != "-" for cell in cells):
                rows.append([row_format, method, *cells])
    return ["format", "method", *_FIRST_CONTACT.values()], rows


def _cell(results: Results, problem: str, method: str, measure: str, seeds: list[int]) -> str:
    found = results.values(problem, method, measure)
    return spread([value for seed, value in found.items() if seed in seeds])


_MEASURES = {"held-out loss": "held_out_loss", "AUROC": "auroc", "kept": "kept_ratio", "precision": "kept_precision"}
TABLES: dict[str, Callable[[Results, list[int]], Rows]] = {
    **{
        f"{title}, {row_format}": lambda results, seeds, row_format=row_format, measure=measure: across_beds(
            results, row_format, measure, seeds
        )
        for title, measure in [*_MEASURES.items(), ("exact match", "exact_match")]
        for row_format in FORMATS
    },
    "cut": cut_of_the_screen,
    "weights": weights_across_beds,
    "first contact": first_contact,
}


def main(args: OverviewArguments) -> None:
    """Print the tables, and write those of the page."""
    results, console = Results.read(Path(args.results)), Console(width=200)
    tables = {name: make(results, args.seeds) for name, make in TABLES.items()}
    for name, (header, rows) in tables.items():
        printed = Table(*header, title=name)
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    if args.page is not None:
        page = Path(args.page)
        page.write_text(fill_in(page.read_text(), {name: markdown(*rows) for name, rows in tables.items()}))


if __name__ == "__main__":
    main(*TrlParser(OverviewArguments).parse_args_and_config())
