"""What TRL offers to save memory or time works, or is refused before training."""

import importlib.util

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.utils import counters


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _result(trainer):
    trainer.train()
    return trainer.data_selector.logits, {name: value.detach() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("option", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(kwargs|enable).*:FutureWarning")  # TRL calls the latter
def test_selective_checkpointing(make_trainer, option):
    options = {"activation_checkpointing": True, option: {"selective": True}}
    torch.testing.assert_close(_result(make_trainer(**options)), _result(make_trainer()))
    with pytest.raises(ValueError, match="Selective activation checkpointing does not work with a PEFT adapter"):
        make_trainer(peft_config=LoraConfig(**LORA), **options)


def test_activation_offloading_needs_an_accelerator(make_trainer, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`activation_offloading=True` needs an accelerator"):
        make_trainer(activation_offloading=True, activation_checkpointing=True)


def test_both_levels_offload_activations(make_trainer):
    """TRL's context is a pair of hooks on what the backward pass needs; here hooks of our own that count."""

    class Counting(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            self.packed = 0
            super().__init__(self.pack, lambda value: value.clone())

        def pack(self, value):
            self.packed += 1
            return value.clone()

    plain, *offloaded = (make_trainer(peft_config=LoraConfig(**LORA), value_function=kind)
                         for kind in ("adapter", "adapter", "none"))  # fmt: skip
    counts, results = [], []
    for trainer in offloaded:
        trainer.maybe_activation_offload_context = counting = Counting()
        results.append(_result(trainer))
        counts.append(counting.packed)
    torch.testing.assert_close(results[0], _result(plain))
    assert counts[0] > 1.8 * counts[1] > 0  # the value function's pass is as deep as the model's
    assert results[0][0].std() > 0


@pytest.mark.filterwarnings("ignore")  # of PyTorch's tracer, about itself and TRL's loss
@pytest.mark.parametrize("value_function", [pytest.param(None, marks=pytest.mark.slow), "adapter"])
def test_compiled_model(make_trainer, value_function):
    """Traced and differentiated as by any backend, without the minutes that generating code takes."""
    options = {"value_function": value_function, "max_steps": 3}
    if value_function is not None:
        options["peft_config"] = LoraConfig(**LORA)
    compiled = make_trainer(torch_compile=True, torch_compile_backend="aot_eager", **options)
    counters.clear()
    result = _result(compiled)
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(result, _result(make_trainer(**options)), rtol=1e-3, atol=1e-4)


def test_hub_kernels(make_trainer, build_model, tokenizer, tmp_path):
    """Where there is no kernel for the device, the model's own code runs; transformers refuses without the library."""
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "model_init_kwargs": {"use_kernels": True}}
    if importlib.util.find_spec("kernels") is None:
        with pytest.raises(ValueError, match=r"Kernels are not available\. Please install"):
            make_trainer(**options)
    else:
        torch.testing.assert_close(_result(make_trainer(**options)), _result(make_trainer()), rtol=1e-3, atol=1e-4)
