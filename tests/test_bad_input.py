"""Wrong input: each gets an error that names the value and the cure, before training starts."""

import math
from types import SimpleNamespace

import pytest
from conftest import prompt_completion_rows
from datasets import Dataset, DatasetDict
from trl import pack_dataset

from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.row_format_checks import check_row_formats


ROWS = prompt_completion_rows(24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection_method": "seal"}, "`selection_method` must be 'bds' or 'bmo', got 'seal'"),
        ({"selector_activation": "relu"}, "`selector_activation` must be 'softmax' or 'sigmoid', got 'relu'"),
        ({"selector_optimizer": "sgd"}, "`selector_optimizer` must be 'mirror_descent' or 'adam', got 'sgd'"),
        ({"loss_normalization": "batch"}, "`loss_normalization` must be 'token' or 'row', got 'batch'"),
        ({"validation_weight": 0.0}, "larger than 0 and at most 1, got 0.0"),
        ({"validation_weight": 1.1}, "larger than 0 and at most 1, got 1.1"),
        ({"validation_weight": math.nan}, "larger than 0 and at most 1, got nan"),
        ({"validation_weight_decay": -0.1}, "`validation_weight_decay` must be at least 0 and less than 1, got -0.1"),
        ({"per_device_validation_batch_size": 0}, "must be at least 1, got 0"),
        ({"selector_learning_rate": -1.0}, "`selector_learning_rate` must be a finite number, 0 or larger, got -1.0"),
        ({"selector_learning_rate": math.inf}, "got inf"),
        ({"bmo_temperature": 0.0}, "`bmo_temperature` must be a finite number larger than 0, got 0.0"),
        (
            {"selection_method": "bmo", "selector_learning_rate": 0.5},
            "`selector_learning_rate=0.5` has no effect with `selection_method='bmo'`",
        ),
        ({"bmo_temperature": 0.5}, "`bmo_temperature=0.5` has no effect with `selection_method='bds'`"),
        ({"filter_ratio": 1.0}, "`filter_ratio` must be at least 0 and less than 1, got 1.0"),
        ({"loss_type": "hinge"}, "Invalid `loss_type` hinge passed. Supported values are 'nll' and 'dft'"),
        ({"packing": True, "packing_strategy": "wrapped"}, "cuts rows into pieces"),
        ({"packing": True, "max_length": None}, "When packing is enabled, `max_length` can't be `None`."),
        ({"train_sampling_strategy": "batch_rebalance"}, "Use 'random', 'sequential' or 'group_by_length'"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` is not supported"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches=True` is not supported"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches=True` is not supported"),
        ({"accelerator_config": {"even_batches": False}}, "or set `dataloader_drop_last=True`"),
    ],
)
def test_wrong_options(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def _with_ids(ids):
    return ROWS.select(range(len(ids))).add_column("uid", ids)


@pytest.mark.parametrize(
    ("datasets", "error", "message"),
    [
        ({"validation_dataset": None}, ValueError, "`validation_dataset` is required. Pass a `datasets.Dataset`"),
        ({"validation_dataset": ROWS.select([])}, ValueError, "`validation_dataset` is empty"),
        ({"train_dataset": None}, ValueError, "`train_dataset` is required"),
        ({"train_dataset": ROWS.select([])}, ValueError, "`train_dataset` is empty"),
        ({"train_dataset": DatasetDict(train=ROWS)}, TypeError, "got `DatasetDict`.*Pass one of its splits"),
        ({"validation_dataset": ROWS.to_list()}, TypeError, "got `list`"),
        ({"train_dataset": ROWS.add_column("image", [0] * 24)}, ValueError, "must have the same columns of images"),
        ({"train_dataset": ROWS.add_column("rank", [0] * 24)}, ValueError, r"remove_columns\(\['rank'\]\)"),
        (
            {"validation_dataset": Dataset.from_dict({"input_ids": [[1, 2]] * 8})},
            ValueError,
            "must both be tokenized datasets, or neither",
        ),
        (
            {"validation_dataset": Dataset.from_dict({"text": ["good"] * 8})},
            ValueError,
            "must both be prompt-completion datasets, or neither",
        ),
        (
            {"validation_dataset": prompt_completion_rows(2, 900), "per_device_validation_batch_size": 4},
            ValueError,
            "`validation_dataset` has 2 rows .* Lower `per_device_validation_batch_size`",
        ),
    ],
)
def test_wrong_datasets(make_trainer, datasets, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**datasets)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (ROWS, ValueError, r"`sample_id_column='uid'` is not a column .* \['prompt', 'completion'\]"),
        (_with_ids(["a", "b", "a", "c"]), ValueError, r"1 rows repeat an id .* 'a' \(2 times\)"),
        (_with_ids(["a", None, "b", None]), ValueError, "2 of 4 rows have no id in the column 'uid'"),
        (_with_ids([0.5, 1.5, 2.5, 3.5]), TypeError, "has type double. Cast it"),
        (_with_ids([1, 2, 3, 4]).add_column("sample_id", list("abcd")), ValueError, "Drop or rename that column"),
    ],
)
def test_wrong_sample_ids(make_trainer, rows, error, message):
    with pytest.raises(error, match=message):
        make_trainer(train_dataset=rows, sample_id_column="uid")


def test_nothing_is_loaded_before_the_datasets_are_checked(make_config, train_dataset):
    with pytest.raises(ValueError, match="`validation_dataset` is required"):
        BilevelSFTTrainer("/no/such/model", make_config(), train_dataset=train_dataset)


TEXT, QUESTIONS = Dataset.from_dict({"text": ["a b"] * 24}), Dataset.from_dict({"question": ["a"] * 24})
TALKS = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 24}
)
TOKENS = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 24})
GAP = Dataset.from_list([*ROWS.select(range(22)), {"prompt": "a", "completion": None}, {"prompt": "b"}])


@pytest.mark.parametrize(
    ("training", "validation", "options", "message"),
    [
        (TEXT, QUESTIONS, {}, r"`validation_dataset` has the columns \['question'\], of which TRL can make no text"),
        (QUESTIONS, QUESTIONS, {}, r"`train_dataset` has the columns .*, or 'text' \(`dataset_text_field`\)"),
        (TEXT, TEXT, {"dataset_text_field": "body"}, "`train_dataset` has the columns .*, or 'body'"),
        (ROWS.select_columns("completion"), ROWS, {}, "`train_dataset` has the columns .*'prompt' with 'completion'"),
        (GAP, ROWS, {}, "2 of 24 rows of `train_dataset` have nothing in the column 'completion'. Drop them: "),
        (ROWS, GAP.shuffle(seed=0), {}, "2 of 24 rows of `validation_dataset` have nothing"),
        (QUESTIONS.to_iterable_dataset(), TEXT, {"sample_id_column": "question"}, "`train_dataset` has the columns"),
        (TOKENS.add_column("labels", [[-100, 2, 3]] * 24), TOKENS, {}, "Of one dataset a column says which tokens"),
        (TOKENS, TOKENS.add_column("assistant_masks", [[0, 1, 1]] * 24), {}, "Give both of them `labels`, or neither"),
        (
            TOKENS.add_column("labels", [[-100, 2, 3]] * 24),
            TOKENS.add_column("completion_mask", [[0, 1, 1]] * 24),  # which nothing reads
            {},
            "Of one dataset a column says which tokens",
        ),
        (TALKS.add_column("prompt", ["a"] * 24), TALKS, {}, "has a column 'prompt' and no 'completion'"),
        (TALKS.rename_column("messages", "conversations"), TALKS, {}, "'conversations' of 'from' and 'value'"),
        (TALKS, TEXT, {"assistant_only_loss": True}, "holds conversations"),
    ],
)
def test_wrong_row_formats(make_config, training, validation, options, message):
    """Before a model is loaded."""
    with pytest.raises(ValueError, match=message):
        BilevelSFTTrainer(
            "/no/such/model",
            make_config(max_steps=2, **options),
            train_dataset=training,
            validation_dataset=validation,
        )


def test_row_formats_that_others_make_text_of_are_not_refused(make_config):
    config = make_config()
    check_row_formats(QUESTIONS, QUESTIONS, config, has_formatting_func=True)
    check_row_formats(TEXT, QUESTIONS, make_config(dataset_kwargs={"skip_prepare_dataset": True}), False)
    check_row_formats(TALKS, TALKS, make_config(assistant_only_loss=True), False)
    masked = TOKENS.add_column("assistant_masks", [[0, 1, 1]] * 24)
    check_row_formats(masked, TOKENS.add_column("labels", [[-100, 2, 3]] * 24), config, False)
    completion_masked = TOKENS.add_column("completion_mask", [[0, 1, 1]] * 24)
    check_row_formats(completion_masked, TOKENS, config, False)  # not read
    for option in (True, False):
        second = masked if option else TOKENS
        check_row_formats(completion_masked, second, make_config(completion_only_loss=option), False)
    check_row_formats(TOKENS.add_column("labels", [[1, 2, 3]] * 24), TOKENS, config, False)  # all of them count
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    check_row_formats(
        TALKS, Dataset.from_dict({"conversations": [shared]}), make_config(assistant_only_loss=True), False
    )
    check_row_formats(QUESTIONS.with_transform(lambda rows: {"text": rows["question"]}), TEXT, config, False)
    pairs = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    check_row_formats(ROWS, pairs, make_config(validation_loss_type="dpo"), False)
    check_row_formats(GAP.select(range(20)), ROWS, config, False)  # the gaps were dropped


def test_masks_that_nothing_reads_are_refused(make_trainer):
    tokens = {"input_ids": [[1, 2, 3]] * 24, "labels": [[-100, 2, 3]] * 24}
    masked = {"input_ids": [[4, 5, 6]] * 10, "completion_mask": [[0, 1, 1]] * 10}
    with pytest.raises(ValueError, match="The validation dataset has mask columns but no 'labels'"):
        make_trainer(
            train_dataset=Dataset.from_dict(tokens),
            validation_dataset=Dataset.from_dict(masked),
            dataset_kwargs={"skip_prepare_dataset": True},
        )


def test_shared_rows_are_counted(make_trainer):
    trusted = Dataset.from_list([*ROWS.select([3, 9]), *prompt_completion_rows(8, 1000)])
    with pytest.warns(UserWarning, match=r"^2 training rows are also in `validation_dataset`.*: sample ids 3, 9\. "):
        make_trainer(validation_dataset=trusted)


@pytest.mark.parametrize("name", ["train_dataset", "validation_dataset"])
def test_dataset_without_any_completion_token_left(make_trainer, name):
    rows = Dataset.from_list([{"prompt": "long " * 20, "completion": " lost"}] * 8)
    with pytest.raises(ValueError, match=f"No row of `{name}` has a completion token left .* max_length=40"):
        make_trainer(max_length=40, **{name: rows})


def test_dropped_rows_are_reported(make_trainer, caplog):
    rows = Dataset.from_list([*ROWS, {"prompt": "long " * 20, "completion": " lost"}])
    make_trainer(train_dataset=rows, max_length=40)
    assert "1 of 25 rows of `train_dataset` have no completion token left" in caplog.text


@pytest.mark.parametrize("name", ["train_dataset", "validation_dataset"])
def test_rows_that_are_packed_already_are_refused(make_trainer, name):
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [5, 5]] * 4}), 8)
    with pytest.raises(ValueError, match=rf"The rows of `{name}` are packed already .* and set `packing=True`"):
        make_trainer(**{name: packed})


def test_pairs_beside_the_text_of_a_row_are_no_pairs(make_trainer, validation_dataset):
    sides = {side: [side] * len(validation_dataset) for side in ("chosen", "rejected")}
    pairs = Dataset.from_dict({"prompt": ["p"] * 10, **sides})
    with pytest.raises(ValueError, match="holds preference pairs"):
        make_trainer(validation_dataset=pairs)
    beside = validation_dataset
    for name, values in sides.items():
        beside = beside.add_column(name, values)
    formatted = make_trainer(validation_dataset=beside, formatting_func=lambda row: f"{row['prompt']}!",
                             completion_only_loss=False)  # fmt: skip
    text = Dataset.from_dict({"text": validation_dataset["prompt"][:], **sides})
    plain = make_trainer(train_dataset=Dataset.from_dict({"text": ROWS["prompt"][:]}), validation_dataset=text)
    for trainer in (formatted, plain):
        assert len(trainer.validation_dataset) == 10
        trainer.train()


def test_parts_of_a_model_on_each_process_are_refused(make_trainer, build_model):
    model = build_model()
    model.config.distributed_config = SimpleNamespace(tp_size=1, pp_size=2)
    with pytest.raises(ValueError, match="`distributed_config` with pp_size above 1 is not supported"):
        make_trainer(model=model)
    sharded = build_model()
    sharded._is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="`refine_ratio` is not supported with"):
        make_trainer(model=sharded, refine_ratio=0.5)


def test_loss_function_of_the_user_is_refused(make_trainer):
    with (
        pytest.warns(FutureWarning, match="compute_loss_func"),
        pytest.raises(ValueError, match="`compute_loss_func` is not supported"),
    ):
        make_trainer(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())


@pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.5, math.nan])
def test_wrong_keep_ratio(make_trainer, keep_ratio):
    with pytest.raises(ValueError, match=f"larger than 0 and at most 1, got {keep_ratio}"):
        make_trainer().curate(keep_ratio)


SPOKEN = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 24
)


@pytest.mark.parametrize(
    ("training", "validation"), [(TALKS, TEXT), (TEXT, TALKS), (SPOKEN, ROWS), (ROWS, SPOKEN)], ids="abcd"
)
def test_text_beside_conversations_is_refused(make_trainer, training, validation):
    with pytest.raises(ValueError, match=r"holds conversations .* plain text .* Bring both into one"):
        make_trainer(train_dataset=training, validation_dataset=validation)


def test_empty_answers_are_counted(make_trainer, caplog):
    rows = Dataset.from_list([{**row, "completion": " " if number % 2 else ""} for number, row in enumerate(ROWS)])
    mixed = Dataset.from_list([*ROWS.select(range(20)), *rows.select(range(12))])
    make_trainer(train_dataset=mixed)
    assert "12 of 32 rows of `train_dataset` have an empty answer" in caplog.text
    assert "20, 21, 22, 23, 24, 25, 26, 27, 28, 29, .... Drop" in caplog.text
    assert "rows of `validation_dataset` have an empty answer" not in caplog.text


def test_empty_answers_of_conversations_are_counted(make_trainer, caplog):
    def talk(answer):
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}

    silent = Dataset.from_list([talk("d"), talk(""), *[talk("c")] * 8])
    make_trainer(train_dataset=TALKS, validation_dataset=silent)
    assert "1 of 10 rows of `validation_dataset` have an empty answer" in caplog.text
    assert "Counted from 0 they are 1. Drop" in caplog.text
