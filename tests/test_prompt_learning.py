"""Adapters that learn a prompt: their virtual tokens are in the model's outputs, and in none of its inputs."""

import pytest
import torch
from conftest import prompt_completion_rows
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig


ADAPTERS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}


def _mean_nll(model, row):
    """From plain logits, whose last positions are the row's own."""
    tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits[0, -tokens.shape[1] : -1]
    counted = labels != -100
    return -logits.log_softmax(-1)[counted].gather(-1, labels[counted][:, None]).mean().item()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "options",
    [
        {"value_function": "none"},
        {"value_function": "adapter"},
        {"selection_method": "bmo", "gradient_accumulation_steps": 2},
    ],
    ids=["bds", "value function", "bmo"],
)
def test_rows_are_weighed_by_their_own_losses(make_trainer, adapter, options):
    trainer = make_trainer(peft_config=ADAPTERS[adapter](), learning_rate=0.0, **options)
    seen, update = {}, trainer._selection.update

    def record(selector, rows, row_means, losses):
        seen.update(zip(rows.tolist(), row_means.tolist(), strict=True))
        update(selector, rows, row_means, losses)

    trainer._selection.update = record
    trainer.train()
    assert len(seen) == 24
    model = trainer.model.eval()
    for row, loss in seen.items():
        assert loss == pytest.approx(_mean_nll(model, trainer.train_dataset[row]), abs=1e-5)
    scored = trainer.score(prompt_completion_rows(3))
    for row in range(3):
        assert scored["loss"][row] == pytest.approx(_mean_nll(model, trainer.train_dataset[row]), abs=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_value_function_learns_a_prompt_of_its_own(make_trainer, adapter):
    trainer = make_trainer(peft_config=ADAPTERS[adapter](), learning_rate=0.1)
    before = {name: value.clone() for name, value in trainer.value_function.state().items()}
    trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    assert trainer.data_selector.weights().std() > 0
    own = dict(trainer.model.named_parameters())
    after = trainer.value_function.state()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], own[name]) for name in before)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_ratio": 0.5}, "`refine_ratio=0.5` is not supported with prompt learning, got an adapter of type '"),
        ({"amortized_selector": True}, "`amortized_selector=True` is not supported .* Use `amortized_selector=False`"),
        ({"packing": True, "max_length": 64}, "`packing=True` is not supported with prompt learning"),
        ({"padding_free": True, "max_length": None}, "`padding_free=True` is not supported with prompt learning"),
    ],
    ids=["refine_ratio", "amortized_selector", "packing", "padding_free"],
)
def test_what_counts_positions_is_refused_before_training(make_trainer, adapter, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=ADAPTERS[adapter](), **options)
