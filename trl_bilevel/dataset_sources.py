"""Which of the Hub's repositories rows come from, for the cards."""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.naming import camelcase_to_snakecase
from datasets.table import ConcatenationTable, MemoryMappedTable
from huggingface_hub import constants


# Where `load_dataset` caches a repository's rows, the only place that says which commit they are of
_CACHE_PATH = re.compile(
    r".*/((?P<namespace>[^/]+)___)?(?P<name>[^/]+)/(?P<config>[^/]+)/\d+\.\d+\.\d+/(?P<revision>[0-9a-f]{40})/[^/]+"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository's and is no path here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def describe_dataset(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Which of the Hub's repositories a dataset comes from, at which revisions, and how many rows it has."""
    if isinstance(dataset, IterableDataset):  # it does not say where it comes from
        return {
            "sources": [],
            "has_other_rows": True,
            "is_stream": True,
            "split": str(dataset.split) if dataset.split else None,
            "license": dataset.info.license or None,
            "num_rows": 0,  # seen so far
        }
    parts = dataset.data.blocks if isinstance(dataset.data, ConcatenationTable) else [[dataset.data]]
    found = []
    for blocks in parts:  # next to each other: columns that were added to rows of the Hub are in memory
        paths = [Path(block.path).as_posix() for block in blocks if isinstance(block, MemoryMappedTable)]
        found.append(next((source for path in paths if (source := _source_of(path)) is not None), None))
    sources = [source for source in found if source is not None and source["id"]]
    return {
        "sources": [source for number, source in enumerate(sources) if source not in sources[:number]],
        "has_other_rows": None in found,  # not of the Hub
        "has_unnamed_source": any(source is not None and not source["id"] for source in found),
        "is_derived": _is_derived(dataset),
        "split": str(dataset.split) if dataset.split else None,
        "license": dataset.info.license or None,
        "num_rows": len(dataset),
    }


def _source_of(path: str) -> dict[str, str] | None:
    """Repository, revision and configuration of a file of rows, `None` if it is not of the Hub."""
    match = _CACHE_PATH.fullmatch(path)
    if match is None:
        return None
    repo_id = _repo_id(match["namespace"], match["name"], match["revision"])
    return {"id": repo_id, "revision": match["revision"], "config": match["config"]}


def _repo_id(namespace: str | None, name: str, revision: str) -> str:
    """
    The repository of rows, empty if its name is not known any more. `OpenOrca` is cached as `open_orca`; the files
    that it was made of are in a folder with the name as it is.
    """
    downloads = Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{revision}")
    names = [folder.parent.parent.name.removeprefix("datasets--").split("--") for folder in downloads]
    for *owner, as_it_is in names:
        if owner == [namespace] * (namespace is not None) and camelcase_to_snakecase(as_it_is) == name:
            return "/".join([*owner, as_it_is])
    # They were deleted. Of a name without an underscore the Hub knows the repository, whatever letters were capitals
    return "" if "_" in name else "/".join(filter(None, (namespace, name)))


def _is_derived(dataset: Dataset) -> bool:
    """Whether rows of a repository were selected, put into another order or changed."""
    split = (dataset.info.splits or {}).get(str(dataset.split))
    return (
        dataset._indices is not None
        or (split is not None and split.num_examples != len(dataset))
        or any(Path(file["filename"]).name.startswith("cache-") for file in dataset.cache_files)
    )


def source_ids(description: dict[str, Any]) -> list[str]:
    """
    Repositories that a described dataset comes from.

    Example:

    ```python
    >>> source_ids({"sources": [{"id": "me/a", "revision": "1"}, {"id": "me/a", "revision": "2"}]})
    ['me/a']

    ```
    """
    return [*dict.fromkeys(source["id"] for source in description["sources"])]


def source_text(description: dict[str, Any]) -> str:
    """
    The same as a sentence's part, in Markdown.

    Example:

    ```python
    >>> source_text({"sources": [{"id": "me/a", "revision": "3f"}], "has_other_rows": True})
    '`me/a` (revision `3f`), and rows that are not on the Hub'
    >>> source_text({"sources": [], "has_other_rows": True})
    'not on the Hub'
    >>> source_text({"sources": [{"id": "me/a", "revision": "3f"}], "has_other_rows": False, "is_derived": True})
    'rows selected from or made of `me/a` (revision `3f`)'

    ```
    """
    names = [f"`{source['id']}` (revision `{source['revision']}`)" for source in description["sources"]]
    if description.get("is_stream"):
        return "a stream, whose source is not recorded"
    if description.get("has_unnamed_source"):
        names.append("a repository of the Hub whose name is not recorded")
    if not names:
        return "not on the Hub"
    derived = "rows selected from or made of " if description.get("is_derived") else ""
    others = ", and rows that are not on the Hub" if description["has_other_rows"] else ""
    return f"{derived}{', '.join(names)}{others}"
