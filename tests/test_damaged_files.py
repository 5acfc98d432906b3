"""Files that were cut off or changed: one line that names the file and what to do, whoever reads it."""

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from trl_bilevel import DataSelector
from trl_bilevel.amortized_selector import AMORTIZED_SELECTOR_FILE_NAME, AmortizedSelector, load_amortized_selector
from trl_bilevel.refined_responses import RESPONSE_SCHEMA, RefinedResponse, RefreshPlan, ResponseStore
from trl_bilevel.row_scores import SCORES_FILE_NAME, find_scores, read_scores, save_scores
from trl_bilevel.run_settings import RUN_SETTINGS_FILE_NAME, read_run_settings
from trl_bilevel.scoring import _check_manifest
from trl_bilevel.value_function import VALUE_FUNCTION_FILE_NAME, ValueFunction, load_value_function
from trl_bilevel.whole_files import damage_explained


MODEL = torch.nn.Linear(2, 1)
_RESPONSE = {
    "row": 0, "step": 4, "response": 0, "used": True, "flaw": None, "text": "a", "prompt_ids": [1],
    "completion_ids": [2], "log_probs": [-1.0], "weight": None, "settings": "{}",
}  # fmt: skip
RESPONSES = pa.Table.from_pylist([_RESPONSE], schema=RESPONSE_SCHEMA)


def _save_value_function(folder):
    ValueFunction(MODEL, ["weight"], torch.optim.SGD, 1.0).save(folder)


FILES = {
    VALUE_FUNCTION_FILE_NAME: (_save_value_function, lambda folder: load_value_function(folder, MODEL)),
    AMORTIZED_SELECTOR_FILE_NAME: (AmortizedSelector(4, seed=0).save, load_amortized_selector),
    SCORES_FILE_NAME: (lambda folder: save_scores(folder, DataSelector(num_rows=3), "rows", 1), find_scores),
    "scoring.json": (
        lambda folder: _check_manifest(folder, {"model": "m"}),
        lambda folder: _check_manifest(folder, {"model": "m"}),
    ),
    RUN_SETTINGS_FILE_NAME: (lambda folder: (folder / RUN_SETTINGS_FILE_NAME).write_text("{}"), read_run_settings),
    "0-0/refresh-00000004.json": (
        lambda folder: ResponseStore(folder).write_plan(4, RefreshPlan([0], None)),
        lambda folder: ResponseStore(folder).read_plan(4),
    ),
    "0-0/refresh-00000004.arrow": (
        lambda folder: ResponseStore(folder).write_refresh(4, RESPONSES, parts=0),
        lambda folder: ResponseStore(folder).read_new_files(4),
    ),
    "0-0/refresh-00000004-part-000001.arrow": (
        lambda folder: ResponseStore(folder).write_part(4, 1, RESPONSES),
        lambda folder: ResponseStore(folder).read_part(4, 1),
    ),
}
DAMAGES = {"truncated": lambda content: content[: len(content) // 2], "empty": lambda content: b"",
           "overwritten": lambda content: b"[" + bytes(range(1, 200)), "a list": lambda content: b"[3]"}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_file_and_cure_are_named(tmp_path, name, damage):
    save, load = FILES[name]
    save(tmp_path)
    (tmp_path / name).write_bytes(DAMAGES[damage]((tmp_path / name).read_bytes()))
    with pytest.raises(
        ValueError, match=rf"/{name} is damaged and cannot be read \(.*\)\. .*(nother|delete).*\.$"
    ) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_refresh_is_written_anew_from_a_checkpoint(tmp_path):
    store = ResponseStore(tmp_path)
    store.write_refresh(4, RESPONSES, parts=0)
    store.read_new_files(4)
    store.save(tmp_path)
    (path,) = store.folder.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    resumed = ResponseStore.load(tmp_path, tmp_path)
    assert resumed.responses_of(0, up_to_step=4) == [RefinedResponse([1], [2], [-1.0])]
    assert ResponseStore(tmp_path).read_refresh(4).equals(RESPONSES)


def test_scores_that_lack_something(tmp_path):
    save_scores(tmp_path, DataSelector(num_rows=3), "rows", 1)
    scores, fingerprint = read_scores(tmp_path)
    assert (len(scores), fingerprint) == (3, "rows")
    pa.parquet.write_table(scores.drop_columns("judged"), tmp_path / SCORES_FILE_NAME)
    with pytest.raises(ValueError, match=rf"{SCORES_FILE_NAME} is damaged and cannot be read"):
        read_scores(tmp_path)
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / SCORES_FILE_NAME)
    with pytest.raises(ValueError, match=rf"{SCORES_FILE_NAME} is damaged and cannot be read"):
        find_scores(tmp_path)


def test_a_file_that_is_not_there_is_not_damaged(tmp_path):
    path = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError), damage_explained(path, "Look elsewhere."):
        path.read_text()


def test_head_of_another_size_is_not_damaged(tmp_path):
    AmortizedSelector(4, seed=0).save(tmp_path)
    with pytest.raises(ValueError, match=r"is of a model of another size \(.*\)\.$") as error:
        AmortizedSelector(6, seed=0).load(tmp_path)
    assert "\n" not in str(error.value)
