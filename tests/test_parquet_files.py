"""Parquet files: the rows and types that `datasets` itself would write, without holding all of them."""

import os

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value

from trl_bilevel import parquet_files
from trl_bilevel.dataset_checks import hash_rows
from trl_bilevel.parquet_files import as_rows, pieces_of_stream, read_column, write_parquet


NUM_ROWS = 95
ROWS = Dataset.from_dict(
    {
        "text": [None if row < 30 else f"row {row}" for row in range(NUM_ROWS)],
        "label": [row % 3 for row in range(NUM_ROWS)],
        "nested": [{"numbers": list(range(row % 4))} for row in range(NUM_ROWS)],
    }
).cast_column("label", ClassLabel(names=["a", "b", "c"]))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(parquet_files, "_ROWS_PER_PIECE", 10)


def test_content_of_files_goes_along(tmp_path):
    """Not their paths, which say something of this machine and nothing to others."""
    PIL.Image.new("L", (2, 2), 7).save(tmp_path / "shade.png")
    rows = Dataset.from_dict({"text": ["a"], "picture": [str(tmp_path / "shade.png")]}).cast_column("picture", Image())
    write_parquet(rows, tmp_path / "rows.parquet")
    (tmp_path / "shade.png").unlink()
    assert str(tmp_path).encode() not in (tmp_path / "rows.parquet").read_bytes()
    (row,) = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert row["picture"].getpixel((0, 0)) == 7


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS.select([3, 8, 9, 10, 51, 94]),
        ROWS.select([94, 0, 50, 5]),
        ROWS.filter(lambda row: row["label"] == 1).shard(2, 1, contiguous=True),
        ROWS.with_format("torch", columns=["label"]),
        ROWS.to_iterable_dataset(),
    ],
    ids=["all", "selected", "shuffled", "shard", "formatted", "stream"],
)
def test_file_has_the_rows_and_their_types(rows, tmp_path):
    path = tmp_path / "new" / "rows.parquet"
    expected = rows.with_format(None).to_list() if isinstance(rows, Dataset) else ROWS.to_list()
    assert write_parquet(rows, path) == len(expected)
    written = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    assert written.to_list() == expected
    assert written.features == ROWS.features
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(ROWS, path)

    def broken():
        for number in range(25):
            yield {"text": number}
        raise OSError("the network is down")

    with pytest.raises(OSError, match="the network is down"):
        write_parquet(IterableDataset.from_generator(broken), path)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]
    assert len(Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))) == NUM_ROWS


def test_stream_of_unknown_types(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"text": f"row {row}"} for row in range(25)))
    assert write_parquet(stream, tmp_path / "rows.parquet") == 25
    written = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert written.features == {"text": Value("string")}
    # Empty at first in one column, and a key that not all rows have
    rows = [{"a": None, "b": []}, {"a": "x", "b": ["y"], "c": 1}, {"a": None, "b": []}]
    stream = IterableDataset.from_generator(lambda: iter(rows)).map(lambda row: {**row, "d": 2})
    assert stream.features is None
    write_parquet(stream, tmp_path / "gaps.parquet")
    written = Dataset.from_parquet(str(tmp_path / "gaps.parquet"), cache_dir=str(tmp_path / "cache"))
    assert written.to_list() == [{"a": None, "b": [], "c": None, "d": 2, **row} for row in rows]
    with pytest.raises(ValueError, match=r"Rows 2 to 3 do not fit .* `dataset.cast\(Features"):
        list(pieces_of_stream(IterableDataset.from_generator(lambda: iter([*rows[1:], {"a": 1.5, "b": 2}])), 2))
    late = [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4, "b": 5}]
    for rows in (late, [*late[:2], late[3], late[2]]):
        with pytest.raises(ValueError, match=r"Rows 2 to 4 do not fit .*columns \['b'\] as well"):
            list(pieces_of_stream(IterableDataset.from_generator(lambda rows=rows: iter(rows)), 2))
    with pytest.raises(ValueError, match="The stream has no rows"):
        write_parquet(IterableDataset.from_generator(lambda: iter(())), tmp_path / "none.parquet")


@pytest.mark.parametrize("numbers", [range(NUM_ROWS), [3, 8, 9, 51], [94, 0, 5, 5, 60]])
def test_selected_rows_are_read_as_they_are(numbers):
    tokens = Dataset.from_dict({"input_ids": [[row, row % 7] for row in range(NUM_ROWS)]})
    hashes = hash_rows(tokens)
    assert len(set(hashes.tolist())) == NUM_ROWS
    selected = tokens.select(numbers)
    assert hash_rows(selected).tolist() == [hashes[number] for number in numbers]
    assert read_column(selected, "input_ids").to_pylist() == selected.to_dict()["input_ids"]


def test_rows_that_are_still_mapped_may_stay(monkeypatch, tmp_path):
    """As on Windows, which deletes no file that somebody reads."""
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if str(path).endswith(".arrow"):
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, *args, **kwargs)

    stream = Dataset.from_dict({"n": [1, 2, 3]}).to_iterable_dataset()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with as_rows(stream) as rows:
        monkeypatch.setattr(os, "unlink", refuse)
        assert rows["n"][:] == [1, 2, 3]
    monkeypatch.undo()
