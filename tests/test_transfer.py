"""A selector trained in one run serves another: joined by sample id, whatever the order of the rows."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import prompt_completion_rows
from peft import LoraConfig

from trl_bilevel import DataSelector
from trl_bilevel.run_records import read_selector
from trl_bilevel.selector_files import SELECTOR_TABLE_NAME, write_selector_table
from trl_bilevel.selector_setup import build_selector


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def _ids(values):
    return pa.chunked_array([values])


def _trained(num_rows, ids, activation="softmax", prior=0.5):
    selector = DataSelector(num_rows, activation, learning_rate=0.5, sample_ids=_ids(ids), prior=prior)
    selector.update(torch.arange(num_rows - 1), torch.linspace(0, 3, num_rows - 1))  # the last row is never scored
    return selector


@pytest.mark.parametrize(("activation", "prior"), [("softmax", 0.5), ("sigmoid", 0.5), ("sigmoid", 0.2)])
def test_table_round_trip(tmp_path, activation, prior):
    selector = _trained(5, ["a", "b", "ü", "d", "e"], activation, prior)
    path = selector.save_pretrained(tmp_path / "new" / "folder")
    table = pq.read_table(path)
    assert table.column_names == ["sample_id", "logit", "weight", "scored"]
    assert table["sample_id"].to_pylist() == ["a", "b", "ü", "d", "e"]
    assert table["weight"].to_pylist() == selector.weights().tolist()
    loaded = DataSelector.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(loaded.weights(), selector.weights())
    assert torch.equal(loaded.scored, selector.scored)
    assert 0 < selector.proved_good.sum() < 4
    assert torch.equal(loaded.proved_good, selector.proved_good)
    assert (loaded.prior, loaded.neutral_logit) == (prior, selector.neutral_logit)
    assert (loaded.activation, loaded.sample_ids.to_pylist()) == (activation, selector.sample_ids.to_pylist())


def test_rows_are_joined_by_id_and_unknown_ones_get_the_mean_weight():
    known = _trained(5, [10, 11, 12, 13, 14])
    other = DataSelector(4, sample_ids=_ids(["13", "99", "10", "14"]))
    assert other.start_from(known) == 2
    assert other.scored.tolist() == [True, False, True, False]
    # in units of the first selector, where the mean weight is 1: row 99 is unknown, row 14 was never scored
    expected = torch.stack([known.weights()[3], torch.tensor(1.0), known.weights()[0], torch.tensor(1.0)])
    torch.testing.assert_close(other.weights(), expected / expected.mean())


@pytest.mark.parametrize("prior", [0.5, 0.2])
def test_a_sigmoid_prior_is_not_taken_over(prior):
    """What the losses said is, in logits; a row that the other does not know has neither risen nor sunk."""
    known = _trained(5, [10, 11, 12, 13, 14], "sigmoid", prior=0.5)
    other = DataSelector(4, "sigmoid", sample_ids=_ids(["13", "99", "10", "14"]), prior=prior)
    assert other.start_from(known) == 2
    neutral = math.log(prior / (1 - prior))
    learned = known.logits[[3, 0]]  # as the other's prior has logit 0
    expected = torch.tensor([learned[0] + neutral, neutral, learned[1] + neutral, neutral])
    torch.testing.assert_close(other.logits, expected)
    assert other.scored.tolist() == [True, False, True, False]
    assert other.proved_good.tolist() == [bool(learned[0] > 0), False, bool(learned[1] > 0), False]
    assert not other.sunk(torch.tensor([1, 3])).any()
    mass = torch.sigmoid(expected)
    risen = ((mass[[0, 2]] - prior) / (1 - prior)).clamp(min=0).sum()
    assert other.proved_rows == pytest.approx(risen.item(), rel=1e-5)


@pytest.mark.parametrize(("has_value_function", "options", "kept"), [
    (False, {}, True), (True, {"selector_learning_rate": 0.0}, True), (False, {"selector_learning_rate": 0.0}, True),
    (True, {}, False), (True, {"selector_learning_rate": 0.0, "selector_prior": 0.4}, False),
])  # fmt: skip
def test_weights_that_nothing_judges_stay_as_they_are(make_config, has_value_function, options, kept):
    """Only a run that goes on to judge rows by a prior of its own takes them over to it."""
    known = _trained(5, [0, 1, 2, 3, 4], "sigmoid", prior=0.3)
    selector = build_selector(make_config(**options), has_value_function, known, known.sample_ids, None)
    selector.start_from(known)
    assert selector.prior == (0.3 if kept else options.get("selector_prior", 0.2))
    same = torch.allclose(selector.weights(), known.weights(), rtol=1e-6)
    assert same == kept


def test_sources_start_with_the_mean_logit_of_their_rows():
    known = _trained(5, [0, 1, 2, 3, 4])
    other = DataSelector(4, sources=torch.tensor([0, 1, 0, 1]), sample_ids=_ids([3, 2, 1, 0]))
    other.start_from(known)
    means = torch.stack([known.logits[[3, 1]].mean(), known.logits[[2, 0]].mean()])
    torch.testing.assert_close(other._unit_logits, means)


def test_nothing_in_common_and_other_activations_are_refused():
    known = _trained(3, ["x", "y", "z"])
    with pytest.raises(ValueError, match="Sample ids are like 0 here and like 'x' there"):
        DataSelector(3).start_from(known)
    with pytest.raises(ValueError, match="Set `selector_activation='softmax'`"):
        DataSelector(3, "sigmoid").start_from(known)


def test_selector_that_seal_published():
    path = SHARED_DATA / "seal_selector_llama3.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    selector = DataSelector.from_pretrained(path)
    logits = torch.load(path, weights_only=True, map_location="cpu").detach().double()
    torch.testing.assert_close(selector.weights().double(), 111_900 * logits.softmax(0), rtol=1e-5, atol=1e-7)
    subset = DataSelector(3, sample_ids=_ids([5, 111_899, 77]))
    assert subset.start_from(selector) == 3
    torch.testing.assert_close(subset.weights().double(), 3 * logits[[5, 111_899, 77]].softmax(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"logits": torch.zeros(3)}, "it holds dict"),
        (torch.zeros(3, 2), r"it holds shape \(3, 2\)"),
        (torch.tensor([0.0, math.nan]), "finite logits"),
        (torch.zeros(0), "a number per row"),
        ("code", "cannot be read"),
    ],
)
def test_other_pt_files_are_refused(tmp_path, content, message):
    path = tmp_path / "selector.pt"
    if isinstance(content, str):
        torch.save(Path, path)  # a pickle of something that is no tensor must not be run
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        DataSelector.from_pretrained(path)


def test_missing_and_damaged_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match=SELECTOR_TABLE_NAME):
        DataSelector.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a directory here nor a dataset repository"):
        DataSelector.from_pretrained("nobody/nothing")
    path = _trained(3, [1, 2, 3]).save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged"):
        DataSelector.from_pretrained(tmp_path)
    pq.write_table(pa.table({"sample_id": [1]}), path)
    with pytest.raises(ValueError, match="not the table of a data selector"):
        DataSelector.from_pretrained(tmp_path)


def test_prior_of_a_table(tmp_path):
    path = _trained(3, [1, 2, 3], "sigmoid", prior=0.2).save_pretrained(tmp_path)
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    for text in ("much", "1.0", "nan"):
        pq.write_table(table.replace_schema_metadata({**metadata, b"selector_prior": text}), path)
        with pytest.raises(ValueError, match=f"its prior is '{text}'"):
            DataSelector.from_pretrained(tmp_path)
    del metadata[b"selector_prior"]
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert DataSelector.from_pretrained(tmp_path).prior == 0.5  # written before it was kept


def test_run_on_disk_keeps_the_prior(make_trainer, tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"selector_prior": 0.3, "selector_learning_rate": 5.0, "output_dir": str(tmp_path / "out")}
    trainer = make_trainer(peft_config=peft_config, **options)
    trainer.train()
    trainer.save_model()
    write_selector_table(tmp_path / "selector", read_selector(tmp_path / "out"))
    loaded = DataSelector.from_pretrained(tmp_path / "selector")
    assert loaded.prior == 0.3
    assert 0 < loaded.proved_good.sum() < len(loaded.logits)
    assert torch.equal(loaded.proved_good, trainer.data_selector.proved_good)


def test_weights_of_a_small_model_guide_another(make_trainer, build_model, tmp_path):
    """Fixed weights of the first run, on a shuffled part of its rows and another architecture."""
    rows = prompt_completion_rows(24).add_column("sample_id", [f"row-{index}" for index in range(24)])
    small = make_trainer(train_dataset=rows, max_steps=6)
    small.train()
    small.data_selector.save_pretrained(tmp_path / "selector")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:16].tolist()
    large = make_trainer(
        model=build_model("gpt2"), train_dataset=rows.select(order), data_selector=str(tmp_path / "selector"),
        selector_learning_rate=0.0,
    )  # fmt: skip
    expected = small.data_selector.weights()[order]
    large.train()
    torch.testing.assert_close(large.data_selector.weights(), expected / expected.mean())


def test_closed_form_weights_take_no_selector(make_trainer):
    with pytest.raises(ValueError, match="`data_selector` has no effect with `selection_method='bmo'`"):
        make_trainer(selection_method="bmo", data_selector=DataSelector(24))
