"""The value function: other values of the same adapter, and never to be seen outside the selector's step."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import prompt_completion_rows
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTTrainer, DataSelector
from trl_bilevel.batch_layout import PaddedLayout
from trl_bilevel.checkpoint_files import write_manifest
from trl_bilevel.value_function import VALUE_FUNCTION_FILE_NAME, optimizer_maker


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def make_lora_trainer(make_trainer):
    return lambda **options: make_trainer(
        **{"peft_config": LoraConfig(**LORA), "value_function": "adapter", "learning_rate": 3e-2, **options}
    )


def _adapter(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def _value_function(trainer):
    return {name: value.detach().clone() for name, value in trainer.value_function._own.items()}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.1},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.3},
    ],
)
def test_on_all_rows_it_is_the_adapter_that_sft_trains(
    make_lora_trainer, build_model, tokenizer, train_dataset, options
):
    """theta-hat = argmin of the training loss: SFTTrainer on the same rows, in the same order, step for step."""
    trainer = make_lora_trainer(value_function_rows="all", **options)
    trainer.train()
    sft_options = {option.name: getattr(trainer.args, option.name) for option in fields(SFTConfig) if option.init}
    reference = SFTTrainer(
        build_model(), SFTConfig(**sft_options), train_dataset=train_dataset, processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    reference.train()
    torch.testing.assert_close(_value_function(trainer), _adapter(reference.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        next(iter(_adapter(trainer.model).values())), next(iter(_adapter(reference.model).values()))
    )


def test_on_rejected_rows_a_row_counts_by_what_speaks_against_it(make_lora_trainer, monkeypatch):
    """By default: 1 - sigma, in units of that of a row of which nothing is known; and the divisor is all rows'."""
    trainer = make_lora_trainer(max_steps=1, per_device_train_batch_size=24, per_device_validation_batch_size=10)
    logits = torch.linspace(-3, 3, 24)
    trainer.data_selector._sums.set_logits(trainer.data_selector._unit_logits, torch.arange(24), logits)
    fit, seen = trainer._fit_value_function, []

    def record(value_function, inputs):
        seen.append(inputs["step_rows"])
        fit(value_function, inputs)

    monkeypatch.setattr(trainer, "_fit_value_function", record)
    trainer.train()
    (rows,) = seen
    indices = trainer._step_sample_indices
    expected = torch.sigmoid(-logits[indices]) / 0.8 / rows.num_tokens[:24].sum()
    torch.testing.assert_close(rows.value_coefficients.cpu().float(), expected)


def test_steps_are_those_of_the_kind_of_selector(make_lora_trainer):
    for options, step in (({}, 3.0), ({"value_function": "none"}, 1.0), ({"selector_optimizer": "adam"}, 5e-3)):
        assert make_lora_trainer(**options).data_selector.learning_rate == step


def test_selector_follows_the_excess_loss(make_lora_trainer, monkeypatch):
    """The first update: no excess yet. The second: losses of the two sets of values after one step each."""
    trainer = make_lora_trainer(max_steps=2, per_device_train_batch_size=24, per_device_validation_batch_size=10)
    updates = []
    update = trainer.data_selector.update

    def record(rows, losses):
        updates.append((rows.clone(), losses.clone()))
        if len(updates) == 2:
            collator = trainer.data_collator
            order = {int(index): row for row, index in enumerate(trainer.train_dataset["bilevel_sample_index"])}
            batch = collator([trainer.train_dataset[order[int(row)]] for row in rows])
            means = []
            with torch.no_grad():
                # theta and theta-hat before their second step, and theta back as it is
                for values in (*before_step, _adapter(trainer.model)):
                    means.append(trainer._forward(trainer.model, batch, PaddedLayout())[1].mean)
                    for name, value in trainer.model.named_parameters():
                        if value.requires_grad:
                            value.copy_(values[name])
            updates.append(means[1] - means[2])
        update(rows, losses)

    fit = trainer._fit_value_function
    before_step = []

    def remember(value_function, inputs):
        before_step[:] = [_adapter(trainer.model), {**_value_function(trainer)}]
        fit(value_function, inputs)

    monkeypatch.setattr(trainer.data_selector, "update", record)
    monkeypatch.setattr(trainer, "_fit_value_function", remember)
    trainer.train()
    torch.testing.assert_close(updates[0][1], torch.zeros(24), atol=1e-6, rtol=0)
    assert updates[1][1].abs().max() > 1e-4
    torch.testing.assert_close(updates[1][1], updates[2], rtol=1e-4, atol=1e-5)


def test_weights_of_the_rows_it_learns():
    rows = torch.arange(3)
    for activation in ("softmax", "sigmoid"):
        selector = DataSelector(3, activation, learning_rate=1.0)
        for kind in ("rejected", "all", "selected"):
            assert selector.value_function_weights_of(rows, kind).tolist() == pytest.approx([1, 1, 1])
        selector.update(rows, torch.tensor([0.0, 1.0, 5.0]))
        assert torch.equal(selector.value_function_weights_of(rows, "selected"), selector.weights())
        assert selector.value_function_weights_of(rows, "all").tolist() == [1, 1, 1]
        accepted = (
            selector.weights() / (1 + selector.weights()) if activation == "softmax" else selector.logits.sigmoid()
        )
        torch.testing.assert_close(selector.value_function_weights_of(rows, "rejected"), 2 * (1 - accepted))


def test_what_the_user_gets_holds_no_trace_of_it(make_lora_trainer, build_model, tmp_path, validation_dataset):
    """Saved adapter, evaluation and generation are those of the model's own values."""
    trainer = make_lora_trainer(eval_dataset=validation_dataset, save_strategy="steps", save_steps=3)
    trainer.train()
    own, other = _adapter(trainer.model), _value_function(trainer)
    assert any(not torch.allclose(own[name], other[name]) for name in own)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.save_model(str(tmp_path / "adapter"))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert not any((tmp_path / "adapter" / name).is_dir() for name in files)
    # What Trainer.push_to_hub uploads of the folder: everything but `_*`
    assert [name for name in files if "value_function" in name] == [VALUE_FUNCTION_FILE_NAME]
    assert VALUE_FUNCTION_FILE_NAME.startswith("_")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(own)
    for name, value in saved.items():
        torch.testing.assert_close(value, own[name.replace(".weight", ".default.weight")])

    loaded = PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    trainer.model.eval()
    generated = [model.generate(**inputs, max_new_tokens=8, do_sample=False) for model in (trainer.model, loaded)]
    assert torch.equal(*generated)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(**inputs).logits, loaded(**inputs).logits)
    reference = SFTTrainer(
        loaded, SFTConfig(str(tmp_path / "eval"), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
                          gradient_checkpointing=None),
        train_dataset=validation_dataset, eval_dataset=validation_dataset, processing_class=trainer.processing_class,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-5)


def test_push_leaves_it_behind(make_lora_trainer, monkeypatch):
    """What Trainer hands to the Hub client, filtered by the client's own function."""
    trainer = make_lora_trainer(max_steps=1)
    trainer.train()
    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: RepoUrl(f"https://localhost/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: uploads.append(options))
    trainer.hub_model_id = "me/adapter"
    trainer.push_to_hub()
    (upload,) = uploads
    files = [str(path.relative_to(upload["folder_path"])) for path in Path(upload["folder_path"]).rglob("*")]
    assert VALUE_FUNCTION_FILE_NAME in files
    pushed = list(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert "adapter_model.safetensors" in pushed
    assert VALUE_FUNCTION_FILE_NAME not in pushed


def test_values_come_back_after_an_error(make_lora_trainer):
    trainer = make_lora_trainer(max_steps=2)
    trainer.train()
    for value in trainer.model.parameters():
        value.grad = torch.randn_like(value)
    own, gradients = _adapter(trainer.model), [value.grad for value in trainer.model.parameters()]

    def fail_inside():
        with trainer.value_function.active():
            assert any(not torch.equal(value, own[name]) for name, value in _adapter(trainer.model).items())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_inside()
    assert all(torch.equal(value, own[name]) for name, value in _adapter(trainer.model).items())
    assert all(value.grad is gradient for value, gradient in zip(trainer.model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("selector_activation", ["softmax", "sigmoid"])
def test_resumed_run_equals_an_unbroken_one(make_lora_trainer, tmp_path, selector_activation):
    options = {"max_steps": 9, "selector_activation": selector_activation}
    unbroken = make_lora_trainer(**options)
    unbroken.train()
    stopped = make_lora_trainer(**options, save_strategy="steps", save_steps=4, output_dir=str(tmp_path / "stopped"))
    stopped.train()
    resumed = make_lora_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    torch.testing.assert_close(_value_function(resumed), _value_function(unbroken), rtol=0, atol=0)
    torch.testing.assert_close(_adapter(resumed.model), _adapter(unbroken.model), rtol=0, atol=0)
    assert torch.equal(resumed.data_selector.weights(), unbroken.data_selector.weights())


def test_accumulation_equals_one_large_batch(make_lora_trainer):
    results = []
    for batch_size, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = make_lora_trainer(
            train_dataset=prompt_completion_rows(27), per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps, max_steps=-1, num_train_epochs=2, optim="sgd", learning_rate=0.3,
            filter_ratio=0.25, validation_weight=0.6,
        )  # fmt: skip
        trainer.train()
        results.append({"weights": trainer.data_selector.weights(), **_value_function(trainer)})
    assert results[0]["weights"].std() > 1e-3
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_recomputes_with_the_right_values(make_lora_trainer):
    trainer = make_lora_trainer(activation_checkpointing=True)
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    reference = make_lora_trainer()
    reference.train()
    torch.testing.assert_close(_value_function(trainer), _value_function(reference), rtol=1e-4, atol=1e-6)


def test_row_without_a_finite_loss_is_left_out(make_lora_trainer, monkeypatch):
    trainer = make_lora_trainer(max_steps=3)
    forward, calls = trainer._forward, []

    def broken_forward(model, inputs, layout):
        outputs, losses = forward(model, inputs, layout)
        calls.append(len(losses.nll))
        if len(calls) == 2:  # the value function's first
            losses = losses._replace(nll=losses.nll * torch.tensor([1.0, torch.nan, 1.0, 1.0]))
        return outputs, losses

    monkeypatch.setattr(trainer, "_forward", broken_forward)
    trainer.train()
    assert calls[:3] == [8, 4, 3]
    assert trainer.data_selector.scored.sum() == 11
    assert all(value.isfinite().all() for value in _value_function(trainer).values())


def test_works_on_a_quantized_base_without_a_copy_of_it(make_lora_trainer, build_model, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    trainer = make_lora_trainer(
        model=str(tmp_path / "base"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(**LORA),
    )
    before = {name: value.data_ptr() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    after = {name: value.data_ptr() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    assert before == after
    trained = sum(value.numel() for value in _adapter(trainer.model).values())
    assert sum(value.numel() for value in _value_function(trainer).values()) == trained
    assert trainer.data_selector.weights().std() > 0


@pytest.mark.parametrize("load_best_model_at_end", [False, True])
def test_reloaded_adapter_is_the_one_that_is_swapped(make_lora_trainer, validation_dataset, load_best_model_at_end):
    """PEFT replaces an adapter in bf16 by parameters in fp32 when Trainer loads a checkpoint."""
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
        "eval_dataset": validation_dataset, "load_best_model_at_end": load_best_model_at_end,
    }  # fmt: skip
    first, second = make_lora_trainer(**options), make_lora_trainer(**options)
    for trainer in (first, second):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        trainer.value_function.rebind()
    first.train()
    second.train(resume_from_checkpoint=os.path.join(first.args.output_dir, "checkpoint-3"))
    own, other = _adapter(second.model), _value_function(second)
    with second.value_function.active():
        inside = _adapter(second.model)
    assert all(torch.equal(inside[name], other[name]) for name in own)
    assert any(not torch.equal(inside[name], own[name]) for name in own)
    scored = second.score(validation_dataset)
    assert max(abs(score) for score in scored["score"]) > 1e-4
    assert torch.equal(second.data_selector.weights(), first.data_selector.weights())
    assert {value.dtype for value in own.values()} == {torch.bfloat16}


def test_starts_from_the_users_own_adapter(make_lora_trainer, build_model, tmp_path):
    first = make_lora_trainer(max_steps=2)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(build_model(), tmp_path / "adapter", is_trainable=True)
    second = make_lora_trainer(model=model, peft_config=None)
    torch.testing.assert_close(_value_function(second), _adapter(first.model), rtol=0, atol=0)
    second.train()


def test_checkpoint_without_it_is_refused(make_lora_trainer):
    trainer = make_lora_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = os.path.join(trainer.args.output_dir, "checkpoint-1")
    path = os.path.join(checkpoint, VALUE_FUNCTION_FILE_NAME)
    with open(path, "r+b") as file:
        file.truncate(40)
    with pytest.raises(ValueError, match=f"{VALUE_FUNCTION_FILE_NAME} is damaged"):
        make_lora_trainer().train(resume_from_checkpoint=checkpoint)
    os.remove(path)
    write_manifest(checkpoint)  # as if it had never been there
    with pytest.raises(FileNotFoundError, match="the value function cannot be restored"):
        make_lora_trainer().train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"peft_config": None}, False),
        ({"selection_method": "bmo"}, False),
        ({"selector_optimizer": "adam"}, False),
        ({"value_function": "none"}, False),
    ],
)
def test_default_is_to_have_one_where_it_works(make_trainer, options, expected):
    trainer = make_trainer(**{"peft_config": LoraConfig(**LORA), **options})
    assert (trainer.value_function is not None) == expected
    assert trainer.data_selector.activation == ("sigmoid" if expected else "softmax")
    assert trainer.data_selector.centered != expected


def test_its_options_are_refused_where_the_default_is_none(make_trainer):
    with pytest.raises(ValueError, match=r"`selector_prior=0\.4` has no effect with softmax weights"):
        make_trainer(selector_prior=0.4)
    with pytest.raises(ValueError, match="`value_function_rows='all'` has no effect without a value function"):
        make_trainer(value_function_rows="all")


def test_needs_an_adapter(make_lora_trainer):
    with pytest.raises(ValueError, match="Pass `peft_config=LoraConfig"):
        make_lora_trainer(peft_config=None)


def test_adapter_that_is_not_trained_is_refused(make_lora_trainer, build_model, tmp_path):
    make_lora_trainer().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no parameter that can be trained. .*is_trainable=True"):
        make_lora_trainer(model=PeftModel.from_pretrained(build_model(), tmp_path), peft_config=None)


def test_optimizer_tied_to_the_model_is_refused():
    with pytest.raises(ValueError, match="`optim='lomo'` works on the layers of one model"):
        optimizer_maker(torch.optim.SGD, {"lr": 0.1, "model": torch.nn.Linear(1, 1)}, 0.0, "lomo")
    with pytest.raises(ValueError, match="`optim='muon'` works on the layers of one model"):
        optimizer_maker(lambda: None, {}, 0.0, "muon")  # a factory


def test_optimizer_without_weight_decay_is_the_models(make_lora_trainer):
    trainer = make_lora_trainer(optimizer_cls_and_kwargs=(torch.optim.Rprop, {"lr": 1e-2}), max_steps=2)
    before = _value_function(trainer)
    trainer.train()
    assert isinstance(trainer.value_function._optimizer, torch.optim.Rprop)
    assert any(not torch.equal(value, before[name]) for name, value in _value_function(trainer).items())


class _Interrupt(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_interrupted_within_an_accumulation_and_resumed_at_once(make_lora_trainer, tmp_path):
    """In the same process, as in a notebook: of the interrupted step no gradient is left."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_lora_trainer(**options, output_dir=str(tmp_path / "unbroken"))
    unbroken.train()
    trainer = make_lora_trainer(**options, callbacks=[_Interrupt()], output_dir=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(_Interrupt)
    trainer.train(resume_from_checkpoint=True)
    for name, value in _value_function(trainer).items():
        assert torch.equal(value, _value_function(unbroken)[name]), name
    assert torch.equal(trainer.data_selector.weights(), unbroken.data_selector.weights())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_function": "model"}, "must be 'none' or 'adapter', got 'model'"),
        ({"value_function_rows": "good"}, "must be 'rejected' or 'all' or 'selected', got 'good'"),
        ({"selector_prior": 1.0}, "larger than 0 and less than 1, got 1.0"),
        ({"value_function": "none", "selector_prior": 0.3}, "`selector_prior=0.3` has no effect"),
        ({"value_function": "none", "value_function_rows": "all"}, "`value_function_rows='all'` has no effect"),
        ({"value_function": "adapter", "selection_method": "bmo"}, "has no effect with `selection_method='bmo'`"),
    ],
)
def test_bad_options(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


@pytest.mark.parametrize("value_function", [None, "adapter"])
def test_optimizer_set_on_the_trainer_is_refused(make_lora_trainer, value_function):
    """theta-hat would go on with another one, and its loss would tell of the optimizers and not of the rows."""
    trainer = make_lora_trainer(value_function=value_function)
    trainer.optimizer = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    with pytest.raises(ValueError, match=r"`trainer\.optimizer`, which was set.*value_function='none'"):
        trainer.train()


class _OwnOptimizer(BilevelSFTTrainer):
    def create_optimizer(self, *args, **kwargs):
        self.optimizer = create_loraplus_optimizer(self.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
        return self.optimizer


def test_trainer_with_its_own_create_optimizer(make_config, build_model, tokenizer, train_dataset, validation_dataset):
    def make(**options):
        return _OwnOptimizer(
            build_model(),
            make_config(max_steps=1, **options),
            train_dataset=train_dataset,
            validation_dataset=validation_dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )

    trainer = make()  # by default there is one only where it works
    trainer.train()
    assert trainer.value_function is None
    with pytest.raises(ValueError, match=r"`_OwnOptimizer\.create_optimizer`, which was overridden"):
        make(value_function="adapter")


def test_weight_decay_is_that_of_the_model(make_lora_trainer, build_model):
    """Trainer spares biases and norms; theta-hat's are spared too, or the selector would see the difference."""
    config = LoraConfig(r=4, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = make_lora_trainer(model=build_model("gpt2"), peft_config=config, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    own = {id(value): name for name, value in trainer.value_function._own.items()}

    def decays(optimizer, names):
        return {names[id(one)]: group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}

    expected = decays(trainer.optimizer, names)
    assert {*expected.values()} == {0.0, 0.1}
    assert decays(trainer.value_function._optimizer, own) == expected
