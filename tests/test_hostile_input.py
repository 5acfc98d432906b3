"""Rows and names that somebody else wrote, with anything in them."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from trl_bilevel.parquet_files import write_parquet
from trl_bilevel.scripts import sft


TEXTS = [
    "\x00 nul", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "x" * 1_000_000, "", "\U0001f469\u200d\U0001f467 e\u0301",
    "aaaa" * 125, "[red]x[/]", "../../etc/passwd", "/abs", "---\nlicense: evil\n---", "<script>alert(1)</script>",
    "| a | b |", "{{ 7 * 7 }}", "{% for x in y %}", "`](http://evil)",
]  # fmt: skip


@pytest.fixture
def hostile_rows():
    rows = []
    for row, text in enumerate(TEXTS):
        start = text[:40]
        rows.append(
            {"prompt": f"{row}: {text}", "completion": f" {row} {text}", "uid": f"{start}#{row}", "source": start}
        )
    return Dataset.from_list(rows)


def test_nothing_of_it_is_lost_or_obeyed(make_trainer, hostile_rows, hub, tmp_path, capsys):
    trainer = make_trainer(
        train_dataset=hostile_rows, sample_id_column="uid", source_column="source", max_length=64, max_steps=4,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    before = {path.name for path in tmp_path.iterdir()}
    trainer.train()
    trainer.save_model()
    curated = trainer.curate()
    for name in hostile_rows.column_names:
        assert curated[name][:] == hostile_rows[name][:]
    assert curated["sample_id"][:] == hostile_rows["uid"][:]
    path = tmp_path / "curated.parquet"
    write_parquet(curated, path)
    again = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert again.to_dict() == curated.to_dict()
    assert {found.name for found in tmp_path.iterdir()} - before <= {"run", "curated.parquet", "cache"}
    assert set(trainer.source_weights()) == {text[:40] for text in TEXTS}
    capsys.readouterr()
    sft._save_curated(trainer, None)
    printed = capsys.readouterr().out
    assert "[red]x[/]" in printed  # the sources
    assert "\x1b[31m" not in printed

    trainer.push_curated_dataset("me/rows", keep_ratio=0.9)
    card = DatasetCard(hub.files("dataset", "me/rows")["README.md"].decode())
    assert "license" not in card.data.to_dict()
    assert "<script>" not in card.text
    for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
        assert json.loads((folder / "_run.json").read_text())["options"]["source_column"] == "source"
    assert "\x1b[31m" not in capsys.readouterr().out


def test_code_of_a_model_folder_is_not_run(make_trainer, build_model, tokenizer, tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "was_run"
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(model=str(folder), processing_class=None)
    assert not marker.exists()
