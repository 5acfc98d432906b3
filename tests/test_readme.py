"""The README's commands, as a new user types them; the Hub is the server of the tests."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import prompt_completion_rows
from datasets import load_dataset
from huggingface_hub import DatasetCard
from peft import PeftModel


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


def test_train_curate_push_and_train_elsewhere(hub, new_user, build_model):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in _command_block("chain"):
        if " sft " in command:
            command += " --use_cpu"  # TRL asks for it where there is no GPU
        result = subprocess.run(
            ["bash", "-euc", command], cwd=new_user, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
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
