"""Out of memory while answers are regenerated."""

import pytest
import torch

from trl_bilevel.fitting_batches import FittingBatches


OUT_OF_MEMORY = torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")


def _work_that_fits(most, seen):
    def work(batch, number):
        seen.append((number, list(batch)))
        if len(batch) > most:
            raise OUT_OF_MEMORY
        return [10 * item for item in batch for _ in range(2)]  # two results an item

    return work


def test_batches_are_halved_until_they_fit_and_stay_so(caplog):
    batches, seen = FittingBatches(6, "the test", "Buy memory."), []
    items = list(range(1, 8))
    expected = [10 * item for item in items for _ in range(2)]
    assert batches.run(_work_that_fits(2, seen), items) == expected
    # 6 -> 3 -> 1
    assert seen == [(0, [1, 2, 3, 4, 5, 6]), (0, [1, 2, 3]), *((number, [number + 1]) for number in range(7))]
    assert [record.message for record in caplog.records] == [
        "Out of memory in the test, 6 at a time. It goes on with 3, for the rest of the run.",
        "Out of memory in the test, 3 at a time. It goes on with 1, for the rest of the run.",
    ]
    seen.clear()
    assert batches.run(_work_that_fits(2, seen), [5, 6]) == [50, 50, 60, 60]
    assert seen == [(0, [5]), (1, [6])]
    assert batches.run(_work_that_fits(2, seen), []) == []


def test_one_item_that_does_not_fit_is_an_error_with_the_cure():
    with pytest.raises(RuntimeError, match=r"not enough memory for the test, one at a time. Buy memory\.") as caught:
        FittingBatches(2, "the test", "Buy memory.").run(_work_that_fits(0, []), [1, 2])
    assert caught.value.__cause__ is OUT_OF_MEMORY


def test_errors_that_only_say_so_count_too():
    def work(batch, number):
        if len(batch) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return list(batch)

    assert FittingBatches(2, "the test", "").run(work, [1, 2]) == [1, 2]


def test_other_errors_are_not_hidden():
    def work(batch, number):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        FittingBatches(2, "the test", "").run(work, [1, 2])


@pytest.mark.parametrize("what", ["generation", "likelihoods"])
def test_run_that_ran_out_of_memory_is_the_run_that_did_not(make_trainer, monkeypatch, what):
    """Greedy answers do not depend on the batch."""
    options = {"refine_ratio": 0.5, "refine_start_step": 1, "refine_every_steps": 2, "refine_temperature": 0.0,
               "refine_max_new_tokens": 4, "refine_batch_size": 6, "refine_discard_flawed": False}  # fmt: skip
    expected = make_trainer(**options)
    expected.train()
    trainer = make_trainer(**options, output_dir=expected.args.output_dir + "-again")
    largest, refused = [], []
    owner, name = (trainer.refiner.generator, "_generate") if what == "generation" else (trainer, "_forward")
    original = getattr(owner, name)

    def limited(*arguments, **keywords):
        size = len(arguments[0]) if what == "generation" else len(arguments[1]["input_ids"])
        if size > 2 and (what == "generation" or not torch.is_grad_enabled()):
            refused.append(size)
            raise OUT_OF_MEMORY
        largest.append(size)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, limited)
    trainer.train()
    assert refused
    found, wanted = (run.response_store.table().drop(["log_probs"]).to_pylist() for run in (trainer, expected))
    assert len(found) > 6
    for response, other in zip(found, wanted, strict=True):
        assert response.pop("weight") == pytest.approx(other.pop("weight"), abs=1e-5)
        assert response == other
    torch.testing.assert_close(trainer.data_selector.weights(), expected.data_selector.weights())
    if what == "generation":
        assert max(largest) == 1  # 6 -> 3 -> 1
