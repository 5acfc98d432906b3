"""Everything SFTTrainer accepts, and what comes out."""

import copy
import datetime
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from transformers.utils import chat_template_utils
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.paired_batches import ValidationStream


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _assert_learned(trainer, num_rows=24):
    weights = trainer.data_selector.weights()
    assert weights.shape == (num_rows,)
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights.std() > 0
    logs = [entry for entry in trainer.state.log_history if "validation_loss" in entry]
    assert logs[-1]["validation_loss"] < logs[0]["validation_loss"]
    return logs


def test_logs_carry_the_names_users_plot(make_trainer):
    trainer = make_trainer(filter_ratio=0.5, max_steps=12)
    trainer.train()
    logs = _assert_learned(trainer)
    statistics = trainer.data_selector.statistics()
    last = logs[-1]
    assert last["selector/entropy"] == statistics.entropy
    assert last["selector/effective_sample_ratio"] == statistics.effective_sample_ratio
    assert last["selector/weight_min"] == statistics.weight_min
    assert last["selector/weight_max"] == statistics.weight_max
    assert logs[0]["selector/filtered_ratio"] == 0  # all weights tie
    assert logs[-1]["selector/filtered_ratio"] == pytest.approx(0.5)
    assert last["validation_weight"] == 0.9
    assert {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens"} <= last.keys()
    assert json.dumps(trainer.state.log_history)


def test_one_forward_per_micro_batch_and_never_full_logits(make_trainer, build_model):
    model = build_model()
    trainer = make_trainer(model=model, gradient_accumulation_steps=2, max_steps=3)
    forwards, backbone_rows = [], []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: backbone_rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    # The fused head multiplies by the weight of the LM head; only building the logits calls the module
    model.lm_head.register_forward_pre_hook(lambda *_: forwards.append("logits"))
    trainer.train()
    assert backbone_rows == [8] * 6  # 4 training and 4 validation rows each
    assert forwards == []


def test_logged_validation_loss_is_the_loss_of_the_validation_rows(make_trainer, validation_dataset):
    trainer = make_trainer(
        learning_rate=0.0, per_device_validation_batch_size=10, per_device_eval_batch_size=10, logging_steps=6
    )
    trainer.train()
    logged = trainer.state.log_history[0]["validation_loss"]  # six batches, each of all ten rows
    assert logged == pytest.approx(trainer.evaluate(validation_dataset)["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("kind", ["path", "model", "peft_model", "model_and_peft_config"])
def test_kinds_of_model(make_trainer, build_model, tokenizer, tmp_path, kind):
    model, peft_config = build_model(), None
    if kind == "path":
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        trainer = make_trainer(model=str(tmp_path / "model"), processing_class=None)
    else:
        if kind == "peft_model":
            model = get_peft_model(model, LoraConfig(**LORA))
        if kind == "model_and_peft_config":
            peft_config = LoraConfig(**LORA)
        trainer = make_trainer(model=model, peft_config=peft_config)
    trainer.train()
    _assert_learned(trainer)

    trainer.save_model()
    output_dir = Path(trainer.args.output_dir)
    assert (output_dir / "_data_selector.safetensors").is_file()
    if kind in ("peft_model", "model_and_peft_config"):
        reloaded = PeftModel.from_pretrained(build_model(), output_dir)
        assert "lora" in next(iter(load_file(output_dir / "adapter_model.safetensors")))
    else:
        reloaded = AutoModelForCausalLM.from_pretrained(output_dir)
    batch = tokenizer(["add 3 and 9: 12"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_model_families(make_trainer, build_model, tokenizer, family):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    trainer = make_trainer(model=build_model(family), processing_class=tokenizer, activation_checkpointing=True)
    trainer.train()
    logs = _assert_learned(trainer)
    assert ("aux_loss" in logs[0]) == (family == "qwen3_moe")


def test_moe_auxiliary_loss_counts_as_in_sft(make_trainer, build_model, tokenizer, train_dataset):
    """The same rows in training and validation, lambda 1/2 and uniform weights: objective and aux loss are SFT's."""
    rows = train_dataset.select(range(4))
    options = {"max_steps": 1, "learning_rate": 0.0, "router_aux_loss_coef": 0.5}
    with pytest.warns(UserWarning, match="4 training rows are also in `validation_dataset`"):
        trainer = make_trainer(
            model=build_model("qwen3_moe"),
            train_dataset=rows,
            validation_dataset=rows,
            validation_weight=0.5,
            **options,
        )
    trainer.train()
    sft_options = {name: getattr(trainer.args, name) for name in ("output_dir", "use_cpu", "bf16", "disable_tqdm")}
    reference = SFTTrainer(
        build_model("qwen3_moe"),
        SFTConfig(
            **sft_options, **options, per_device_train_batch_size=4, report_to="none", activation_checkpointing=False,
            logging_steps=1, save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    reference.train()
    ours, theirs = trainer.state.log_history[0], reference.state.log_history[0]
    assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], abs=1e-5)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def _conversation(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


FORMATS = {
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
    "prompt_completion": lambda row: {"prompt": row["prompt"], "completion": row["completion"]},
    "messages": lambda row: {"messages": _conversation(row)},
    "sharegpt": lambda row: {
        "conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
    },
    "conversational_prompt_completion": lambda row: {
        "prompt": _conversation(row)[:1],
        "completion": _conversation(row)[1:],
    },
    "unicode": lambda row: {"prompt": f"число {row['prompt']} 数🧮\t", "completion": row["completion"] + " ✓\u202e"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_row_formats(make_trainer, name):
    rows, trusted = (
        Dataset.from_list([FORMATS[name](row) for row in prompt_completion_rows(size, offset)])
        for size, offset in ((24, 0), (10, 1000))
    )
    trainer = make_trainer(train_dataset=rows, validation_dataset=trusted, eval_dataset=trusted, max_length=None)
    trainer.train()
    _assert_learned(trainer)
    curated = trainer.curate(keep_ratio=0.5)
    assert len(curated) == 12
    assert curated.column_names[: len(rows.column_names)] == rows.column_names
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("options", [{"assistant_only_loss": True}, {"completion_only_loss": False}])
def test_which_tokens_carry_loss(make_trainer, options):
    """Against SFTTrainer's own count of the label tokens that each choice leaves."""
    name = "messages" if "assistant_only_loss" in options else "prompt_completion"
    rows, trusted = (
        Dataset.from_list([FORMATS[name](row) for row in prompt_completion_rows(size, offset)])
        for size, offset in ((24, 0), (10, 1000))
    )
    trainer = make_trainer(train_dataset=rows, validation_dataset=trusted, **options)
    seen = []
    start_step = trainer._start_step

    def recording_start_step(batches):
        seen.extend((list(batch["sample_indices"]), batch["labels"]) for batch in batches)
        start_step(batches)

    trainer._start_step = recording_start_step
    trainer.train()
    _assert_learned(trainer)
    assert len(seen) == 6
    for sample_indices, batch_labels in seen:
        for sample_index, labels in zip(sample_indices, batch_labels, strict=False):  # validation rows follow
            text = trainer.processing_class.decode(labels[labels != -100])
            answer = prompt_completion_rows(24)[sample_index]["completion"]
            if "assistant_only_loss" in options:
                assert text == answer + "<|im_end|>"
            else:
                assert text.startswith("add") and text.endswith(answer + "<eos>")  # noqa: PT018


NEW_NAMES = {"prompt": "question", "completion": "answer"}


def test_formatting_func_and_pretokenized_rows(make_trainer, tokenizer):
    rows, trusted = prompt_completion_rows(24), prompt_completion_rows(10, 1000)
    formatted = make_trainer(
        train_dataset=rows.rename_columns(NEW_NAMES),
        validation_dataset=trusted.rename_columns(NEW_NAMES),
        formatting_func=lambda row: row["question"] + row["answer"],
    )
    formatted.train()

    def tokenize(row):
        return tokenizer(row["prompt"] + row["completion"] + "<eos>", return_token_type_ids=False)

    tokenized = make_trainer(
        train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
        validation_dataset=trusted.map(tokenize, remove_columns=rows.column_names),
    )
    tokenized.train()
    _assert_learned(tokenized)
    assert torch.equal(formatted.data_selector.weights(), tokenized.data_selector.weights())


def test_rows_prepared_by_a_transform(make_trainer, tokenizer):
    """`skip_prepare_dataset` with a transform that returns token columns only, not the ids of the rows."""

    def tokenize(rows):
        texts = [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
        tokens = tokenizer(texts)["input_ids"]
        return {"input_ids": tokens, "labels": tokens}

    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = make_trainer(
        train_dataset=prompt_completion_rows(24).with_transform(tokenize),
        validation_dataset=prompt_completion_rows(10, 1000).with_transform(tokenize),
        **options,
    )
    trainer.train()
    _assert_learned(trainer)
    assert trainer.data_selector.scored.all()


def test_shuffled_rows_with_a_transform_are_transformed_once(make_trainer):
    def shout(rows):
        return {"prompt": [prompt + "!" for prompt in rows["prompt"]], "completion": rows["completion"]}

    rows = prompt_completion_rows(24).shuffle(seed=0)
    trainer = make_trainer(
        train_dataset=rows.with_transform(shout),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    assert trainer.train_dataset[0]["prompt"] == rows[0]["prompt"] + "!"
    assert trainer.curate()["prompt"] == rows["prompt"]


def test_formatting_func_sees_the_columns_of_the_user_only(make_trainer, tokenizer):
    trainer = make_trainer(
        train_dataset=prompt_completion_rows(24).rename_columns({"prompt": "question", "completion": "answer"}),
        validation_dataset=prompt_completion_rows(10, 1000).rename_columns(
            {"prompt": "question", "completion": "answer"}
        ),
        formatting_func=lambda row: " ".join(f"{name}: {value}" for name, value in row.items()),
    )
    assert (
        tokenizer.decode(trainer.train_dataset[3]["input_ids"]) == "question: add 3 and 9: answer:  12 ok ok ok<eos>"
    )


def test_collator_without_attention_mask(make_trainer):
    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]),
            "labels": torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in rows]),
        }

    trainer = make_trainer(data_collator=collate)
    trainer.train()
    _assert_learned(trainer)


def test_tokenized_rows_of_fixed_length(make_trainer):
    tokens = datasets.List(datasets.Value("int32"), length=5)
    features = datasets.Features({"input_ids": tokens, "labels": tokens})

    def rows_from(numbers):
        sequences = [[number + step for step in range(5)] for number in numbers]
        return Dataset.from_dict({"input_ids": sequences, "labels": sequences}, features=features)

    rows, trusted = rows_from(range(24)), rows_from(range(100, 110))
    trainer = make_trainer(train_dataset=rows, validation_dataset=trusted)
    trainer.train()
    _assert_learned(trainer)


def test_evaluation_never_reaches_the_selector(make_trainer, validation_dataset):
    held_out = {"a": prompt_completion_rows(6, 500), "b": prompt_completion_rows(5, 600)}
    plain, evaluated = (
        make_trainer(eval_dataset=dataset, eval_strategy=strategy, eval_steps=2)
        for dataset, strategy in ((None, "no"), (held_out, "steps"))
    )
    plain.train()
    evaluated.train()
    assert torch.equal(plain.data_selector.weights(), evaluated.data_selector.weights())
    eval_logs = [entry for entry in evaluated.state.log_history if "eval_a_loss" in entry]
    assert len(eval_logs) == 3
    assert not any(name.startswith("selector/") or name == "validation_loss" for name in eval_logs[0])


def test_callbacks_see_every_step(make_trainer):
    class Counter(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    counter = Counter()
    make_trainer(callbacks=[counter], gradient_accumulation_steps=2).train()
    assert counter.steps == 6


@pytest.mark.parametrize("selector_activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("selector_optimizer", ["mirror_descent", "adam"])
def test_rows_of_high_loss_lose_weight(make_trainer, selector_activation, selector_optimizer):
    """Ten rows whose answers nothing can predict must end below the rows that look like the trusted ones."""
    generator = np.random.default_rng(0)
    noise = [{"prompt": "add 1 and 1:", "completion": generator.bytes(12).hex()} for _ in range(10)]
    trusted = [{"prompt": f"say it {n}:", "completion": " yes it is"} for n in range(30)]
    rows = Dataset.from_list([*noise, *trusted[:14]])
    trainer = make_trainer(
        train_dataset=rows,
        validation_dataset=Dataset.from_list(trusted[14:]),
        selector_activation=selector_activation,
        selector_optimizer=selector_optimizer,
        selector_learning_rate=0.2,
        max_steps=30,
    )
    trainer.train()
    noise_weights, good_weights = trainer.data_selector.weights().split([10, 14])
    auroc = (good_weights[:, None] > noise_weights).float().mean().item()
    if selector_optimizer == "mirror_descent":
        assert auroc == 1
        assert set(trainer.curate(14 / 24)["completion"]) == {" yes it is"}
    else:  # dense Adam also moves rows that are not in the batch
        assert auroc > 0.8


def test_defaults_with_an_adapter_find_a_consistent_wrong_answer(make_trainer):
    """As easy to learn as the right one, and given more often: only the trusted rows tell which is which."""
    right = [{"prompt": f"say it {n}:", "completion": " yes it is"} for n in range(26)]
    wrong = [{"prompt": f"say it {n}:", "completion": " no it is not"} for n in range(100, 114)]
    trainer = make_trainer(
        train_dataset=Dataset.from_list([*wrong, *right[:10]]),
        validation_dataset=Dataset.from_list(right[10:]),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=40,
    )
    assert trainer.value_function is not None
    trainer.train()
    wrong_weights, right_weights = trainer.data_selector.weights().split([14, 10])
    assert (right_weights[:, None] > wrong_weights).float().mean() > 0.95
    assert set(trainer.curate(10 / 24)["completion"]) == {" yes it is"}


def test_row_with_nan_loss_is_skipped_counted_and_survived(make_trainer, build_model, tokenizer, tmp_path):
    """A frozen embedding of NaN for one token: its row would turn every LoRA gradient into NaN."""
    poison = tokenizer.convert_tokens_to_ids("#")
    model = build_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    clean_rows = [*prompt_completion_rows(23)]
    rows = Dataset.from_list([*clean_rows[:5], {"prompt": "add # and 1:", "completion": " 1"}, *clean_rows[5:]])
    trusted = Dataset.from_list([*prompt_completion_rows(9, 1000), {"prompt": "#", "completion": " 1"}])
    trainer = make_trainer(
        model=model,
        train_dataset=rows,
        validation_dataset=trusted,
        peft_config=LoraConfig(**LORA),
        max_steps=-1,
        num_train_epochs=2,
    )
    trainer.train()
    _assert_learned(trainer)
    scored = trainer.curate()["scored"]
    assert [index for index in range(24) if not scored[index]] == [5]
    assert trainer.data_selector.logits[5].item() == pytest.approx(math.log(0.2 / 0.8))  # the prior, as at the start
    nonfinite = sum(entry.get("selector/nonfinite_rows", 0) for entry in trainer.state.log_history)
    # the training row once per epoch, the validation row as often as the stream of 2 * 24 rows holds it
    assert nonfinite == 2 + ValidationStream(10, seed=7).rows(0, 48).count(9)
    assert all(parameter.isfinite().all() for name, parameter in trainer.model.named_parameters() if "lora" in name)


def test_batch_without_a_finite_row_is_skipped(make_trainer, build_model, caplog):
    model = build_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    trainer = make_trainer(model=model, peft_config=LoraConfig(**LORA), max_steps=2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert "lower `learning_rate`" in caplog.text
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "lora" in name)
    assert not trainer.data_selector.scored.any()


def test_diverged_model_is_reported_and_does_not_crash(make_trainer, caplog):
    trainer = make_trainer(peft_config=LoraConfig(**LORA), max_steps=3)
    with torch.no_grad():
        next(value for name, value in trainer.model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    trainer.train()
    assert "the model has diverged" in caplog.text
    assert all(entry["selector/nonfinite_rows"] == 8 for entry in trainer.state.log_history[:3])
    assert not trainer.data_selector.scored.any()


def test_bf16_keeps_the_selector_in_fp32(make_trainer):
    trainer = make_trainer(bf16=True, activation_checkpointing=True)
    trainer.train()
    _assert_learned(trainer)
    assert trainer.data_selector.logits.dtype == torch.float32


def test_qlora(make_trainer, build_model, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make_trainer(
        model=str(tmp_path / "model"),
        processing_class=None,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        peft_config=LoraConfig(**LORA),
        bf16=True,
        learning_rate=3e-2,
        max_steps=12,
    )
    trainer.train()
    _assert_learned(trainer)


def test_other_training_arguments_are_completed(build_model, tokenizer, train_dataset, validation_dataset, tmp_path):
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
    defaults = BilevelSFTConfig(str(tmp_path), use_cpu=True)
    trainer = BilevelSFTTrainer(
        build_model(),
        SFTConfig(str(tmp_path), max_length=77, activation_checkpointing=False, save_strategy="no", **options),
        train_dataset=train_dataset,
        validation_dataset=validation_dataset,
        processing_class=tokenizer,
    )
    assert isinstance(trainer.args, BilevelSFTConfig)
    assert trainer.args.max_length == 77
    assert trainer.args.validation_weight == defaults.validation_weight
    trainer.train()


def test_default_config_keeps_trls_defaults(tmp_path):
    config = BilevelSFTConfig(str(tmp_path), use_cpu=True)
    assert config.activation_checkpointing is True
    assert config.bf16 is True
    config = BilevelSFTConfig(str(tmp_path), use_cpu=True, activation_checkpointing=False)
    assert config.gradient_checkpointing is False
    with pytest.warns(FutureWarning, match="activation_checkpointing"):
        config = BilevelSFTConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=False)
    assert config.activation_checkpointing is False


def test_final_model_and_checkpoints_hold_the_selector_also_without_optimizer(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=3, save_only_model=True)
    trainer.train()
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        state = load_file(Path(trainer.args.output_dir) / checkpoint / "_data_selector.safetensors")
        assert state["logits"].shape == (24,)
    assert torch.equal(state["logits"], trainer.data_selector.logits)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (prompt_completion_rows(25), r"num_rows 24 \(now 25\)"),
        (prompt_completion_rows(24).select([1, 0, *range(2, 24)]), "rows_fingerprint"),
        (prompt_completion_rows(24, offset=1), "rows_fingerprint"),
    ],
    ids=["more rows", "other order", "other rows"],
)
def test_resume_with_other_rows_is_refused(make_trainer, rows, message):
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-3")
    other = make_trainer(train_dataset=rows)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=checkpoint)


def test_best_model_comes_with_the_weights_of_its_checkpoint(make_trainer, validation_dataset):
    """The largest loss is called the best one, so that it is not that of the last checkpoint."""
    trainer = make_trainer(
        eval_dataset=validation_dataset, load_best_model_at_end=True, greater_is_better=True,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    assert torch.equal(trainer.data_selector.logits, load_file(best / "_data_selector.safetensors")["logits"])


class _RemovesOptimizers(TrainerCallback):
    """To save disk."""

    def on_save(self, args, state, control, **kwargs):
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            if folder.name != f"checkpoint-{state.global_step}":
                for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "_value_function_optimizer.pt"):
                    (folder / name).unlink(missing_ok=True)


def test_best_model_needs_no_state_of_the_optimizer(make_trainer, validation_dataset):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        eval_dataset=validation_dataset, load_best_model_at_end=True, greater_is_better=True, peft_config=lora,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, callbacks=[_RemovesOptimizers()],
        amortized_selector=True, refine_ratio=0.5, refine_start_step=0, refine_every_steps=1, refine_max_new_tokens=4,
        refine_discard_flawed=False,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert not (best / "optimizer.pt").exists()
    # All of that checkpoint, and not of the end
    assert torch.equal(trainer.data_selector.logits, load_file(best / "_data_selector.safetensors")["logits"])
    of_the_end = Path(trainer.args.output_dir) / "checkpoint-6"
    for part, name in ((trainer.value_function, "value_function"), (trainer.amortized_selector, "amortized_selector")):
        part.save(tmp := best.parent)
        (file,) = tmp.glob(f"*{name}.safetensors")
        assert file.read_bytes() == (best / file.name).read_bytes() != (of_the_end / file.name).read_bytes()
    stored = pyarrow.parquet.read_table(best / "_refined_responses.pq")
    assert len(trainer.response_store.table()) == len(stored)
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):  # which going on needs
        make_trainer().train(resume_from_checkpoint=str(best))


def test_log_of_one_process_waits_for_nobody(make_trainer):
    """`trainer.log` within a step writes what it was given; the averages are those of the step."""

    class Logs(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.log({"mine": 1.0})

    gathered = []
    trainer = make_trainer(callbacks=[Logs()], max_steps=4, logging_steps=2)
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda values: gathered.append(trainer.state.global_step) or gather(values)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    assert [("mine" in entry, "training_loss" in entry) for entry in lines] == [
        (True, False), (True, False), (False, True), (True, False), (True, False), (False, True),
    ]  # fmt: skip
    for entry in lines:
        assert ("validation_weight" in entry) == ("training_loss" in entry)
    assert set(gathered) <= {2, 4}


def test_overridden_loss_adds_to_ours(make_trainer, build_model, tokenizer, train_dataset, validation_dataset):
    class Adds(BilevelSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + 0.0 * outputs.log_probs.sum()
            return (loss, outputs) if return_outputs else loss

    class Replaces(BilevelSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return next(model.parameters()).sum()

    plain = make_trainer()
    plain.train()
    arguments = {"train_dataset": train_dataset, "validation_dataset": validation_dataset,
                 "processing_class": tokenizer}  # fmt: skip
    adds = Adds(build_model(), plain.args, **arguments)
    adds.train()
    assert torch.equal(adds.data_selector.logits, plain.data_selector.logits)
    with pytest.raises(RuntimeError, match=r"overridden without a call of `super\(\).compute_loss"):
        Replaces(build_model(), plain.args, **arguments).train()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("side", "name"),
    [
        ("train_dataset", "optimizer_step"),
        ("train_dataset", "reference_nll"),
        ("validation_dataset", "bilevel_sample_index"),
        ("validation_dataset", "optimizer_step"),
        ("validation_dataset", "reference_nll"),
    ],
)
def test_columns_may_have_names_that_we_use_within(
    make_trainer, train_dataset, validation_dataset, side, name, is_stream
):
    results = []
    for has_column in (False, True):
        rows = {"train_dataset": train_dataset, "validation_dataset": validation_dataset}
        if has_column:
            rows[side] = rows[side].add_column(name, list(range(len(rows[side]))))
        options = {}
        if is_stream:
            options["sample_id_column"] = "uid"
            ids = [f"row-{row}" for row in range(24)]
            rows["train_dataset"] = rows["train_dataset"].add_column("uid", ids).to_iterable_dataset()
        trainer = make_trainer(**rows, **options, max_steps=3)
        trainer.train()
        losses = [entry.get("validation_loss") for entry in trainer.state.log_history]
        results.append((losses, trainer.data_selector.logits.tolist()))
    assert results[0] == results[1]


def test_prepared_rows_of_one_run_are_trusted_in_another(make_trainer):
    tokenized = make_trainer().train_dataset
    training = tokenized.remove_columns("bilevel_sample_index").select(range(8, 24))
    second = make_trainer(train_dataset=training, validation_dataset=tokenized.select(range(8)))
    second.train()
    assert second.state.log_history[0]["validation_loss"] > 0


def test_validation_weight_is_logged_as_it_was_used(make_trainer):
    trainer = make_trainer(
        max_steps=-1, num_train_epochs=2, logging_strategy="epoch", validation_weight=0.8, validation_weight_decay=0.3
    )
    trainer.train()
    logged = [entry["validation_weight"] for entry in trainer.state.log_history if "validation_weight" in entry]
    assert logged == pytest.approx([0.8, 0.5])


def test_curated_dataset_round_trips_and_trains_plain_sft(make_trainer, build_model, tokenizer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    curated = trainer.curate(keep_ratio=0.5)
    curated.save_to_disk(tmp_path / "disk")
    curated.to_parquet(tmp_path / "curated.parquet")
    from_disk = datasets.load_from_disk(tmp_path / "disk")
    from_parquet = Dataset.from_parquet(str(tmp_path / "curated.parquet"), cache_dir=str(tmp_path / "cache"))
    assert from_disk.to_list() == from_parquet.to_list() == curated.to_list()
    assert from_parquet.features == curated.features

    reference = SFTTrainer(
        build_model(),
        SFTConfig(str(tmp_path / "sft"), max_steps=2, use_cpu=True, bf16=False, report_to="none",
                  activation_checkpointing=False, save_strategy="no", disable_tqdm=True),
        train_dataset=from_parquet,
        processing_class=tokenizer,
    )  # fmt: skip
    assert reference.train().training_loss > 0


class _Clock(datetime.datetime):
    day = 1

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2026, 3, cls.day)


def _talk(num_rows, offset=0):
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"{2 * i}"}]}
            for i in range(offset, offset + num_rows)
        ]
    )


def test_template_that_prints_the_date_does_not_keep_a_run_from_going_on(make_trainer, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", dated)

    def trainer_on(day, rows):
        monkeypatch.setattr(_Clock, "day", day)
        return make_trainer(
            train_dataset=rows, validation_dataset=_talk(10, 1000), save_strategy="steps", save_steps=3
        )

    first = trainer_on(1, _talk(24))
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-3"
    second = trainer_on(2, _talk(24))
    assert second.train_dataset[0]["input_ids"] != first.train_dataset[0]["input_ids"]
    second.train(resume_from_checkpoint=checkpoint)
    assert second.state.global_step == 6
    with pytest.raises(ValueError, match="rows_fingerprint"):  # other rows are still told
        trainer_on(2, _talk(24, 1)).train(resume_from_checkpoint=checkpoint)


def test_rows_that_only_the_collator_reads(make_trainer, tokenizer):
    """They have columns of any name, and a fingerprint all the same."""

    def rows(num_rows, offset):
        return Dataset.from_list([{"question": f"q{i} ", "answer": f"a{i}"} for i in range(offset, offset + num_rows)])

    def collate(batch):
        tokens = [torch.tensor(tokenizer(row["question"] + row["answer"])["input_ids"]) for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
        labels = padded.masked_fill(padded == -1, -100)
        return {"input_ids": padded.clamp(min=0), "labels": labels, "attention_mask": (padded != -1).long()}

    options = {"data_collator": collate, "dataset_kwargs": {"skip_prepare_dataset": True}}
    options |= {"remove_unused_columns": False, "validation_dataset": rows(10, 1000), "max_steps": 1}
    fingerprints = []
    for offset in (0, 0, 1):
        trainer = make_trainer(train_dataset=rows(24, offset), **options)
        fingerprints.append(trainer._rows_fingerprint)
    trainer.train()
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def _answers_only(row):
    """What masks the prompts of rows that are tokenized already."""
    return {"labels": [-100] * (len(row["input_ids"]) - 3) + row["input_ids"][-3:]}


@pytest.mark.parametrize("name", ["train_dataset", "validation_dataset"])
def test_labels_masked_in_one_dataset_after_construction_are_refused(make_trainer, name):
    trainer = make_trainer(train_dataset=_talk(24), validation_dataset=_talk(10, 1000))
    setattr(trainer, name, getattr(trainer, name).map(_answers_only))
    with pytest.raises(ValueError, match=rf"`trainer\.{name}` was replaced .* Do the same to"):
        trainer.train()


def test_labels_masked_in_both_datasets_are_those_that_count(make_trainer):
    trainer = make_trainer(train_dataset=_talk(24), validation_dataset=_talk(10, 1000), max_steps=1)
    for name in ("train_dataset", "validation_dataset"):
        setattr(trainer, name, getattr(trainer, name).map(_answers_only))
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum(1).tolist() == [3] * 8
    trainer.train()


def test_rows_in_another_order_or_fewer_of_them_are_the_same_rows(make_trainer):
    """More than are looked at, of different lengths: only the tokens that count in each decide."""
    trainer = make_trainer(train_dataset=prompt_completion_rows(150), max_steps=1)
    trainer.train_dataset = trainer.train_dataset.shuffle(seed=3).select(range(120))
    trainer.train()


class _OwnLoader(BilevelSFTTrainer):
    def get_train_dataloader(self):
        rows = self.train_dataset.select_columns(["input_ids", "labels"])
        return self.accelerator.prepare(DataLoader(rows, batch_size=4, collate_fn=self.data_collator))


def test_dataloader_without_trusted_rows_is_refused_by_name(
    make_config, build_model, tokenizer, train_dataset, validation_dataset
):
    trainer = _OwnLoader(
        build_model(),
        make_config(),
        train_dataset=train_dataset,
        validation_dataset=validation_dataset,
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match=r"`_OwnLoader\.get_train_dataloader` makes one of its own"):
        trainer.train()
    assert trainer.state.global_step == 0
