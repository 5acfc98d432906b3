"""Rows with images, as `SFTTrainer` takes them: a tiny LLaVA and its processor, built from a config."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUIET_CPU_RUN, build_tokenizer, prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import SFTConfig, SFTTrainer


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIDE = 16  # pixels, in patches of 8: four tokens an image
LORA = {"r": 4, "target_modules": "model.language_model.*(q_proj|v_proj)"}


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@pytest.fixture
def build_vlm(processor):
    def build() -> LlavaForConditionalGeneration:
        tokenizer = processor.tokenizer
        sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **sizes,
        )
        vision = CLIPVisionConfig(hidden_size=16, image_size=SIDE, patch_size=8, projection_dim=16, **sizes)
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=text,
                vision_config=vision,
                image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                image_seq_length=4,
            )
        )

    return build


def image_rows(num_rows: int, kind: str = "image", offset: int = 0) -> Dataset:
    """A row is about the brightness of its image, in an own format of TRL's each."""
    rows: list[dict[str, Any]] = []
    for number in range(offset, offset + num_rows):
        image = Image.new("RGB", (SIDE, SIDE), ((37 * number) % 256,) * 3)
        question = {"role": "user", "content": f"how bright is {number}?"}
        answer = {"role": "assistant", "content": f"{(37 * number) % 256} it is" + " ok" * (number % 3)}
        if kind == "image":
            rows.append({"image": image, "messages": [question, answer]})
        elif kind == "images":  # none, one and two
            rows.append({"images": [image] * (number % 3), "messages": [question, answer]})
        elif kind == "parts":
            parts = [{"type": "image", "text": None}, {"type": "text", "text": question["content"]}]
            said = [{"type": "text", "text": answer["content"]}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
            rows.append({"images": [image], "messages": messages})
        else:
            rows.append({"images": [image], "prompt": [question], "completion": [answer]})
    return Dataset.from_list(rows)


@pytest.fixture
def make_vlm_trainer(make_trainer, build_vlm, processor):
    def make(kind: str = "image", **options: Any):
        given: dict[str, Any] = {
            "train_dataset": image_rows(12, kind),
            "validation_dataset": image_rows(6, kind, 100),
            "processing_class": processor,
            "max_length": None,
            "max_steps": 4,
        }
        return make_trainer(**{"model": build_vlm(), **given, **options})

    return make


@pytest.mark.parametrize("kind", ["image", "images", "parts", "prompt and completion"])
def test_without_validation_term_it_is_sft(make_vlm_trainer, build_vlm, processor, tmp_path, kind):
    options = {"max_steps": 4, "max_length": None, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 7}
    options["adam_epsilon"] = 1e-6
    trainer = make_vlm_trainer(kind, **options, selector_learning_rate=0.0)
    trainer.args.validation_weight = 0.0  # not allowed to users
    trainer.train()
    reference = SFTTrainer(
        build_vlm(),
        SFTConfig(str(tmp_path / "sft"), **QUIET_CPU_RUN, **options),
        train_dataset=image_rows(12, kind),
        processing_class=processor,
    )
    reference.train()
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (trainer, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] - losses[0][-1] > 0.1
    expected = dict(reference.model.named_parameters())
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_text_alone_trains_the_language_model_alone(make_vlm_trainer):
    """A processor, and rows that are tokenized beforehand as those of a text model."""
    rows, trusted = (prompt_completion_rows(12, offset) for offset in (0, 100))
    trainer = make_vlm_trainer(train_dataset=rows, validation_dataset=trusted)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("model.")} == {"language_model"}
    assert trainer.data_selector.weights().std() > 0


def test_rows_unlike_the_trusted_ones_lose_weight(make_vlm_trainer):
    rows = image_rows(12, "images")
    bad = [{**row, "messages": [row["messages"][0], {"role": "assistant", "content": "#?#?#?"}]} for row in rows]
    mixed = Dataset.from_list([bad[number] if number < 4 else row for number, row in enumerate(rows)])
    trainer = make_vlm_trainer("images", train_dataset=mixed, max_steps=18)
    trainer.train()
    weights = trainer.data_selector.weights()
    assert weights[:4].max() < weights[4:].min()
    curated = trainer.curate(keep_ratio=0.5)
    assert {"images", "messages", "weight", "rank"} <= {*curated.column_names}
    assert all(image.size == (SIDE, SIDE) for row in curated for image in row["images"])
    assert min(curated["sample_id"]) >= 4


def test_value_function_is_the_adapter_that_sft_trains(make_vlm_trainer, build_vlm, processor, tmp_path):
    """theta-hat learns the training rows alone, although the trusted rows go through its forward pass."""
    options = {"max_steps": 3, "max_length": None, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 7}
    trainer = make_vlm_trainer(
        "images", **options, peft_config=LoraConfig(**LORA), value_function="adapter", value_function_rows="all"
    )
    trainer.train()
    reference = SFTTrainer(
        build_vlm(),
        SFTConfig(str(tmp_path / "sft"), **QUIET_CPU_RUN, **options),
        train_dataset=image_rows(12, "images"),
        processing_class=processor,
        peft_config=LoraConfig(**LORA),
    )
    reference.train()
    expected = {name: value for name, value in reference.model.named_parameters() if value.requires_grad}
    torch.testing.assert_close(trainer.value_function.state(), expected, rtol=1e-3, atol=1e-4, check_dtype=False)


def test_scores_are_the_rows_losses(make_vlm_trainer, build_vlm, processor):
    """Against the model's own loss of each row alone."""
    trainer, rows = make_vlm_trainer(amortized_selector=True), image_rows(5, offset=300)
    scores = trainer.score(rows, batch_size=2)
    model = build_vlm().eval()
    for row, loss in zip(rows, scores["loss"], strict=True):
        batch = trainer.data_collator([row])
        with torch.no_grad():
            assert loss == pytest.approx(float(model(**batch).loss), rel=1e-4)
    trainer.train()
    assert np.isfinite(trainer.score(rows)["selector_score"][:]).all()


def test_a_batch_with_a_broken_row_is_skipped(make_vlm_trainer, build_vlm, processor, caplog):
    """No input says whose an image is, so that no row can leave the batch alone."""
    model = build_vlm()
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("#")] = torch.nan
    rows = image_rows(8).to_list()
    rows[2]["messages"][1]["content"] = "#"
    trainer = make_vlm_trainer(
        model=model, train_dataset=Dataset.from_list(rows).cast(image_rows(8).features), max_steps=2,
        peft_config=LoraConfig(**LORA), value_function="adapter",
    )  # fmt: skip
    trainer.train()
    assert "1 of 8 rows of a batch have a NaN or infinite loss, so it was skipped" in caplog.text
    assert all(value.isfinite().all() for value in trainer.model.parameters() if value.requires_grad)
    assert all(value.isfinite().all() for value in trainer.value_function.state().values())
    assert trainer.data_selector.weights().isfinite().all()


def test_resumed_run_equals_the_unbroken_one(make_vlm_trainer):
    """With an adapter: Trainer does not find a LLaVA's own parameters in a checkpoint, which names them otherwise."""
    options = {"peft_config": LoraConfig(**LORA), "value_function": "adapter", "learning_rate": 1e-1}
    whole = make_vlm_trainer("images", save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = make_vlm_trainer("images", **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert torch.equal(resumed.data_selector.logits, whole.data_selector.logits)
    assert whole.data_selector.weights().std() > 0


def test_streamed_rows_with_images(make_vlm_trainer):
    rows = image_rows(12, "images").add_column("sample_id", list(range(12)))
    trainer = make_vlm_trainer("images", train_dataset=rows.to_iterable_dataset())
    trainer.train()
    assert trainer.data_selector.weights().std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_ratio": 0.5}, "`refine_ratio` is not supported with images"),
        (
            {
                "validation_loss_type": "dpo",
                "validation_dataset": image_rows(6)
                .rename_column("messages", "chosen")
                .add_column("rejected", [""] * 6),
            },
            "`validation_loss_type='dpo'` is not supported with images",
        ),
        ({"screen": True}, "`screen=True` needs .*rows that TRL tokenizes"),
        ({"packing": True, "max_length": 64}, "Packing is not supported for vision datasets"),
        ({"validation_dataset": image_rows(6, "images")}, "must have the same columns of images"),
        (
            {"validation_dataset": image_rows(6, "pairs").rename_column("images", "image")},
            "must both be prompt-completion datasets",
        ),
        ({"max_length": 8}, "token count between text and `input_ids`"),  # of the processor
        ({"max_length": 8, "kind": "pairs"}, "`max_length=8` cuts off tokens that stand for an image"),
    ],
)
def test_what_images_do_not_go_with_is_refused(make_vlm_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_vlm_trainer(**options).train()


def test_a_text_model_is_the_error_of_sft(make_trainer, build_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vision-related") as theirs:
        SFTTrainer(
            build_model(),
            SFTConfig(str(tmp_path), **QUIET_CPU_RUN),
            train_dataset=image_rows(8),
            processing_class=tokenizer,
        )
    with pytest.raises(ValueError, match="vision-related") as ours:
        make_trainer(train_dataset=image_rows(8), validation_dataset=image_rows(4))
    assert str(ours.value) == str(theirs.value)
