"""What the tables of all benchmarks have in common: spread over seeds, Markdown, and the pages of the docs."""

import re
import statistics
from collections.abc import Mapping


def spread(values: list[float | None]) -> str:
    """Mean and range; a single number is of one seed."""
    known = [value for value in values if value is not None]
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


def spread_and_seeds(values: list[float], most: int) -> str:
    """The same, and of how many seeds where others have more."""
    return f"{spread([*values])}{f', {len(values)}' * (0 < len(values) < most)}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def fill_in(page: str, tables: Mapping[str, str]) -> str:
    """
    A page of the docs with its tables as the results have them.

    Args:
        page (`str`): Markdown. A table's place is what stands between `<!-- table: NAME -->` and
            `<!-- end of table -->`.
        tables (`Mapping[str, str]`): by name; a page need not show all.

    Raises:
        ValueError: for the name of a table that there is not.
    """

    def table(place: re.Match[str]) -> str:
        if place[1] not in tables:
            raise ValueError(f"The page asks for the table {place[1]!r}. Known are {list(tables)}.")
        return f"<!-- table: {place[1]} -->\n\n{tables[place[1]]}\n\n<!-- end of table -->"

    return re.sub(r"<!-- table: (.+?) -->.*?<!-- end of table -->", table, page, flags=re.DOTALL)
