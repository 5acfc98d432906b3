"""Which scores of a folder count, when several runs have written into it."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import prompt_completion_rows

from trl_bilevel import DataSelector
from trl_bilevel.report import build_report
from trl_bilevel.row_scores import SCORES_FILE_NAME, find_scores, save_scores
from trl_bilevel.run_records import curate_run, read_facts
from trl_bilevel.training_log import read_log


EARLIER_RUN = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
LATER_RUN = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "selector_learning_rate": 0.5}


@pytest.fixture
def later_run(make_trainer):
    """A shorter run in the folder of an earlier one, of which a checkpoint stays; neither was saved at its end."""
    make_trainer(**EARLIER_RUN).train()
    trainer = make_trainer(**LATER_RUN)
    trainer.train()
    return trainer


def _check(found, trainer, run_dir):
    assert found["weight"][:] == pytest.approx(trainer.curate()["weight"])
    assert read_facts(run_dir)["options"]["selector_learning_rate"] == 0.5
    assert f"step {trainer.state.global_step:,} of {trainer.state.max_steps:,}." in build_report(run_dir)


def test_a_shorter_run_in_the_folder_of_an_earlier_one(later_run):
    folder = Path(later_run.args.output_dir)
    assert (folder / "checkpoint-8").is_dir()
    assert find_scores(folder) == folder / "checkpoint-2"  # as of an interrupted run
    _check(curate_run(folder), later_run, folder)
    later_run.save_model()
    assert find_scores(folder) == folder
    _check(curate_run(folder), later_run, folder)


def test_an_interrupted_run_in_the_folder_of_a_finished_one(make_trainer):
    earlier = make_trainer(**EARLIER_RUN)
    earlier.train()
    earlier.save_model()
    folder = Path(earlier.args.output_dir)
    assert find_scores(folder) == folder
    trainer = make_trainer(**LATER_RUN)
    trainer.train()
    _check(curate_run(folder), trainer, folder)


def test_other_rows_of_an_earlier_run_do_not_refuse_a_good_one(make_trainer):
    make_trainer(**EARLIER_RUN, train_dataset=prompt_completion_rows(30)).train()
    trainer = make_trainer(**LATER_RUN)
    trainer.train()
    trainer.save_model()
    _check(curate_run(trainer.args.output_dir), trainer, trainer.args.output_dir)


def test_a_run_that_went_back_to_a_checkpoint(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 1, "selector_learning_rate": 0.5}
    make_trainer(**options, max_steps=6).train()
    trainer = make_trainer(**options, max_steps=3, learning_rate=0.1)
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert (folder / "checkpoint-6").is_dir()
    assert find_scores(folder) == folder / "checkpoint-3"
    _check(curate_run(folder), trainer, folder)


def test_a_push_without_a_final_save_leaves_its_own_log(later_run, hub):
    folder = Path(later_run.args.output_dir)
    shutil.copy(folder / "checkpoint-8" / "trainer_state.json", folder / "_trainer_state.json")
    later_run.push_curated_dataset("me/rows")
    assert find_scores(folder) == folder
    assert read_log(folder).global_step == 2


def test_times_of_files_do_not_matter(tmp_path):
    """A clock that was set back, and a copy whose files are of one time or in another order."""
    selector = DataSelector(num_rows=2)
    for name in ("checkpoint-9", "checkpoint-3", "checkpoint-5", "checkpoint-4"):
        (tmp_path / "out" / name).mkdir(parents=True)
        save_scores(tmp_path / "out" / name, selector, "rows", int(name.partition("-")[2]))
    for time, name in enumerate(("checkpoint-4", "checkpoint-9", "checkpoint-3", "checkpoint-5")):
        os.utime(tmp_path / "out" / name / SCORES_FILE_NAME, (time, time))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    for run in ("out", "copy"):
        assert find_scores(tmp_path / run) == tmp_path / run / "checkpoint-4"
    assert find_scores(tmp_path / "out" / "checkpoint-9") == tmp_path / "out" / "checkpoint-9"
    save_scores(tmp_path / "copy", selector, "rows", 1)
    assert find_scores(tmp_path / "copy") == tmp_path / "copy"
    save_scores(tmp_path / "copy" / "checkpoint-5", selector, "rows", 5)
    assert find_scores(tmp_path / "copy") == tmp_path / "copy" / "checkpoint-5"


def test_files_without_a_number_go_by_their_steps(tmp_path):
    selector = DataSelector(num_rows=2)
    for name, step in (("checkpoint-8", 8), ("checkpoint-12", 12), (".", 12)):
        (tmp_path / name).mkdir(exist_ok=True)
        save_scores(tmp_path / name, selector, "rows", step)
        path = tmp_path / name / SCORES_FILE_NAME
        table = pa.parquet.read_table(path)
        metadata = {name: value for name, value in table.schema.metadata.items() if name != b"write_number"}
        pa.parquet.write_table(table.replace_schema_metadata(metadata), path)
    assert find_scores(tmp_path) == tmp_path
    (tmp_path / SCORES_FILE_NAME).unlink()
    assert find_scores(tmp_path) == tmp_path / "checkpoint-12"
    save_scores(tmp_path / "checkpoint-8", selector, "rows", 8)
    assert find_scores(tmp_path) == tmp_path / "checkpoint-8"


def test_damaged_scores_of_an_earlier_run_do_not_stop_a_run(tmp_path):
    for name in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2" / SCORES_FILE_NAME).write_bytes(b"half")
    save_scores(tmp_path / "checkpoint-3", DataSelector(num_rows=2), "rows", 3)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{SCORES_FILE_NAME} is damaged"):
        find_scores(tmp_path)
    assert find_scores(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"
