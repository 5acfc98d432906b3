"""One weight per source."""

import pytest
import torch
from datasets import Dataset

from trl_bilevel import DataSelector


SOURCES = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0])


def test_step_is_exponentiated_gradient_on_the_shares_of_the_sources():
    """By hand, on a full batch: omega_s falls by eta * (mean loss of its rows - weighted mean of all)."""
    losses = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0, 2.0, 1.5, 1.0])
    selector = DataSelector(8, learning_rate=0.7, sources=SOURCES)
    logits = torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        selector.update(torch.arange(8), losses)
        weights = logits.exp()[SOURCES]
        mean = (weights * losses).sum() / weights.sum()
        source_means = torch.stack([losses[source == SOURCES].double().mean() for source in range(3)])
        logits = logits - 0.7 * (source_means - mean)
    mass = logits.exp()[SOURCES]
    expected = (8 * mass / mass.sum()).float()
    torch.testing.assert_close(selector.weights(), expected)
    torch.testing.assert_close(selector.weights_of(torch.tensor([6, 1])), expected[[6, 1]])
    torch.testing.assert_close(selector.source_weights(), expected[[0, 1, 3]])


def test_direction_is_that_of_the_gradient_of_the_lower_level():
    """Finite differences of g = sum_i sigma_i l_i in float64: dg/domega_s = share_s * (mean loss_s - mean loss)."""
    losses = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0, 2.0, 1.5, 1.0], dtype=torch.float64)
    selector = DataSelector(8, learning_rate=1.0, sources=SOURCES)
    selector.update(torch.arange(8), losses.float())

    def lower_level(logits):
        return (logits[SOURCES].softmax(0) * losses).sum()

    nudges = 1e-6 * torch.eye(3, dtype=torch.float64)
    slopes = torch.stack([(lower_level(nudge) - lower_level(-nudge)) / 2e-6 for nudge in nudges])
    shares = SOURCES.bincount() / 8
    torch.testing.assert_close(selector._unit_logits.double(), -slopes / shares, rtol=1e-5, atol=1e-6)


def test_sources_of_one_row_are_row_weights():
    order = torch.tensor([3, 0, 2, 1])
    by_source = DataSelector(4, learning_rate=0.5, sources=order)
    by_row = DataSelector(4, learning_rate=0.5)
    for rows, losses in (([0, 2], [1.0, 2.0]), ([3, 1, 0], [0.1, 3.0, 1.0])):
        by_source.update(torch.tensor(rows), torch.tensor(losses))
        by_row.update(torch.tensor(rows), torch.tensor(losses))
    torch.testing.assert_close(by_source.weights(), by_row.weights())
    assert by_source.scored.tolist() == by_row.scored.tolist()


def test_adam_on_sources_is_torchs_adam():
    selector = DataSelector(8, optimizer="adam", learning_rate=0.05, sources=SOURCES)
    reference = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([reference], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, losses = torch.randperm(8, generator=generator)[:3], torch.rand(3, generator=generator)
        selector.update(rows, losses)
        optimizer.zero_grad()
        (8 * reference[SOURCES].softmax(0)[rows] * losses).mean().backward()
        optimizer.step()
    torch.testing.assert_close(selector._unit_logits, reference.data, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_thousands_of_sources_stay_normalised(activation):
    generator = torch.Generator().manual_seed(0)
    sources = torch.cat([torch.arange(5000), torch.randint(5000, (15_000,), generator=generator)])
    selector = DataSelector(20_000, activation, learning_rate=2.0, sources=sources)
    for _ in range(200):
        rows = torch.randint(20_000, (64,), generator=generator)
        selector.update(rows, sources[rows] / 5000)
    weights = selector.weights()
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert selector.source_weights().shape == (5000,)
    share = weights.double() / weights.double().sum()
    statistics = selector.statistics()
    assert statistics.entropy == pytest.approx(torch.special.entr(share).sum().item(), rel=1e-5)
    assert statistics.effective_sample_ratio == pytest.approx(1 / (20_000 * share.square().sum().item()), rel=1e-5)


def _with_sources(rows):
    """Every third row is gibberish, from its own source."""
    return Dataset.from_list(
        [
            {**row, "completion": " zq xj" * 3 if index % 3 == 0 else row["completion"], "source": f"é/{index % 3}"}
            for index, row in enumerate(rows)
        ]
    )


def test_trainer_weighs_down_the_bad_source_and_reports_it(make_trainer, train_dataset):
    trainer = make_trainer(train_dataset=_with_sources(train_dataset), source_column="source", max_steps=30)
    trainer.train()
    report = trainer.source_weights()
    assert list(report)[-1] == "é/0"
    assert sum(report.values()) / 3 == pytest.approx(1, abs=1e-5)  # eight rows each
    curated = trainer.curate()
    assert set(curated["source"]) == set(report)
    for row in curated:
        assert row["weight"] == pytest.approx(report[row["source"]], rel=1e-6)
    assert set(trainer.curate(keep_ratio=2 / 3)["source"]) == {"é/1", "é/2"}
    assert trainer.state.log_history[-2]["source_weight/é/0"] == pytest.approx(report["é/0"], rel=1e-5)


def test_resumed_run_equals_an_unbroken_one(make_trainer, train_dataset, tmp_path):
    options = {"train_dataset": _with_sources(train_dataset), "source_column": "source", "max_steps": 8}
    unbroken = make_trainer(**options)
    unbroken.train()
    stopped = make_trainer(**options, save_strategy="steps", save_steps=5, output_dir=str(tmp_path / "stopped"))
    stopped.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    assert resumed.source_weights() == unbroken.source_weights()
    moved = {**options, "train_dataset": _with_sources(train_dataset.select([*range(1, 24), 0]))}
    with pytest.raises(ValueError, match="was written for another run"):
        make_trainer(**moved).train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_column": "origin"}, ValueError, "`source_column='origin'` is not a column"),
        ({"source_column": "gap"}, ValueError, "1 of 24 rows have no source in the column 'gap'"),
        ({"source_column": "score"}, TypeError, "Sources must be strings or integers, but the column 'score'"),
        ({"source_column": "gap", "selection_method": "bmo"}, ValueError, "`source_column='gap'` has no effect"),
    ],
)
def test_bad_sources(make_trainer, train_dataset, options, error, message):
    rows = train_dataset.add_column("gap", [None, *["a"] * 23]).add_column("score", [0.5] * 24)
    with pytest.raises(error, match=message):
        make_trainer(train_dataset=rows, **options)


def test_row_weights_have_no_source_report(make_trainer):
    with pytest.raises(ValueError, match="Set `source_column`"):
        make_trainer().source_weights()
