"""A dataset screened by one forward pass: formats, batches, resuming, streams, errors, the command."""

import html
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, left_padding_collator, prompt_completion_rows
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from trl_bilevel import DataSelector, dataset_card, screen_dataset
from trl_bilevel.cli import main
from trl_bilevel.run_records import curate_run, read_facts
from trl_bilevel.screening.answer_statistics import STATISTICS
from trl_bilevel.screening.row_screener import RowScreener, batches_by_length
from trl_bilevel.screening.screen import SCREEN_COLUMNS, preparing_trainer
from trl_bilevel.scripts.screen import make_parser


@pytest.fixture
def rows():
    """Thirty rows like the trusted ones; the last three answers are of one word, over and over."""
    rows = prompt_completion_rows(30).to_list()
    for row in rows[-3:]:
        row["completion"] = " qqqq" * 12
    return Dataset.from_list([{**row, "note": f"row {number} é"} for number, row in enumerate(rows)])


@pytest.fixture
def trusted():
    return prompt_completion_rows(40, offset=1000)


@pytest.fixture
def options(tmp_path):
    return SFTConfig(
        str(tmp_path / "options"), bf16=False, use_cpu=True, activation_checkpointing=False, report_to="none"
    )


@pytest.fixture
def screen(build_model, tokenizer, options):
    def run(rows, trusted, model=None, args=None, **more):
        return screen_dataset(
            build_model() if model is None else model,
            rows,
            trusted,
            args or options,
            processing_class=tokenizer,
            **more,
        )

    return run


def _as_messages(rows):
    return [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in rows
    ]


def test_rows_come_back_unchanged_with_their_scores(screen, rows, trusted):
    screening = screen(rows, trusted)
    scored = screening.scored
    assert scored.column_names == [*rows.column_names, "sample_id", *SCREEN_COLUMNS]
    assert scored.select_columns(rows.column_names).to_list() == rows.to_list()
    assert sorted(scored["rank"]) == list(range(1, 31))
    assert min(scored["rank"][27:]) > 20  # of 30; a model of random weights sees little else in them
    assert "same answer as row 28" in scored[27]["screen_reason"]
    assert "same answer as row 27" in scored[29]["screen_reason"]
    order = np.argsort(scored["rank"])
    assert (np.diff(np.array(scored["score"])[order]) >= 0).all()
    assert (np.diff(np.array(scored["good_probability"])[order]) <= 1e-12).all()
    assert screening.num_trusted == 40
    assert "40 trusted ones" in screening.summary()


def test_statistics_are_those_of_a_plain_forward_pass(screen, rows, trusted, build_model, tokenizer):
    scored = screen(rows, trusted).scored
    model = build_model().eval()
    for row in scored.select([0, 7, 29]):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)  # (L-1, V)
        nll = -log_p.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)[len(prompt) - 1 :]
        assert row["loss"] == pytest.approx(nll.mean().item(), abs=1e-5)
        assert row["loss_std"] == pytest.approx(nll.std(correction=0).item(), abs=1e-5)
        assert row["surprise"] == pytest.approx((nll - entropy).mean().item(), abs=1e-5)
        assert row["end_loss"] == pytest.approx(nll[-1].item(), abs=1e-5)
        assert row["begin_loss"] == pytest.approx(nll[:4].mean().item(), abs=1e-5)
        assert row["num_tokens"] == len(nll)


def test_conversations_count_their_answers_only(screen, rows, trusted):
    """Whether the prompt stands in a column of its own or not, and whatever a training loss would cover."""
    columns = {}
    for name, make in (
        ("messages", lambda of: {"messages": _as_messages(of)}),
        (
            "prompt",
            lambda of: {"prompt": [m[:1] for m in _as_messages(of)], "completion": [m[1:] for m in _as_messages(of)]},
        ),
    ):
        scored = screen(Dataset.from_dict(make(rows)), Dataset.from_dict(make(trusted))).scored
        columns[name] = {key: np.array(scored[key]) for key in ("score", *STATISTICS)}
    for key, values in columns["messages"].items():
        assert values == pytest.approx(columns["prompt"][key], abs=1e-5, nan_ok=True), key


def test_batches_and_padding_change_nothing(screen, rows, trusted, build_model, tokenizer, options):
    whole = screen(rows, trusted).scored
    alone = screen(rows, trusted, tokens_per_batch=1, chunk_size=7).scored
    trainer = preparing_trainer(build_model(), trusted, options, tokenizer, None, "unused")
    trainer.data_collator = left_padding_collator(tokenizer.pad_token_id)
    left = RowScreener(trainer, 4096).statistics(rows)
    for name in STATISTICS:
        assert np.array(alone[name]) == pytest.approx(np.array(whole[name]), abs=1e-4)
        assert getattr(left, name) == pytest.approx(np.array(whole[name]), abs=1e-4)


@pytest.mark.parametrize("lengths", [[3], [9, 1, 1, 1], [5, 5, 5, 5, 5]])
def test_batches_hold_every_row_once_and_no_more_tokens_than_asked(lengths):
    lengths = np.array(lengths)
    batches = batches_by_length(lengths, 10)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 10


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_families(screen, rows, trusted, tokenizer, family):
    scored = screen(rows, trusted, model=build_tiny_model(family, tokenizer)).scored
    assert np.isfinite(scored["score"]).all()


def test_an_adapter_and_its_absence_differ(screen, rows, trusted, build_model):
    model = get_peft_model(build_model(), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    assert np.array(screen(rows, trusted, model=model).scored["loss"]) != pytest.approx(
        np.array(screen(rows, trusted).scored["loss"]), abs=1e-4
    )


def test_a_screen_goes_on_where_it_was_stopped(screen, rows, trusted, tmp_path, monkeypatch):
    whole = screen(rows, trusted, chunk_size=8)
    score, screened = RowScreener.score, []

    def stop_at_the_third(self, chunk):
        if len(screened) == 2:
            raise KeyboardInterrupt
        screened.append(len(chunk))
        return score(self, chunk)

    monkeypatch.setattr(RowScreener, "score", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        screen(rows, trusted, chunk_size=8, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "scored").exists()

    def count(self, chunk):
        screened.append(len(chunk))
        return score(self, chunk)

    monkeypatch.setattr(RowScreener, "score", count)
    resumed = screen(rows, trusted, chunk_size=8, output_dir=tmp_path / "out")
    assert screened == [8, 8, 8, 6]
    assert resumed.scored.to_list() == whole.scored.to_list()
    assert resumed.noise_rate == whole.noise_rate
    written = load_dataset("parquet", data_files=str(tmp_path / "out" / "scored" / "train.parquet"), split="train")
    assert written.to_list() == whole.scored.to_list()
    summary = json.loads((tmp_path / "out" / "screening.json").read_text())
    assert summary["noise_rate"] == whole.noise_rate._asdict()
    assert summary["summary"] == whole.summary()


def test_another_model_does_not_go_on_there(screen, rows, trusted, tmp_path, build_model):
    screen(rows, trusted, output_dir=tmp_path / "out")
    other = build_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        screen(rows, trusted, model=other, output_dir=tmp_path / "out")


def test_a_stream_is_screened_as_its_rows_are(screen, rows, trusted, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rows.to_list()))
    streamed = screen(stream, trusted, output_dir=tmp_path / "out", chunk_size=8)
    assert streamed.scored.to_list() == screen(rows, trusted, chunk_size=8).scored.to_list()
    with pytest.raises(ValueError, match="give `output_dir`"):
        screen(stream, trusted)


def test_rows_without_an_answer_rank_last(screen, trusted, options):
    rows = prompt_completion_rows(20).to_list()
    rows[4]["prompt"] = "a prompt that is longer than all " * 4
    options.max_length = 60
    scored = screen(Dataset.from_list(rows), trusted, args=options).scored
    assert scored[4]["rank"] == 20
    assert not scored[4]["kept"]
    assert np.isnan(scored[4]["score"])
    assert scored[4]["screen_reason"] == "no answer left after truncation"
    assert np.isfinite([row["score"] for row in scored if row["rank"] < 20]).all()


def test_curation_keeps_what_it_says(screen, rows, trusted):
    screening = screen(rows, trusted)
    assert screening.curate(0.5)["rank"] == [rank for rank in screening.scored["rank"] if rank <= 15]
    assert screening.curate(None).num_rows == 30
    assert all(screening.curate()["kept"])
    assert screening.curate().num_rows == sum(screening.scored["kept"])
    with pytest.raises(ValueError, match="must be 'auto', or larger than 0 and at most 1, got best"):
        screening.curate("best")
    with pytest.raises(ValueError, match="larger than 0 and at most 1, got 70"):
        screening.curate(70)


def test_rows_like_the_trusted_ones_are_said_to_be_no_ranking(screen, trusted):
    screening = screen(prompt_completion_rows(40, offset=1040), trusted)
    assert not screening.is_informative
    assert 0.2 < screening.control_auroc < 0.75  # of random weights: chance, from 40 pairs
    assert "cannot be told from noise by this model" in screening.summary()
    assert screening.curate().num_rows == 40


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trusted": prompt_completion_rows(9)}, ValueError, "9 rows, too few.*at least 10"),
        ({"trusted": "trusted.jsonl"}, TypeError, "must be a `datasets.Dataset`, got str"),
        ({"rows": Dataset.from_list([])}, ValueError, "`train_dataset` is empty"),
        (
            {"rows": Dataset.from_list([{"text": "a b"}])},
            ValueError,
            r"\['text'\] and `validation_dataset` from \['pr",
        ),
        ({"rows": Dataset.from_list([{"question": "a", "answer": "b"}])}, ValueError, "rename_column"),
        (
            {"rows": Dataset.from_list([{"prompt": "a", "completion": "b", "score": 1.0}])},
            ValueError,
            r"already has the columns \['score'\]",
        ),
        ({"trusted": Dataset.from_list([{"prompt": "a", "completion": None}] * 12)}, ValueError, "12 of 12 rows"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(change, error, message, rows, trusted):
    arguments = {"rows": rows, "trusted": trusted, **change}
    with pytest.raises(error, match=message):
        screen_dataset("no such model", arguments["rows"], arguments["trusted"])


COMMAND = [
    "screen",
    "--model_name_or_path",
    "model",
    "--dataset_name",
    "mixture.jsonl",
    "--validation_dataset_name",
    "trusted.jsonl",
]


def _write_inputs(folder, model, tokenizer, rows, trusted):
    """What [`COMMAND`] reads."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows.to_json(folder / "mixture.jsonl")
    trusted.to_json(folder / "trusted.jsonl")


def test_the_command_screens_and_curates(build_model, tokenizer, rows, trusted, tmp_path, capsys, monkeypatch):
    _write_inputs(tmp_path, build_model(), tokenizer, rows, trusted)
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--output_dir", "out", "--use_cpu", "--keep_ratio", "0.8"]) == 0
    printed = capsys.readouterr().out
    assert "30 rows screened against 40 trusted ones." in printed
    assert "The rows that rank last" in printed
    curated = load_dataset("out/curated", split="train")
    assert curated.num_rows == 24
    assert (
        curated.select_columns(rows.column_names).to_list()
        == rows.select(range(30)).filter(lambda row: row["note"] in set(curated["note"])).to_list()
    )
    for wrong, message in (
        (["--keep_ratio", "most"], "must be 'auto', or larger than 0"),
        (["--keep_ratio", "70"], "at most 1, got 70"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*COMMAND, "--output_dir", "out", *wrong])
    with pytest.raises(SystemExit, match="--output_dir` is missing"):
        main(COMMAND)


@pytest.fixture
def screened(build_model, tokenizer, tmp_path, monkeypatch):
    """A folder of a screen in which a third of the rows is unlike the trusted ones."""
    rows = prompt_completion_rows(30).to_list()
    for number, row in enumerate(rows[-10:]):
        row["completion"] = " qqqq" * (14 + number)
    rows = Dataset.from_list([{**row, "kind": f"k{place >= 20}"} for place, row in enumerate(rows)])
    trusted = prompt_completion_rows(60, offset=1000)
    _write_inputs(tmp_path, build_model(), tokenizer, rows, trusted)
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--output_dir", "screened", "--use_cpu"]) == 0
    return load_dataset("parquet", data_files="screened/scored/train.parquet", split="train")


def test_a_screened_folder_is_curated_reported_and_pushed_as_a_run(screened, hub, capsys):
    dropped = np.flatnonzero(~np.array(screened["kept"]))
    assert len(dropped) >= 5
    assert main(["curate", "screened", "--output_dir", "cut"]) == 0
    assert "cannot be told from noise by this model" not in capsys.readouterr().err
    cut = load_dataset("cut", split="train")
    assert cut["sample_id"] == np.setdiff1d(np.arange(30), dropped).tolist()
    assert np.array(curate_run("screened")["weight"]).mean() == pytest.approx(1)

    assert main(["report", "screened", "--output", "report.html", "--source_column", "kind"]) == 0
    page = Path("report.html").read_text()
    assert f"drops {len(dropped)} rows" in page
    assert "Learning curves" not in page
    worst = int(np.argmax(screened["rank"]))
    assert html.escape(screened[worst]["screen_reason"]) in page

    assert main(["push", "screened", "me/screened", "--license", "mit"]) == 0
    pushed = load_dataset("me/screened", "curated", split="train")
    assert pushed["sample_id"] == cut["sample_id"]
    assert pushed["good_probability"] == pytest.approx(cut["good_probability"])
    card = hub.files("dataset", "me/screened")["README.md"].decode()
    assert "read every row once, before it was trained on any" in card
    assert "trl-bilevel screen \\" in card
    facts = {**read_facts("screened"), "other_models": ["me/other"], "model_options": {"load_in_4bit": True}}
    words = shlex.split(dataset_card._command(facts).replace("\\\n", " "))
    (parsed,) = make_parser().parse_args_and_config(words)
    assert parsed.model_name_or_path == ["MODEL", "me/other"]
    assert parsed.load_in_4bit
    assert "learns a weight" not in card
    selector = DataSelector.from_pretrained("me/screened")
    assert selector.activation == "sigmoid"
    assert selector.num_rows == 30


def test_two_models_one_of_them_in_four_bits_with_an_adapter(screened, build_model, tokenizer, capsys):
    torch.manual_seed(1)
    adapted = get_peft_model(build_model(), LoraConfig(init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "model"
    adapted.save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    rest = "--dataset_name mixture.jsonl --validation_dataset_name trusted.jsonl --use_cpu --load_in_4bit"
    command = ["screen", "--model_name_or_path", "model", "adapter", *rest.split(), "--output_dir", "both"]
    assert main(command) == 0
    both = load_dataset("parquet", data_files="both/scored/train.parquet", split="train")
    assert both.num_rows == 30
    assert np.array(both["score"]) != pytest.approx(np.array(screened["score"]), abs=0.1)
    assert np.array(both["rank"])[20:].min() > 15
    # The first one's, quantized
    assert np.array(both["loss"]) == pytest.approx(np.array(screened["loss"]), abs=0.3)
    assert "60 trusted ones" in capsys.readouterr().out
