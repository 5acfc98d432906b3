"""The commands from outside: help, options in a file, errors and exit codes, pipes and locales."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import QUIET_CPU_RUN, prompt_completion_rows
from datasets import Dataset, load_dataset
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.cli import _COMMANDS, main
from trl_bilevel.command_line import quiet_launcher
from trl_bilevel.scripts import curate, sft


COMMAND = str(Path(sys.executable).with_name("trl-bilevel"))
NAMES = sorted(_COMMANDS)
ON_CPU = ["--use_cpu", "--bf16", "False"]
HOSTILE = 'Ünïcödé 🧹 \x1b[31m"rows"'


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokenizer, build_model):
    """A finished run, with its model; the last of its rows is not ASCII."""
    folder = tmp_path_factory.mktemp("finished")
    build_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [*prompt_completion_rows(23), {"prompt": HOSTILE, "completion": HOSTILE}]
    trainer = BilevelSFTTrainer(
        str(folder / "base"),
        BilevelSFTConfig(
            str(folder / "run"), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, **QUIET_CPU_RUN
        ),
        train_dataset=Dataset.from_list(rows),
        validation_dataset=prompt_completion_rows(10, 1000),
    )
    trainer.train()
    trainer.save_model(str(folder / "run"))
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    prompt_completion_rows(10, 1000).to_json(folder / "trusted.jsonl")
    return folder / "run"


def _config(tmp_path, **options):
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump({name: str(v) if isinstance(v, Path) else v for name, v in options.items()}))
    return ["--config", str(path)]


def _run(*command, **environment):
    """As in a pipe, with nobody at the terminal."""
    return subprocess.run(
        command, capture_output=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip


# ---- Help ----
def test_help_names_the_commands_and_how_to_start(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in NAMES:
        assert f"\n    {name} " in shown
    assert "\n  trl-bilevel demo\n" in shown


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    usage, _, description, *_ = shown = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: trl-bilevel {name} ")
    assert usage.endswith("[options]")
    assert description.endswith(".")
    assert description[0].isupper()
    assert any(line.startswith(f"  trl-bilevel {name} ") for line in shown[shown.index("examples:") :])
    assert "--config options.yaml" in shown[-1]
    assert "(default: )" not in " ".join(shown)


# ---- Exit codes and errors ----
@pytest.mark.parametrize("name", [name for name in NAMES if name != "sft"])
def test_unknown_options_are_named(name, tmp_path, capsys):
    needed = {
        "curate": ["run_dir", "output_dir"],
        "push": ["run_dir", "repo_id"],
        "report": ["run_dir"],
        "score": ["run_dir", "output_dir", "dataset_name"],
        "screen": ["model_name_or_path", "dataset_name", "validation_dataset_name", "output_dir"],
    }.get(name, [])
    options = [option for needed_name in needed for option in (f"--{needed_name}", "x")]
    with pytest.raises(SystemExit) as stop:
        main([name, *options, "--keep_ration", "0.5"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --keep_ration" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([name, *options, *_config(tmp_path, keep_ration=0.5)])
    assert stop.value.code == 2
    assert "unrecognized options in the YAML file: --keep_ration" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["fine-tune"], ["--fast", "demo"], ["curate", "--config"]])
def test_exit_code_of_wrong_usage(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: trl-bilevel ")
    assert "error: " in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["curate"], "`--run_dir` is missing"),
        (["curate", "{run}"], "`--output_dir` is missing"),
        (["curate", "nowhere", "--output_dir", "{new}"], "nowhere does not exist. Give the output folder"),
        (["curate", "{run}", "--output_dir", "{new}", "--keep_ratio", "2"], "`keep_ratio` must be 'auto', or larger"),
        (["curate", "--config", "{new}.yaml"], "No such file or directory: '{new}.yaml'"),
        (["report", "{run}", "--source_column", "origin"], "`source_column='origin'` is not a column"),
        (["push", "{run}", "not a repository"], "not a repository"),
        (["score", "{run}", "--output_dir", "{new}", "--dataset_name", "{new}.jsonl"], "{new}.jsonl is no file here."),
        (
            ["score", "{run}", "--output_dir", "{new}", "--dataset_name", "{run}/model.safetensors"],
            "is not a dataset file",
        ),
        (["score", "{run}", "--output_dir", "{new}", "--dataset_name", "{bad}"], "cannot be read"),
        (["demo", "--fault_ratio", "2"], "`fault_ratio` must be larger than 0"),
        (["sft", "--keep_ratio", "2"], "`keep_ratio` must be 'auto', or larger"),
        (
            ["sft", *ON_CPU, "--output_dir", "{new}", "--validation_weight", "2"],
            "`validation_weight` must be larger than 0",
        ),
        (["sft", *ON_CPU, "--accelerate_config", "nowhere"], "nowhere is neither a file nor a valid config"),
    ],
)
def test_errors_are_one_line_with_the_cure(run_dir, tmp_path, hub, options, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n{"half')
    places = {"run": run_dir, "new": tmp_path / "new", "bad": tmp_path / "bad.jsonl"}
    with pytest.raises(SystemExit) as stop:
        main([option.format(**places) for option in options])
    assert stop.value.code.startswith("error: ")  # which Python prints, and exits with 1
    assert message.format(**places) in stop.value.code
    assert "\n" not in stop.value.code
    assert not (tmp_path / "new").exists()


def test_learned_weights_promise_nothing_and_equal_ones_are_noise(make_trainer, tmp_path, monkeypatch, capsys):
    """And a checkpoint is the folder that one stands in."""
    for rate, said in ((0.0, "cannot be told from noise"), (1e3, "learned weights promise nothing")):
        trainer = make_trainer(
            selector_activation="sigmoid",
            selector_learning_rate=rate,
            max_steps=6,
            save_strategy="steps",
            save_steps=6,
        )
        trainer.train()
        monkeypatch.chdir(Path(trainer.args.output_dir) / "checkpoint-6")
        assert main(["curate", ".", "--output_dir", str(tmp_path / str(rate))]) == 0
        printed = capsys.readouterr().out
        assert "Curated dataset of 24 rows" in printed
        assert said in printed
        assert main(["report", ".", "--output", str(tmp_path / "report.html")]) == 0
        is_noise = rate == 0
        assert ("Do not cut by this ranking" in (tmp_path / "report.html").read_text()) == is_noise


def test_yaml_that_is_none(tmp_path):
    (tmp_path / "options.yaml").write_text("run_dir: [")
    with pytest.raises(SystemExit, match=r"^error: while parsing a flow"):
        main(["curate", "--config", str(tmp_path / "options.yaml")])
    (tmp_path / "options.yaml").write_text("- run_dir")
    with pytest.raises(SystemExit, match="must contain a YAML mapping"):
        main(["curate", "--config", str(tmp_path / "options.yaml")])


@pytest.mark.parametrize("error", [KeyError("weights"), ZeroDivisionError(), ValueError("of somebody else")])
def test_bugs_keep_their_traceback(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(curate, "main", fail)
    with pytest.raises(type(error)) as caught:
        main(["curate", "run", "--output_dir", "out"])
    assert caught.value is error


def test_type_error_of_a_bug_keeps_its_traceback(monkeypatch):
    """A line of ours that does not say `raise` had no message for the user."""
    monkeypatch.setattr("trl_bilevel.run_records.curate_run", lambda *args: None)
    with pytest.raises(AttributeError):
        main(["curate", "run", "--output_dir", "out"])
    monkeypatch.setattr("trl_bilevel.run_records.curate_run", None)
    with pytest.raises(TypeError):
        main(["curate", "run", "--output_dir", "out"])


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("TRL_BILEVEL_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        main(["curate", "nowhere", "--output_dir", "out"])


# ---- Options in a file ----
def test_every_command_reads_its_options_from_a_file(run_dir, tmp_path, hub):
    """`sft` and `demo` in test_cli.py and test_demo.py."""
    curated = _config(tmp_path, run_dir=run_dir, output_dir=tmp_path / "curated", keep_ratio=0.5)
    assert main(["curate", *curated]) == 0
    assert pq.read_metadata(tmp_path / "curated" / "train.parquet").num_rows == 12
    assert main(["curate", *curated, "--keep_ratio", "0.25"]) == 0  # the command line counts more
    assert pq.read_metadata(tmp_path / "curated" / "train.parquet").num_rows == 6

    assert main(["report", *_config(tmp_path, run_dir=run_dir, output=tmp_path / "page.html", keep_ratio=0.5)]) == 0
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")

    options = {"run_dir": run_dir, "repo_id": "me/rows", "keep_ratio": 0.5, "language": ["en", "de"], "license": "mit"}
    assert main(["push", *_config(tmp_path, **options)]) == 0
    assert len(load_dataset("me/rows", split="train")) == 12
    assert b"- de" in hub.files("dataset", "me/rows")["README.md"]

    corpus = run_dir.parent / "rows.jsonl"
    options = {"run_dir": run_dir, "dataset_name": corpus, "output_dir": tmp_path / "scored", "chunk_size": 20}
    assert main(["score", *_config(tmp_path, **options)]) == 0
    assert len(list((tmp_path / "scored").glob("*.parquet"))) == 2


# ---- Processes: pipes, locales, launching ----
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"LC_ALL": "C"}, id="C", marks=pytest.mark.slow),  # Python then takes UTF-8 by itself
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, id="ASCII"),
    ],
)
def test_pipe_in_any_locale(run_dir, tmp_path, environment):
    page = tmp_path / "page.html"
    commands = (
        ["curate", str(run_dir), "--output_dir", str(tmp_path / "cut")],
        ["report", str(run_dir), "--output", str(page)],
    )
    both = f"from trl_bilevel.cli import main; assert not any([main(command) for command in {commands!r}])"
    result = _run(sys.executable, "-c", both, **environment)  # one start for both
    assert result.returncode == 0, result.stderr
    assert b"\x1b" not in result.stdout + result.stderr
    assert b"Curated dataset of 24 rows saved" in result.stdout
    assert pq.read_table(tmp_path / "cut" / "train.parquet")["prompt"].to_pylist()[-1] == HOSTILE
    assert "Ünïcödé 🧹" in page.read_text(encoding="utf-8")


def test_sft_in_a_pipe_and_an_ascii_locale_with_a_config_of_trl(run_dir, tmp_path):
    options = _config(
        tmp_path, model_name_or_path=run_dir.parent / "base", dataset_name=run_dir.parent / "rows.jsonl",
        validation_dataset_name=run_dir.parent / "trusted.jsonl", output_dir=tmp_path / "out", max_steps=2,
        per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none", accelerate_config="single_gpu",
    )  # fmt: skip
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = _run(COMMAND, "sft", *options, "--num_machines", "1", **ascii_locale)
    assert result.returncode == 0, result.stderr
    assert b"\x1b" not in result.stdout
    assert b"Training completed" in result.stdout
    assert pq.read_metadata(tmp_path / "out" / "curated" / "train.parquet").num_rows == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            [],
            "error: `--validation_dataset_name` is missing. Name the dataset you trust.",
            marks=pytest.mark.slow,  # as on two processes
        ),
        pytest.param(
            ["--validation_dataset_name", "{new}.jsonl"],
            "error: {new}.jsonl is no file here.",
            marks=pytest.mark.slow,
        ),
        (
            ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
            "error: `--validation_dataset_name` is missing. Name the dataset you trust.",  # of each process
        ),
        pytest.param(
            ["--validation_dataset_name", "{new}.jsonl", "--resume_from_checkpoint", "{new}"],
            "error: `resume_from_checkpoint='{new}'` is no folder.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--validation_dataset_name", "{new}.jsonl", "--resume_from_checkpoint", "True"],
            "error: No valid checkpoint found in ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_error_of_a_launched_run_is_one_line(run_dir, tmp_path, options, message):
    places = {"new": tmp_path / "new"}
    result = _run(
        COMMAND, "sft", "--model_name_or_path", str(run_dir.parent / "base"), "--dataset_name",
        str(run_dir.parent / "rows.jsonl"), "--output_dir", str(tmp_path / "out"), *ON_CPU,
        *[option.format(**places) for option in options],
    )  # fmt: skip
    assert result.returncode == 1
    errors = result.stderr.decode()
    assert "Traceback" not in errors
    # Of two processes the ends of the lines may come after both lines
    assert [line for line in errors.splitlines() if line][-1].startswith(message.format(**places))


def test_checkpoint_is_looked_for_before_the_datasets(run_dir, tmp_path):
    options = ["--model_name_or_path", str(run_dir.parent / "base"), "--output_dir", str(tmp_path / "out"), *ON_CPU]
    options += ["--dataset_name", "no.jsonl", "--validation_dataset_name", "no.jsonl"]
    options += ["--resume_from_checkpoint", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint='.*new'` is no folder"):
        sft.main(*sft.make_parser().parse_args_and_config(options))


@pytest.mark.parametrize(("exit_code", "message"), [(1, 1), (-9, "error: process 1 was ended by SIGKILL")])
def test_failure_of_one_of_several_processes(tmp_path, monkeypatch, exit_code, message):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file=str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stop, quiet_launcher():
        raise ChildFailedError("sft.py", {1: failure})
    assert stop.value.code == message
    monkeypatch.setenv("TRL_BILEVEL_TRACEBACK", "1")
    with pytest.raises(ChildFailedError), quiet_launcher():
        raise ChildFailedError("sft.py", {1: failure})
