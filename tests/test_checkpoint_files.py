"""Which checkpoints are whole."""

import json
from pathlib import Path

import pytest
from conftest import prompt_completion_rows
from transformers import TrainerCallback

from trl_bilevel import DataSelector
from trl_bilevel.checkpoint_files import (
    MANIFEST_FILE_NAME,
    check_checkpoint,
    find_checkpoint,
    find_problem,
    read_resume_option,
    remove_manifest,
    write_manifest,
)
from trl_bilevel.selector_files import SELECTOR_FILE_NAME
from trl_bilevel.whole_files import disk_full_explained, write_whole


def _checkpoint(folder, step, is_whole=True):
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True)
    DataSelector(num_rows=3).save(checkpoint, "rows")
    (checkpoint / "shards" / "0.bin").write_bytes(bytes(range(256)))
    (checkpoint / "trainer_state.json").write_text("{}")
    if is_whole:
        write_manifest(checkpoint)
    return checkpoint


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": _truncate, "empty": lambda path: path.write_bytes(b""), "flipped": _flip,
           "missing": lambda path: path.unlink()}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [SELECTOR_FILE_NAME, "shards/0.bin", "trainer_state.json", MANIFEST_FILE_NAME])
def test_damage_is_found_and_named(tmp_path, name, damage):
    older, checkpoint = _checkpoint(tmp_path, 2), _checkpoint(tmp_path, 10)
    check_checkpoint(checkpoint)
    assert find_checkpoint(tmp_path, skip_damaged=False) == checkpoint  # 10 is newer than 2
    DAMAGES[damage](checkpoint / name)
    if name == MANIFEST_FILE_NAME and damage == "missing":  # looks interrupted: nothing says that it ever was whole
        with pytest.raises(ValueError, match=r"checkpoint-10 was interrupted while it was written.*checkpoint=True"):
            check_checkpoint(checkpoint)
        assert find_checkpoint(tmp_path, skip_damaged=False) == older
        return
    if name == MANIFEST_FILE_NAME and damage == "flipped":
        (checkpoint / name).write_text(json.dumps({"files": 3}))
    with pytest.raises(ValueError, match=rf"checkpoint-10/{name} is (damaged|missing).*'last_intact'"):
        check_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=rf"checkpoint-10/{name}"):
        find_checkpoint(tmp_path, skip_damaged=False)
    assert find_checkpoint(tmp_path, skip_damaged=True) == older


def test_interrupted_checkpoints_are_passed_over(tmp_path):
    assert find_checkpoint(tmp_path, skip_damaged=False) is None
    _checkpoint(tmp_path, 4, is_whole=False)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-best").mkdir()  # not one of Trainer's
    (tmp_path / "checkpoint-9").write_text("a file")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole: .*checkpoint-5.*checkpoint-4.*=None"):
        find_checkpoint(tmp_path, skip_damaged=False)
    whole = _checkpoint(tmp_path, 3)
    assert find_checkpoint(tmp_path, skip_damaged=False) == whole
    remove_manifest(whole)
    remove_manifest(whole)  # as often as one likes
    assert find_problem(whole)[0] == "torn"


def test_leftovers_of_a_killed_writer_are_no_part_of_a_checkpoint(tmp_path):
    checkpoint = _checkpoint(tmp_path, 1, is_whole=False)
    leftovers = [checkpoint / "_data_selector.safetensors.0a.partial", checkpoint / "checkpoint-is-incomplete.txt"]
    for path in leftovers:
        path.write_text("half")
    write_manifest(checkpoint)
    for path in leftovers:
        path.unlink()
    check_checkpoint(checkpoint)


def test_checkpoint_of_another_trainer_is_left_to_the_selector_to_refuse(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    check_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="BilevelSFTTrainer wrote"):
        DataSelector(num_rows=1).load(tmp_path, "rows")


class _OnSave(TrainerCallback):
    """Writes, changes and removes files of a checkpoint, as callbacks of users do."""

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (checkpoint / "notes.txt").write_text("of the user's")
        (checkpoint / "README.md").unlink(missing_ok=True)
        with (checkpoint / "trainer_state.json").open("a") as file:
            file.write("\n")


def test_what_callbacks_do_to_a_checkpoint_is_part_of_it(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        callbacks=[_OnSave()], eval_dataset=prompt_completion_rows(4, 500), load_best_model_at_end=True, **options
    )
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    assert find_problem(checkpoint) == ("whole", "")
    (checkpoint / "notes.txt").unlink()
    state, why = find_problem(checkpoint)
    assert state == "damaged"
    assert "notes.txt is missing" in why


def test_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda partial: partial.write_text("old"))

    def half(partial):
        partial.write_text("ne")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(KeyError), disk_full_explained(tmp_path):
        raise KeyError("other")


def test_option_means_what_it_says(tmp_path):
    for value in (None, "", False, "False", "false"):
        assert read_resume_option(value, tmp_path) is None
    for value in (True, "True", "true", "last_intact"):
        with pytest.raises(ValueError, match=rf"No valid checkpoint found in {tmp_path}, to go on as .*Leave it out"):
            read_resume_option(value, tmp_path)
    checkpoint = _checkpoint(tmp_path, 2)
    for value in (True, "True", "true", "TRUE"):
        assert read_resume_option(value, tmp_path) is True
    assert read_resume_option("last_intact", tmp_path) == "last_intact"
    assert read_resume_option(checkpoint, tmp_path) == str(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint='.*checkpoint-3'` is no folder.*checkpoint-500'; True for the"):
        read_resume_option(tmp_path / "checkpoint-3", tmp_path)
