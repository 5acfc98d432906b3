"""BMO against the merit function it is the gradient of."""

import copy
import math

import pytest
import torch
from peft import LoraConfig

from trl_bilevel import DataSelector
from trl_bilevel.losses import closed_form_log_weights


def _merit(losses, temperature):
    """u = -tau * log( 1/B * sum_i exp(-l_i / tau) )."""
    return -temperature * torch.log(torch.exp(-losses / temperature).mean())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_weights_are_the_gradient_of_the_smoothed_merit(temperature):
    losses = 3 * torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = closed_form_log_weights(losses, temperature).exp()
    assert weights.mean().item() == pytest.approx(1)
    for row in range(7):
        nudge = torch.zeros_like(losses)
        nudge[row] = 1e-6
        slope = (_merit(losses + nudge, temperature) - _merit(losses - nudge, temperature)) / 2e-6
        assert weights[row].item() / 7 == pytest.approx(slope.item(), abs=1e-8)


def test_rows_without_a_finite_loss_get_no_weight_and_take_none():
    log_weights = closed_form_log_weights(torch.tensor([1.0, math.nan, 2.0, math.inf]), 1.0)
    expected = closed_form_log_weights(torch.tensor([1.0, 2.0]), 1.0)
    torch.testing.assert_close(log_weights[[0, 2]], expected)
    assert log_weights.exp()[[1, 3]].tolist() == [0, 0]
    assert closed_form_log_weights(torch.tensor([math.nan]), 1.0).exp().tolist() == [0]


def test_one_step_descends_validation_loss_and_merit(make_trainer, build_model, tokenizer, train_dataset):
    """Against autograd through the log-sum-exp itself, from plain logits: no weights anywhere."""
    trainer = make_trainer(
        selection_method="bmo", bmo_temperature=0.5, loss_normalization="row", validation_weight=0.4,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=1,
        train_sampling_strategy="sequential", per_device_train_batch_size=4, per_device_validation_batch_size=3,
    )  # fmt: skip
    validation_rows = trainer._get_paired_sampler(trainer.get_train_dataloader().dataset).validation_stream.rows(0, 3)
    trainer.train()

    model = build_model()

    def mean_nll(tokens, labels):
        log_probs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(labels[1:])
        return -log_probs[labels != -100].gather(-1, labels[labels != -100][:, None]).mean()

    def losses(dataset, rows):
        return torch.stack([mean_nll(dataset[row]["input_ids"], dataset[row]["labels"]) for row in rows])

    training = losses(trainer.train_dataset, range(4))
    (0.4 * losses(trainer.validation_dataset, validation_rows).mean() + 0.6 * _merit(training, 0.5)).backward()
    expected = {name: (value - 0.5 * value.grad).detach() for name, value in model.named_parameters()}
    torch.testing.assert_close(dict(trainer.model.named_parameters()), expected, rtol=1e-5, atol=1e-5)

    # the selector keeps the weights of the visit: 4 * softmax(-l / tau), and 0 for logarithms of rows not seen
    logits = torch.zeros(24)
    logits[:4] = (4 * (-training / 0.5).softmax(0)).log().detach()
    torch.testing.assert_close(trainer.data_selector.logits, logits, rtol=1e-4, atol=1e-5)
    assert trainer.data_selector.scored.sum() == 4


def test_accumulation_takes_one_extra_forward_per_micro_batch_and_a_single_batch_none(make_trainer, build_model):
    for steps, forwards in ((1, 3), (2, 12)):
        model = build_model()
        trainer = make_trainer(model=model, selection_method="bmo", gradient_accumulation_steps=steps, max_steps=3)
        calls = []
        model.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        trainer.train()
        assert len(calls) == forwards
        assert calls.count(False) == (0 if steps == 1 else 6)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_dropout_of_the_extra_forward_resumes(make_trainer, stop_at):
    """Within an epoch, at its end, within the next: Trainer restores the random state only after that forward."""
    options = {
        "peft_config": LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
        "selection_method": "bmo", "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    unbroken = make_trainer(**copy.deepcopy(options))
    unbroken.train()
    resumed = make_trainer(**copy.deepcopy(options), output_dir=unbroken.args.output_dir + "-resumed")
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-{stop_at}")
    assert torch.equal(resumed.data_selector.weights(), unbroken.data_selector.weights())
    first, second = (dict(trainer.model.named_parameters()) for trainer in (unbroken, resumed))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_row_with_nan_loss_does_not_stop_bmo(make_trainer, build_model, tokenizer, train_dataset):
    model = build_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("#")] = torch.nan
    model.get_input_embeddings().requires_grad_(False)
    rows = train_dataset.from_list([*train_dataset.select(range(23)), {"prompt": "#", "completion": " 1"}])
    for steps in (1, 2):
        trainer = make_trainer(
            model=model, train_dataset=rows, selection_method="bmo", gradient_accumulation_steps=steps
        )
        trainer.train()
        assert trainer.data_selector.scored.tolist() == [True] * 23 + [False]
        assert trainer.data_selector.weights().isfinite().all()
        trained = [value for value in model.parameters() if value.requires_grad]
        assert all(value.isfinite().all() for value in trained)


def test_assigned_weights_are_kept_and_normalised():
    selector = DataSelector(5)
    selector.assign(torch.tensor([1, 3, 1]), torch.tensor([2.0, -1.0, 2.0]))
    torch.testing.assert_close(selector.weights(), 5 * torch.tensor([0.0, 2.0, 0.0, -1.0, 0.0]).softmax(0))
    selector.assign(torch.tensor([1, 4]), torch.tensor([0.5, -math.inf]))
    torch.testing.assert_close(selector.weights(), 5 * torch.tensor([0.0, 0.5, 0.0, -1.0, 0.0]).softmax(0))
    assert selector.scored.tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match="Only a softmax selector"):
        DataSelector(5, activation="sigmoid").assign(torch.tensor([0]), torch.tensor([0.0]))
