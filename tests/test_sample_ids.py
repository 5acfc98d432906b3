"""Rows keep their weights by id, whatever their order."""

import torch
from datasets import concatenate_datasets


def test_ids_of_the_user_reach_the_curated_dataset(make_trainer, train_dataset):
    ids = [f"row/{index}é" for index in range(24)]
    trainer = make_trainer(train_dataset=train_dataset.add_column("uid", ids), sample_id_column="uid", max_steps=2)
    trainer.train()
    curated = trainer.curate()
    assert curated["sample_id"] == ids
    assert curated["uid"] == ids


def test_sample_id_column_is_found_on_its_own_for_a_second_round(make_trainer, train_dataset):
    first = make_trainer(train_dataset=train_dataset.add_column("sample_id", list(range(100, 124))), max_steps=2)
    first.train()
    kept = first.curate(0.5).remove_columns(["weight", "rank", "scored", "response_source"])
    second = make_trainer(train_dataset=kept, max_steps=2)
    second.train()
    assert second.curate()["sample_id"] == kept["sample_id"]
    assert min(kept["sample_id"]) >= 100


def test_weights_follow_rows_through_a_shuffled_source(make_trainer, train_dataset):
    """The same rows in another order, visited all in one batch, so that the order of visits cannot matter."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    options = {
        "per_device_train_batch_size": 24,
        "per_device_validation_batch_size": 10,
        "max_steps": 3,
        "optim": "sgd",
        "selector_learning_rate": 1.0,
    }
    straight = make_trainer(**options)
    shuffled = make_trainer(train_dataset=train_dataset.select(order), **options)
    straight.train()
    shuffled.train()
    torch.testing.assert_close(
        shuffled.data_selector.weights(), straight.data_selector.weights()[order], rtol=1e-4, atol=1e-5
    )


def test_duplicate_rows_each_have_their_own_weight(make_trainer, train_dataset):
    twice = concatenate_datasets([train_dataset, train_dataset])
    options = {"selector_learning_rate": 1.0, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(train_dataset=twice, max_steps=9, **options)  # batches of 4: the copies of half of the rows
    trainer.train()
    assert trainer.data_selector.scored.tolist() == [True] * 36 + [False] * 12
    logits = trainer.data_selector.logits
    assert (logits[:12] != logits[24:36]).all()
    assert len(trainer.curate(0.5)) == 24
