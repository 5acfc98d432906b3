"""The report of a run: its numbers are those of `curate`, and nothing in it comes from elsewhere or runs."""

import base64
import itertools
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, DataSelector
from trl_bilevel.cli import main
from trl_bilevel.report import build_report
from trl_bilevel.report_rows import cell_fields, plain_text
from trl_bilevel.run_records import curate_run
from trl_bilevel.training_log import read_log
from trl_bilevel.weight_history import BIN_EDGES, WeightHistory


HOSTILE = (
    "</td></table><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "[link](javascript:alert(3)) **bold** `code` | cell",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; \" ' onload=alert(4)",
    "\x00\x07\x1b[31m \u202eright to left\u202c \ufeff",
    "http://evil.example/track.png",
    "x" * 2**20,
    "family: \U0001f468\u200d\U0001f469\u200d\U0001f467",
)
SOURCES = ("web", "books<script>", "<img src=x onerror=alert(5)>")


def _hostile_rows():
    rows = prompt_completion_rows(24).to_list()
    for number, row in enumerate(rows):
        row["source"] = SOURCES[number % 3]
        row["<script>note</script>"] = HOSTILE[number % len(HOSTILE)]
    return Dataset.from_list(rows)


def _train(folder, model, tokenizer, rows, resume=None, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
    }
    trainer = BilevelSFTTrainer(
        model,
        BilevelSFTConfig(str(folder), **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=prompt_completion_rows(4, offset=2000),
        validation_dataset=prompt_completion_rows(10, offset=1000),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


@pytest.fixture(scope="session")
def bds_run(tmp_path_factory, build_model, tokenizer):
    """A finished run with one weight per source, and rows that would like to be more than text."""
    folder = tmp_path_factory.mktemp("report") / "run <b>one"
    _train(folder, build_model(), tokenizer, _hostile_rows(), value_function="adapter", source_column="source")
    return folder


@pytest.fixture(scope="session")
def bmo_run(tmp_path_factory, build_model, tokenizer):
    """A finished run in which answers were refined."""
    folder = tmp_path_factory.mktemp("report") / "bmo"
    options = {"refine_ratio": 0.5, "refine_mode": "random", "refine_start_step": 1, "refine_every_steps": 2}
    options |= {"refine_max_new_tokens": 5, "refine_discard_flawed": False}
    _train(folder, build_model(), tokenizer, prompt_completion_rows(24), selection_method="bmo", **options)
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the cells of tables as text, by the id of what they are in."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.cells = [], [], {}
        self._within, self._open = None, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self._within = attributes.get("id", self._within)
        if tag == "tr":
            self.cells.setdefault(self._within, []).append((attributes.get("data-sample-id"), []))
        elif tag == "td":
            self.cells[self._within][-1][1].append("")
            self._open.append(tag)
        elif tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open[-1:] == ["style"]:
            return
        self.text.append(data)
        if self._open[-1:] == ["td"]:
            self.cells[self._within][-1][1][-1] += data

    def rows(self, within):
        """Those of a table's body: id of the row, cells."""
        return [(sample_id, [cell.strip() for cell in cells]) for sample_id, cells in self.cells[within] if cells]

    def __contains__(self, text):
        return text in " ".join("".join(self.text).split())


def _check_lists(page, curated):
    """The best and worst ten of the page are those of the curated rows, which hold all rows."""
    by_rank = sorted(curated.to_list(), key=lambda row: row["rank"])
    worst_first = [row for row in by_rank[::-1] if row["scored"]]
    for within, expected in (("best", by_rank[:10]), ("worst", worst_first[:10])):
        found = page.rows(within)
        assert [sample_id for sample_id, _ in found] == [str(row["sample_id"]) for row in expected]
        assert [cells[:2] for _, cells in found] == [[str(row["rank"]), f"{row['weight']:.4g}"] for row in expected]
        for (_, cells), row in zip(found, expected, strict=True):
            assert row["prompt"] in cells[2]
            assert row["completion"] in cells[2]


# ---- Numbers ----
def test_numbers_are_those_of_curate(bds_run):
    page = Page(build_report(bds_run, keep_ratio=0.4))
    curated, kept = curate_run(bds_run), curate_run(bds_run, keep_ratio=0.4)
    _check_lists(page, curated)
    all_rows, *by_source = (cells[:7] for _, cells in page.rows("counts"))
    assert all_rows == ["all rows", "24", "10", "14", "0", str(24 - sum(curated["scored"])), "1"]
    num_kept, weights = Counter(kept["source"]), {}
    for row in curated:
        weights.setdefault(row["source"], []).append(row["weight"])
    expected = [
        [source, "8", str(num_kept[source]), str(8 - num_kept[source]), "0", "0", f"{np.mean(weights[source]):.4g}"]
        for source in sorted(weights, key=lambda source: -np.mean(weights[source]))
    ]
    assert by_source == expected
    assert "Finished: step 6 of 6." in page
    assert "trl-bilevel curate --keep_ratio 0.4" in page
    tokens = read_log(bds_run).last("num_tokens")
    cost = dict(cells for _, cells in page.rows("cost"))
    assert cost["optimizer steps"] == "6 of 6"
    assert cost["tokens read by the model"] == f"{tokens:,.0f}"
    seconds = WeightHistory.load(bds_run).seconds
    assert cost["time"] == f"{seconds[-1]:.1f} s"
    assert 'source_column = "source"' in page
    assert "use_peft = true" in page
    assert "lora_r = " in page
    by_rank = [str(row["sample_id"]) for row in sorted(curated.to_list(), key=lambda row: row["rank"])]
    assert [row for row, _ in page.rows("last_kept")] == by_rank[5:10]
    assert [row for row, _ in page.rows("first_dropped")] == by_rank[10:15]
    assert f"torch {torch.__version__.partition('+')[0]}" in page


def test_costs_of_a_resumed_run_are_those_of_all_its_parts(make_trainer, tmp_path):
    """Also of what was logged neither before the checkpoint nor after it."""
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    unbroken = make_trainer(**options)
    unbroken.train()
    unbroken.save_model()
    resumed = make_trainer(**options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(Path(unbroken.args.output_dir) / "checkpoint-3"))
    resumed.save_model()
    logs = [trainer.state.log_history for trainer in (unbroken, resumed)]
    tokens = [[entry["num_tokens"] for entry in log if "num_tokens" in entry] for log in logs]
    assert tokens[0] == tokens[1]
    batches = list(unbroken.get_train_dataloader())
    assert tokens[0][-1] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for folder in (unbroken.args.output_dir, resumed.args.output_dir):
        costs = dict(cells for _, cells in Page(build_report(folder)).rows("cost"))
        history = WeightHistory.load(folder)
        assert costs["tokens read by the model"] == f"{tokens[0][-1]:,.0f}"
        assert costs["tokens per second"] == f"{tokens[0][-1] / history.seconds[-1]:,.0f}"
        assert history.num_tokens[-1] == tokens[0][-1] > history.num_tokens[0] > tokens[0][0]
    resumed.train()  # from the start
    assert [entry["num_tokens"] for entry in resumed.state.log_history if "num_tokens" in entry] == tokens[0]


def test_time_is_that_of_training(make_trainer, monkeypatch):
    """A trainer that is saved hours after it trained took no hours."""
    now = [1000.0]
    monkeypatch.setattr("trl_bilevel.weight_history.time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer = make_trainer(max_steps=1)
    trainer.add_callback(_Meanwhile(now, 5.0))
    trainer.train()
    now[0] += 3600.0
    trainer.save_model()
    assert WeightHistory.load(trainer.args.output_dir).seconds.tolist() == [5.0]


class _Meanwhile(TrainerCallback):
    """Time that a step takes."""

    def __init__(self, now, seconds):
        self.now, self.seconds = now, seconds

    def on_step_end(self, *args, **kwargs):
        self.now[0] += self.seconds


@pytest.mark.parametrize("kind", ["nll", "dpo"])
def test_losses_have_their_units(make_trainer, kind):
    pairs = prompt_completion_rows(6, offset=1000).to_list()
    pairs = Dataset.from_list([{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"} for r in pairs])
    trainer = make_trainer(
        max_steps=1, validation_loss_type=kind, **({"validation_dataset": pairs} if kind == "dpo" else {})
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    page = Page(build_report(trainer.args.output_dir))
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    unit = "nats per pair" if kind == "dpo" else "nats per token"
    assert f"loss on the trusted rows, {unit}" in card
    assert "loss on the training rows, nats per token" in card
    assert "In nats per completion token" in page
    assert ("that of the trusted rows in nats per pair" in page) == (kind == "dpo")


def test_refined_answers_are_beside_the_originals(bmo_run):
    page = Page(build_report(bmo_run))
    curated = curate_run(bmo_run)
    _check_lists(page, curated)
    refined = sorted((r for r in curated if r["response_source"] == "refined"), key=lambda row: row["rank"])
    assert len(refined) >= 10
    assert "learned weights promise nothing" in page
    num_unscored = 24 - sum(curated["scored"])
    assert page.rows("counts")[0][1][1:6] == ["24", "24", "0", str(len(refined)), str(num_unscored)]
    for (sample_id, cells), row in zip(page.rows("refined"), refined[:10], strict=True):
        assert sample_id == str(row["sample_id"])
        assert plain_text(row["completion"])[0].strip() in cells[2]
        assert row["original_completion"].strip() in cells[3]
    assert sum("Importance ratios" in attributes.get("alt", "") for _, attributes in page.tags) == 1


def test_rows_whose_rank_changed_most(bmo_run):
    first, last = curate_run(bmo_run / "checkpoint-2"), curate_run(bmo_run)
    # ranks among the rows that had a score at the first checkpoint
    known = [row["sample_id"] for row in sorted(first.to_list(), key=lambda row: row["rank"]) if row["scored"]]
    assert 8 <= len(known) < 24
    now = [
        row["sample_id"] for row in sorted(last.to_list(), key=lambda row: row["rank"]) if row["sample_id"] in known
    ]
    changes = {row: abs(known.index(row) - now.index(row)) for row in known}
    found = Page(build_report(bmo_run)).rows("changed")
    assert found
    assert [changes[int(row)] for row, _ in found] == sorted(filter(None, changes.values()), reverse=True)[:10]
    for row, cells in found:
        assert cells[:2] == [str(known.index(int(row)) + 1), str(now.index(int(row)) + 1)]


@pytest.mark.parametrize("give", ["folder", "checkpoint"])
def test_a_running_job_has_checkpoints_only(bmo_run, tmp_path, give):
    for name in ("_training_rows", "checkpoint-2", "checkpoint-4"):
        shutil.copytree(bmo_run / name, tmp_path / name)
    run_dir = tmp_path / "checkpoint-4" if give == "checkpoint" else tmp_path
    page = Page(build_report(run_dir))
    _check_lists(page, curate_run(bmo_run / "checkpoint-4"))
    assert "Still running, or interrupted: step 4 of 6." in page
    assert dict(cells for _, cells in page.rows("cost"))["optimizer steps"] == "4 of 6"


def test_a_run_without_checkpoints_and_logs(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model()
    (Path(trainer.args.output_dir) / "_trainer_state.json").unlink()
    page = Page(build_report(trainer.args.output_dir))
    _check_lists(page, trainer.curate())
    assert "Not known: the run was saved once only." in page
    assert "The weights now; a run that is saved more often" in page
    assert "last_kept" not in page.cells
    assert "Nothing has been logged yet" in page


# ---- What is stored for it ----
def test_history_counts_the_weights(bds_run):
    history = WeightHistory.load(bds_run)
    assert history.steps.tolist() == [2, 4, 6]
    assert (np.diff(history.seconds) > 0).all()
    for number, folder in enumerate(("checkpoint-2", "checkpoint-4", "")):
        weights = np.array(curate_run(bds_run / folder)["weight"])
        counts = [int(((low <= np.log10(weights)) & (np.log10(weights) < high)).sum())
                  for low, high in itertools.pairwise(BIN_EDGES)]  # fmt: skip
        assert history.counts[number].tolist() == counts
        assert sum(counts) == 24
        ratio = weights.sum() ** 2 / (24 * (weights**2).sum())
        assert history.effective_sample_ratios[number] == pytest.approx(ratio)


def test_resumed_run_forgets_what_came_after_its_checkpoint(bmo_run, tmp_path, build_model, tokenizer):
    folder = tmp_path / "again"
    shutil.copytree(bmo_run, folder)
    options = {"refine_ratio": 0.5, "refine_mode": "random", "refine_start_step": 1, "refine_every_steps": 2}
    options |= {"refine_max_new_tokens": 5, "refine_discard_flawed": False, "selection_method": "bmo"}
    checkpoint = folder / "checkpoint-2"
    _train(folder, build_model(), tokenizer, prompt_completion_rows(24), str(checkpoint), **options)
    before, after, unbroken = (WeightHistory.load(path) for path in (checkpoint, folder, bmo_run))
    assert after.steps.tolist() == [2, 4, 6]
    np.testing.assert_array_equal(after.counts, unbroken.counts)
    np.testing.assert_array_equal(after.first_logits, unbroken.first_logits)
    assert after.seconds[0] == before.seconds[0] == unbroken.seconds[0] < after.seconds[1]
    assert not set(after.seconds[1:]) & set(unbroken.seconds[1:])  # written anew


def test_history_stays_small_and_keeps_its_first_and_newest():
    selector, history = DataSelector(num_rows=5), WeightHistory()
    selector.update(torch.tensor([1]), torch.tensor([2.0]))
    selector.update(torch.tensor([1, 2]), torch.tensor([2.0, 1.0]))
    first = selector.logits.tolist()
    for step in range(1, 1001):
        history.record(step, selector, 100 * step)
        selector.update(torch.tensor([1, 3]), torch.tensor([0.5, 0.0]))
        assert history.steps[-1] == step
        assert len(history.steps) == len(history.counts) == len(history.seconds) <= 200
    assert (np.diff(history.steps) > 0).all()
    assert history.first_step == 1
    np.testing.assert_array_equal(history.first_logits, [np.nan, first[1], first[2], np.nan, np.nan])
    history.record(500, selector, 50_000)  # the run went back
    assert history.steps[-1] == 500
    assert history.last_num_tokens == 50_000
    history.forget_after(400)
    assert history.steps[-1] <= 400


def test_best_model_takes_the_history_along(tmp_path, build_model, tokenizer):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = _train(tmp_path, build_model(), tokenizer, _hostile_rows(), eval_steps=2, **options)
    assert trainer.state.best_global_step == 2  # the best by a metric that training lowers
    history = WeightHistory.load(tmp_path)
    assert history.steps.tolist() == [2, 6]
    assert history.counts[0].tolist() == history.counts[1].tolist()


# ---- Safety ----
def test_rows_are_text_and_nothing_else(bds_run):
    source = build_report(bds_run, source_column="source")
    assert len(source) < 2**20
    page = Page(source)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "div", "b", "span", "img",
        "table", "thead", "tbody", "tr", "th", "td", "i", "section", "code", "ul", "li", "footer",
    }  # fmt: skip
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "id", "src", "alt", "style", "dir",
                     "data-sample-id"}  # fmt: skip
    text = "".join(page.text)
    shown = {value for value in HOSTILE if plain_text(value)[0] in text}
    assert shown == set(HOSTILE)  # of 24 rows, the best and worst ten show each of the eight
    assert "\x00" not in source
    assert "\x1b" not in source
    assert "\u202e" not in source
    assert "(the first 600 of 1,048,576 characters)" in page
    assert all(source in text for source in SOURCES)
    assert "run <b>one" in text


def test_answers_are_in_sight():
    """They are at the end, and a call of a tool has no text."""
    turns = [{"role": "user" if turn % 2 == 0 else "assistant", "content": f"turn {turn}"} for turn in range(20)]
    texts = [field.text for field in cell_fields("messages", turns)]
    assert texts == [*(f"turn {turn}" for turn in (0, 1, 2, 3)), "…", *(f"turn {turn}" for turn in (16, 17, 18, 19))]
    (tokens,) = cell_fields("input_ids", list(range(100)))
    assert tokens.text.split() == [*map(str, range(30)), "…", *map(str, range(70, 100))]
    assert tokens.note == "the first and the last 30 of 100 entries"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert "add" in cell_fields("messages", [call])[0].text
    assert [field.text for field in cell_fields("facts", [{"role": "user", "content": "Hi"}, None, "x"])] == [
        "Hi", "", "x",
    ]  # fmt: skip


def test_spaces_of_all_scripts_are_no_control_characters():
    text = "Bonjour\u202f! 3\u00a0000 \u3000\u6f22\u5b57"
    assert plain_text(text) == (text, "")


def test_the_page_needs_nothing_else(bds_run):
    source = build_report(bds_run)
    page = Page(source)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for image in images:
        start, _, encoded = image.partition(",")
        assert start == "data:image/svg+xml;base64"
        figure = base64.b64decode(encoded).decode()
        assert ElementTree.fromstring(figure).tag == "{http://www.w3.org/2000/svg}svg"
        linked = re.findall(r'(?:xlink:)?href="([^"]*)"', figure)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in linked)
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    without_rows = re.sub(r'<span class="text".*?</span>', "", source, flags=re.DOTALL)
    assert not re.search(r"https?:", re.sub(r"data:[^\"]*", "", without_rows))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_figures(bds_run, tmp_path):
    (tmp_path / "report.html").write_text(build_report(bds_run))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1200",
               f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}",
               (tmp_path / "report.html").as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape == (1200, 1000, 3)
    line_color = np.array([0xD1, 0x49, 0x5B]) / 255  # of a curve, and of nothing that is not in a figure
    assert (np.abs(pixels - line_color).max(axis=-1) < 0.02).sum() > 100


# ---- The command ----
def test_command_writes_the_page(bmo_run, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    main(["report", str(bmo_run), "--keep_ratio", "0.5", "--output", str(output)])
    assert output.read_text() == build_report(bmo_run, keep_ratio=0.5)
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    assert f"Report saved to {output}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        (["--keep_ratio", "1.5"], None, "`keep_ratio` must be 'auto', or larger than 0 and at most 1, got 1.5"),
        (["--source_column", "origin"], None, "`source_column='origin'` is not a column"),
        ([], "_run.json", r"_run\.json is damaged and cannot be read"),
        ([], "_trainer_state.json", r"_trainer_state\.json is damaged and cannot be read .*Delete"),
        ([], "_weight_history.safetensors", r"_weight_history\.safetensors is damaged and cannot be read .*Delete"),
        (["--run_dir", "nowhere"], None, "nowhere does not exist. Give the output folder"),
    ],
)
def test_errors_are_one_line_with_the_cure(bmo_run, tmp_path, options, damage, message):
    run = tmp_path / "run"
    shutil.copytree(bmo_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    if damage:
        (run / damage).write_bytes(b'{"half":')
    run_dir = [] if "--run_dir" in options else [str(run)]
    with pytest.raises(SystemExit, match=message) as error:
        main(["report", *run_dir, "--output", str(tmp_path / "page.html"), *options])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()
