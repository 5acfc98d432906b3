"""Each fault of the published codes that concerns selection, and what would give it away."""

import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset

from trl_bilevel import DataSelector


def _nll(model, rows):
    """Sum of each row's completion NLL and its number of tokens, from plain logits and one row at a time."""
    sums, counts = [], []
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        sums.append(-log_probs[labels != -100].gather(1, labels[labels != -100][:, None]).sum())
        counts.append((labels != -100).sum())
    return torch.stack(sums), torch.stack(counts)


def test_weights_act_on_rows_and_not_on_the_mean_loss(make_trainer, build_model):
    """The batch's loss must not be averaged before weights are applied: all weight on row 2 trains on row 2 alone."""
    selector = DataSelector(4)
    selector.assign(torch.arange(4), torch.tensor([-50.0, -50.0, 1.0, -50.0]))
    trainer = make_trainer(
        train_dataset=prompt_completion_rows(4), data_selector=selector, selector_learning_rate=0.0, max_steps=1,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.args.validation_weight = 0.0  # not allowed to users
    trainer.train()
    model = build_model()
    rows = sorted(trainer.train_dataset, key=lambda row: row["bilevel_sample_index"])
    sums, counts = _nll(model, rows)
    (4 * sums[2] / counts.sum()).backward()
    expected = {name: (value - 0.5 * value.grad).detach() for name, value in model.named_parameters()}
    torch.testing.assert_close(dict(trainer.model.named_parameters()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prompts_are_cut_at_the_right_column_and_labels_shifted_once(
    make_trainer, build_model, tokenizer, padding_side, monkeypatch
):
    """The losses that reach the selector are those of each row on its own, whatever the padding."""
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    trainer = make_trainer(max_steps=1)
    updates = []
    monkeypatch.setattr(trainer.data_selector, "update", lambda rows, losses: updates.append((rows, losses)))
    trainer.train()
    rows = {row["bilevel_sample_index"]: row for row in trainer.train_dataset}
    (indices, losses), *_ = updates
    with torch.no_grad():
        sums, counts = _nll(build_model(), [rows[index] for index in indices.tolist()])
    torch.testing.assert_close(losses, sums / counts, rtol=1e-4, atol=1e-5)


def test_short_validation_set_does_not_cut_the_epoch(make_trainer, monkeypatch):
    """`zip` over two loaders ends with the shorter one; here 24 training rows meet 5 validation rows again."""
    trainer = make_trainer(validation_dataset=prompt_completion_rows(5, 1000), max_steps=-1, num_train_epochs=1)
    validation_rows = []
    paired = trainer._get_paired_sampler

    def record(dataset):
        sampler = paired(dataset)
        rows_of = sampler.validation_stream.rows
        monkeypatch.setattr(
            sampler.validation_stream, "rows", lambda *span: validation_rows.extend(rows_of(*span)) or rows_of(*span)
        )
        return sampler

    monkeypatch.setattr(trainer, "_get_paired_sampler", record)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.data_selector.scored.all()
    counts = torch.tensor(validation_rows).bincount(minlength=5)
    assert counts.sum() == 24
    assert counts.max() - counts.min() <= 1


def test_weights_follow_rows_through_shuffling_and_filtering(make_trainer, build_model, monkeypatch):
    """A row in the middle is dropped and the others are shuffled: every loss reaches the row it is the loss of."""
    rows = list(prompt_completion_rows(12))
    rows[5] = {"prompt": "x y z " * 60, "completion": " 1"}
    trainer = make_trainer(
        train_dataset=Dataset.from_list(rows), shuffle_dataset=True, max_length=40, learning_rate=0.0, max_steps=-1,
        num_train_epochs=1, per_device_train_batch_size=3,
    )  # fmt: skip
    losses = {}
    monkeypatch.setattr(
        trainer.data_selector,
        "update",
        lambda indices, values: losses.update(zip(indices.tolist(), values.tolist(), strict=True)),
    )
    trainer.train()
    assert sorted(losses) == [index for index in range(12) if index != 5]
    tokenizer, model = trainer.processing_class, build_model()
    for index, loss in losses.items():
        prompt = tokenizer(rows[index]["prompt"])["input_ids"]
        tokens = tokenizer(rows[index]["prompt"] + rows[index]["completion"] + "<eos>")["input_ids"][:40]
        labels = [-100] * len(prompt) + tokens[len(prompt) :]
        with torch.no_grad():
            sums, counts = _nll(model, [{"input_ids": tokens, "labels": labels}])
        assert loss == pytest.approx((sums / counts).item(), rel=1e-4)
