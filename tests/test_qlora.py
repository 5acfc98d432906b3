"""QLoRA as it is used: nf4 with double quantization, bf16, activation checkpointing, paged optimizers."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prompt_completion_rows
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


pytest.importorskip("bitsandbytes")

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_alpha": 16}
QLORA = {
    "bf16": True,
    "activation_checkpointing": True,
    "optim": "paged_adamw_8bit",
    "learning_rate": 1e-2,  # at twice that, tiny models in bf16 part company with each other
    "num_train_epochs": 5,
    "max_steps": -1,
}
REFINE = {
    "refine_ratio": 0.5,
    "refine_start_step": 8,
    "refine_every_steps": 8,
    "refine_max_new_tokens": 6,
    "refine_discard_flawed": False,
}
METHODS = {
    "bds": {"value_function": "none"},
    "bmo": {"selection_method": "bmo"},
    "value_function": {"value_function": "adapter"},
    "refined": {"value_function": "none", **REFINE},
    "packed": {"value_function": "adapter", "packing": True, "max_length": 80, "per_device_train_batch_size": 1},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flash attention.*"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),  # they work, without paging
]


def quantization(compute_dtype=torch.bfloat16):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@pytest.fixture
def base(build_model, tokenizer, tmp_path):
    """A model on disk, as users have it."""
    build_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make_qlora_trainer(make_trainer, base):
    def make(**options):
        defaults = {"model": base, "processing_class": None, "quantization_config": quantization()}
        return make_trainer(**{**defaults, **QLORA, "peft_config": LoraConfig(**LORA), **options})

    return make


def _losses(trainer, name="validation_loss"):
    return np.array([entry[name] for entry in trainer.state.log_history if name in entry])


@pytest.mark.parametrize("method", METHODS)
def test_same_as_on_the_dequantized_base(make_qlora_trainer, base, method):
    """
    The only difference that quantization may make is that of its weights: the same run on what they stand for,
    unquantized, learns the same weights of rows, up to the rounding of bf16.
    """
    options = METHODS[method]
    quantized = make_qlora_trainer(**options)
    linear = quantized.model.get_base_model().model.layers[0].mlp.up_proj
    assert type(linear.base_layer).__name__ == "Linear4bit"
    assert linear.base_layer.weight.quant_state.nested
    quantized.train()
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization()).dequantize()
    unquantized = make_qlora_trainer(model=model, quantization_config=None, **options)
    unquantized.train()
    np.testing.assert_allclose(_losses(quantized), _losses(unquantized), rtol=0.02)
    first, second = (trainer.data_selector.weights().log().numpy() for trainer in (quantized, unquantized))
    assert first.std() > 0.05
    assert np.corrcoef(first, second)[0, 1] > 0.98
    assert _losses(quantized)[-1] < 0.95 * _losses(quantized)[0]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_the_unbroken_one(make_qlora_trainer, tmp_path, method):
    options = {**METHODS[method], "save_strategy": "steps", "save_steps": 10, "num_train_epochs": 3}
    unbroken = make_qlora_trainer(**options)
    unbroken.train()
    resumed = make_qlora_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-10")
    assert torch.equal(resumed.data_selector.logits, unbroken.data_selector.logits)
    assert resumed.curate().to_list() == unbroken.curate().to_list()
    adapters = [{name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
                for trainer in (unbroken, resumed)]  # fmt: skip
    torch.testing.assert_close(adapters[1], adapters[0], rtol=0, atol=0)


def test_curated_and_published(hub, make_qlora_trainer, base, tokenizer):
    trainer = make_qlora_trainer(
        **METHODS["refined"], num_train_epochs=3, push_to_hub=True, hub_model_id="me/adapter",
    )  # fmt: skip
    trainer.train()
    trainer.push_curated_dataset("me/curated", keep_ratio=0.5)
    trainer.push_to_hub()
    curated = load_dataset("me/curated", split="train")
    assert curated.to_list() == trainer.curate(keep_ratio=0.5).remove_columns("refined_responses").to_list()
    card = hub.files("dataset", "me/curated")["README.md"].decode()
    assert "--load_in_4bit" in card
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization())
    loaded = PeftModel.from_pretrained(model, "me/adapter").eval()
    batch = tokenizer("add 1 and 2:", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = trainer.model.eval()(**batch).logits.float()
        torch.testing.assert_close(loaded(**batch).logits.float(), expected, rtol=0.02, atol=0.02)
    with loaded.disable_adapter(), torch.no_grad():
        assert not torch.allclose(loaded(**batch).logits.float(), expected, rtol=0.02, atol=0.02)


# ---- The example ----
EXAMPLE = Path(__file__).parents[1] / "examples" / "qlora_single_gpu.py"


def _bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("value_function", ["adapter", "none"])
def test_memory_estimate_is_what_a_run_holds(make_qlora_trainer, tokenizer, tmp_path, monkeypatch, value_function):
    """All that stays between steps, counted in a model that is really quantized; 8-bit states need 4,096 values."""
    spec = importlib.util.spec_from_file_location("qlora_single_gpu", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "qlora_single_gpu", example)
    spec.loader.exec_module(example)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    lora = {**LORA, "r": 16}
    trainer = make_qlora_trainer(
        model=str(tmp_path / "wide"),
        peft_config=LoraConfig(**lora),
        value_function=value_function,
        num_train_epochs=1,
        model_init_kwargs={"dtype": "bfloat16"},
    )
    trainer.train()
    base, adapters, gradients, states, inputs, _ = (
        size * 2**30 for size in example.estimate_memory(config, LoraConfig(**lora), trainer.args).values()
    )
    parameters = list(trainer.model.parameters())
    held = [value for value in parameters if not value.requires_grad]
    for value in held:
        if hasattr(value, "quant_state") and value.quant_state is not None:
            held = [*held, value.quant_state.absmax, value.quant_state.state2.absmax]
    assert base == pytest.approx(_bytes_of(held), rel=0.01)
    sets = [[value for value in parameters if value.requires_grad]]
    optimizers = [trainer.optimizer.optimizer]
    if value_function == "adapter":
        sets.append(list(trainer.value_function._own.values()))
        optimizers.append(trainer.value_function._optimizer)
    assert adapters == sum(map(_bytes_of, sets))
    assert gradients == _bytes_of(sets[0])
    found = [value for optimizer in optimizers for state in optimizer.state.values()
             for name, value in state.items() if name in ("state1", "state2")]  # fmt: skip
    assert states == pytest.approx(_bytes_of(found), rel=0.01)
    assert inputs == 2 * (2 * 4 * trainer.args.max_length) * 512 * 2  # layers, tokens, width, bytes


def test_example_on_a_tiny_model(base, tmp_path, monkeypatch, capsys):
    prompt_completion_rows(48).to_parquet(tmp_path / "mixture" / "train.parquet")
    prompt_completion_rows(16, 1000).to_parquet(tmp_path / "trusted" / "train.parquet")
    command = [str(EXAMPLE), "--model_name_or_path", base]
    monkeypatch.setattr(sys, "argv", [*command, "--estimate_only", "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "their optimizers' states, 8 bit" in capsys.readouterr().out
    assert not (tmp_path / "out" / "curated").exists()
    options = ["--dataset_name", str(tmp_path / "mixture"), "--validation_dataset_name", str(tmp_path / "trusted")]
    options += ["--output_dir", str(tmp_path / "out"), "--max_length", "80", "--gradient_accumulation_steps", "2"]
    options += ["--max_steps", "3", "--use_cpu", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    curated = load_dataset(str(tmp_path / "out" / "curated"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(curated) == 34
