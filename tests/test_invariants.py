"""What must hold exactly: equality with SFTTrainer, with other ways to cut a batch, and with an unbroken run."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import StopWithinStep, left_padding_collator, prompt_completion_rows
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def _parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def _assert_same_parameters(first, second, tolerance):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)  # names the parameter that differs


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 2},
        {"shuffle_dataset": True, "train_sampling_strategy": "group_by_length"},
        {"per_device_train_batch_size": 3, "activation_checkpointing": True, "max_steps": 12},
    ],
)
def test_without_validation_term_it_is_sft(make_trainer, build_model, tokenizer, train_dataset, options):
    """Invariant 1: uniform fixed weights and lambda = 0 reproduce SFTTrainer's losses and parameters step for step."""
    # Adam divides a gradient by its own size: one that is mostly rounding error would make a step of any size
    trainer = make_trainer(selector_learning_rate=0.0, adam_epsilon=1e-6, **options)
    trainer.args.validation_weight = 0.0  # not allowed to users
    trainer.train()

    sft_options = {option.name: getattr(trainer.args, option.name) for option in fields(SFTConfig) if option.init}
    reference = SFTTrainer(
        build_model(), SFTConfig(**sft_options), train_dataset=train_dataset, processing_class=tokenizer
    )
    reference.train()

    assert len(_logged(trainer, "loss")) >= 6
    assert _logged(trainer, "loss") == pytest.approx(_logged(reference, "loss"), abs=1e-5)
    assert _logged(trainer, "grad_norm") == pytest.approx(_logged(reference, "grad_norm"), rel=1e-4)
    assert _logged(trainer, "training_loss") == pytest.approx(_logged(reference, "loss"), abs=1e-5)
    # SFTTrainer takes the mean over micro-batches, whatever they hold
    tolerance = 0.02 if "gradient_accumulation_steps" in options else 1e-4
    for metric in ("mean_token_accuracy", "entropy"):
        assert _logged(trainer, metric) == pytest.approx(_logged(reference, metric), abs=tolerance)
    _assert_same_parameters(_parameters(trainer), _parameters(reference), 1e-5)
    assert torch.equal(trainer.data_selector.weights(), torch.ones(len(train_dataset)))


@pytest.mark.parametrize(
    ("selection_method", "loss_normalization", "validation_rows_per_training_row"),
    [("bds", "token", 1), ("bds", "row", 0.5), ("bmo", "token", 0.5), ("bmo", "row", 1)],
)
def test_accumulation_equals_one_large_batch(
    make_trainer, selection_method, loss_normalization, validation_rows_per_training_row
):
    """Invariant 2, one process: 1 x 8 rows = 2 x 4 = 4 x 2 accumulated, incomplete last batch included."""
    results = []
    for batch_size, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            train_dataset=prompt_completion_rows(27),
            per_device_train_batch_size=batch_size,
            per_device_validation_batch_size=int(batch_size * validation_rows_per_training_row),
            gradient_accumulation_steps=steps,
            max_steps=-1,
            num_train_epochs=3,
            optim="sgd",
            learning_rate=0.3,
            selection_method=selection_method,
            filter_ratio=0.25,
            validation_weight=0.6,
            validation_weight_decay=0.2,
            loss_normalization=loss_normalization,
        )
        trainer.train()
        results.append((_parameters(trainer), trainer.data_selector.weights(), _logged(trainer, "loss")))
        assert max(_logged(trainer, "selector/filtered_ratio")) > 0
    for parameters, weights, losses in results[1:]:
        _assert_same_parameters(parameters, results[0][0], 1e-5)
        torch.testing.assert_close(weights, results[0][1], rtol=1e-5, atol=1e-5)
        assert losses == pytest.approx(results[0][2], abs=1e-5)


def _row_losses_one_by_one(model, tokenizer, rows, max_length=None):
    """Mean NLL per completion token from the logits of each row on its own: no batch, no padding, no fused head."""
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][:max_length]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        completion = torch.tensor(tokens[len(prompt) :])
        losses.append(torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], completion).item())
    return losses


def _record_updates(trainer):
    """Losses by sample index, from what the selector is told."""
    seen = {}
    update = trainer.data_selector.update

    def recording_update(row_indices, losses):
        seen.update(zip(row_indices.tolist(), losses.tolist(), strict=True))
        update(row_indices, losses)

    trainer.data_selector.update = recording_update
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_keeps_its_own_loss(make_trainer, build_model, tokenizer, train_dataset, family, padding, workers):
    """Invariant 5: padding, shuffling twice, length grouping, truncation and dropped rows, checked by id."""
    if workers and (family, padding) != ("llama", "right"):
        pytest.skip("one combination with dataloader workers is enough")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = padding
    too_long = {"prompt": "a very long prompt " * 10, "completion": " lost"}
    rows = [*train_dataset, *[too_long] * 3]
    order = [0, 24, *range(1, 12), 25, *range(12, 24), 26]
    rows = train_dataset.from_list([rows[index] for index in order])
    max_length = 24
    trainer = make_trainer(
        model=build_model(family),
        processing_class=tokenizer,
        train_dataset=rows,
        data_collator=left_padding_collator(tokenizer.pad_token_id) if padding == "left" else None,
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=2,
        max_length=max_length,
        shuffle_dataset=True,
        train_sampling_strategy="group_by_length" if family == "gpt2" else "random",
        dataloader_num_workers=workers,
    )
    seen = _record_updates(trainer)
    trainer.train()

    kept = [index for index, row in enumerate(rows) if row != too_long]
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in train_dataset]
    assert min(lengths) <= max_length < max(lengths), "the test needs truncated and whole rows"
    expected = _row_losses_one_by_one(build_model(family), tokenizer, [rows[index] for index in kept], max_length)
    assert seen == pytest.approx(dict(zip(kept, expected, strict=True)), abs=1e-5)

    curated = trainer.curate()
    assert curated["scored"] == [row != too_long for row in rows]
    assert curated["prompt"] == rows["prompt"]
    assert torch.tensor(curated["weight"]).isfinite().all()


def test_dropped_row_keeps_the_neutral_weight(make_trainer, train_dataset):
    too_long = {"prompt": "a very long prompt " * 10, "completion": " lost"}
    rows = train_dataset.from_list([*train_dataset, too_long])
    trainer = make_trainer(train_dataset=rows, max_length=40, selector_learning_rate=2.0)
    trainer.train()
    weights = trainer.data_selector.weights()
    assert weights.shape == (25,)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert trainer.data_selector.logits[24] == 0
    curated = trainer.curate()
    assert curated["rank"][24] == 25
    assert not curated["scored"][24]
    assert 24 not in trainer.curate(24 / 25)["sample_id"]


@pytest.mark.parametrize(
    "method",
    [{"selector_optimizer": "mirror_descent"}, {"selector_optimizer": "adam"}, {"selection_method": "bmo"}],
    ids=["mirror_descent", "adam", "bmo"],
)
def test_resumed_run_equals_the_unbroken_one(make_trainer, method):
    """Invariant 6, within the first epoch, at its end and in the second; dropout checks the random state."""
    options = {
        "peft_config": LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"),
        **method,
        "max_steps": -1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "validation_weight_decay": 0.3,
        "filter_ratio": 0.25,
        "per_device_validation_batch_size": 2,
    }
    unbroken = make_trainer(**copy.deepcopy(options))
    unbroken.train()
    for stop_at in (1, 4, 6, 9):
        folder = f"{unbroken.args.output_dir}-{stop_at}"
        resumed = make_trainer(**{**copy.deepcopy(options), "save_strategy": "no"}, output_dir=folder)
        resumed.train(resume_from_checkpoint=str(Path(unbroken.args.output_dir) / f"checkpoint-{stop_at}"))

        assert resumed.state.global_step == unbroken.state.global_step == 12
        assert torch.equal(resumed.data_selector.weights(), unbroken.data_selector.weights())
        assert resumed.curate().to_dict() == unbroken.curate().to_dict()
        _assert_same_parameters(_parameters(resumed), _parameters(unbroken), 0)
        assert _logged(resumed, "validation_loss")[-1] == _logged(unbroken, "validation_loss")[-1]


@pytest.mark.parametrize(
    ("value_function", "accumulation", "step"),
    [("adapter", 1, 0), ("adapter", 1, 6), ("adapter", 2, 2), ("adapter", 2, 3), ("none", 1, 2), ("none", 2, 3)],
)
def test_run_stopped_within_a_step_does_it_again(make_trainer, value_function, accumulation, step):
    """As on SIGTERM: dropout had drawn for the step already, and a dataloader for the epoch that the step begins."""
    options = {
        "peft_config": LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "value_function": value_function,
        "gradient_accumulation_steps": accumulation,
        "per_device_validation_batch_size": 2,
        "max_steps": 8,
    }
    unbroken = make_trainer(**copy.deepcopy(options))
    unbroken.train()
    stop = StopWithinStep(step)
    folder = unbroken.args.output_dir + "-stopped"
    stop.trainer = make_trainer(**copy.deepcopy(options), callbacks=[stop], output_dir=folder)
    stop.trainer.train()
    resumed = make_trainer(**copy.deepcopy(options), output_dir=folder)
    resumed.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{step}"))
    assert torch.equal(resumed.data_selector.weights(), unbroken.data_selector.weights())
    _assert_same_parameters(_parameters(resumed), _parameters(unbroken), 0)


@pytest.mark.parametrize("filter_ratio", [0.0, 0.25])
def test_both_levels_move_as_the_formulas_say(
    make_trainer, build_model, tokenizer, train_dataset, validation_dataset, filter_ratio
):
    """One step against autograd and the mirror-descent formula, from plain logits."""
    trainer = make_trainer(
        filter_ratio=filter_ratio,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=1,
        validation_weight=0.4, selector_learning_rate=2.0,
        train_sampling_strategy="sequential", per_device_train_batch_size=4, per_device_validation_batch_size=3,
    )  # fmt: skip
    # start from weights that are not uniform
    trainer.data_selector.update(torch.arange(24), torch.linspace(0, 1, 24))
    logits, weights = trainer.data_selector.logits.clone(), trainer.data_selector.weights()
    validation_batch = trainer._get_paired_sampler(trainer.get_train_dataloader().dataset).validation_stream.rows(0, 3)
    trainer.train()

    model = build_model()

    def summed_nll(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        completion = torch.tensor(tokens[len(prompt) :])
        log_probs = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return -log_probs.gather(-1, completion[:, None]).sum(), len(completion)

    training = [summed_nll(train_dataset[row]) for row in range(4)]
    kept = training[: 3 if filter_ratio else 4]  # the fourth has the lowest weight, and moves all the same
    validation = [summed_nll(validation_dataset[row]) for row in validation_batch]
    objective = 0.4 * sum(nll for nll, _ in validation) / sum(n for _, n in validation) + 0.6 * sum(
        weights[row] * nll for row, (nll, _) in enumerate(kept)
    ) / sum(n for _, n in kept)
    objective.backward()
    expected = {name: (value - 0.5 * value.grad).detach() for name, value in model.named_parameters()}
    _assert_same_parameters(_parameters(trainer), expected, 1e-5)
    assert _logged(trainer, "loss")[0] == pytest.approx(objective.item(), abs=1e-5)

    means = torch.tensor([nll.item() / n for nll, n in training])
    baseline = (weights[:4] * means).sum() / weights[:4].sum()
    logits[:4] -= 2.0 * (means - baseline)
    torch.testing.assert_close(trainer.data_selector.logits, logits, rtol=1e-5, atol=1e-5)
