"""Self-refining generation in a plain SFTTrainer."""

import copy
import shutil

import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_bilevel import RefinementConfig, SelfRefiningCallback, SelfRefiningCollator
from trl_bilevel.refined_responses import ResponseStore
from trl_bilevel.self_refining_callback import row_key


@pytest.fixture
def make_sft(build_model, tokenizer, tmp_path):
    def make(rows=None, refine=None, reward_funcs=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "sft"), "per_device_train_batch_size": 4, "max_steps": 8,
            "bf16": False, "use_cpu": True, "gradient_checkpointing": None, "activation_checkpointing": False,
            "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
            "seed": 7, "learning_rate": 1e-2,
        }  # fmt: skip
        collator = SelfRefiningCollator(DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id))
        defaults_refine = {
            "refine_ratio": 0.5, "refine_mode": "random", "refine_start_step": 2, "refine_every_steps": 3,
            "refine_max_new_tokens": 5, "refine_discard_flawed": False,
        }  # fmt: skip
        callback = SelfRefiningCallback(
            collator, RefinementConfig(**{**defaults_refine, **(refine or {})}), reward_funcs
        )
        return SFTTrainer(
            build_model(),
            SFTConfig(**{**defaults, **options}),
            train_dataset=prompt_completion_rows(24) if rows is None else rows,
            processing_class=tokenizer,
            data_collator=collator,
            callbacks=[callback],
        )

    return make


def _record_completions(trainer):
    """Tokens of the completions of every batch, by its prompt's tokens."""
    batches = []
    compute_loss = trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        batch = {}
        for tokens, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
            completion = [label for label in labels if label != -100]
            start = next(index for index, label in enumerate(labels) if label != -100)
            batch[tuple(tokens[:start])] = completion
        batches.append(batch)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_refined_answers_replace_the_originals(make_sft, workers):
    trainer = make_sft(max_steps=18, dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0)
    batches = _record_completions(trainer)
    dataset = trainer.train_dataset
    originals = {}
    for row in dataset:
        start = row["labels"].count(-100)
        originals[tuple(row["input_ids"][:start])] = row["input_ids"][start:]
    trainer.train()
    store = ResponseStore.load(trainer.args.output_dir, trainer.args.output_dir)
    table = store.table().to_pylist()
    assert sorted({response["step"] for response in table}) == [2, 5, 8, 11, 14, 17]
    refined = {tuple(response["prompt_ids"]) for response in table}
    assert len(refined) == 12  # the same half of the rows in every refresh
    for step, batch in enumerate(batches):
        for prompt, completion in batch.items():
            answers = [r["completion_ids"] for r in table if tuple(r["prompt_ids"]) == prompt and r["step"] < step]
            if prompt not in refined or step < 3:
                assert completion == originals[prompt]
            elif step >= 6 + 3 * (workers > 0):  # what workers had collated by then is used up
                assert completion in answers
    assert any(completion != originals[prompt] for prompt, completion in batches[-1].items())
    refreshes = [entry for entry in trainer.state.log_history if "refine/questions" in entry]
    assert [entry["step"] for entry in refreshes] == [2, 5, 8, 11, 14, 17]
    assert refreshes[0]["refine/questions"] == 12


def test_resumed_run_equals_the_unbroken_one(make_sft, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    unbroken = make_sft(**options)
    unbroken.train()
    # Elsewhere, where nothing is of what the first run generated after the checkpoint
    shutil.copytree(tmp_path / "sft" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    resumed = make_sft(**options, output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    first, second = (dict(trainer.model.named_parameters()) for trainer in (unbroken, resumed))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    tables = [ResponseStore.load(tmp_path / name, tmp_path / "x").table() for name in ("sft", "again")]
    assert set(tables[1].column("step").to_pylist()) == {2, 5, 8}
    assert tables[1].drop(["log_probs"]).equals(tables[0].drop(["log_probs"]))


def test_equal_rows_are_refined_once(make_sft):
    rows = Dataset.from_list([*prompt_completion_rows(6)] * 4)
    trainer = make_sft(rows=rows, refine={"refine_ratio": 1.0}, max_steps=4)
    trainer.train()
    table = ResponseStore.load(trainer.args.output_dir, trainer.args.output_dir).table()
    assert len(table) == 6
    assert set(table.column("row").to_pylist()) == {row_key(row) for row in trainer.train_dataset}


def test_reward_functions_decide(make_sft):
    trainer = make_sft(reward_funcs=lambda prompts, completions, **kwargs: [-1.0] * len(prompts), max_steps=4)
    trainer.train()
    table = ResponseStore.load(trainer.args.output_dir, trainer.args.output_dir).table()
    assert len(table) == 12
    assert not any(table.column("used").to_pylist())


@pytest.mark.parametrize(
    ("refine", "message"),
    [
        ({"refine_mode": "lowest_weight"}, "weights that BilevelSFTTrainer learns"),
        ({"refine_ratio": 0.0, "refine_mode": "random"}, "refines nothing"),
        ({"importance_ratio_clip": 5.0}, "plain trainer"),
        ({"use_vllm": True}, "plain trainer"),
        ({"num_refined_responses": 4}, "`num_refined_responses=4` cannot be honoured in a plain trainer"),
        ({"refine_prompt_template": "{{ prompt }}!"}, "`refine_prompt_template='{{ prompt }}!'` cannot be honoured"),
    ],
)
def test_what_a_plain_trainer_cannot_honour_is_refused(refine, message):
    collator = SelfRefiningCollator(lambda rows: {})
    options = {"refine_ratio": 0.5, "refine_mode": "random", **refine}
    if options["refine_ratio"] == 0:
        options = {"refine_ratio": 0.0}
    with pytest.raises(ValueError, match=message):
        SelfRefiningCallback(collator, RefinementConfig(**options))


@pytest.mark.parametrize("reward_funcs", [None, []])
def test_threshold_without_rewards_is_refused(reward_funcs):
    config = RefinementConfig(refine_ratio=0.5, refine_mode="random", refine_reward_threshold=0.5)
    with pytest.raises(ValueError, match=r"`refine_reward_threshold=0\.5` has no effect without `reward_funcs`"):
        SelfRefiningCallback(SelfRefiningCollator(lambda rows: {}), config, reward_funcs)


def test_rows_without_a_prompt_are_refused_before_training(make_sft):
    trainer = make_sft(rows=Dataset.from_list([{"text": f"row {row} is text"} for row in range(8)]))
    with pytest.raises(ValueError, match="the loss covers the prompt too"):
        trainer.train()


def test_messages_need_a_masked_prompt(make_sft):
    messages = [
        [{"role": "user", "content": f"question {row}"}, {"role": "assistant", "content": f"answer {row}"}]
        for row in range(8)
    ]
    rows = Dataset.from_list([{"messages": chat} for chat in messages])
    trainer = make_sft(rows=rows, assistant_only_loss=True, max_steps=4, refine={"refine_ratio": 1.0})
    trainer.train()
    store = ResponseStore.load(trainer.args.output_dir, trainer.args.output_dir)
    prompts = {trainer.processing_class.decode(ids) for ids in store.table().column("prompt_ids").to_pylist()}
    assert prompts == {f"<|im_start|>user\nquestion {row}<|im_end|>\n<|im_start|>assistant\n" for row in range(8)}
    with pytest.raises(ValueError, match="assistant_only_loss"):
        make_sft(rows=rows).train()


def test_sequences_of_several_rows_are_refused(make_sft):
    with pytest.raises(ValueError, match="needs a sequence per row"):
        make_sft(packing=True, packing_strategy="wrapped", max_length=64).train()


def test_tokenizer_is_that_of_a_processor(make_sft):
    trainer = make_sft(max_steps=1)
    tokenizer, processor = trainer.processing_class, object.__new__(ProcessorMixin)
    processor.tokenizer = tokenizer
    callback = next(found for found in trainer.callback_handler.callbacks if isinstance(found, SelfRefiningCallback))
    callback.on_train_begin(
        trainer.args, trainer.state, trainer.control, model=trainer.model,
        processing_class=processor, train_dataloader=trainer.get_train_dataloader(),
    )  # fmt: skip
    assert tokenizer.eos_token_id in callback._refiner.stop_ids


def test_streams_are_refused(make_sft):
    stream = IterableDataset.from_generator(lambda: (copy.copy(row) for row in prompt_completion_rows(24)))
    with pytest.raises(ValueError, match=r"datasets\.Dataset"):
        make_sft(rows=stream).train()
