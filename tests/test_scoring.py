"""Scores for unseen rows: against losses computed row by row; in chunks, resumed, streamed, by the command line."""

import io
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from trl_bilevel.amortized_selector import AmortizedSelector, load_amortized_selector
from trl_bilevel.cli import main
from trl_bilevel.run_settings import read_base_model
from trl_bilevel.scoring import RowScorer
from trl_bilevel.value_function import load_value_function


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def make_lora_trainer(make_trainer):
    return lambda **options: make_trainer(**{"peft_config": LoraConfig(**LORA), "learning_rate": 3e-2, **options})


def _losses(trainer, rows):
    """Mean NLL of each completion, one row at a time, from plain logits."""
    losses = []
    tokenizer = trainer.processing_class
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            log_probs = trainer.model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(tokens[1:])[:, None]
        losses.append(-log_probs.gather(1, targets)[len(prompt) - 1 :].mean().item())
    return losses


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_score_is_the_excess_loss(make_lora_trainer, tokenizer, padding_side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    trainer = make_lora_trainer(value_function="adapter")
    trainer.train()
    unseen = prompt_completion_rows(11, offset=500)
    scored = trainer.score(unseen, batch_size=3)
    assert scored.column_names == ["prompt", "completion", "score", "loss", "value_loss"]
    assert scored["completion"] == unseen["completion"]
    assert trainer.model.training
    trainer.model.eval()
    losses = _losses(trainer, unseen)
    with trainer.value_function.active():
        value_losses = _losses(trainer, unseen)
    assert scored["loss"] == pytest.approx(losses, rel=1e-4)
    assert scored["value_loss"] == pytest.approx(value_losses, rel=1e-4)
    assert scored["score"] == pytest.approx([b - a for a, b in zip(losses, value_losses, strict=True)], abs=1e-4)


def test_without_value_function_it_is_the_negative_loss(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    unseen = prompt_completion_rows(5, offset=500)
    scored = trainer.score(unseen)
    trainer.model.eval()
    assert scored["score"] == pytest.approx([-loss for loss in _losses(trainer, unseen)], rel=1e-4)


def test_rows_without_completion_tokens_have_no_score(make_trainer):
    trainer = make_trainer(max_length=30, max_steps=1)
    rows = [
        *prompt_completion_rows(2, 500),
        {"prompt": "x y z " * 40, "completion": " 1"},
        *prompt_completion_rows(1, 9),
    ]
    scored = trainer.score(Dataset.from_list(rows), batch_size=2)["score"]
    assert [score != score for score in scored] == [False, False, True, False]  # NaN differs from itself


def test_interrupted_scoring_goes_on(make_trainer, tmp_path, monkeypatch):
    """The third chunk fails; the second call scores the last three chunks only, and a changed model is refused."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    unseen = prompt_completion_rows(23, offset=500).add_column("ünïcode", ["é"] * 23)
    expected = trainer.score(unseen)["score"]
    batches = []
    forward = trainer.model.forward

    def count(*args, **kwargs):
        batches.append(len(kwargs["input_ids"]))
        if len(batches) == 3 and not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            raise RuntimeError("power cut")
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", count)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.score(unseen, tmp_path / "scored", batch_size=5, chunk_size=5)
    assert len(list((tmp_path / "scored").glob("*.parquet"))) == 2
    batches.clear()
    scored = trainer.score(unseen, tmp_path / "scored", batch_size=5, chunk_size=5)
    assert batches == [5, 5, 3]
    assert scored["score"] == pytest.approx(expected, rel=1e-4)
    assert scored["prompt"] == unseen["prompt"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="scores with another chunk_size"):
        trainer.score(unseen, tmp_path / "scored", chunk_size=6)
    trainer.train()
    with pytest.raises(ValueError, match=r"scores with another .*rows"):
        trainer.score(unseen.select(range(1, 23)), tmp_path / "scored", chunk_size=5)
    with pytest.raises(ValueError, match="scores with another model"):
        trainer.score(unseen, tmp_path / "scored", chunk_size=5)


def test_only_what_changed_is_scored_again(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=1)
    rows = prompt_completion_rows(23, offset=500).to_list()
    scored = []
    score = RowScorer.score

    def count(self, chunk):
        scored.append(len(chunk))
        return score(self, chunk)

    monkeypatch.setattr(RowScorer, "score", count)

    def stream(num_rows):
        return IterableDataset.from_generator(lambda: iter(rows[:num_rows]))

    trainer.score(stream(12), tmp_path / "stream", chunk_size=5)
    assert scored == [5, 5, 2]
    grown = trainer.score(stream(23), tmp_path / "stream", chunk_size=5)  # by rows at its end
    assert scored[3:] == [5, 5, 3]
    assert grown["prompt"][:] == [row["prompt"] for row in rows]
    assert len(trainer.score(stream(7), tmp_path / "stream", chunk_size=5)) == 7
    assert len(list((tmp_path / "stream").glob("*.parquet"))) == 2
    scored.clear()
    trainer.score(Dataset.from_list(rows), tmp_path / "rows", chunk_size=5)
    corrected = [{**row, "completion": " 7"} if number == 8 else row for number, row in enumerate(rows)]
    again = trainer.score(Dataset.from_list(corrected), tmp_path / "rows", chunk_size=5)
    assert scored == [5, 5, 5, 5, 3, 5]
    assert again["completion"][8] == " 7"
    assert again["score"][:] == trainer.score(Dataset.from_list(corrected), chunk_size=5)["score"][:]


def test_parts_of_another_run_in_the_folder_are_gone(make_trainer, make_lora_trainer):
    trainer = make_lora_trainer(amortized_selector=True, max_steps=1, save_steps=1)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    names = ("_value_function.safetensors", "amortized_selector.safetensors")
    trainer.save_model()
    assert [name for name in names if (folder / name).is_file()] == [*names]
    plain = make_lora_trainer(value_function="none", max_steps=1, output_dir=str(folder))
    plain.save_model()
    assert not [name for name in names if (folder / name).exists()]
    assert load_value_function(folder, plain.model) is None
    assert load_amortized_selector(folder) is None


def test_rows_with_an_image_go_on(make_trainer, tmp_path, monkeypatch):
    """An image is an object at another address whenever it is read."""
    trainer = make_trainer(max_steps=1)
    rows = prompt_completion_rows(4, offset=500)
    pictures = [{"bytes": png, "path": None} for png in map(_png, range(4))]
    rows = rows.add_column("picture", pictures).cast_column("picture", Image())
    first = trainer.score(rows, tmp_path / "rows", chunk_size=2)["score"][:]
    monkeypatch.setattr(RowScorer, "score", None)  # nothing is left to score
    assert trainer.score(rows, tmp_path / "rows", chunk_size=2)["score"][:] == first


@pytest.mark.parametrize("select", [lambda rows: rows, lambda rows: rows.shuffle(seed=1)], ids=["as is", "shuffled"])
def test_scoring_leaves_no_copies_in_the_cache(make_trainer, tmp_path, select):
    prompt_completion_rows(12, offset=500).to_parquet(tmp_path / "rows.parquet")
    rows = select(Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")))
    trainer = make_trainer(max_steps=1)
    before = {*(tmp_path / "cache").rglob("*.arrow")}
    scored = trainer.score(rows, tmp_path / "scored", chunk_size=4)
    assert {*(tmp_path / "cache").rglob("*.arrow")} == before
    assert scored["prompt"] == rows["prompt"]


def _png(shade):
    buffer = io.BytesIO()
    PIL.Image.new("L", (2, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def test_stream_in_and_out(make_trainer, tmp_path):
    """Rows are pulled chunk by chunk, never all at once, and equal those of the dataset."""
    trainer = make_trainer(max_steps=1)
    unseen = prompt_completion_rows(12, offset=500)
    pulled = []

    def rows():
        for index, row in enumerate(unseen):
            pulled.append((index, len(list(tmp_path.glob("scored/*.parquet")))))
            yield row

    scored = trainer.score(IterableDataset.from_generator(rows), tmp_path / "scored", chunk_size=4)
    assert scored["score"] == pytest.approx(trainer.score(unseen)["score"], rel=1e-4)
    assert dict(pulled)[8] >= 1  # by the third chunk, the first was on the disk
    # a stream that lost its last chunk goes on from there
    (tmp_path / "scored" / "scored-000002.parquet").unlink()
    again = trainer.score(IterableDataset.from_generator(rows), tmp_path / "scored", chunk_size=4)
    assert again["score"] == scored["score"]


def test_columns_of_a_stream_are_those_of_its_first_chunk(make_trainer, tmp_path):
    """No features are declared: a key that the second chunk lacks is empty there, another type is an error."""
    trainer = make_trainer(max_steps=1)
    rows = [{**row, "note": 1} for row in prompt_completion_rows(4, offset=500)]
    rows[2].pop("note")
    scored = trainer.score(IterableDataset.from_generator(lambda: iter(rows)), tmp_path / "scored", chunk_size=2)
    assert scored["note"] == [1, 1, None, 1]
    rows[3]["note"] = "no number"
    with pytest.raises(ValueError, match="Rows 2 to 4 do not fit the columns of those before"):
        trainer.score(IterableDataset.from_generator(lambda: iter(rows)), tmp_path / "other", chunk_size=2)


def test_amortized_selector_learns_what_it_is_told():
    """What counts is the loss above 2 * the first feature, hidden difficulty: unseen rows must be ranked by it."""
    generator = torch.Generator().manual_seed(0)
    head = AmortizedSelector(hidden_size=32, seed=0)
    state = torch.get_rng_state()
    for _ in range(1000):
        pooled = torch.randn(16, 32, generator=generator)
        excess = torch.randn(16, generator=generator)
        losses = excess + 2 * pooled[:, 0]
        excess[3] = torch.nan  # left out
        head.update(pooled, losses, excess)
    assert torch.equal(state, torch.get_rng_state())
    pooled, excess = torch.randn(500, 32, generator=generator), torch.randn(500, generator=generator)
    losses = excess + 2 * pooled[:, 0]
    correlation = torch.corrcoef(torch.stack([head.score(pooled, losses), excess, losses]))
    assert correlation[0, 1] < -0.8
    assert correlation[2, 1] < 0.6  # the loss alone would not do


def test_update_of_the_head_follows_the_gradient_of_the_lower_level():
    """Finite differences of 1/B * sum_i sigma(s_i) (l_i - mean l) in the last bias, against one plain SGD step."""
    head = AmortizedSelector(hidden_size=4, seed=1)
    head._optimizer = torch.optim.SGD(head._head.parameters(), lr=1.0)
    pooled = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    losses = torch.tensor([1.0, 3.0, 0.5, 2.0, 2.5])
    means = torch.rand(5, generator=torch.Generator().manual_seed(1))
    scores, bias = head.score(pooled, means).double(), head._head.output.bias.item()

    def lower_level(shift):
        return (torch.sigmoid(scores + shift) * (losses - losses.mean()).double()).mean()

    slope = (lower_level(1e-6) - lower_level(-1e-6)) / 2e-6
    head.update(pooled, means, losses)
    assert bias - head._head.output.bias.item() == pytest.approx(slope.item(), abs=1e-6)


def test_trained_with_the_model_and_resumed(make_lora_trainer, tmp_path):
    options = {"amortized_selector": True, "max_steps": 8, "value_function": "adapter"}
    unbroken = make_lora_trainer(**options)
    unbroken.train()
    stopped = make_lora_trainer(**options, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "stopped"))
    stopped.train()
    resumed = make_lora_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    unseen = prompt_completion_rows(6, offset=500)
    scores = [trainer.score(unseen)["selector_score"] for trainer in (unbroken, resumed)]
    assert scores[0] == scores[1]
    untrained = make_lora_trainer(**options)
    assert untrained.score(unseen)["selector_score"] != scores[0]


def test_head_sees_the_hidden_states_of_the_training_forward(make_trainer, build_model, monkeypatch):
    """What it is updated with: the last hidden states of the completion tokens, averaged, of a fresh model."""
    trainer = make_trainer(amortized_selector=True, max_steps=1)
    seen = []
    monkeypatch.setattr(trainer.amortized_selector, "update", lambda *update: seen.append(update))
    trainer.train()
    (pooled, row_means, losses), model = seen[0], build_model()
    rows = {row["bilevel_sample_index"]: row for row in trainer.train_dataset}
    for position, index in enumerate(trainer._step_sample_indices.tolist()):
        tokens, labels = torch.tensor([rows[index]["input_ids"]]), torch.tensor(rows[index]["labels"])
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state[0]
        torch.testing.assert_close(pooled[position], hidden[labels != -100].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(row_means, losses)
    assert losses.shape == (4,)


def test_amortized_selector_learns_the_excess_loss(make_lora_trainer, monkeypatch):
    """With a value function, whose adapter begins as the model's: no loss is in excess at first."""
    trainer = make_lora_trainer(amortized_selector=True, value_function="adapter", max_steps=2)
    seen = []
    monkeypatch.setattr(trainer.amortized_selector, "update", lambda *update: seen.append(update))
    trainer.train()
    (_, row_means, losses), (_, later_means, later) = seen
    torch.testing.assert_close(losses, torch.zeros(4), rtol=0, atol=1e-5)
    assert row_means.min() > 1
    assert 0 < later.abs().max() < 1 < later_means.min()


def test_amortized_selector_of_a_model_with_a_narrow_head(make_trainer, tokenizer):
    """As `facebook/opt-350m`."""
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    trainer = make_trainer(model=OPTForCausalLM(config), amortized_selector=True, max_steps=2)
    trainer.train()
    assert np.isfinite(trainer.score(prompt_completion_rows(3))["selector_score"][:]).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_command_line(make_lora_trainer, build_model, tokenizer, tmp_path, capsys, streaming):
    build_model().save_pretrained(tmp_path / "base")
    trainer = make_lora_trainer(
        model=str(tmp_path / "base"), value_function="adapter", amortized_selector=True, max_length=60
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    unseen = prompt_completion_rows(9, offset=500)
    unseen.to_json(tmp_path / "corpus.jsonl")
    options = ["--dataset_name", str(tmp_path / "corpus.jsonl"), "--output_dir", str(tmp_path / "scored")]
    options += ["--chunk_size", "4", "--dataset_streaming", str(streaming)]
    assert main(["score", str(tmp_path / "run"), *options]) == 0
    assert "9 scored rows" in capsys.readouterr().out
    expected = trainer.score(unseen)
    files = sorted((tmp_path / "scored").glob("*.parquet"))
    assert [pq.read_table(file).num_rows for file in files] == [4, 4, 1]
    scored = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    for name in ("score", "loss", "value_loss", "selector_score"):
        assert scored[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`--run_dir` is missing"),
        (["--run_dir", "nowhere"], "`--dataset_name` is missing"),
    ],
)
def test_missing_options(options, message):
    with pytest.raises(SystemExit, match=message):
        main(["score", *options])


def test_base_model_is_of_the_revision_that_the_run_used(make_lora_trainer, build_model, tmp_path, monkeypatch):
    build_model().save_pretrained(tmp_path / "base")
    trainer = make_lora_trainer(model=str(tmp_path / "base"), max_steps=1)
    trainer.model.config._commit_hash = "3f" * 20  # as if it came from the Hub
    trainer.save_model(str(tmp_path / "run"))
    prompt_completion_rows(3).to_json(tmp_path / "corpus.jsonl")
    load, loaded = LlamaForCausalLM.from_pretrained, []  # the class of the run, which a text model's is not always

    def note(name, revision=None, trust_remote_code=False, **options):
        loaded.append((Path(name).name, revision, trust_remote_code))
        return load(name, **options)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", note)
    options = ["--dataset_name", str(tmp_path / "corpus.jsonl")]
    build_model().save_pretrained(tmp_path / "moved")
    for number, more in enumerate(([], ["--model_revision", "old"], ["--model_name_or_path", str(tmp_path / "moved"),
                                                                     "--trust_remote_code"])):  # fmt: skip
        command = ["score", str(tmp_path / "run"), *options, "--output_dir", str(tmp_path / str(number)), *more]
        assert main(command) == 0
    assert loaded == [("base", "3f" * 20, False), ("base", "old", False), ("moved", None, True)]


def test_base_model_on_disk_is_found_after_a_push(hub, make_lora_trainer, build_model, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    trainer = make_lora_trainer(
        model=str(tmp_path / "base"), max_steps=2, push_to_hub=True, hub_model_id="me/adapter", save_strategy="steps",
        save_steps=1, hub_strategy="checkpoint",
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    run = Path(trainer.args.output_dir)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert not [name for name in hub.files("model", "me/adapter") if "_base_model" in name]
    rows = prompt_completion_rows(3)
    rows.to_json(tmp_path / "corpus.jsonl")
    for number, folder in enumerate((run, run / "checkpoint-2")):
        command = ["score", str(folder), "--dataset_name", str(tmp_path / "corpus.jsonl")]
        assert main([*command, "--output_dir", str(tmp_path / str(number))]) == 0
        scored = Dataset.from_parquet(str(tmp_path / str(number) / "*.parquet"), cache_dir=str(tmp_path / "cache"))
        assert scored["loss"][:] == pytest.approx(trainer.score(rows)["loss"][:], rel=1e-4)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(SystemExit, match=r"The base model of .* was in .*base, which is no folder now.*`--model_name"):
        main([*command, "--output_dir", str(tmp_path / "third")])
    elsewhere = str(tmp_path / "elsewhere")
    shutil.move(tmp_path / "moved", tmp_path / "base")
    trainer.save_model(elsewhere)
    assert read_base_model(elsewhere, "base") == str(tmp_path / "base")
    trainer.args.push_to_hub = False
    trainer.save_model(elsewhere)  # which names the base by its path again
    assert read_base_model(elsewhere, "base") == "base"
    config = json.loads((Path(elsewhere) / "adapter_config.json").read_text())
    (Path(elsewhere) / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "none"}))
    command = ["score", elsewhere, "--dataset_name", str(tmp_path / "corpus.jsonl")]
    with pytest.raises(SystemExit, match=r"The base model 'none' of .* cannot be loaded.*`--model_name_or_path`"):
        main([*command, "--output_dir", str(tmp_path / "third")])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("more", [16, -3])  # a base model with spare embeddings, and one with too few of them
def test_embeddings_are_as_many_as_the_run_had(make_lora_trainer, build_model, tokenizer, tmp_path, more):
    base = build_model()
    base.resize_token_embeddings(len(tokenizer) + more)
    base.save_pretrained(tmp_path / "base")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded.resize_token_embeddings(len(tokenizer))  # as TRL does for a template that brings tokens of its own
    adapter = LoraConfig(**{**LORA, "modules_to_save": ["lm_head"]})
    trainer = make_lora_trainer(model=loaded, peft_config=adapter, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    rows = prompt_completion_rows(3)
    rows.to_json(tmp_path / "corpus.jsonl")
    command = ["score", str(tmp_path / "run"), "--dataset_name", str(tmp_path / "corpus.jsonl")]
    assert main([*command, "--output_dir", str(tmp_path / "scored")]) == 0
    scored = Dataset.from_parquet(str(tmp_path / "scored" / "*.parquet"), cache_dir=str(tmp_path / "cache"))
    assert scored["loss"][:] == pytest.approx(trainer.score(rows)["loss"][:], rel=1e-4)


def test_columns_have_the_types_of_the_dataset(make_lora_trainer, build_model, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    trainer = make_lora_trainer(model=str(tmp_path / "base"), max_steps=1)
    trainer.save_model(str(tmp_path / "run"))
    rows = [{"prompt": "a", "completion": "b", "tools": [{"enum": [1, 2]}, {"enum": ["low"]}]}]
    features = Features({"prompt": Value("string"), "completion": Value("string"), "tools": List(Json())})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "corpus")  # of a row alone Arrow makes none
    command = ["score", str(tmp_path / "run"), "--dataset_name", str(tmp_path / "corpus")]
    assert main([*command, "--output_dir", str(tmp_path / "scored")]) == 0


def test_what_scoring_cannot_honour_is_refused(make_trainer, tmp_path, capsys):
    rows = prompt_completion_rows(24)
    rows.to_json(tmp_path / "corpus.jsonl")
    options = ["--dataset_name", str(tmp_path / "corpus.jsonl"), "--output_dir", str(tmp_path / "out")]
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "whole"))
    for name in ("model_name_or_path", "model_revision"):
        with pytest.raises(SystemExit, match=rf"`--{name} x` has no effect: .*whole holds a whole model"):
            main(["score", str(tmp_path / "whole"), *options, f"--{name}", "x"])
    with pytest.raises(SystemExit) as stop:
        main(["score", str(tmp_path / "whole"), *options, "--use_peft", "--lora_r", "4"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --use_peft --lora_r 4" in capsys.readouterr().err
    questions = [
        rows.rename_columns({"prompt": "question", "completion": "answer"})
        for rows in (rows, prompt_completion_rows(8, 900))
    ]
    formatted = make_trainer(
        train_dataset=questions[0], validation_dataset=questions[1], formatting_func=lambda row: row["question"],
        completion_only_loss=False,
    )  # fmt: skip
    formatted.save_model(str(tmp_path / "formatted"))
    with pytest.raises(SystemExit, match=r"made by a `formatting_func`.*Score in the training script: `trainer.score"):
        main(["score", str(tmp_path / "formatted"), *options])
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_run(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    options = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="output folder, or a checkpoint, of a run"):
        main(["score", str(tmp_path), *options])


def test_bad_input(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    rows = prompt_completion_rows(3)
    with pytest.raises(ValueError, match="give `output_dir`"):
        trainer.score(rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"already has the columns \['loss'\]"):
        trainer.score(rows.add_column("loss", [1.0] * 3))
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        trainer.score(rows, chunk_size=0)
    with pytest.raises(ValueError, match="empty, so there is nothing to score"):
        trainer.score(rows.select([]))
    assert len(list(islice(trainer.score(rows), 5))) == 3


def test_guide_cuts_by_the_loss(make_lora_trainer):
    guide = Path(__file__).parents[1] / "docs" / "howto" / "keep_ratio.md"
    blocks = [text.partition("```")[0] for text in guide.read_text().split("```python\n")[1:]]
    (block,) = [block for block in blocks if 'score(mixture)["loss"]' in block]
    rows = prompt_completion_rows(9, offset=500)
    mixture = Dataset.from_list([{"prompt": "too long " * 200, "completion": "yes"}, *rows])
    trainer = make_lora_trainer(max_length=32)
    trainer.model.eval()
    names = {"trainer": trainer, "mixture": mixture, "np": np}
    exec(block, names)
    # All but the row that nothing is left of
    assert names["kept"]["prompt"][:] == rows["prompt"][:]
    exec(block.replace("0.9", "0.4"), names)
    lowest = sorted(sorted(range(9), key=_losses(trainer, rows).__getitem__)[:4])
    assert names["kept"]["prompt"][:] == rows.select(lowest)["prompt"][:]


def test_folder_with_the_characters_of_a_pattern(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    rows = prompt_completion_rows(4, offset=700)
    trainer.score(prompt_completion_rows(4, offset=500), output_dir=tmp_path / "run1")  # what `run[1]` would match
    for name in ("run[1]", "run[2]", "run*?"):
        assert trainer.score(rows, output_dir=tmp_path / name)["prompt"] == rows["prompt"]


def _conversations(num_rows, offset=0):
    turns = [
        ({"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"{2 * i}"})
        for i in range(offset, offset + num_rows)
    ]
    return [{"messages": list(pair)} for pair in turns], [{"prompt": [u], "completion": [a]} for u, a in turns]


def test_one_conversation_scores_alike_in_either_format(make_trainer):
    """Whatever training counted: the numbers of a corpus in one format compare with those of another."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    messages, completions = map(Dataset.from_list, _conversations(4))
    assert trainer.score(messages)["loss"] == pytest.approx(trainer.score(completions)["loss"][:], rel=1e-5)


@pytest.mark.parametrize("odd", [[], [{"role": "system", "content": "be brief"}]], ids=["empty", "no answer"])
def test_conversation_without_an_answer_does_not_stop_the_pass(make_trainer, tmp_path, caplog, odd):
    good, _ = _conversations(12)
    trainer = make_trainer(
        train_dataset=Dataset.from_list(good),
        validation_dataset=Dataset.from_list(_conversations(6, offset=1000)[0]),
        assistant_only_loss=True,
        max_steps=1,
    )
    trainer.train()
    rows = [*good[:8], *[{"messages": odd}] * 5, *good[8:]]  # of the chunks of 4 one has no answer at all
    features = Dataset.from_list(good).features
    found = trainer.score(Dataset.from_list(rows, features=features), output_dir=tmp_path / "scored", chunk_size=4)
    assert np.flatnonzero(np.isnan(found["loss"])).tolist() == [8, 9, 10, 11, 12]
    whole = trainer.score(Dataset.from_list(good))["loss"][:]
    assert [loss for loss in found["loss"] if not np.isnan(loss)] == pytest.approx(whole, rel=1e-5)
    assert "5 rows have no answer" in caplog.text
    assert "8, 9, 10, 11, 12." in caplog.text


def test_adapter_with_a_name_of_its_own(make_trainer, build_model, tokenizer, tmp_path):
    for part in (build_model(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make_trainer(model=get_peft_model(base, LoraConfig(**LORA), adapter_name="quality"), learning_rate=3e-2)
    trainer.train()
    trainer.save_model()
    rows = prompt_completion_rows(5, offset=500)
    rows.to_json(tmp_path / "rows.jsonl")
    expected = trainer.score(rows)["score"][:]
    main(
        [
            "score",
            trainer.args.output_dir,
            "--dataset_name",
            str(tmp_path / "rows.jsonl"),
            "--output_dir",
            str(tmp_path / "scored"),
            "--dtype",
            "float32",
        ]
    )
    found = load_dataset("parquet", data_files=str(tmp_path / "scored" / "*.parquet"), split="train")
    assert found["score"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
