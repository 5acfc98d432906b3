"""An adaptive lambda: rows that have proved good count as much as trusted ones, rows that have sunk do not."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig

from trl_bilevel import DataSelector
from trl_bilevel.run_records import read_facts
from trl_bilevel.selector_setup import resolve_adaptive_validation_weight
from trl_bilevel.streamed_selector import StreamedSelector


LORA = {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SURE, HOPELESS = 50.0, -50.0  # logits


def _proved(logits, prior):
    probabilities = logits.double().sigmoid()
    return ((probabilities - prior).clamp(min=0) / (1 - prior)).sum().item()


# ---- What has proved good ----
@pytest.mark.parametrize("with_sources", [False, True])
def test_running_sum_is_that_of_all_rows(with_sources, tmp_path):
    """Over updates large enough to saturate, rows that restart, and a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.arange(300) % 40 if with_sources else None
    options = {"activation": "sigmoid", "learning_rate": 20.0, "sources": sources, "centered": False, "prior": 0.2}
    selector = DataSelector(300, **options)
    assert selector.proved_rows == pytest.approx(0, abs=1e-4)  # the first logits are rounded
    for step in range(300):
        rows = torch.randperm(300, generator=generator)[:8]
        selector.update(rows, torch.randn(8, generator=generator) * 10.0 ** (step % 3 - 1))
        if step % 7 == 0:
            selector.restart(rows[:2])
        assert selector.proved_rows == pytest.approx(_proved(selector.logits, 0.2), abs=1e-8)
    assert 50 < selector.proved_rows < 300
    selector.save(tmp_path, "rows")
    restored = DataSelector(300, **options)
    restored.load(tmp_path, "rows")
    for other in (selector, restored):
        other.update(torch.arange(8), torch.linspace(-1, 1, 8))
    assert restored.proved_rows == selector.proved_rows  # bit for bit


def test_rows_of_a_stream_have_proved_nothing_when_they_come():
    selector = StreamedSelector("sigmoid", 3.0, centered=False, prior=0.2)
    assert selector.proved_rows == 0
    for start in range(0, 3000, 100):
        rows = selector.row_numbers([str(row) for row in range(start, start + 100)])
        assert selector.proved_rows == pytest.approx(_proved(selector.logits, 0.2), abs=1e-3)
        selector.update(rows, torch.linspace(-1, 1, 100))
        assert selector.proved_rows == pytest.approx(_proved(selector.logits, 0.2), abs=1e-3)


@pytest.mark.parametrize("prior", [0.05, 0.2, 0.5])
def test_row_has_sunk_once_something_speaks_against_it(prior):
    selector = DataSelector(4, activation="sigmoid", learning_rate=1.0, centered=False, prior=prior)
    assert not selector.sunk(torch.arange(4)).any()
    selector.update(torch.arange(3), torch.tensor([-0.1, 0.1, 0.0]))
    assert selector.sunk(torch.arange(4)).tolist() == [False, True, False, False]
    assert selector.sunk(torch.tensor([3, 1])).tolist() == [False, True]
    selector.restart(torch.tensor([1]))
    assert not selector.sunk(torch.arange(4)).any()
    with pytest.raises(IndexError):
        selector.sunk(torch.tensor([4]))


# ---- The trainer ----
@pytest.fixture
def make_adaptive_trainer(make_trainer):
    return lambda **options: make_trainer(
        **{
            "peft_config": LoraConfig(**LORA),
            "adaptive_validation_weight": True,
            "selector_learning_rate": 1000.0,
            "learning_rate": 3e-2,
            "max_steps": -1,
            "num_train_epochs": 2,
            "logging_steps": 1,
            **options,
        }
    )


def _lambdas(trainer):
    """By step."""
    entries = [entry for entry in trainer.state.log_history if "validation_weight" in entry]
    return {entry["step"]: entry["validation_weight"] for entry in entries}


def _set_logits(trainer, logits):
    trainer.data_selector._unit_logits.copy_(logits)
    trainer.data_selector._sums.refresh(logits)


@pytest.mark.parametrize("share_of_good", [0.5, 1.0])
def test_it_equals_a_constant_lambda_where_that_is_known(make_adaptive_trainer, train_dataset, share_of_good):
    """With weights that stay: of M trusted rows and R good ones lambda is M / (M + R)."""
    num_rows = len(train_dataset)
    num_good = round(share_of_good * num_rows)
    logits = torch.full((num_rows,), HOPELESS)
    logits[torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:num_good]] = SURE
    options = {"peft_config": LoraConfig(**{**LORA, "lora_dropout": 0.0}), "selector_learning_rate": 0.0}
    adaptive = make_adaptive_trainer(**options)
    expected = len(adaptive.validation_dataset) / (len(adaptive.validation_dataset) + num_good)
    constant = make_adaptive_trainer(
        **options,
        validation_weight=expected,
        adaptive_validation_weight=False,
        output_dir=f"{adaptive.args.output_dir}-constant",
    )
    for trainer in (adaptive, constant):
        _set_logits(trainer, logits)
        trainer.train()
    assert list(_lambdas(adaptive).values()) == pytest.approx([expected] * 12)
    for one, other in zip(adaptive.model.parameters(), constant.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_that_have_sunk_have_no_part_in_the_model(make_adaptive_trainer, train_dataset, tmp_path):
    """Not even as much as their weight: nonsense in their place changes nothing. With a constant lambda it does."""
    sunk = torch.arange(len(train_dataset)) % 3 == 0
    logits = torch.where(sunk, -2.0, 1.0)  # the prior's is -1.4

    def parameters(name, nonsense, adaptive):
        def spoil(row, index):
            return {"completion": row["completion"][::-1]} if nonsense and sunk[index] else row

        trainer = make_adaptive_trainer(
            train_dataset=train_dataset.map(spoil, with_indices=True),
            selector_learning_rate=0.0,
            adaptive_validation_weight=adaptive,
            output_dir=str(tmp_path / name),
            loss_normalization="row",
        )
        _set_logits(trainer, logits)
        trainer.train()
        return torch.cat([value.flatten() for value in trainer.model.parameters() if value.requires_grad])

    assert torch.equal(parameters("a", False, True), parameters("b", True, True))
    assert not torch.allclose(parameters("c", False, False), parameters("d", True, False), atol=1e-5)


def test_lambda_of_a_step_follows_the_rows_that_have_proved_good(make_adaptive_trainer, monkeypatch):
    trainer = make_adaptive_trainer(gradient_accumulation_steps=2)
    expected = []
    start_step = trainer._start_step

    def record(batches):
        num_trusted = len(trainer.validation_dataset)
        expected.append(min(0.9, num_trusted / (num_trusted + _proved(trainer.data_selector.logits, 0.2))))
        start_step(batches)

    monkeypatch.setattr(trainer, "_start_step", record)
    trainer.train()
    assert list(_lambdas(trainer).values()) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == 0.9
    assert min(expected) < 0.8
    assert len(set(expected)) > 2


def test_log_has_the_mean_since_the_last(make_adaptive_trainer):
    by_step = make_adaptive_trainer()
    by_step.train()
    every_other = make_adaptive_trainer(logging_steps=2, output_dir=f"{by_step.args.output_dir}-2")
    every_other.train()
    each = _lambdas(by_step)
    assert len(set(each.values())) > 2
    for step, mean in _lambdas(every_other).items():
        assert mean == pytest.approx((each[step - 1] + each[step]) / 2)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_resumed_run_equals_the_unbroken_one(make_adaptive_trainer, stop_at):
    options = {"save_strategy": "steps", "save_steps": 1}
    unbroken = make_adaptive_trainer(**options)
    unbroken.train()
    checkpoint = Path(unbroken.args.output_dir) / f"checkpoint-{stop_at}"
    resumed = make_adaptive_trainer(**options, output_dir=f"{unbroken.args.output_dir}-resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed.data_selector.logits, unbroken.data_selector.logits)
    parameters = zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)
    assert _lambdas(resumed) == _lambdas(unbroken)
    assert any(one != other for one, other in itertools.pairwise(_lambdas(unbroken).values()))


def test_filter_goes_by_the_weights_also_of_rows_that_have_sunk(make_adaptive_trainer, train_dataset):
    """All of them have, and would tie."""
    trainer = make_adaptive_trainer(selector_learning_rate=0.0, filter_ratio=0.25, num_train_epochs=1)
    _set_logits(trainer, torch.linspace(-6, -5, len(train_dataset)))
    trainer.train()
    filtered = [
        entry["selector/filtered_ratio"] for entry in trainer.state.log_history if "selector/filtered_ratio" in entry
    ]
    assert filtered
    assert filtered == pytest.approx([0.25] * len(filtered))


def test_stream_trains_with_it(make_adaptive_trainer, train_dataset):
    rows = train_dataset.add_column("sample_id", list(range(len(train_dataset)))).to_iterable_dataset()
    trainer = make_adaptive_trainer(train_dataset=rows, max_steps=12)
    trainer.train()
    logged = list(_lambdas(trainer).values())
    assert logged[0] == 0.9
    assert logged[-1] < 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"selection_method": "bmo"},
        {"peft_config": None},
        {"value_function": "none"},
        {"selector_activation": "softmax"},
        {"selector_optimizer": "adam", "value_function": "adapter"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refused_where_no_row_proves_good_by_itself(make_adaptive_trainer, options):
    if options.get("selection_method") == "bmo":
        options = {**options, "selector_learning_rate": None}
    with pytest.raises(ValueError, match="needs a value function, sigmoid weights and mirror descent"):
        make_adaptive_trainer(**options)


def test_refused_beside_a_schedule(make_config):
    with pytest.raises(ValueError, match=r"`validation_weight_decay=0.1` has no effect with `adaptive_validation"):
        make_config(adaptive_validation_weight=True, validation_weight_decay=0.1)


def test_lambda_without_evidence_and_with_all_of_it():
    selector = DataSelector(1000, activation="sigmoid", learning_rate=50.0, centered=False, prior=0.2)
    for _ in range(3):
        selector.update(torch.arange(1000), -torch.ones(1000))
    assert selector.proved_rows == pytest.approx(1000, rel=1e-6)
    assert math.isfinite(selector.statistics().entropy)


# ---- By default ----
@pytest.fixture
def make_default_trainer(make_trainer, validation_dataset):
    """With many validation rows, and training rows that have all proved good, so that lambda falls where it may."""
    validation = concatenate_datasets([validation_dataset] * 100)

    def make(num_validation_rows=100, **options):
        trainer = make_trainer(
            **{
                "peft_config": LoraConfig(**LORA),
                "validation_dataset": validation.select(range(num_validation_rows)),
                "selector_learning_rate": 0.0,
                "max_steps": 2,
                "logging_steps": 1,
                **options,
            }
        )
        _set_logits(trainer, torch.full_like(trainer.data_selector._unit_logits, SURE))
        return trainer

    return make


def _method_on_the_card(trainer):
    trainer.save_model()
    return read_facts(trainer.args.output_dir)["method"]


@pytest.mark.parametrize("options", [{}, {"value_function_rows": "all"}, {"filter_ratio": 0.5}], ids=str)
def test_it_is_on_by_default_with_a_hundred_validation_rows(make_default_trainer, train_dataset, options):
    trainer = make_default_trainer(**options)
    trainer.train()
    assert list(_lambdas(trainer).values()) == pytest.approx([100 / (100 + len(train_dataset))] * 2)
    assert _method_on_the_card(trainer) == "BDS with a value function and an adaptive validation weight"


def test_it_can_be_turned_off(make_default_trainer):
    trainer = make_default_trainer(adaptive_validation_weight=False)
    trainer.train()
    assert set(_lambdas(trainer).values()) == {0.9}
    assert _method_on_the_card(trainer) == "BDS with a value function"


@pytest.mark.parametrize(
    "options",
    [
        {"num_validation_rows": 99},
        {"validation_weight": 0.85},
        {"validation_weight_decay": 0.1},
        {"selector_activation": "softmax"},
        {"value_function": "none"},
        {"peft_config": None},
        {"selection_method": "bmo", "selector_learning_rate": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_lambda_does_not_adapt_by_default(make_default_trainer, options):
    trainer = make_default_trainer(**options)
    trainer.train()
    assert set(_lambdas(trainer).values()) == {options.get("validation_weight", 0.9)}


def test_lambda_does_not_adapt_by_default_to_sources(make_default_trainer, train_dataset):
    rows = train_dataset.add_column("origin", [str(number % 5) for number in range(len(train_dataset))])
    trainer = make_default_trainer(train_dataset=rows, source_column="origin")
    trainer.train()
    assert set(_lambdas(trainer).values()) == {0.9}


@pytest.mark.parametrize(("loss", "adapts"), [("nll", True), ("dpo", False)])
def test_lambda_adapts_by_default_where_both_levels_have_the_same_loss(make_config, loss, adapts):
    selector = DataSelector(10, activation="sigmoid", centered=False, prior=0.2)
    args = make_config(validation_loss_type=loss)
    assert resolve_adaptive_validation_weight(args, selector, 100) is adapts
