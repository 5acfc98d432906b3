"""
Where refined responses are kept: files that are written whole or not at all, and never changed.

Data loading workers read the same files, mapped into memory, so a refresh reaches them without a restart, and a killed
run finds everything it had generated.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.feather
import pyarrow.parquet

from .whole_files import damage_explained, write_whole


CHECKPOINT_FILE_NAME = "_refined_responses.pq"
"""In every checkpoint and output folder. Trainer pushes no file of an output folder whose name starts with `_`; it
pushes whole checkpoints, this file included, with `hub_strategy="checkpoint"` or `"all_checkpoints"`. A Parquet file,
but not by its name: the Hub's client warns where `.parquet` is committed to a model repository."""
FOLDER_NAME = "_refined_responses"
"""In the output folder: a folder per run, where responses are written as soon as they are generated."""

RESPONSE_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # the question: its position in the training dataset
        "step": pa.int64(),  # optimizer steps done before it was generated
        "response": pa.int32(),  # 0 to G - 1
        "used": pa.bool_(),  # whether it replaces the original answer
        "flaw": pa.string(),  # null if none was found, see `response_checks`
        "text": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),  # that training puts before the response
        "completion_ids": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float32()),  # of the completion under the model and prompt that generated it, in nats
        "weight": pa.float64(),  # of the question when it was chosen, mean 1; null without a selector
        "settings": pa.string(),  # of the generation, JSON
    }
)
_CURE = "If you delete it, what it held is generated anew."
_REFRESH_FILE = re.compile(r"refresh-(\d+)\.arrow")
_ARRIVED_UP_TO = "arrived_up_to"  # in the metadata of the file


class RefinedResponse(NamedTuple):
    """A response that takes the place of a row's original answer."""

    prompt_ids: list[int]
    completion_ids: list[int]
    log_probs: list[float]
    """Of the completion's tokens under the policy and prompt that generated them, in nats."""


class RefreshPlan(NamedTuple):
    """What a refresh set out to do, written down before its first response."""

    rows: list[int]
    """Questions, positions in the training dataset."""
    weights: list[float] | None
    """Of the questions when they were chosen; `None` without a selector."""


class _Refresh(NamedTuple):
    step: int
    table: pa.Table
    rows: np.ndarray
    """Rows whose answer this refresh decides on, int64, ascending; a row occurs once for each response it uses."""
    lines: np.ndarray
    """The line of the table that each of them uses, int64; -1 for a row that goes back to its original answer."""
    previous: np.ndarray
    """The refresh before this one that answered the same row, by its place in the list, -1 for none, int32."""


class ResponseStore:
    """
    The refined responses of a run, one file per refresh.

    Args:
        parent (`str` or `os.PathLike`): holds the folders of runs.
        run (`str`): hexadecimal name of the run, which stays when it is interrupted and resumed.
        settings (`str`): digest of all that decides on the responses. A run that goes on with other settings gets a
            folder of its own, and finds there only what its checkpoint brings.
    """

    def __init__(self, parent: str | os.PathLike, run: str = "0", settings: str = "0"):
        self.run = run
        self.folder = Path(parent) / f"{run}-{settings}"  # created with the first file
        self._refreshes: list[_Refresh] = []  # by step
        # The R rows that have an answer, ascending, and the last refresh that gave it, by its place in the list
        self._rows = np.empty(0, dtype=np.int64)  # (R,)
        self._newest = np.empty(0, dtype=np.int32)  # (R,)
        self._read_up_to = -1  # a refresh no later than this is here, or will never be
        self._arrived_up_to = -1  # the answers of a refresh no later than this are in the batches

    def __getstate__(self) -> dict[str, Any]:
        # To a data loading worker, which maps the files itself
        return {**vars(ResponseStore(self.folder.parent, self.run)), "folder": self.folder}

    def go_on_as(self, other: "ResponseStore") -> None:
        """Become another store, for all who hold this one."""
        self.__dict__.update(other.__dict__)

    def read_new_files(self, up_to_step: int) -> None:
        """Map the files of refreshes that are complete, no later than a step, and not read yet."""
        if up_to_step <= self._read_up_to or not self.folder.is_dir():
            return
        known = {refresh.step for refresh in self._refreshes}
        steps = [int(match[1]) for name in os.listdir(self.folder) if (match := _REFRESH_FILE.fullmatch(name))]
        for step in sorted(set(steps) - known):
            if step <= up_to_step:
                self._add(step, _read_table(self._refresh_path(step), memory_map=True))
        self._read_up_to = up_to_step

    def _add(self, step: int, table: pa.Table) -> None:
        # Arrays, not dictionaries: these are as many numbers as all refreshes together had rows
        lines = np.flatnonzero(table.column("used").to_numpy())
        rows = table.column("row").to_numpy()[lines]
        back = np.intersect1d(_confirmed_rows(table), self._rows)
        rows, lines = np.concatenate([rows, back]), np.concatenate([lines, np.full(len(back), -1)])
        by_row = np.argsort(rows, kind="stable")
        rows, lines = rows[by_row], lines[by_row]
        all_rows = np.union1d(self._rows, rows)
        newest = np.full(len(all_rows), -1, dtype=np.int32)
        newest[np.searchsorted(all_rows, self._rows)] = self._newest
        places = np.searchsorted(all_rows, rows)
        previous = newest[places]
        newest[places] = len(self._refreshes)
        self._rows, self._newest = all_rows, newest
        self._refreshes.append(_Refresh(step, table, rows, lines, previous))

    @property
    def last_step(self) -> int:
        """Step of the newest refresh, -1 before the first."""
        return self._refreshes[-1].step if self._refreshes else -1

    def responses_of(self, row: int, up_to_step: int) -> list[RefinedResponse]:
        """
        The responses to use for a row: those of its newest refresh no later than a step. Empty: the original, which a
        refresh may also have come back to.
        """
        place = int(np.searchsorted(self._rows, row))
        number = int(self._newest[place]) if place < len(self._rows) and self._rows[place] == row else -1
        while number >= 0:
            refresh = self._refreshes[number]
            start, stop = (int(np.searchsorted(refresh.rows, row, side)) for side in ("left", "right"))
            if refresh.step <= up_to_step:
                columns = [refresh.table.column(name) for name in RefinedResponse._fields]
                return [
                    RefinedResponse(*(column[line].as_py() for column in columns))
                    for line in refresh.lines[start:stop].tolist()
                    if line >= 0
                ]
            number = int(refresh.previous[start])
        return []

    def rows_that_change(self, up_to_step: int) -> list[int]:
        """
        Rows whose answer becomes another one now that refreshes up to a step are in the batches, ascending.

        Each refresh counts once, also in a run that was interrupted. A row that is given the same answer again is not
        among them.
        """
        arriving = [refresh for refresh in self._refreshes if self._arrived_up_to < refresh.step <= up_to_step]
        self._arrived_up_to = max(self._arrived_up_to, up_to_step)
        return sorted({row for refresh in arriving for row in self._changed_rows(refresh)})

    def _changed_rows(self, refresh: _Refresh) -> list[int]:
        starts = np.flatnonzero(np.diff(refresh.rows, prepend=np.iinfo(np.int64).min))  # of each row's lines
        return [
            row
            for row, number in zip(refresh.rows[starts].tolist(), refresh.previous[starts].tolist(), strict=True)
            if number < 0 or _texts(refresh, row) != _texts(self._refreshes[number], row)
        ]

    def table(self, arrived_only: bool = False) -> pa.Table:
        """
        All responses, of the columns of `RESPONSE_SCHEMA`, oldest first.

        Args:
            arrived_only (`bool`): without those of refreshes of which no batch has had an answer yet.
        """
        refreshes = [refresh for refresh in self._refreshes if not arrived_only or refresh.step <= self._arrived_up_to]
        return pa.concat_tables(
            [RESPONSE_SCHEMA.empty_table(), *(refresh.table.cast(RESPONSE_SCHEMA) for refresh in refreshes)]
        )

    # ---- A refresh, as it goes on ----
    def read_plan(self, step: int) -> RefreshPlan | None:
        """What an interrupted refresh at this step set out to do."""
        path = self._plan_path(step)
        if not path.is_file():
            return None
        with damage_explained(path, _CURE):
            return RefreshPlan(**json.loads(path.read_text()))

    def write_plan(self, step: int, plan: RefreshPlan) -> None:
        """Begin a refresh."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._plan_path(step), lambda path: path.write_text(json.dumps(plan._asdict())))

    def discard(self, step: int) -> None:
        """Remove all that is on disk of a refresh that is not read yet; its plan last, by which it is known."""
        for path in self.folder.glob(f"refresh-{step:08d}*.arrow"):
            path.unlink(missing_ok=True)
        self._plan_path(step).unlink(missing_ok=True)

    def read_part(self, step: int, part: int) -> pa.Table | None:
        """Responses of one batch of a refresh, if they were generated before."""
        path = self._part_path(step, part)
        return _read_table(path) if path.is_file() else None

    def write_part(self, step: int, part: int, responses: pa.Table) -> None:
        """Keep the responses of one batch, before the whole refresh is done."""
        self.folder.mkdir(parents=True, exist_ok=True)  # another node's may be another disk
        write_table(self._part_path(step, part), responses)

    def read_refresh(self, step: int) -> pa.Table | None:
        """The responses of a refresh that is complete."""
        return _read_table(self._refresh_path(step)) if self.has_refresh(step) else None

    def has_refresh(self, step: int) -> bool:
        """Whether a refresh of this run at this step is complete, maybe from before the run was interrupted."""
        return self._refresh_path(step).is_file()

    def write_refresh(self, step: int, responses: pa.Table, parts: int) -> None:
        """Make a refresh visible, to this process with the next `read_new_files` and to all workers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_table(self._refresh_path(step), responses)
        for part in range(parts):
            self._part_path(step, part).unlink(missing_ok=True)

    def _plan_path(self, step: int) -> Path:
        return self.folder / f"refresh-{step:08d}.json"

    def _refresh_path(self, step: int) -> Path:
        return self.folder / f"refresh-{step:08d}.arrow"

    def _part_path(self, step: int, part: int) -> Path:
        return self.folder / f"refresh-{step:08d}-part-{part:06d}.arrow"

    # ---- Checkpoints ----
    def save(self, directory: str | os.PathLike) -> None:
        """Write all responses to `_refined_responses.pq` in an existing directory."""
        metadata = {"run": self.run, _ARRIVED_UP_TO: str(self._arrived_up_to)}
        table = self.table().replace_schema_metadata(metadata)
        write_whole(Path(directory) / CHECKPOINT_FILE_NAME, lambda path: pyarrow.parquet.write_table(table, path))

    @classmethod
    def load(cls, directory: str | os.PathLike, parent: str | os.PathLike, settings: str = "0") -> "ResponseStore":
        """
        Go on with the responses of a checkpoint.

        Args:
            directory (`str` or `os.PathLike`): of the checkpoint.
            parent (`str` or `os.PathLike`): holds the folders of runs. What the run's own folder has of refreshes
                after the checkpoint stays there.
            settings (`str`): digest of what decides on the responses now.

        Raises:
            `FileNotFoundError`: if the checkpoint has no responses.
            `ValueError`: if the file is damaged.
        """
        path = Path(directory) / CHECKPOINT_FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so the refined responses cannot be restored. Resume from a checkpoint that "
                "was written with `refine_ratio` above 0, or train from the start."
            )
        with damage_explained(path, "Resume from another one."):
            table = pyarrow.parquet.read_table(path)
            run = table.schema.metadata[b"run"].decode()
            arrived_up_to = int(table.schema.metadata[_ARRIVED_UP_TO.encode()])
            table = table.cast(RESPONSE_SCHEMA)
            if not re.fullmatch(r"[0-9a-f]+", run):
                raise ValueError(f"it names the run {run!r}")
        store = cls(parent, run, settings)
        for step in sorted(table.column("step").unique().to_pylist()):
            refresh = table.filter(pa.compute.equal(table.column("step"), step)).combine_chunks()
            if not _holds(store._refresh_path(step), refresh):
                store.write_refresh(step, refresh, parts=0)
            store.read_new_files(step)
        store._arrived_up_to = arrived_up_to
        return store


def read_arrived(path: str | os.PathLike) -> pa.Table:
    """The responses that [`ResponseStore.save`] wrote, of the refreshes that were in the batches by then."""
    table = pyarrow.parquet.read_table(path)
    arrived_up_to = int(table.schema.metadata[_ARRIVED_UP_TO.encode()])
    return table.filter(pa.compute.less_equal(table.column("step"), arrived_up_to))


def returns_to_original(flaws: list[str | None]) -> bool:
    """
    Whether responses to a question, none of which is used, speak for its original answer: at least half are that.

    Example:

    ```python
    >>> returns_to_original(["identical", "truncated"]), returns_to_original(["identical", "empty", "truncated"])
    (True, False)

    ```
    """
    return 2 * flaws.count("identical") >= len(flaws)


def _confirmed_rows(table: pa.Table) -> np.ndarray:
    """Rows of a refresh that use no response and that [`returns_to_original`] holds for, ascending, int64."""
    rows, of_response = np.unique(table.column("row").to_numpy(), return_inverse=True)
    is_identical = pa.compute.equal(table.column("flaw"), "identical").fill_null(False).to_numpy()
    num_used = np.bincount(of_response, weights=table.column("used").to_numpy(), minlength=len(rows))
    num_identical = np.bincount(of_response, weights=is_identical, minlength=len(rows))
    return rows[(num_used == 0) & (2 * num_identical >= np.bincount(of_response, minlength=len(rows)))]


def _texts(refresh: _Refresh, row: int) -> list[str]:
    """The answers that a refresh gives to a row, in alphabetical order; none if that is the original one."""
    start, stop = (int(np.searchsorted(refresh.rows, row, side)) for side in ("left", "right"))
    column = refresh.table.column("text")
    return sorted(column[line].as_py() for line in refresh.lines[start:stop].tolist() if line >= 0)


def _read_table(path: Path, memory_map: bool = False) -> pa.Table:
    with damage_explained(path, _CURE):
        return pyarrow.feather.read_table(path, memory_map=memory_map).select(RESPONSE_SCHEMA.names)


def _holds(path: Path, table: pa.Table) -> bool:
    try:
        return path.is_file() and _read_table(path).equals(table)
    except ValueError:  # damaged: to be written anew
        return False


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow file that can be mapped into memory, whole or not at all."""
    write_whole(path, lambda partial: pyarrow.feather.write_feather(table, partial, compression="uncompressed"))
