"""The command line, as a user calls it."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import prompt_completion_rows
from datasets import DatasetDict, load_dataset

from trl_bilevel import DataSelector, __version__
from trl_bilevel.cli import main
from trl_bilevel.dataset_loading import load_split
from trl_bilevel.scripts import sft


EXAMPLES = Path(__file__).parents[1] / "examples"


def _sft(*options):
    """What `accelerate launch` starts, without another process."""
    sft.main(*sft.make_parser().parse_args_and_config([*options], fail_with_unknown_args=False))


@pytest.fixture
def run_example(monkeypatch):
    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer, build_model):
    """A model, a mixture and trusted rows on disk."""
    folder = tmp_path_factory.mktemp("files")
    build_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompt_completion_rows(24).to_json(folder / "mixture.jsonl")
    prompt_completion_rows(10, 1000).save_to_disk(folder / "trusted")
    (folder / "parquet").mkdir()
    prompt_completion_rows(10, 1000).to_parquet(folder / "parquet" / "train.parquet")
    (folder / "mixture").mkdir()
    prompt_completion_rows(24).to_parquet(folder / "mixture" / "train.parquet")
    return folder


def _training_options(files, output_dir):
    return [
        "--model_name_or_path", str(files / "model"),
        "--dataset_name", str(files / "mixture.jsonl"),
        "--validation_dataset_name", str(files / "trusted"),
        "--output_dir", str(output_dir),
        "--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "0.01",
        "--use_cpu", "--bf16", "False", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no",
    ]  # fmt: skip


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["sft", "--help"])
    assert stop.value.code == 0
    assert "--validation_weight" in capsys.readouterr().out


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fine-tune"])
    assert stop.value.code == 2
    assert "'fine-tune' (choose from" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL's own default
def test_sft_trains_curates_and_saves(files, tmp_path, run_example, monkeypatch, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "use_peft: true\nlora_r: 4\nlora_target_modules: all-linear\nkeep_ratio: 0.5\nnum_processes: 1\n"
    )
    # `--num_machines` belongs to `accelerate launch`, `--seed` to the script
    options = ["--config", str(config), "--num_machines", "1", "--seed", "1"]
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda launch: _sft(*launch.training_script_args))
    assert main(["sft", *_training_options(files, tmp_path / "out"), *options]) == 0
    assert "validation_loss" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "_data_selector.safetensors").is_file()
    curated = load_dataset(str(tmp_path / "out" / "curated"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(curated) == 12
    assert curated.column_names[:2] == ["prompt", "completion"]

    # What it leaves serves other runs: plain SFT on the curated rows, and the weights as a start
    options = _training_options(files, tmp_path / "plain")
    options[options.index(str(files / "mixture.jsonl"))] = str(tmp_path / "out" / "curated")
    del options[options.index("--validation_dataset_name") : options.index("--validation_dataset_name") + 2]
    run_example("train_on_curated.py", *options, "--keep_ratio", "0.4")
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    selector = ["--data_selector", str(tmp_path / "out"), "--selector_learning_rate", "0"]
    _sft(*_training_options(files, tmp_path / "next"), *selector)
    first, second = (DataSelector.from_pretrained(tmp_path / name) for name in ("out", "next"))
    # Rows that the first run never saw are known by their prior only, which rescales the others
    first_weights, second_weights = (selector.weights()[first.scored] for selector in (first, second))
    assert first_weights.std() > 1e-4
    torch.testing.assert_close(second_weights / second_weights.mean(), first_weights / first_weights.mean())


def test_sft_goes_on_from_its_last_checkpoint(files, tmp_path, capsys):
    options = [*_training_options(files, tmp_path / "out"), "--save_strategy", "steps", "--save_steps", "2"]
    for more, num_steps in (([], 3), (["--max_steps", "5", "--resume_from_checkpoint", "True"], 2)):
        _sft(*options, *more)
        assert capsys.readouterr().out.count("'validation_loss'") == num_steps


def test_sft_trains_on_a_mixture_of_datasets(files, tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text(f"datasets:\n  - path: json\n    data_files: {files / 'mixture.jsonl'}\n")
    options = _training_options(files, tmp_path / "out")
    del options[options.index("--dataset_name") : options.index("--dataset_name") + 2]
    # All but the other process: the launcher has to tell the options of `datasets` from its own
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda launch: _sft(*launch.training_script_args))
    assert main(["sft", "--config", str(config), *options]) == 0
    assert len(load_dataset(str(tmp_path / "out" / "curated"), split="train", cache_dir=str(tmp_path))) == 24


def test_flags_of_the_launcher_in_a_file(tmp_path, monkeypatch):
    """They take no value on the command line, and are true or false in YAML."""
    config = tmp_path / "run.yaml"
    config.write_text("num_processes: 2\nmulti_gpu: true\ndebug: false\nmax_steps: 3\nuse_cpu: true\n")
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert main(["sft", "--config", str(config), "--seed", "3"]) == 0
    (launch,) = launched
    assert (launch.num_processes, launch.multi_gpu, bool(launch.debug)) == (2, True, False)
    assert Path(launch.training_script).name == "sft.py"
    assert launch.training_script_args == ["--config", str(config), "--seed", "3"]


def test_mixture_without_rows_for_the_evaluation(files, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"datasets:\n  - path: json\n    data_files: {files / 'mixture.jsonl'}\n")
    options = _training_options(files, tmp_path / "out")
    del options[options.index("--dataset_name") : options.index("--dataset_name") + 2]
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]\. `test_split_size` sets rows apart"):
        _sft("--config", str(config), *options, "--eval_strategy", "steps", "--eval_steps", "2")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", b"", "is empty"),
        ("header.csv", b"prompt,completion\n", "is empty"),
        ("list.json", b"[]", "is empty"),
        ("broken.jsonl", b'{"prompt": 1}\n{"half', "cannot be read"),
        ("broken.parquet", b"PAR1 and so on", "cannot be read"),
        ("latin.jsonl", '{"prompt": "ü"}'.encode("latin-1"), "cannot be read"),
    ],
)
def test_files_without_rows_or_damaged(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"The dataset .*{name} {message}"):
        load_split(str(tmp_path / name), None, "train", streaming=streaming)


def test_sft_refuses_unknown_options_before_training(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", *_training_options(files, tmp_path / "out"), "--validation_wieght", "0.5"])
    assert stop.value.code == 2
    assert "--validation_wieght" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_example_runs(files, tmp_path, run_example):
    options = _training_options(files, tmp_path / "out")
    options[options.index(str(files / "mixture.jsonl"))] = str(files / "parquet")
    options[options.index(str(files / "trusted"))] = str(files / "parquet")
    with pytest.warns(UserWarning, match="10 training rows are also in `validation_dataset`"):
        run_example("bilevel_sft.py", *options)
    assert len(load_dataset(str(tmp_path / "out" / "curated"), split="train", cache_dir=str(tmp_path))) == 7


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL's own default
def test_run_is_pushed_and_cut_from_disk(files, tmp_path, hub, run_example):
    """Train and push the model; then publish and write the curated dataset without it."""
    options = [*_training_options(files, tmp_path / "out"), "--push_to_hub", "--hub_model_id", "me/model"]
    _sft(*options)
    assert "model.safetensors" in hub.files("model", "me/model")
    push = ["push", str(tmp_path / "out"), "me/rows", "--keep_ratio", "0.5", "--license", "mit", "--private"]
    assert main(push) == 0
    assert hub.repo("dataset", "me/rows").private
    published = load_dataset("me/rows", split="train")
    assert len(published) == 12
    (tmp_path / "cut.yaml").write_text("keep_ratio: 0.5\n")
    curate = ["curate", str(tmp_path / "out"), "--output_dir", str(tmp_path / "cut")]
    assert main([*curate, f"--config={tmp_path / 'cut.yaml'}"]) == 0
    cut = load_dataset(str(tmp_path / "cut"), split="train", cache_dir=str(tmp_path))
    assert cut.to_list() == published.to_list()
    options = _training_options(files, tmp_path / "elsewhere")
    options[options.index(str(files / "mixture.jsonl"))] = "me/rows"
    del options[options.index("--validation_dataset_name") : options.index("--validation_dataset_name") + 2]
    run_example("train_on_curated.py", *options, "--keep_ratio", "0.5")
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["curated", "data_selector.parquet"])
def test_results_of_an_earlier_run_are_not_pushed_with_the_model(files, tmp_path, hub, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    options = [*_training_options(files, tmp_path / "out"), "--push_to_hub", "--hub_model_id", "me/model"]
    with pytest.raises(ValueError, match=rf"{name} is of an earlier run and would be pushed with the model\. Move it"):
        _sft(*options)
    assert hub.requests == []


def test_curated_rows_are_written_when_the_hub_takes_no_model(files, tmp_path, hub):
    hub.fail("POST", "/commit/", 403, times=100)
    options = [*_training_options(files, tmp_path / "out"), "--push_to_hub", "--hub_model_id", "me/model"]
    with pytest.raises(RuntimeError, match=re.escape(f"`hf upload me/model {tmp_path / 'out'} .")):
        _sft(*options)
    assert len(load_dataset(str(tmp_path / "out" / "curated"), split="train", cache_dir=str(tmp_path))) == 24


def test_self_refining_example_shows_what_became_of_the_answers(files, tmp_path, run_example, capsys):
    options = _training_options(files, tmp_path / "out")
    options[options.index(str(files / "mixture.jsonl"))] = str(files / "mixture")
    options[options.index(str(files / "trusted"))] = str(files / "parquet")
    # An untrained model seldom stops by itself
    refine = ["--refine_ratio", "0.5", "--refine_start_step", "1", "--refine_discard_flawed", "False"]
    refine += ["--refine_max_new_tokens", "4"]
    run_example("self_refining.py", *options, *refine)
    printed = capsys.readouterr().out
    assert "12 of 24 answers were regenerated" in printed
    assert "original answer" in printed
    curated = load_dataset(str(tmp_path / "out" / "curated"), split="train", cache_dir=str(tmp_path))
    refined = curated.filter(lambda row: row["response_source"] == "refined")
    assert len(refined) == 12
    assert all(row["completion"] != row["original_completion"] for row in refined)
    assert not list((tmp_path / "out").glob("refined*"))  # what a push would upload


def test_local_folders_and_files_load(files, tmp_path):
    rows = prompt_completion_rows(10, 1000).to_list()
    assert load_split(str(files / "trusted"), None, "train").to_list() == rows
    assert load_split(str(files / "parquet"), None, "train").to_list() == rows
    assert load_split(str(files / "parquet" / "train.parquet"), None, "train").to_list() == rows
    prompt_completion_rows(10, 1000).to_csv(tmp_path / "rows.csv")
    assert load_split(str(tmp_path / "rows.csv"), None, "train").to_list() == rows
    prompt_completion_rows(10, 1000).to_json(tmp_path / "rows [v2] *.jsonl")  # a name, no pattern
    assert load_split(str(tmp_path / "rows [v2] *.jsonl"), None, "train").to_list() == rows
    DatasetDict(test=prompt_completion_rows(10, 1000)).save_to_disk(tmp_path / "splits")
    assert load_split(str(tmp_path / "splits"), None, "test").to_list() == rows
    with pytest.raises(ValueError, match=r"has no split 'train', only \['test'\]"):
        load_split(str(tmp_path / "splits"), None, "train")
    prompt_completion_rows(10, 1000).save_to_disk(tmp_path / "one")
    assert load_split(str(tmp_path / "one"), None, "train").to_list() == rows
    with pytest.raises(ValueError, match=r"one has no split 'test', only \['train'\]"):
        load_split(str(tmp_path / "one"), None, "test")
    prompt_completion_rows(10, 1000).to_json(tmp_path / "rows.jsonl")
    test = load_dataset("json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(tmp_path / "cache"))
    test["test"].save_to_disk(tmp_path / "one_test")
    for split in ("train", "test"):  # a folder of one split need not say which
        assert load_split(str(tmp_path / "one_test"), None, split).to_list() == rows
    (tmp_path / "rows.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"rows.txt is not a dataset file. Use one that ends with .csv, .json"):
        load_split(str(tmp_path / "rows.txt"), None, "train")
    with pytest.raises(FileNotFoundError, match=r"row\.csv is no file here\. Did you mean .*rows\.csv\?"):
        load_split(str(tmp_path / "row.csv"), None, "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_with_the_characters_of_a_pattern(tmp_path, streaming):
    """`datasets` would read the rows of the folder that the pattern matches, without a word."""
    for name, offset in (("rows1", 100), ("rows[1]", 200), ("rows*?", 300)):
        (tmp_path / name).mkdir()
        prompt_completion_rows(3, offset).to_parquet(tmp_path / name / "train.parquet")
        prompt_completion_rows(2, offset).to_parquet(tmp_path / name / "test.parquet")
    for name, offset in (("rows1", 100), ("rows[1]", 200), ("rows*?", 300)):
        for split, num_rows in (("train", 3), ("test", 2)):
            rows = load_split(str(tmp_path / name), None, split, streaming=streaming)
            assert [*rows] == [*prompt_completion_rows(num_rows, offset)]
        file = load_split(str(tmp_path / name / "test.parquet"), None, "train", streaming=streaming)
        assert [*file] == [*prompt_completion_rows(2, offset)]


def test_folder_whose_name_cannot_be_followed(tmp_path):
    folder = tmp_path / "rows[1]"
    folder.mkdir()
    prompt_completion_rows(3).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match=r"by which its card cannot be followed\. Rename the folder"):
        load_split(str(folder), "main", "train")
    prompt_completion_rows(3).to_json(folder / "test.jsonl")
    with pytest.raises(ValueError, match=r"has files of the types \['.jsonl', '.parquet'\]. Name one file"):
        load_split(str(folder), None, "train")
