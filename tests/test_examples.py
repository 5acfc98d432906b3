"""Every example runs, on tiny stand-ins for its models and datasets; and so does TRL's own script after the swap."""

import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
import trl.scripts.sft
import yaml
from conftest import prompt_completion_rows
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from trl_bilevel import BilevelSFTConfig, DataSelector
from trl_bilevel.run_records import curate_run


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer, build_model):
    """Two models, a mixture of three sources, trusted rows and preference pairs, on disk."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("small", "large"):
        build_model().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    mixture = prompt_completion_rows(24).add_column("source", [f"source {row % 3}" for row in range(24)])
    trusted = prompt_completion_rows(10, 1000)
    pairs = trusted.rename_column("completion", "chosen").add_column("rejected", [f" {row} no" for row in range(10)])
    for name, rows in (("mixture", mixture), ("trusted", trusted), ("pairs", pairs)):
        (folder / name).mkdir()
        rows.to_parquet(folder / name / "train.parquet")
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """An example as `python examples/<name>.py`, with its YAML file; returns where it wrote to."""

    def run(name: str, *options: str, trusted: str | None = "trusted", source: Path | None = None) -> Path:
        output_dir = tmp_path / "out"
        config = [] if source else ["--config", str(EXAMPLES / "configs" / f"{name}.yaml")]
        if trusted is not None:
            config += ["--validation_dataset_name", str(files / trusted)]
        arguments = [
            *config, "--model_name_or_path", str(files / "large"), "--dataset_name", str(files / "mixture"),
            "--output_dir", str(output_dir),
            "--max_steps", "4", "--learning_rate", "0.01", "--use_cpu", "--bf16", "False", "--report_to", "none",
            "--logging_steps", "1", "--save_strategy", "no", "--activation_checkpointing", "False",
            "--per_device_train_batch_size", "4", "--per_device_validation_batch_size", "2", "--disable_tqdm", "True",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [name, *arguments, *options])
        runpy.run_path(str(source or EXAMPLES / f"{name}.py"), run_name="__main__")
        return output_dir

    return run


def _curated(output_dir: Path, tmp_path: Path) -> Dataset:
    return load_dataset(str(output_dir / "curated"), split="train", cache_dir=str(tmp_path / "cache"))


def test_safety_tuning(run, tmp_path, capsys):
    output_dir = run("safety_tuning", trusted="pairs")
    assert (output_dir / "adapter_model.safetensors").is_file()
    assert len(_curated(output_dir, tmp_path)) == round(0.9 * 24)
    printed = capsys.readouterr().out
    assert re.search(r"right order: \d+% at first, \d+% in the end", printed)
    worst = [line for line in printed.splitlines() if re.match(r"\d\.\d{3}  'add ", line)]
    assert len(worst) == 5


def test_quality_filtering(run, tmp_path, capsys):
    # Three sources have mean 1: some stand below it, and some do not
    output_dir = run("quality_filtering", "--min_source_weight", "1.0", "--selector_learning_rate", "30")
    reported = re.findall(r"^ +(\d+\.\d+)  (kept|dropped) +(source \d)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(source for _, _, source in reported) == ["source 0", "source 1", "source 2"]
    kept = {source: float(weight) for weight, verdict, source in reported if verdict == "kept"}
    assert 0 < len(kept) < 3
    curated = _curated(output_dir, tmp_path)
    assert set(curated["source"]) == set(kept)
    assert len(curated) == 8 * len(kept)
    for row in curated:
        assert row["weight"] == pytest.approx(kept[row["source"]], abs=1e-3)


def test_publish_and_reuse(run, hub, capsys):
    output_dir = run("publish_and_reuse", "--repo_id", "me/curated", "--license", "mit")
    assert len(load_dataset("me/curated", split="train")) == round(0.7 * 24)
    assert "12 rows of me/curated, the best 50% of the mixture" in capsys.readouterr().out
    assert (output_dir / "sft" / "adapter_model.safetensors").is_file()
    assert not list((output_dir / "sft").rglob("data_selector*"))  # plain SFT


def test_selector_transfer(run, files):
    # 4-bit layers are in tests/test_qlora.py
    small = ["--small_model_name_or_path", str(files / "small"), "--load_in_4bit", "False"]
    output_dir = run("selector_transfer", *small)
    assert (output_dir / "adapter_model.safetensors").is_file()
    found = DataSelector.from_pretrained(output_dir / "selector").weights()
    assert found.std() > 1e-3
    assert curate_run(output_dir)["weight"][:] == pytest.approx(found.tolist(), rel=1e-5)


def test_every_example_has_its_options_in_a_file_and_is_listed():
    assert sorted(path.stem for path in (EXAMPLES / "configs").iterdir()) == SCRIPTS
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"[`{path.name}`]({path.name})" in listed


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_in_the_file_are_options_of_the_example(name):
    file = f"examples/configs/{name}.yaml"
    script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"accelerate launch examples/{name}.py" in script
    config = (EXAMPLES.parent / file).read_text(encoding="utf-8")
    assert config.startswith(f"# accelerate launch examples/{name}.py --config {file}\n")
    arguments = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["ExampleArguments"]
    known = {option.name for kind in (arguments, BilevelSFTConfig, ModelConfig) for option in fields(kind)}
    assert set(yaml.safe_load(config)) <= known


def test_quickstart(monkeypatch, capsys):
    """The notebook's cells one after the other, as Jupyter runs them; it needs no Jupyter."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    namespace = ModuleType("quickstart").__dict__
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"quickstart {cell['id']}", "exec"), namespace)
    matplotlib.pyplot.close("all")
    curated = namespace["curated"]
    assert len(curated) == 32
    assert sum(curated["is_right"]) >= 30
    assert "rows that were kept are right" in capsys.readouterr().out


SWAP = [
    ("from trl import SFTTrainer, ", "from trl_bilevel import BilevelSFTTrainer\n\n    from trl import "),
    ("trainer = SFTTrainer(", "trainer = BilevelSFTTrainer("),
    ("        eval_dataset=", "        validation_dataset=load_dataset(TRUSTED)['train'],\n        eval_dataset="),
    ("SFTConfig, TrlParser\n", "TrlParser\n    from trl_bilevel import BilevelSFTConfig\n"),
    ("(ScriptArguments, SFTConfig, ", "(ScriptArguments, BilevelSFTConfig, "),
    ("import argparse\n", "import argparse\nTRUSTED = {trusted!r}\n"),
]
"""In the script of the installed TRL: two names, where they are imported and used, and the rows that are trusted."""


def test_script_of_trl_with_the_names_swapped(run, files, build_model, tmp_path, capsys):
    source = Path(trl.scripts.sft.__file__).read_text(encoding="utf-8")
    for old, new in SWAP:
        assert source.count(old) == 1, old
        source = source.replace(old, new.replace("{trusted!r}", repr(str(files / "trusted"))))
    script = tmp_path / "sft.py"
    script.write_text(source, encoding="utf-8")
    output_dir = run("sft", trusted=None, source=script)
    assert "Training completed" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(output_dir).state_dict()
    assert any((trained[name] != value).any() for name, value in build_model().state_dict().items())
    assert len(set(curate_run(output_dir)["weight"])) > 12
