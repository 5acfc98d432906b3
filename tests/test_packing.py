"""Packed and padding-free batches: every row keeps its own loss, weight and update."""

import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer, pack_dataset

from trl_bilevel.batch_layout import PaddingFreeLayout
from trl_bilevel.packing import pack_rows


PACKED = {"packing": True, "max_length": 96, "per_device_train_batch_size": 2}
FLASH_WARNING = "ignore:.*flash attention.*"
pytestmark = pytest.mark.filterwarnings(FLASH_WARNING)


def _lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def _in_packed_order(trainer, rows):
    """The rows one packed sequence after the other, and how many each holds."""
    packed = trainer.packed_training
    groups = [packed.rows_of(sequence) for sequence in range(len(packed))]
    return rows.select([row for group in groups for row in group]), [len(group) for group in groups]


def test_rows_are_packed_as_trl_packs_them():
    lengths = torch.randint(1, 33, (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": [[number] * length for number, length in enumerate(lengths)]})
    packed = pack_rows(rows, 32, "train")
    expected = pack_dataset(rows, 32, "bfd")
    assert len(packed) == len(expected)
    for sequence, tokens in enumerate(expected["input_ids"]):
        assert [row for row in packed.rows_of(sequence) for _ in range(lengths[row])] == tokens
    shuffled = packed.shuffled(seed=3)
    assert sorted(map(tuple, map(shuffled.rows_of, range(len(shuffled))))) == sorted(
        map(tuple, map(packed.rows_of, range(len(packed))))
    )
    assert shuffled.rows_of(0) != packed.rows_of(0)


def test_layout_finds_each_rows_predictions():
    """Against a loop over the rows, with the padding to a multiple that TRL may add at the end."""
    lengths = [3, 1, 4, 2]
    values = torch.arange(1.0, 12.0)[None]  # predictions of 12 tokens, 2 of them padding
    layout = PaddingFreeLayout(torch.tensor(lengths), torch.device("cpu"))
    expected = torch.zeros(4, 3)
    start = 0
    for row, length in enumerate(lengths):
        expected[row, : length - 1] = values[0, start : start + length - 1]
        start += length
    assert torch.equal(layout._unpack(values), expected)
    hidden = torch.randn(1, 12, 5)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    pooled = layout.pool(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0, 1:3].mean(dim=0))
    torch.testing.assert_close(pooled[2], hidden[0, 6:8].mean(dim=0))
    assert torch.equal(pooled[1], torch.zeros(5))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["bds", "bmo", "value_function"])
def test_same_curated_dataset_as_unpacked(make_trainer, packing, method):
    """The same rows in every step, one to a sequence and all in one: losses, weights and curated rows agree."""
    rows, trusted = prompt_completion_rows(32), prompt_completion_rows(8, 1000)
    options = {
        "train_sampling_strategy": "sequential",
        "learning_rate": 5e-3,
        "validation_dataset": trusted,
        "optim": "sgd",
        "max_steps": -1,
        "num_train_epochs": 2,
        "filter_ratio": 0.25,
        **(
            {"peft_config": _lora(), "learning_rate": 1.0, "num_train_epochs": 6}
            if method == "value_function"
            else {"selection_method": method}
        ),
    }
    if packing:
        shared = make_trainer(
            train_dataset=rows, packing=True, max_length=1000, per_device_train_batch_size=1, **options
        )
        rows, counts = _in_packed_order(shared, rows)
        assert counts == [32]  # all in one, and 8 trusted rows in another
        assert len(shared.packed_validation) == 1
        shared = make_trainer(
            train_dataset=rows, packing=True, max_length=1000, per_device_train_batch_size=1, **options
        )
        batch, validation_batch = 32, 8
    else:
        batch, validation_batch = 8, 8
        shared = make_trainer(
            train_dataset=rows, padding_free=True, max_length=None, per_device_train_batch_size=8, **options
        )
    apart = make_trainer(
        train_dataset=rows,
        per_device_train_batch_size=batch,
        per_device_validation_batch_size=validation_batch,
        **options,
    )
    for trainer in (shared, apart):
        trainer.train()
    assert _logged(shared, "loss") == pytest.approx(_logged(apart, "loss"), abs=1e-4)
    assert _logged(shared, "validation_loss") == pytest.approx(_logged(apart, "validation_loss"), abs=1e-4)
    assert _logged(shared, "num_tokens") == _logged(apart, "num_tokens")
    torch.testing.assert_close(shared.data_selector.weights(), apart.data_selector.weights(), rtol=1e-3, atol=1e-4)
    assert apart.data_selector.weights().std() > 1e-3
    ids = [trainer.curate(keep_ratio=0.5)["sample_id"][:] for trainer in (shared, apart)]
    assert len(set(ids[0]) & set(ids[1])) >= 15  # of 16; two rows on the border may be a rounding error apart


def test_packed_without_validation_term_is_packed_sft(make_trainer, build_model, tokenizer, train_dataset):
    """Invariant 1 with packing: the losses of TRL's own packed training."""
    options = {**PACKED, "max_steps": 4, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(selector_learning_rate=0.0, **options)
    trainer.args.validation_weight = 0.0  # not allowed to users
    trainer.train()
    base = {name: getattr(trainer.args, name) for name in ("output_dir", "learning_rate", "logging_steps", "seed")}
    reference = SFTTrainer(
        build_model(),
        SFTConfig(
            **base, **options, bf16=False, use_cpu=True, activation_checkpointing=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    reference.train()
    assert _logged(trainer, "loss") == pytest.approx(_logged(reference, "loss"), abs=1e-4)
    assert isinstance(trainer._get_train_sampler(trainer.packed_training), SequentialSampler)


def test_every_row_is_trained_on_once_per_epoch_and_known_by_its_number(make_trainer, train_dataset):
    rows = list(train_dataset)
    rows[5] = {"prompt": "a very long prompt " * 40, "completion": " lost"}
    trainer = make_trainer(
        train_dataset=Dataset.from_list(rows), shuffle_dataset=True, max_steps=-1, num_train_epochs=1, **PACKED
    )
    seen = []
    update = trainer.data_selector.update

    def record(row_indices, losses):
        seen.extend(row_indices.tolist())
        update(row_indices, losses)

    trainer.data_selector.update = record
    trainer.train()
    assert sorted(seen) == [row for row in range(24) if row != 5]
    curated = trainer.curate()
    assert curated["scored"][:] == [row != 5 for row in range(24)]
    assert curated["prompt"][:] == [row["prompt"] for row in rows]


def test_row_without_a_finite_loss_leaves_the_packed_sequence(make_trainer, monkeypatch):
    trainer = make_trainer(**PACKED, max_steps=2)
    forward, calls = trainer._forward, []

    def broken(model, inputs, layout):
        outputs, losses = forward(model, inputs, layout)
        calls.append((inputs["input_ids"].shape[1], len(losses.nll)))
        if len(calls) == 1:
            losses = losses._replace(nll=losses.nll.clone().index_fill(0, torch.tensor([1]), torch.nan))
        return outputs, losses

    monkeypatch.setattr(trainer, "_forward", broken)
    trainer.train()
    (tokens, rows), (fewer_tokens, fewer_rows) = calls[:2]
    assert fewer_rows == rows - 1
    assert fewer_tokens < tokens
    assert trainer.data_selector.logits.isfinite().all()
    assert _logged(trainer, "selector/nonfinite_rows")[0] == 1


def test_answers_are_refined_in_packed_batches(make_trainer):
    trainer = make_trainer(
        **PACKED, max_steps=8, learning_rate=0.0, refine_ratio=0.5, refine_start_step=1, refine_every_steps=100,
        refine_max_new_tokens=4, refine_discard_flawed=False,
    )  # fmt: skip
    trainer.train()
    ratios = _logged(trainer, "refine/importance_ratio")
    assert len(ratios) > 3
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
    assert max(_logged(trainer, "refine/row_ratio")) > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_run_resumes_exactly(make_trainer, accumulation):
    options = {**PACKED, "gradient_accumulation_steps": accumulation, "max_length": 48, "max_steps": 8}
    whole = make_trainer(**options)
    whole.train()
    first = make_trainer(**options, save_strategy="steps", save_steps=3)
    first.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-3")
    assert torch.equal(resumed.data_selector.logits, whole.data_selector.logits)


def test_amortized_selector_sees_packed_rows(make_trainer):
    trainer = make_trainer(**PACKED, amortized_selector=True)
    trainer.train()
    scores = trainer.score(prompt_completion_rows(5, 50))
    assert len(scores["selector_score"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing_strategy": "wrapped"}, "cuts rows into pieces"),
        ({"packing_strategy": "bfd_split"}, "cuts rows into pieces"),
        ({"packing": False, "padding_free": True}, "`max_length` is not enforced"),
        ({"train_sampling_strategy": "group_by_length"}, "about as long as each other"),
    ],
)
def test_what_packing_cannot_do_is_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**PACKED, **options})


def test_custom_collator_is_refused(make_trainer, tokenizer):
    with pytest.raises(ValueError, match="custom data collator"):
        make_trainer(**PACKED, data_collator=DataCollatorForSeq2Seq(tokenizer))
