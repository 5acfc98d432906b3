"""An adaptive lambda: rows that have proved good count as much as trusted ones."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from trl_bilevel import DataSelector
from trl_bilevel.losses import pool_with_validation_rows
from trl_bilevel.streamed_selector import StreamedSelector


LORA = {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SURE, HOPELESS = 50.0, -50.0  # logits


# ---- What counts how much ----
def _shares(proofs, kept=None, num_rows=None, num_trusted=10, largest=1.0):
    """Of the whole objective: of all trusted rows together, and of each training row of the batch."""
    kept = torch.ones(len(proofs), dtype=torch.bool) if kept is None else torch.tensor(kept)
    pooled = pool_with_validation_rows(
        torch.tensor(proofs), kept, num_rows or len(proofs), num_trusted, largest=largest
    )
    training = (1 - pooled.validation_weight) * pooled.weights / kept.sum()  # L_train is a mean over the kept rows
    return pooled.validation_weight, training.tolist()


def test_proved_row_counts_as_a_trusted_one():
    trusted, training = _shares([1.0, 0.0, 0.5, 0.0])
    assert trusted == pytest.approx(10 / 11.5)
    assert training == pytest.approx([1 / 11.5, 0, 0.5 / 11.5, 0])


def test_rows_of_a_batch_stand_for_all():
    """4 of 400 rows, one of which has proved good: as if 100 had."""
    trusted, training = _shares([1.0, 0.0, 0.0, 0.0], num_rows=400)
    assert trusted == pytest.approx(10 / 110)
    assert training == pytest.approx([100 / 110, 0, 0, 0])


@pytest.mark.parametrize("num_rows", [4, 1000])
def test_lambda_is_the_largest_before_any_row_has_proved_good(num_rows):
    trusted, training = _shares([0.0] * 4, num_rows=num_rows, largest=0.8)
    assert trusted == pytest.approx(0.8)
    assert training == pytest.approx([0.05] * 4)


def test_no_row_counts():
    pooled = pool_with_validation_rows(torch.zeros(3), torch.ones(3, dtype=torch.bool), 3, 10, largest=1.0)
    assert pooled.validation_weight == 1.0
    assert pooled.weights.isfinite().all()


def test_filtered_rows_do_not_count():
    trusted, training = _shares([1.0, 1.0, 0.0], kept=[True, False, True])
    assert trusted == pytest.approx(10 / 11)
    assert training == pytest.approx([1 / 11, 0, 0])


@pytest.mark.parametrize("prior", [0.05, 0.2, 0.5])
def test_proof_is_how_far_a_probability_has_risen(prior):
    selector = DataSelector(4, activation="sigmoid", learning_rate=1.0, centered=False, prior=prior)
    assert selector.proofs_of(torch.arange(4)).tolist() == pytest.approx([0] * 4, abs=1e-6)
    selector.update(torch.arange(4), torch.tensor([-2.0, 2.0, 0.0, -100.0]))
    # odds times e^2
    odds = prior / (1 - prior) * torch.tensor(2.0).exp().item()
    risen = odds / (1 + odds)
    expected = [(risen - prior) / (1 - prior), 0, 0, 1]
    assert selector.proofs_of(torch.arange(4)).tolist() == pytest.approx(expected, abs=1e-6)
    assert selector.proofs_of(torch.tensor([3, 1])).tolist() == pytest.approx([1, 0], abs=1e-6)
    with pytest.raises(IndexError):
        selector.proofs_of(torch.tensor([4]))


def test_rows_of_a_source_have_proved_the_same():
    sources = torch.tensor([0, 1, 0])
    selector = DataSelector(3, activation="sigmoid", sources=sources, centered=False, prior=0.2)
    selector.update(torch.tensor([0]), torch.tensor([-6.0]))
    first, other, same = selector.proofs_of(torch.arange(3)).tolist()
    assert first == same > 0.5
    assert other == pytest.approx(0, abs=1e-6)


def test_rows_of_a_stream_have_proved_nothing_when_they_come():
    selector = StreamedSelector("sigmoid", 3.0, centered=False, prior=0.2)
    rows = selector.row_numbers(["a", "b"])
    assert selector.proofs_of(rows).tolist() == pytest.approx([0, 0], abs=1e-6)
    selector.update(rows, torch.tensor([-1.0, 1.0]))
    assert selector.proofs_of(selector.row_numbers(["b", "a", "c"])).gt(1e-6).tolist() == [False, True, False]


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


@pytest.mark.parametrize("share_of_good", [0.5, 1.0])
def test_it_equals_a_constant_lambda_where_that_is_known(make_adaptive_trainer, train_dataset, share_of_good):
    """In batches of all rows, with weights that stay: of M trusted rows and R good ones lambda is M / (M + R)."""
    num_rows = len(train_dataset)
    num_good = round(share_of_good * num_rows)
    logits = torch.full((num_rows,), HOPELESS)
    logits[torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:num_good]] = SURE
    options = {
        "peft_config": LoraConfig(**{**LORA, "lora_dropout": 0.0}),
        "selector_learning_rate": 0.0,
        "per_device_train_batch_size": num_rows,
        "per_device_validation_batch_size": 4,
    }
    adaptive = make_adaptive_trainer(**options, validation_weight=1.0)
    expected = len(adaptive.validation_dataset) / (len(adaptive.validation_dataset) + num_good)
    constant = make_adaptive_trainer(
        **options,
        validation_weight=expected,
        adaptive_validation_weight=False,
        output_dir=f"{adaptive.args.output_dir}-constant",
    )
    for trainer in (adaptive, constant):
        trainer.data_selector._unit_logits.copy_(logits)
        trainer.data_selector._sums.refresh(logits)
        trainer.train()
    assert list(_lambdas(adaptive).values()) == pytest.approx([expected] * 2)
    for one, other in zip(adaptive.model.parameters(), constant.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_lambda_of_a_step_follows_what_its_rows_have_proved(make_adaptive_trainer, monkeypatch):
    trainer = make_adaptive_trainer(gradient_accumulation_steps=2)
    expected = []
    weigh_rows = trainer._weigh_rows

    def record(batches, step_weights):
        probabilities = trainer.data_selector.logits[trainer._step_sample_indices].double().sigmoid()
        proved = ((probabilities - 0.2).clamp(min=0) / 0.8).mean().item() * trainer.data_selector.num_rows
        num_trusted = len(trainer.validation_dataset)
        expected.append(num_trusted / (num_trusted / 0.9 + proved))
        weigh_rows(batches, step_weights)

    monkeypatch.setattr(trainer, "_weigh_rows", record)
    trainer.train()
    assert list(_lambdas(trainer).values()) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(0.9)
    assert min(expected) < 0.75
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


def test_filter_goes_by_the_weights_also_of_rows_that_have_proved_nothing(make_adaptive_trainer, train_dataset):
    """All of them are below the prior, where proofs tie."""
    trainer = make_adaptive_trainer(selector_learning_rate=0.0, filter_ratio=0.25, num_train_epochs=1)
    logits = torch.linspace(-6, -5, len(train_dataset))
    trainer.data_selector._unit_logits.copy_(logits)
    trainer.data_selector._sums.refresh(logits)
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
    assert logged[:6] == pytest.approx([0.9] * 6)  # the first pass: nothing is known of a row that is new
    assert min(logged) < 0.8


@pytest.mark.parametrize(
    "options",
    [
        {"selection_method": "bmo"},
        {"peft_config": None},
        {"value_function": "none"},
        {"selector_activation": "softmax"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refused_where_no_row_proves_good_by_itself(make_adaptive_trainer, options):
    if options.get("selection_method") == "bmo":
        options = {**options, "selector_learning_rate": None}
    with pytest.raises(ValueError, match="needs a value function and sigmoid weights"):
        make_adaptive_trainer(**options)


def test_refused_beside_a_schedule(make_config):
    with pytest.raises(ValueError, match=r"`validation_weight_decay=0.1` has no effect with `adaptive_validation"):
        make_config(adaptive_validation_weight=True, validation_weight_decay=0.1)
