"""The README's commands, as a new user types them; the Hub is the server of the tests."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import prompt_completion_rows
from datasets import load_dataset
from huggingface_hub import DatasetCard
from peft import LoraConfig, PeftModel
from trl import SFTConfig

from trl_bilevel import BilevelSFTConfig, load_curated_dataset
from trl_bilevel.cli import main


README = (Path(__file__).parents[1] / "README.md").read_text()


def _command_block(name):
    """The commands that follow a marker, comments left out."""
    (block,) = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [" ".join(line.split()) for line in lines]


@pytest.fixture
def new_user(hub, build_model, tokenizer, tmp_path):
    """Somebody with two files, in an empty folder; the README's model is on the Hub."""
    folder = tmp_path / "model"
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = hub.create("model", "Qwen/Qwen3-0.6B")
    files = {path.name: hub.store(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in folder.iterdir()}
    hub.commit(model, "main", files, "A model")
    here = tmp_path / "here"
    here.mkdir()
    prompt_completion_rows(40).to_json(here / "mixture.jsonl")
    prompt_completion_rows(10, 1000).to_json(here / "trusted.jsonl")
    return here


def test_train_curate_push_and_train_elsewhere(hub, new_user, build_model, monkeypatch):
    for name, text in re.findall(r"<!-- file: ([\w.]+) -->\n```yaml\n(.*?)```", README, flags=re.DOTALL):
        (new_user / name).write_text(text)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    monkeypatch.chdir(new_user)
    for command in _command_block("chain"):
        program, *arguments = shlex.split(command)
        if program == "trl-bilevel" and arguments[0] != "sft":  # what trains is launched, as it may change the process
            assert main(arguments) == 0
            continue
        command += " --use_cpu"  # TRL asks for it where there is no GPU
        result = subprocess.run(
            ["bash", "-euc", command], cwd=new_user, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        if program == "trl-bilevel":
            assert "accelerate" not in result.stderr  # which warns of every default it takes
    curated = load_dataset(str(new_user / "curated"), split="train", cache_dir=str(new_user / "cache"))
    assert len(curated) == 28
    files = hub.files("dataset", "me/mixture-curated")
    published = {
        name: pq.read_table(io.BytesIO(files[f"{name}/train-00000-of-00001.parquet"])).to_pylist()
        for name in ("curated", "scores")
    }
    assert published["curated"] == curated.to_list()
    assert len(published["scores"]) == 40
    card = DatasetCard(hub.files("dataset", "me/mixture-curated")["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    PeftModel.from_pretrained(build_model(), str(new_user / "better"))
    assert (new_user / "report.html").stat().st_size > 10_000
    steps = json.loads((new_user / "better" / "checkpoint-15" / "trainer_state.json").read_text())["global_step"]
    assert steps == 3 * -(-(28 + 10) // 8)  # epochs over the kept and the trusted rows, batches of 8


@pytest.fixture
def on_the_cpu(monkeypatch):
    """TRL asks for it where there is no GPU; the README's machine has one."""

    def with_defaults(post_init):
        def post(self):
            self.use_cpu, self.bf16, self.report_to = True, False, "none"
            post_init(self)

        return post

    for config in (SFTConfig, BilevelSFTConfig):
        monkeypatch.setattr(config, "__post_init__", with_defaults(config.__post_init__))


def _python_blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def _sides_of_the_swap():
    """The code before and after."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    lines = diff.splitlines()
    assert {line[:1] for line in lines} <= {"-", "+", " ", ""}
    return tuple("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")


def test_the_swap_and_every_block_of_python(hub, new_user, on_the_cpu, monkeypatch):
    monkeypatch.chdir(new_user)
    before, after = _sides_of_the_swap()
    mixture, trusted = (
        load_dataset("json", data_files=f"{name}.jsonl", split="train") for name in ("mixture", "trusted")
    )
    names = {"LoraConfig": LoraConfig, "mixture": mixture, "trusted": trusted}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own option of a name that is deprecated
        exec(before, dict(names))
    exec(after, names)
    assert len(names["curated"]) == 40  # ten trusted rows are too few for a screen: nothing is promised
    names |= {"load_dataset": load_dataset, "load_curated_dataset": load_curated_dataset, "corpus": mixture}
    refining, publishing, others = _python_blocks()
    exec(refining, names)
    assert "original_completion" in names["refined"].column_names
    exec(publishing, names)
    assert len(names["dataset"]) == 28
    assert len(names["stricter"]) == 12
    assert "adapter_model.safetensors" in hub.files("model", names["trainer"].hub_model_id)
    exec(others.replace("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"), names)
    assert (new_user / "selector").is_dir()
    assert (new_user / "scored").is_dir()


def test_no_block_is_left_out():
    """Each is one of those that are run, here or by `.ci/run`, or shows what one of them prints."""
    kinds = re.findall(r"```(\w+)\n", README)
    assert kinds.count("bash") == len(re.findall(r"<!-- command: (?:demo|chain|tests) -->\n```bash", README))
    assert kinds.count("yaml") == len(re.findall(r"<!-- file: [\w.]+ -->\n```yaml", README))
    assert kinds.count("python") == len(_python_blocks())
    assert kinds.count("diff") == 1
    assert set(kinds) == {"bash", "yaml", "python", "diff", "text"}
