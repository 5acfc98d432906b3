"""Publishing to a Hub and loading from it, by the real clients over HTTP."""

import copy
import html
import json
import logging
import pickle
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import QUIET_CPU_RUN, prompt_completion_rows
from datasets import Dataset, concatenate_datasets, get_dataset_config_names, load_dataset
from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi, ModelCard
from peft import LoraConfig, PeftModel
from trl import SFTConfig

import trl_bilevel.hub_errors
from trl_bilevel import BilevelSFTConfig, DataSelector, dataset_card, load_curated_dataset
from trl_bilevel.cli import main
from trl_bilevel.dataset_sources import describe_dataset, source_text
from trl_bilevel.hub import publish_curated_dataset
from trl_bilevel.hub_errors import PublishError
from trl_bilevel.report import build_report
from trl_bilevel.run_records import curate_run, describe_run
from trl_bilevel.scripts import sft


REPO = "me/mixture-curated"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(trl_bilevel.hub_errors, "_FIRST_WAIT", 0.01)
    # The client's own waits; of its module only
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", impatient)


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(max_steps=8)
    trainer.train()
    return trainer


def _load(config=None, **options):
    return load_dataset(REPO, config, split="train", **options)


def _card(hub, revision="main"):
    return DatasetCard(hub.files("dataset", REPO, revision)["README.md"].decode())


def test_published_rows_are_those_kept(hub, trained, train_dataset):
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    curated = _load()
    expected = trained.curate(keep_ratio=0.5)
    assert curated.column_names[:2] == train_dataset.column_names
    assert curated.to_list() == expected.to_list()
    scores = _load("scores")
    assert scores["sample_id"][:] == list(range(24))
    assert sum(scores["kept"]) == 12
    np.testing.assert_allclose(scores["weight"], trained.data_selector.weights().numpy(), rtol=1e-6)
    assert sorted(scores["rank"]) == list(range(1, 25))
    assert list(load_dataset(REPO, split="train", streaming=True)) == expected.to_list()
    assert hub.repo("dataset", REPO).history()[0].message == "Curated dataset: 12 of 24 rows"
    assert not hub.repo("dataset", REPO).private  # as the guides warn


def test_second_push_of_the_same_is_no_commit(hub, trained):
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(hub.repo("dataset", REPO).history()) == 1


def test_another_ratio_replaces_the_rows_and_an_old_revision_stays(hub, trained):
    first = trained.push_curated_dataset(REPO, keep_ratio=0.25)
    trained.push_curated_dataset(REPO, keep_ratio=0.75)
    assert len(_load()) == 18
    assert len(_load(revision=first.oid)) == 6
    assert [name for name in hub.files("dataset", REPO) if name.startswith("curated")] == [
        "curated/train-00000-of-00001.parquet"
    ]


def test_many_rows_are_several_files(hub, trained, monkeypatch):
    monkeypatch.setattr("trl_bilevel.hub._ROWS_PER_FILE", 7)
    trained.push_curated_dataset(REPO, keep_ratio=0.75)
    assert sum(name.startswith("curated/") for name in hub.files("dataset", REPO)) == 3
    assert _load().to_list() == trained.curate(0.75).to_list()
    monkeypatch.setattr("trl_bilevel.hub._ROWS_PER_FILE", 10)
    trained.push_curated_dataset(REPO, keep_ratio=0.5)  # and none of the first are left
    assert sum(name.startswith("curated/") for name in hub.files("dataset", REPO)) == 2
    assert _load(download_mode="force_redownload").to_list() == trained.curate(0.5).to_list()


def test_what_was_written_by_hand_stays_in_the_card(hub, trained):
    trained.push_curated_dataset(REPO, keep_ratio=0.5, license="cc-by-4.0")
    card = _card(hub)
    assert card.data.license == "cc-by-4.0"
    text = card.content.replace("license: cc-by-4.0", "license: mit\nlanguage:\n- en")
    text = text.replace("<!-- trl-bilevel: start -->", "# My own words\n\n<!-- trl-bilevel: start -->") + "\nThanks!\n"
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO, repo_type="dataset")
    trained.push_curated_dataset(REPO, keep_ratio=0.25)
    card = _card(hub)
    assert card.data.license == "mit"
    assert card.data.language == ["en"]
    trained.push_curated_dataset(REPO, keep_ratio=0.25, license="apache-2.0")  # said now, and so counts more
    card = _card(hub)
    assert card.data.license == "apache-2.0"
    assert card.text.lstrip().startswith("# My own words")
    assert card.text.rstrip().endswith("Thanks!")
    assert card.text.count("trl-bilevel: start") == 1
    assert "6 of 24 rows" in card.text
    assert "12 of 24 rows" not in card.text


@pytest.mark.parametrize("config", [{"config_name": "default"}, {"config_name": "mine", "default": True}])
def test_a_dataset_that_a_repository_has_stays_its_default(hub, trained, tmp_path, config):
    """As in the repository of the mixture itself. With two defaults nothing in it could be loaded."""
    api = HfApi()
    api.create_repo(REPO, repo_type="dataset")
    own = prompt_completion_rows(3, 500)
    own.to_parquet(tmp_path / "rows.parquet")
    data_files = [{"split": "train", "path": "data/train-*"}]
    card = DatasetCard(f"---\n{json.dumps({'configs': [{**config, 'data_files': data_files}]})}\n---\n# Mine\n")
    for name, content in (("README.md", str(card).encode()), ("data/train-0.parquet", tmp_path / "rows.parquet")):
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO, repo_type="dataset")
    for _ in range(2):
        trained.push_curated_dataset(REPO, keep_ratio=0.5)
        assert _load().to_list() == own.to_list()
        assert _load(config["config_name"]).to_list() == own.to_list()
        assert _load("curated").to_list() == trained.curate(keep_ratio=0.5).to_list()
        assert len(load_curated_dataset(REPO, keep_ratio=0.25)) == 6
    assert f'load_dataset("{REPO}", "curated", split="train")' in _card(hub).text


def test_examples_in_a_card_show_conversations_of_any_kind():
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert dataset_card._plain(shared) == "human: Hi / gpt: Hello"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert dataset_card._plain([{"role": "user", "content": "1 + 1"}, call]) == f"user: 1 + 1 / {call}"


def test_examples_in_a_card_show_the_answer():
    """Whatever comes before it."""
    question, answer = "why " * 200, "because"
    assert dataset_card._example([question, answer]).endswith(" / because")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    shown = dataset_card._example([[{"role": "system", "content": "Be kind."}, *turns * 5]])
    assert re.fullmatch(r"… / user&#58; (why )+w?h?y?… / assistant&#58; because", shown)
    assert len(dataset_card._example([question] * 30)) < 30 * 60


def test_card_shows_no_row_without_a_score_as_dropped_for_its_weight(hub, make_trainer):
    trainer = make_trainer(max_steps=2)  # 16 of 24 rows
    trainer.train()
    trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    dropped = _card(hub).text.partition("Dropped, of the lowest weight")[2]
    weights = [float(line.split("|")[1]) for line in dropped.splitlines() if re.match(r"\| \d", line)]
    scored = trainer.curate().filter(lambda row: row["scored"] and row["rank"] > 12)
    assert len(scored) < 5
    assert weights == pytest.approx(sorted(scored["weight"]), abs=1e-3)


def test_trainer_that_has_not_trained_publishes_nothing_and_leaves_the_run(hub, trained, make_trainer):
    trained.save_model()
    again = make_trainer()  # in the same folder, as after a restart
    files = {path: path.read_bytes() for path in Path(again.args.output_dir).rglob("_*") if path.is_file()}
    with pytest.raises(ValueError, match=f"No row of this trainer has a score.*trl-bilevel push .* {REPO}"):
        again.push_curated_dataset(REPO)
    again.data_selector.load(again.args.output_dir, again._rows_fingerprint)
    again.push_curated_dataset(REPO, keep_ratio=0.5)
    assert _load().to_list() == trained.curate(keep_ratio=0.5).to_list()
    assert {path: path.read_bytes() for path in Path(again.args.output_dir).rglob("_*") if path.is_file()} == files


def test_push_of_a_running_job_is_of_one_moment(hub, make_trainer, monkeypatch):
    """Its next checkpoint may come while the rows of the last one are read."""
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    run = Path(trainer.args.output_dir)
    later = run.with_name("later")
    (run / "checkpoint-4").rename(later)

    def and_then_a_checkpoint(*args):
        curated = curate_run(*args)
        later.rename(run / "checkpoint-4")
        return curated

    monkeypatch.setattr("trl_bilevel.run_records.curate_run", and_then_a_checkpoint)
    main(["push", str(run), REPO])
    expected = dict(zip(*(_load("scores")[name] for name in ("sample_id", "weight")), strict=True))
    assert DataSelector.from_pretrained(REPO).weights().tolist() == pytest.approx([*expected.values()])


def test_card_says_what_it_must(hub, trained):
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    card = _card(hub)
    assert card.data.task_categories == ["text-generation"]
    assert card.data.size_categories == ["n<1K"]
    assert {"trl", "bilevel-sft"} <= set(card.data.tags)
    assert "synthetic" not in card.data.tags
    assert [config["config_name"] for config in card.data.to_dict()["configs"]] == ["curated", "scores"]
    assert "arXiv:2511.21056" in card.text
    assert "| kept | 12 | 50.0 % |" in card.text
    assert hub.files("dataset", REPO)["assets/weights.png"].startswith(b"\x89PNG")


def test_nothing_local_or_secret_is_published(hub, make_trainer, tmp_path):
    trainer = make_trainer(hub_token="hf_write", run_name="secret-run")
    trainer.train()
    trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    trainer.push_to_hub()
    for content in hub.files("dataset", REPO).values():
        assert b"secret-run" not in content
    files = hub.files("model", "me/run")
    assert "training_args.bin" in files  # pickles what it is given
    for content in [*hub.files("dataset", REPO).values(), *files.values()]:
        for secret in (str(tmp_path), "hf_write"):
            assert secret.encode() not in content
    facts = json.loads((tmp_path / "run" / "_run.json").read_text())
    assert str(tmp_path) not in json.dumps(facts)
    assert "hf_write" not in json.dumps(facts)


def test_hostile_rows_are_text_in_the_card(hub, make_trainer):
    rows = [
        {"prompt": f"q{row} <script>alert(1)</script> | [x](javascript:1) ---\n# Title", "completion": " <img src=x>"}
        for row in range(8)
    ]
    trainer = make_trainer(train_dataset=Dataset.from_list(rows), max_steps=2)
    trainer.train()
    trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    text = _card(hub).text
    assert "<script>" not in text
    assert "<img" not in text
    assert "](javascript" not in text
    assert "\n# Title" not in text
    assert "q0 &#60;script&#62;" in text
    for options in ({"sensitive": True}, {}):  # the mark of an earlier push stays
        trainer.push_curated_dataset(REPO, keep_ratio=0.5, **options)
        assert "q0" not in _card(hub).text
        assert "not-for-all-audiences" in _card(hub).data.tags


def test_refined_answers_are_published_beside_the_originals(hub, make_trainer):
    trainer = make_trainer(
        refine_ratio=0.5, refine_start_step=0, refine_every_steps=100, refine_max_new_tokens=4,
        refine_discard_flawed=False,
    )  # fmt: skip
    trainer.train()
    trainer.push_curated_dataset(REPO)
    refined = _load("refined")
    expected = trainer.curate().filter(lambda row: row["response_source"] == "refined")
    assert refined.to_list() == expected.to_list()
    assert len(refined) == 12
    assert "refined_responses" not in _load().column_names
    card = _card(hub)
    assert "synthetic" in card.data.tags
    assert "The answers of 12 rows were regenerated" in card.text


def test_a_branch_is_made_and_main_stays(hub, trained):
    trained.push_curated_dataset(REPO, keep_ratio=0.5, revision="half", private=True, collection="Half")
    assert hub.repo("dataset", REPO).private
    assert [collection["private"] for collection in hub.collections.values()] == [True]
    assert len(_load(revision="half")) == 12
    assert hub.files("dataset", REPO) == {}


# ---- The adapter ----
def test_adapter_is_pushed_with_a_card_that_peft_and_the_hub_know(hub, make_trainer, build_model, tokenizer):
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        push_to_hub=True, hub_model_id="me/adapter", max_steps=4,
    )  # fmt: skip
    trainer.train()
    trainer.push_curated_dataset(REPO, keep_ratio=0.5, collection="Curated")
    trainer.push_to_hub()
    files = hub.files("model", "me/adapter")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if name.startswith("_")]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert card.data.datasets == [REPO]
    assert {"trl", "bilevel-sft"} <= set(card.data.tags)
    assert "author       = {Quan Xiao" in card.text
    assert "effective share of the training rows" in card.text
    loaded = PeftModel.from_pretrained(build_model(), "me/adapter")
    batch = tokenizer("add 1 and 2:", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)
    (collection,) = hub.collections.values()
    assert [(item["type"], item["id"]) for item in collection["items"]] == [("dataset", REPO), ("model", "me/adapter")]


def test_base_model_on_disk_is_not_published(hub, make_trainer, build_model, tokenizer, tmp_path, caplog):
    build_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        model=str(tmp_path / "base"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        push_to_hub=True, hub_model_id="me/adapter", hub_strategy="checkpoint", save_strategy="steps", save_steps=2,
        max_steps=4, metric_for_best_model="loss",
    )  # fmt: skip
    (warning,) = [record.message for record in caplog.records if "Pass a relative path" in record.message]
    assert f"`output_dir='{tmp_path / 'run'}'` will be read in the trainer state of the checkpoints" in warning
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("model", "me/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert "last-checkpoint/adapter_config.json" in files
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    config = trainer.model.active_peft_config
    assert config.base_model_name_or_path == str(tmp_path / "base")


def test_base_model_on_disk_is_not_published_by_hand(hub, make_trainer, build_model, tokenizer, tmp_path):
    """As the README has it: `push_to_hub` is no option of the run."""
    build_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(model=str(tmp_path / "base"), peft_config=adapter, hub_model_id="me/adapter", max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("model", "me/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert trainer.model.active_peft_config.base_model_name_or_path == str(tmp_path / "base")


def test_sample_ids_of_a_stream_stay_here(hub, make_trainer):
    rows = [{**row, "uid": f"user-{n}@example.org"} for n, row in enumerate(prompt_completion_rows(24))]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(train_dataset=stream, sample_id_column="uid", hub_model_id="me/model", max_steps=4)
    trainer.train()
    trainer.push_to_hub()
    names = {path.name for path in Path(trainer.args.output_dir).iterdir() if b"@example.org" in _content(path)}
    assert names == {"_data_selector.safetensors", "_row_scores.pq"}  # here they are
    files = hub.files("model", "me/model")
    assert "model.safetensors" in files
    for name, content in files.items():
        assert b"@example.org" not in content, name


def _content(path):
    """Of a file, as plain bytes: Parquet compresses."""
    if path.suffix == ".pq":
        return str(pyarrow.parquet.read_table(path).to_pylist()).encode()
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
@pytest.mark.parametrize("push_to_hub", [False, True])
def test_reports_that_would_be_published_are_named(hub, make_trainer, monkeypatch, caplog, report_to, push_to_hub):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trainer = make_trainer(hub_model_id="me/model", max_steps=1, push_to_hub=push_to_hub)
    trainer.args.report_to = [report_to]  # its package need not be there
    caplog.clear()
    trainer._warn_about_published_paths()
    assert ("the name of this machine" in caplog.text) == (push_to_hub and report_to == "tensorboard")
    caplog.clear()
    trainer.train()
    trainer.push_to_hub()
    assert ("`TENSORBOARD_LOGGING_DIR`" in caplog.text) == (not push_to_hub and report_to == "tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    caplog.clear()
    trainer._warn_about_published_paths()
    assert caplog.text == ""


def test_pushed_checkpoint_goes_on(hub, make_trainer, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "checkpoint", "save_strategy": "steps",
               "save_steps": 4, "max_steps": 8}  # fmt: skip
    trainer = make_trainer(**options)
    trainer.train()
    assert all(job.exception() is None for job in trainer.push_in_progress.jobs)  # in the background, nobody sees it
    files = hub.files("model", "me/run")
    assert "last-checkpoint/_data_selector.safetensors" in files
    folder = tmp_path / "downloaded" / "checkpoint-8"
    for name, content in files.items():
        if name.startswith("last-checkpoint/"):
            path = folder / name.removeprefix("last-checkpoint/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    resumed = make_trainer(max_steps=10, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == 10


# ---- Cut anew ----
def test_published_rows_are_cut_anew_by_their_scores(hub, trained):
    trained.push_curated_dataset(REPO, keep_ratio=0.75)
    assert load_curated_dataset(REPO).to_list() == _load().to_list()
    assert load_curated_dataset(REPO, keep_ratio=0.25).to_list() == trained.curate(keep_ratio=0.25).to_list()
    heavy = load_curated_dataset(REPO, min_weight=1.0)
    assert heavy["sample_id"][:] == [row for row in range(24) if trained.data_selector.weights()[row] >= 1]
    with pytest.raises(ValueError, match=r"only the best 18 were published \(0.750"):
        load_curated_dataset(REPO, keep_ratio=0.9)
    with pytest.raises(ValueError, match="No row"):
        load_curated_dataset(REPO, min_weight=100)
    with pytest.raises(ValueError, match="at most 1"):
        load_curated_dataset(REPO, keep_ratio=2)


def test_where_a_dataset_comes_from_is_recorded(hub, trained, make_trainer):
    commit = trained.push_curated_dataset(REPO, license="mit", language="en")
    source = _load().select_columns(["prompt", "completion"])
    description = describe_dataset(source)
    assert description["sources"] == [{"id": REPO, "revision": commit.oid, "config": "curated"}]
    trainer = make_trainer(train_dataset=source)
    trainer.train()
    trainer.push_curated_dataset("me/second", keep_ratio=0.5)
    card = DatasetCard(hub.files("dataset", "me/second")["README.md"].decode())
    assert card.data.source_datasets == [REPO]
    assert commit.oid in card.text
    assert f"--dataset_name {REPO} \\\n    --dataset_config curated" in card.text
    assert (card.data.license, card.data.language) == ("mit", ["en"])  # carried from the source


@pytest.mark.parametrize("name", ["me/OpenOrca", "me/GSM8K_v2.5", "me/plain"])
def test_repository_of_a_name_in_capitals(hub, name):
    prompt_completion_rows(4).push_to_hub(name)
    (source,) = describe_dataset(load_dataset(name, split="train"))["sources"]
    assert source["id"] == name


def test_repository_whose_downloads_were_deleted(hub, monkeypatch, tmp_path):
    for name in ("me/plain", "me/open_orca"):
        prompt_completion_rows(4).push_to_hub(name)
    rows = {name: load_dataset(name, split="train") for name in ("me/plain", "me/open_orca")}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert [source["id"] for source in describe_dataset(rows["me/plain"])["sources"]] == ["me/plain"]
    description = describe_dataset(rows["me/open_orca"])  # which may be `OpenOrca`
    assert description["sources"] == []
    assert source_text(description) == "a repository of the Hub whose name is not recorded"


@pytest.mark.parametrize(
    "derive",
    [
        lambda rows: rows.filter(lambda row: row["sample_id"] % 2 == 0),
        lambda rows: rows.select(range(10)),
        lambda rows: rows.shuffle(seed=0),
        lambda rows: rows.map(lambda row: {"prompt": row["prompt"].upper()}),
        lambda rows: rows.train_test_split(0.5, seed=0)["train"],
    ],
    ids=["filtered", "first", "shuffled", "changed", "half"],
)
def test_rows_selected_or_changed_are_not_the_whole_repository(hub, trained, derive):
    trained.push_curated_dataset("me/first", license="mit")
    source = load_dataset("me/first", split="train")
    assert not describe_dataset(source)["is_derived"]
    assert not describe_dataset(source.select_columns(["prompt", "completion"]))["is_derived"]
    description = describe_dataset(derive(source))
    assert description["is_derived"]
    assert source_text(description).startswith("rows selected from or made of `me/first` (revision")
    assert dataset_card._dataset_options(description, "dataset", "split", "ROWS") == {"dataset_name": "ROWS"}


def test_all_sources_of_a_mixture_are_recorded(hub, trained, make_trainer, caplog):
    for name, license in (("me/a", "mit"), ("me/b", "apache-2.0")):
        trained.push_curated_dataset(name, license=license, keep_ratio=0.5)
    parts = [load_dataset(name, split="train").select_columns(["prompt", "completion"]) for name in ("me/a", "me/b")]
    trainer = make_trainer(train_dataset=concatenate_datasets(parts))
    trainer.train()
    caplog.clear()
    trainer.push_curated_dataset(REPO)
    card = _card(hub)
    assert card.data.source_datasets == ["me/a", "me/b"]
    assert "--dataset_name TRAINING_ROWS" in card.text
    assert "license" not in card.data.to_dict()  # nobody can say which of the two
    assert "published without a license" in caplog.text
    hub.repos.pop(("dataset", "me/b"))  # a source that is gone
    trainer.push_curated_dataset(REPO, license="other")
    assert _card(hub).data.license == "other"


def test_rows_that_are_only_partly_from_the_hub_are_not_relicensed(hub, trained, make_trainer, train_dataset):
    trained.push_curated_dataset("me/a", license="mit")
    published = load_dataset("me/a", split="train").select_columns(["prompt", "completion"])
    trainer = make_trainer(train_dataset=concatenate_datasets([published, train_dataset]))
    trainer.train()
    trainer.push_curated_dataset(REPO)
    card = _card(hub)
    assert "license" not in card.data.to_dict()
    assert "and rows that are not on the Hub" in card.text
    assert "--dataset_name TRAINING_ROWS" in card.text


def test_splits_are_kept_side_by_side(hub, trained, make_trainer):
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    rows = Dataset.from_list(prompt_completion_rows(24).to_list(), split="validation")
    trainer = make_trainer(train_dataset=rows)
    trainer.train()
    trainer.push_curated_dataset(REPO, keep_ratio=0.25)
    assert len(_load()) == 12
    assert len(load_dataset(REPO, split="validation")) == 6
    assert load_dataset(REPO, "scores").keys() == {"train", "validation"}


def test_weights_of_a_published_dataset_start_another_run(hub, make_trainer, tmp_path):
    rows = prompt_completion_rows(24)
    rows = rows.add_column("uid", [f"row-{number}" for number in range(24)])
    trainer = make_trainer(train_dataset=rows, sample_id_column="uid", selector_activation="sigmoid")
    trainer.train()
    first = trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    assert get_dataset_config_names(REPO) == ["curated", "scores"]
    assert len(_load()) == 12
    assert load_dataset(REPO).keys() == {"train"}
    shuffled = rows.shuffle(seed=1)
    other = make_trainer(train_dataset=shuffled, sample_id_column="uid", data_selector=REPO)
    expected = dict(zip(rows["uid"], trainer.data_selector.weights().tolist(), strict=True))
    assert other.data_selector.activation == "sigmoid"
    assert other.data_selector.weights().tolist() == pytest.approx([expected[uid] for uid in shuffled["uid"]])
    assert DataSelector.from_pretrained(REPO, token="hf_read").logits.std() > 0

    trainer.save_model()
    trainer.data_selector.update(torch.arange(24), torch.rand(24))
    trainer.push_curated_dataset(REPO)  # now, and as it was, and from disk
    assert not torch.equal(DataSelector.from_pretrained(REPO).logits, other.data_selector.logits)
    logits = DataSelector.from_pretrained(REPO, revision=first.oid).logits
    main(["push", str(tmp_path / "run"), "me/again"])
    assert torch.equal(DataSelector.from_pretrained("me/again").logits, trainer.data_selector.logits)
    assert dict(zip(rows["uid"], logits.tolist(), strict=True)) == pytest.approx(
        dict(zip(shuffled["uid"], other.data_selector.logits.tolist(), strict=True))
    )
    with pytest.raises(FileNotFoundError, match="nor a dataset repository"):
        DataSelector.from_pretrained(REPO, revision="nowhere")


def test_weights_of_splits_are_kept_side_by_side(hub, trained, make_trainer):
    logits = {}
    for number, split in enumerate(("test", "validation", "train")):
        rows = Dataset.from_list(prompt_completion_rows(24).to_list(), split=split)
        trainer = make_trainer(train_dataset=rows, seed=number)
        trainer.train()
        trainer.push_curated_dataset(REPO)
        logits[split] = trainer.data_selector.logits
        if split == "test":  # the only one
            assert torch.equal(DataSelector.from_pretrained(REPO).logits, logits[split])
        if split == "validation":
            with pytest.raises(ValueError, match=r"selectors of the splits \['test', 'validation'\]. Choose one"):
                DataSelector.from_pretrained(REPO)
    assert torch.equal(DataSelector.from_pretrained(REPO).logits, logits["train"])
    for split, expected in logits.items():
        assert torch.equal(DataSelector.from_pretrained(REPO, split=split).logits, expected)
    with pytest.raises(FileNotFoundError, match=r"data_selector-other.parquet"):
        DataSelector.from_pretrained(REPO, split="other")
    assert load_dataset(REPO).keys() == {"train", "validation", "test"}
    # Published without weights: those of the rows before do not stand in for them
    publish_curated_dataset(trained.curate(), trained._run_facts, REPO)
    assert "data_selector.parquet" not in hub.files("dataset", REPO)
    assert "data_selector-test.parquet" in hub.files("dataset", REPO)


def test_split_without_refined_rows_leaves_those_of_another(hub, make_trainer):
    refine = {"refine_ratio": 0.5, "refine_start_step": 0, "refine_max_new_tokens": 4, "refine_discard_flawed": False}
    for split, options in (("train", refine), ("validation", {}), ("train", {})):
        rows = Dataset.from_list(prompt_completion_rows(24).to_list(), split=split)
        trainer = make_trainer(train_dataset=rows, **options)
        trainer.train()
        trainer.push_curated_dataset(REPO)
        configs = {config["config_name"]: config for config in _card(hub).data.to_dict()["configs"]}
        if split == "train" and not options:  # its refined rows are no more, and there are no others
            assert configs.keys() == {"curated", "scores"}
        else:
            assert len(_load("refined", download_mode="force_redownload")) > 0
            assert [entry["split"] for entry in configs["refined"]["data_files"]] == ["train"]


@pytest.mark.parametrize(
    ("split", "num_rows", "keep_ratio", "num_stricter"),
    [("train", 24, 0.5, 6), ("train_sft", 24, 0.5, 6), ("train", 24, 1 / 24, 1), ("train", 1000, 0.001, 1)],
)
def test_code_in_a_card_runs(hub, trained, tokenizer, tmp_path, split, num_rows, keep_ratio, num_stricter):
    rank = np.random.default_rng(0).permutation(num_rows) + 1
    scores = {"weight": 2 * (1 - rank / num_rows), "rank": rank, "scored": rank > 0}
    rows = prompt_completion_rows(num_rows).to_dict()
    source = {"sample_id": list(range(num_rows)), "response_source": ["original"] * num_rows}
    scored = Dataset.from_dict({**rows, **source, **scores}, split=split)
    publish_curated_dataset(scored, trained._run_facts, REPO, keep_ratio=keep_ratio)
    trained.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = {"here": {"output_dir": str(tmp_path / "out"), "max_steps": 1, **QUIET_CPU_RUN}}
    for code in re.findall(r"```python\n(.*?)```", _card(hub).text, flags=re.DOTALL):
        code = code.replace('output_dir="out"', "**here").replace("MODEL", str(tmp_path / "model"))
        exec(code, found)
    assert (tmp_path / "out").is_dir()  # where the weighted run wrote
    assert len(found["dataset"]) == round(keep_ratio * num_rows)
    assert len(found["scores"]) == num_rows
    assert sorted(found["stricter"]["rank"]) == list(range(1, num_stricter + 1))


def test_card_that_cannot_be_read_is_not_written_over(hub, trained):
    trained.push_curated_dataset(REPO)
    api = HfApi()
    text = _card(hub).content.replace("<!-- trl-bilevel: start -->", "# Mine\n\n<!-- trl-bilevel: start -->")
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO, repo_type="dataset")
    hub.fail("HEAD", "README.md", 500, times=100)
    with pytest.raises(PublishError, match="cannot be reached"):
        trained.push_curated_dataset(REPO, keep_ratio=0.5)
    hub.faults.clear()
    assert "# Mine" in _card(hub).text
    for broken, message in ((text.replace("<!-- trl-bilevel: end -->", ""), "nobody can tell"),
                            (f"---\nlicense: [mit\n---\n{text}", "Mend the YAML")):  # fmt: skip
        api.upload_file(path_or_fileobj=broken.encode(), path_in_repo="README.md", repo_id=REPO, repo_type="dataset")
        with pytest.raises(ValueError, match=message):
            trained.push_curated_dataset(REPO, keep_ratio=0.5)
        assert hub.files("dataset", REPO)["README.md"].decode() == broken


def test_command_in_a_card_gives_the_run_again(hub, make_trainer):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=lora, packing=True, max_length=64, per_device_train_batch_size=2)
    trainer.train()
    trainer.push_curated_dataset(REPO)
    assert "WeightedSFTTrainer(model=" in _card(hub).text
    (command,) = re.findall(r"trl-bilevel sft (.*?)```", _card(hub).text, flags=re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    _, training_args, model_args, _ = sft.make_parser().parse_args_and_config([*words, "--use_cpu"])
    assert (model_args.use_peft, model_args.lora_r, model_args.lora_alpha) == (True, 4, 8)
    assert model_args.lora_target_modules == ["q_proj", "v_proj"]
    assert (model_args.lora_dropout, model_args.use_rslora) == (0.0, True)
    for name in ("packing", "max_length", "per_device_train_batch_size", "learning_rate", "max_steps", "seed", "bf16"):
        assert getattr(training_args, name) == getattr(trainer.args, name), name


_REFINE = {"refine_ratio": 0.5}
_EXCESS = {"value_function": "adapter"}
# of every option of ours another value, and what it needs
CHANGED = {
    "refine_ratio": (0.25, {}),
    "refine_mode": ("random", _REFINE),
    "refine_start_step": (3, _REFINE),
    "refine_every_steps": (0.2, _REFINE),
    "num_refined_responses": (2, _REFINE),
    "refine_max_new_tokens": (8, _REFINE),
    "refine_temperature": (0.5, _REFINE),
    "refine_top_p": (0.9, {**_REFINE, "refine_temperature": 1.0}),
    "refine_batch_size": (2, _REFINE),
    "refine_prompt_template": ("{{ prompt }}\n```\n{{ completion }} | 'again'\n```", _REFINE),
    "importance_ratio_clip": (2.0, _REFINE),
    "importance_sampling_level": ("sequence", _REFINE),
    "refine_discard_flawed": (False, _REFINE),
    "refine_min_probability": (0.1, _REFINE),
    "refine_reward_threshold": (0.5, _REFINE),
    "use_vllm": (True, _REFINE),
    "selection_method": ("bmo", {}),
    "bmo_temperature": (0.5, {"selection_method": "bmo"}),
    "validation_weight": (0.5, {}),
    "validation_weight_decay": (0.1, {}),
    "adaptive_validation_weight": (True, _EXCESS),
    "validation_loss_type": ("dpo", {}),
    "beta": (0.2, {"validation_loss_type": "dpo"}),
    "per_device_validation_batch_size": (2, {}),
    "screen": (False, {}),
    "value_function": ("none", {}),
    "value_function_rows": ("all", _EXCESS),
    "selector_prior": (0.3, _EXCESS),
    "selector_activation": ("sigmoid", {}),
    "selector_optimizer": ("adam", {}),
    "selector_learning_rate": (0.5, {}),
    "filter_ratio": (0.1, {}),
    "amortized_selector": (True, {}),
    "loss_normalization": ("row", {}),
    "sample_id_column": ("id", {}),
    "save_training_rows": (False, {}),
    "source_column": ("origin", {}),
}


def _own_options():
    inherited = {option.name for option in fields(SFTConfig)}
    return [option.name for option in fields(BilevelSFTConfig) if option.name not in inherited]


@pytest.mark.parametrize("name", [name for name in _own_options() if not name.startswith("vllm_")])
def test_command_in_a_card_has_every_option(make_config, build_model, train_dataset, name):
    value, needed = CHANGED[name]
    args = make_config(**needed, **{name: value})
    facts = describe_run(args, build_model(), train_dataset, train_dataset, has_value_function=False)
    words = shlex.split(dataset_card._command(facts).replace("\\\n", " "))
    _, parsed, _, _ = sft.make_parser().parse_args_and_config([*words, "--use_cpu"])
    for option in _own_options():
        assert getattr(parsed, option) == getattr(args, option), option


def test_options_in_a_card_say_nothing_of_the_machine(make_config, build_model, train_dataset, tmp_path):
    template = tmp_path / "mine.jinja"
    args = make_config(
        **_REFINE, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://10.0.0.1", hub_token="hf_write",
        chat_template_path=str(template),
    )  # fmt: skip
    facts = describe_run(args, build_model(), train_dataset, train_dataset, has_value_function=False)
    assert facts["options"]["chat_template_path"] == "mine.jinja"
    for secret in ("10.0.0.1", "hf_write", str(tmp_path)):
        assert secret not in json.dumps(facts)


def test_options_that_decide_are_in_card_and_report(hub, make_trainer, tmp_path):
    schedule = {"min_lr": 1e-4}
    trainer = make_trainer(
        max_length=None, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=schedule, optim="adamw_torch",
        optim_args="x=1", router_aux_loss_coef=0.0, max_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.push_curated_dataset(REPO)
    trainer.save_model()
    report = build_report(trainer.args.output_dir)
    text = _card(hub).text
    for name, value in (("max_length", None), ("optim_args", "x=1"), ("router_aux_loss_coef", 0.0)):
        assert f"| `{name}` | `{value}` |" in text
        assert html.escape(f"{name} = {json.dumps(value)}", quote=False) in html.unescape(report)
    assert trainer._run_facts["options"]["lr_scheduler_kwargs"] == schedule
    assert "lr_scheduler_kwargs = " + json.dumps(schedule) in html.unescape(report)
    assert f"--lr_scheduler_kwargs '{json.dumps(schedule)}'" in text
    assert "--max_length" not in text  # which takes no `None`


def test_prompt_template_with_code_stays_in_its_place(hub, make_trainer):
    trainer = make_trainer(refine_prompt_template=CHANGED["refine_prompt_template"][0], max_steps=1, **_REFINE)
    trainer.train()
    trainer.push_curated_dataset(REPO)
    text = _card(hub).text
    assert re.search(r"^````bash\npip install[^`]*```[^`]*```[^`]*\n````$", text, flags=re.MULTILINE)
    assert "\n| `refine_prompt_template` | <code>&#123;" in text


def test_retry_command_does_what_the_call_would_have_done(hub, trained):
    hub.fail("POST", "/repos/create", 403, times=1)
    with pytest.raises(PublishError) as error:
        trained.push_curated_dataset(
            REPO, keep_ratio=0.5, private=True, sensitive=True, revision="draft", license="mit", language="en"
        )
    (command,) = re.findall(r"`(trl-bilevel push .*?)`", str(error.value))
    main(shlex.split(command)[1:])
    assert hub.repo("dataset", REPO).private
    assert hub.files("dataset", REPO) == {}
    card = _card(hub, "draft")
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert "not-for-all-audiences" in card.data.tags
    assert len(_load(revision="draft")) == 12


def test_license_is_asked_for_where_nobody_has_said(hub, trained, tmp_path, monkeypatch):
    trained.save_model()
    answers = []

    def ask(question, default):
        answers.append(question)
        return "cc0-1.0"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("rich.prompt.Prompt.ask", ask)
    for _ in range(2):
        main(["push", trained.args.output_dir, REPO])
        assert _card(hub).data.license == "cc0-1.0"
    assert len(answers) == 1  # the card on the Hub has it now


# ---- From disk ----
def test_run_on_disk_gives_the_same_dataset(hub, make_trainer, train_dataset):
    trainer = make_trainer(save_strategy="steps", save_steps=4, max_steps=8)
    trainer.train()
    output_dir = trainer.args.output_dir
    assert curate_run(output_dir, 0.5).to_list() == trainer.curate(0.5).to_list()  # interrupted: its last checkpoint
    assert len(curate_run(f"{output_dir}/checkpoint-4")) == 24
    trainer.save_model()
    assert curate_run(output_dir).to_list() == trainer.curate().to_list()
    with pytest.raises(FileNotFoundError, match="run-elsewhere does not exist"):
        curate_run(output_dir + "-elsewhere")


def test_files_of_different_runs_are_not_mixed(make_trainer, train_dataset, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    refine = {"refine_ratio": 0.5, "refine_start_step": 0, "refine_max_new_tokens": 4, "refine_discard_flawed": False}
    first = make_trainer(**options, **refine)
    first.train()
    first.save_model()
    assert curate_run(first.args.output_dir).to_list() == first.curate().to_list()
    assert not all(first.curate()["scored"])  # rows whose new answer was not visited
    second = make_trainer(**options)
    second.train()
    second.save_model()
    assert curate_run(second.args.output_dir).to_list() == second.curate().to_list()  # no answers of the first
    other = make_trainer(train_dataset=train_dataset.shuffle(seed=1), max_steps=2)
    other._save_records(str(tmp_path / "other"))  # its rows are in the folder now, but no scores of it
    with pytest.raises(ValueError, match="different runs"):
        curate_run(second.args.output_dir)


def test_newest_complete_scores_count(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=6)
    trainer.train()
    output_dir = Path(trainer.args.output_dir)
    (output_dir / "checkpoint-6" / "_row_scores.pq").unlink()  # killed before it was complete
    expected = curate_run(output_dir / "checkpoint-4").to_list()
    assert curate_run(output_dir).to_list() == expected
    trainer.save_model()
    assert curate_run(output_dir).to_list() == trainer.curate().to_list()


def test_config_copies_keep_their_token_and_paths(make_config, tmp_path):
    address = "http://user:password@10.0.0.5:8000"
    config = make_config(hub_token="hf_write")
    config.vllm_server_base_url = address
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (copied.hub_token, copied.output_dir) == ("hf_write", str(tmp_path / "run"))
        assert copied.vllm_server_base_url == address
    with config.published():
        published = pickle.loads(pickle.dumps(config))
    assert (published.hub_token, published.output_dir, published.vllm_server_base_url) == (None, "run", None)


def test_rows_are_not_written_where_that_is_not_wanted(make_trainer):
    trainer = make_trainer(save_training_rows=False)
    trainer.train()
    trainer.save_model()
    with pytest.raises(FileNotFoundError, match="save_training_rows=False"):
        curate_run(trainer.args.output_dir)


# ---- Faults ----
@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(hub, trained, status):
    hub.fail("POST", "/commit/", status, times=2)
    hub.fail("POST", "/repos/create", status, times=1)
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(_load()) == 12


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", REPO, r"\(401\).*hf auth login"),
        ("hf_read", REPO, r"\(403\).*may not write to me"),
        ("hf_write", "nobody/rows", r"\(403\).*may not write to nobody"),
        ("hf_write", "ghost/rows", r"\(404\).*ghost does not exist"),
    ],
)
def test_missing_permissions_are_named(hub, trained, token, repo_id, message):
    with pytest.raises(PublishError, match=message) as error:
        trained.push_curated_dataset(repo_id, token=token)
    assert f"trl-bilevel push {trained.args.output_dir} {repo_id}" in str(error.value)
    assert token not in str(error.value)


def test_token_of_the_run_is_used(hub, make_trainer):
    trainer = make_trainer(hub_token="hf_read", max_steps=1)  # the environment's may write
    trainer.train()
    with pytest.raises(PublishError, match=r"\(403\).*may not write to me"):
        trainer.push_curated_dataset(REPO)
    trainer.push_curated_dataset(REPO, token="hf_write")
    assert hub.repo("dataset", REPO).history()


def test_failures_that_last_leave_the_run_on_disk(hub, trained, caplog):
    hub.fail("POST", "/repos/create", 500, times=100)
    with pytest.raises(PublishError, match=r"\(500\): the Hub has failed") as error:
        trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert f"`trl-bilevel push {trained.args.output_dir} {REPO} --keep_ratio 0.5`" in str(error.value)
    assert curate_run(trained.args.output_dir, 0.5).to_list() == trained.curate(0.5).to_list()
    assert any(record.levelno == logging.WARNING and "again in" in record.message for record in caplog.records)


@pytest.mark.parametrize(("method", "path"), [("POST", "/commit/"), ("PUT", "/lfs-upload/")])
def test_upload_cut_in_the_middle_leaves_the_old_revision_whole(hub, make_trainer, monkeypatch, method, path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts of the client
    rows = Dataset.from_list([{**row, "prompt": row["prompt"] + "x" * 300} for row in prompt_completion_rows(24)])
    trainer = make_trainer(train_dataset=rows, max_steps=1)
    trainer.train()
    trainer.push_curated_dataset(REPO, keep_ratio=0.25)
    before = _load().to_list()
    hub.fail(method, path, times=100, cut_after=100)
    with pytest.raises(PublishError, match="cannot be reached"):
        trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    hub.faults.clear()
    assert _load(download_mode="force_redownload").to_list() == before
    trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(_load()) == 12


def test_commit_whose_answer_was_lost_is_not_made_twice(hub, trained):
    trained.push_curated_dataset(REPO, keep_ratio=0.25)
    hub.fail("POST", "/commit/", 502, is_done=True)
    commit = trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(_load()) == 12
    assert [commit.oid] == [hub.repo("dataset", REPO).resolve("main").sha]
    assert len(hub.repo("dataset", REPO).history()) == 2


def test_card_changed_during_the_upload_is_kept(hub, trained, monkeypatch):
    trained.push_curated_dataset(REPO, keep_ratio=0.25, license="cc-by-4.0")
    trained._run_facts["training"]["license"] = "cc-by-4.0"  # of the source: what a hand has written counts more
    create_commit, edits = HfApi.create_commit, []

    def edited_meanwhile(api, *args, **options):
        if not edits:
            edits.append("Thanks!")
            text = _card(hub).content.replace("license: cc-by-4.0", "license: mit") + "\nThanks!\n"
            edit = [CommitOperationAdd("README.md", text.encode())]
            create_commit(api, REPO, edit, repo_type="dataset", commit_message="edit")
        return create_commit(api, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", edited_meanwhile)
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert _card(hub).text.rstrip().endswith("Thanks!")
    assert _card(hub).data.license == "mit"
    assert len(_load()) == 12


def test_card_that_the_hub_refuses_is_explained(hub, trained):
    with pytest.raises(PublishError, match=r'its card is refused \("license" is Not A License\)') as error:
        trained.push_curated_dataset(REPO, license="Not A License")
    assert f"`trl-bilevel push {trained.args.output_dir} {REPO} --license 'Not A License'`" in str(error.value)
    assert hub.files("dataset", REPO) == {}


@pytest.mark.parametrize("status", [409, 412])
def test_repository_that_changed_meanwhile_is_not_overwritten(hub, trained, status):
    trained.push_curated_dataset(REPO, keep_ratio=0.25)
    hub.fail("POST", "/commit/", status, times=10)
    with pytest.raises(PublishError, match=rf"\({status}\).*changed meanwhile. Push again"):
        trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(_load()) == 6
    hub.faults.clear()
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(_load(download_mode="force_redownload")) == 12


def test_pull_request_is_pushed_to(hub, trained):
    repo = hub.create("dataset", REPO)
    repo.branches["refs/pr/1"] = repo.branches["main"]
    trained.push_curated_dataset(REPO, keep_ratio=0.5, revision="refs/pr/1")
    (commit,) = hub.repo("dataset", REPO).history()
    assert commit.message == "Curated dataset: 12 of 24 rows"
    assert "data_selector.parquet" in hub.files("dataset", REPO, "refs/pr/1")
    assert hub.files("dataset", REPO) == {}
    with pytest.raises(PublishError, match=r"\(404\)"):
        trained.push_curated_dataset(REPO, revision="refs/pr/2")


def test_what_the_hub_says_is_said(hub, trained):
    hub.fail("POST", "/commit/", 403, times=10, **{"X-Error-Message": "Private storage limit reached"})
    with pytest.raises(PublishError, match=r"\(403\).*may not write.*\(the Hub says: Private storage limit reached"):
        trained.push_curated_dataset(REPO)
    hub.faults.clear()
    hub.fail("POST", "/commit/", 402, times=10, **{"X-Error-Message": "Payment required for this"})
    with pytest.raises(PublishError, match=r"\(402\): the Hub refuses it: Payment required for this"):
        trained.push_curated_dataset(REPO)


def test_page_of_a_broken_server_is_no_traceback(hub, trained):
    page = b"<html>502 Bad Gateway</html>"
    hub.fail("POST", "/validate-yaml", 502, times=2, page=page)
    trained.push_curated_dataset(REPO, keep_ratio=0.5)
    assert len(_load()) == 12
    hub.fail("POST", "/validate-yaml", 502, times=100, page=page)
    with pytest.raises(PublishError, match=r"the Hub has failed\. Push again in a while") as error:
        trained.push_curated_dataset(REPO, keep_ratio=0.25)
    assert f"`trl-bilevel push {trained.args.output_dir} {REPO} --keep_ratio 0.25`" in str(error.value)


def test_offline_mode_is_named(hub, trained, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match=r"offline mode is on\. Unset `HF_HUB_OFFLINE`") as error:
        trained.push_curated_dataset(REPO)
    assert f"`trl-bilevel push {trained.args.output_dir} {REPO}`" in str(error.value)
    assert hub.requests == []


def test_model_that_the_hub_refuses_is_on_disk(hub, make_trainer):
    with pytest.raises(PublishError, match=r"\(403\).*may not write to nobody"):  # before training
        make_trainer(push_to_hub=True, hub_model_id="nobody/model")
    trainer = make_trainer(push_to_hub=True, hub_model_id="me/model", max_steps=1)
    trainer.train()
    hub.fail("POST", "/commit/", 500, times=100)
    with pytest.raises(PublishError, match=r"\(500\): the Hub has failed") as error:
        trainer.push_to_hub()
    hub.faults.clear()
    (command,) = re.findall(r"`(hf upload .*?)`", str(error.value))
    program = str(Path(sys.executable).with_name("hf"))
    result = subprocess.run([program, *shlex.split(command)[1:]], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= hub.files("model", "me/model").keys()


def test_full_disk_is_named(hub, trained, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trl_bilevel.hub.write_parquet", full)
    with pytest.raises(PublishError, match=r"No space left on device.*TMPDIR"):
        trained.push_curated_dataset(REPO)
    assert hub.files("dataset", REPO) == {}


def test_bad_arguments_are_refused_before_the_network(hub, trained):
    with pytest.raises(ValueError, match="keep_ratio"):
        trained.push_curated_dataset(REPO, keep_ratio=1.5)
    with pytest.raises(ValueError, match="cannot be a repository's name"):
        trained.push_curated_dataset("../../etc/passwd")
    assert hub.requests == []
