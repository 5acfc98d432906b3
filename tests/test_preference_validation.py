"""Preference pairs as validation rows, against TRL's own DPO trainer on the same pairs."""

import math

import pytest
import torch
from conftest import QUIET_CPU_RUN, prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer

from trl_bilevel.losses import preference_losses
from trl_bilevel.preference_pairs import REFERENCE_NLL


def _pairs(num_pairs=6, conversational=False, implicit=False):
    rows = []
    for pair in range(num_pairs):
        prompt, chosen, rejected = f"add {pair} and 7:", f" {pair + 1}" + " ok" * (pair % 3), f" {pair + 7} no"
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        if implicit:
            rows.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def _lora(model, seed=0):
    """An adapter that already differs from its base, so that the log-ratios are not 0."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def test_losses_are_dpo_by_hand():
    nll, reference = torch.tensor([2.0, 5.0, 1.0, 1.5]), torch.tensor([3.0, 4.0, 1.0, 1.0])
    losses, chosen, rejected = preference_losses(nll, reference, beta=0.5)
    # pair 1: rewards 0.5 * (3 - 2) and 0.5 * (4 - 5); pair 2: 0 and 0.5 * (1 - 1.5)
    torch.testing.assert_close(chosen, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(rejected, torch.tensor([-0.5, -0.25]))
    expected = [-math.log(1 / (1 + math.exp(-1.0))), -math.log(1 / (1 + math.exp(-0.25)))]
    torch.testing.assert_close(losses, torch.tensor(expected))


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
def test_logged_loss_and_rewards_are_those_of_dpo_trainer(
    make_trainer, build_model, tokenizer, tmp_path, conversational, implicit
):
    """A DPOTrainer on the same model reports the same at every step: its reference is the model at the start too."""
    pairs = _pairs(conversational=conversational, implicit=implicit)
    options = {"learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = make_trainer(
        model=_lora(build_model()), validation_dataset=pairs, validation_loss_type="dpo", beta=0.3,
        validation_weight=1.0, per_device_train_batch_size=6, max_steps=3, **options,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[2]

    dpo_config = DPOConfig(
        str(tmp_path / "dpo"), beta=0.3, per_device_train_batch_size=6, max_steps=3, logging_steps=1, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=None,
        max_length=1024, **options,
    )  # fmt: skip
    reference = DPOTrainer(_lora(build_model()), args=dpo_config, train_dataset=pairs, processing_class=tokenizer)
    reference.train()
    expected = reference.state.log_history[2]
    assert expected["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert logged["validation_loss"] == pytest.approx(expected["loss"], abs=1e-4)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert logged[f"rewards/{name}"] == pytest.approx(expected[f"rewards/{name}"], abs=1e-4)


def test_validation_term_alone_takes_the_step_of_dpo_trainer(make_trainer, build_model, tokenizer, tmp_path):
    """With lambda = 1 the model's step is DPO's: the same adapter after three steps on the same order of pairs."""
    pairs = _pairs(4)
    options = {"learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = make_trainer(
        model=_lora(build_model()), validation_dataset=pairs, validation_loss_type="dpo", beta=0.3,
        validation_weight=1.0, max_steps=3, **options,
    )  # fmt: skip
    trainer.train()
    dpo_config = DPOConfig(
        str(tmp_path / "dpo"), beta=0.3, per_device_train_batch_size=4, max_steps=3, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=None, **options,
    )  # fmt: skip
    reference = DPOTrainer(_lora(build_model()), args=dpo_config, train_dataset=pairs, processing_class=tokenizer)
    reference.train()
    before = _lora(build_model()).state_dict()
    for name, value in reference.model.named_parameters():
        if "lora" in name and ".ref." not in name:
            assert not torch.equal(value, before[name])
            torch.testing.assert_close(dict(trainer.model.named_parameters())[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_accumulation_equals_one_large_batch(make_trainer, build_model, tokenizer, padding_side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    results = []
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            model=_lora(build_model()), validation_dataset=_pairs(), validation_loss_type="dpo", beta=0.3,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, max_steps=6,
            validation_weight=0.6, optim="sgd", learning_rate=0.3,
        )  # fmt: skip
        trainer.train()
        adapter = {name: value.detach() for name, value in trainer.model.named_parameters() if "lora" in name}
        losses = [entry["validation_loss"] for entry in trainer.state.log_history if "validation_loss" in entry]
        results.append({"weights": trainer.data_selector.weights(), "losses": torch.tensor(losses), **adapter})
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_reference_without_adapter_is_the_model_before_training(make_trainer, build_model):
    """Also where the model moved on: the likelihoods are computed before the first step."""
    trainer = make_trainer(validation_dataset=_pairs(4), validation_loss_type="dpo")
    stored = trainer.validation_dataset[0][f"chosen_{REFERENCE_NLL}"]
    trainer.train()
    pair = trainer.validation_dataset[0]
    assert pair[f"chosen_{REFERENCE_NLL}"] == stored
    log_probs = build_model()(torch.tensor([pair["chosen_input_ids"]])).logits[0, :-1].log_softmax(-1)
    labels = torch.tensor(pair["chosen_labels"][1:])
    nll = -log_probs[labels != -100].gather(-1, labels[labels != -100][:, None]).sum()
    assert stored == pytest.approx(nll.item(), rel=1e-5)
    assert trainer.state.log_history[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.state.log_history[-2]["validation_loss"] < math.log(2)


@pytest.mark.parametrize("has_adapter", [True, False])
def test_resumed_run_equals_the_unbroken_one(make_trainer, build_model, has_adapter):
    """The reference is what it was: the base without its adapter, or the model before its first step."""
    options = {"validation_dataset": _pairs(), "validation_loss_type": "dpo", "beta": 0.3, "max_steps": 6}

    def make(**more):
        model = _lora(build_model()) if has_adapter else build_model()
        return make_trainer(model=model, **options, **more)

    unbroken = make(save_strategy="steps", save_steps=3)
    unbroken.train()
    resumed = make(output_dir=unbroken.args.output_dir + "-resumed")
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-3")
    assert torch.equal(resumed.data_selector.weights(), unbroken.data_selector.weights())
    first, second = (dict(trainer.model.named_parameters()) for trainer in (unbroken, resumed))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_truncation_drops_whole_pairs(make_trainer, caplog):
    pairs = _pairs(5)
    long_prompt = {"prompt": "a b c " * 60, "chosen": " yes", "rejected": " no"}
    pairs = Dataset.from_list([*pairs, long_prompt])
    trainer = make_trainer(validation_dataset=pairs, validation_loss_type="dpo", max_length=40)
    assert len(trainer.validation_dataset) == 5
    assert "1 of 6 rows of `validation_dataset` have no completion token left" in caplog.text
    trainer.train()


@pytest.mark.filterwarnings("ignore:.*'keep_end':FutureWarning")
@pytest.mark.parametrize("max_length", [None, 12])
def test_truncation_keeps_the_end(make_trainer, max_length):
    pairs = _pairs(5)
    options = {"validation_dataset": pairs, "validation_loss_type": "dpo"}
    whole = make_trainer(**options).validation_dataset
    kept = make_trainer(**options, truncation_mode="keep_end", max_length=max_length).validation_dataset
    for side in ("chosen", "rejected"):
        expected = [ids[-(max_length or 1000) :] for ids in whole[f"{side}_input_ids"]]
        assert kept[f"{side}_input_ids"][:] == expected
        assert max(map(len, expected)) == (max_length or max(map(len, whole[f"{side}_input_ids"])))


def test_a_pair_with_an_infinite_loss_leaves_as_a_whole(make_trainer, build_model, monkeypatch):
    """One completion of a pair is broken: the other takes no part either, and the run goes on."""
    trainer = make_trainer(
        model=_lora(build_model()), validation_dataset=_pairs(4), validation_loss_type="dpo", max_steps=2,
        value_function="none",
    )  # fmt: skip
    forward, batches = trainer._forward, []

    def broken_forward(model, inputs, layout):
        outputs, losses = forward(model, inputs, layout)
        batches.append(len(losses.nll))
        if len(batches) == 1:
            losses = losses._replace(nll=losses.nll.clone().index_fill(0, torch.tensor([5]), math.nan))
        return outputs, losses

    monkeypatch.setattr(trainer, "_forward", broken_forward)
    trainer.train()
    assert batches == [12, 10, 12]  # 4 rows and 4 pairs, then without the pair
    assert trainer.state.log_history[0]["selector/nonfinite_rows"] == 2
    assert all(value.isfinite().all() for value in trainer.model.parameters())


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"validation_loss_type": "dpo"}, None, "has no column 'chosen'"),
        ({"validation_loss_type": "dpo"}, ["rejected"], "has no column 'rejected'"),
        ({}, [], "Set `validation_loss_type='dpo'`"),
    ],
)
def test_wrong_kind_of_validation_rows(make_trainer, options, columns, message):
    dataset = prompt_completion_rows(6) if columns is None else _pairs().remove_columns(columns)
    with pytest.raises(ValueError, match=message):
        make_trainer(validation_dataset=dataset, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_loss_type": "ipo"}, "must be 'nll' or 'dpo', got 'ipo'"),
        ({"validation_loss_type": "dpo", "beta": 0.0}, "`beta` must be a finite number larger than 0, got 0.0"),
        ({"beta": 0.2}, r"`beta=0.2` has no effect with `validation_loss_type='nll'`"),
    ],
)
def test_bad_options(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def _with_nan(rows, token="#"):
    """Pairs of which some have a token whose embedding is NaN."""
    pairs = _pairs()
    return pairs.map(lambda pair, row: {"prompt": pair["prompt"] + token * (row in rows)}, with_indices=True)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (range(6), "All 6 pairs of `validation_dataset` have a NaN or infinite loss"),
        ([0, 2, 3], r"`validation_dataset` has 3 pairs to train on, fewer than one batch of 4 .*accumulation steps"),
    ],
)
def test_too_few_pairs_with_a_reference_are_refused_before_training(
    make_trainer, build_model, tokenizer, broken, message
):
    model = build_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("#")] = torch.nan
    options = {"model": model, "validation_dataset": _with_nan(broken), "validation_loss_type": "dpo"}
    with pytest.raises(ValueError, match=message):
        make_trainer(**options, per_device_validation_batch_size=4)
    if len(broken) < 6:
        trainer = make_trainer(**options, max_steps=1)
        assert len(trainer.validation_dataset) == trainer.validation_batch_size == 3


def test_reference_is_what_an_adapter_has_learned_before(make_trainer, build_model, tokenizer, tmp_path):
    """Else the first step would already see rewards: those of the earlier training."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(build_model(), config).save_pretrained(tmp_path / "adapter")  # far from the base

    def load():
        return PeftModel.from_pretrained(build_model(), tmp_path / "adapter", is_trainable=True)

    pairs = _pairs(8)
    trainer = make_trainer(
        model=load(), validation_dataset=pairs, validation_loss_type="dpo", learning_rate=0.0, max_steps=1
    )
    trainer.train()
    options = {**QUIET_CPU_RUN, "per_device_train_batch_size": 4, "learning_rate": 0.0, "max_steps": 1}
    dpo = DPOTrainer(
        load(), args=DPOConfig(str(tmp_path / "dpo"), **options), train_dataset=pairs, processing_class=tokenizer
    )
    dpo.train()
    for side in ("chosen", "rejected"):
        found, expected = (one.state.log_history[0][f"rewards/{side}"] for one in (trainer, dpo))
        assert expected == 0
        assert found == pytest.approx(0, abs=1e-5)
