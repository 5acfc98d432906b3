"""The selector of a stream: it grows, and is then the selector that knew all rows from the beginning."""

import pytest
import torch

from trl_bilevel import DataSelector
from trl_bilevel.streamed_selector import StreamedSelector


NUM_ROWS = 5000  # more than the first capacity, more than once


@pytest.mark.parametrize(
    "options", [{}, {"activation": "sigmoid", "centered": False, "prior": 0.2}, {"learning_rate": 300.0}]
)
def test_grown_selector_equals_one_that_knew_all_rows(options):
    generator = torch.Generator().manual_seed(0)
    plain, streamed = DataSelector(NUM_ROWS, **options), StreamedSelector(**options)
    rows = torch.randperm(NUM_ROWS, generator=generator)
    batches = [*rows.split(500), *rows.flip(0).split(700)]
    for number, batch in enumerate(batches):
        losses = torch.rand(len(batch), generator=generator) + (batch % 3)
        plain.update(batch, losses)
        streamed.update(streamed.row_numbers([f"row-{row}" for row in batch.tolist()]), losses)
        if number == 2:
            # The weights have mean 1 over what was seen
            weights = plain.weights()[rows[: streamed.num_rows]].double()
            assert streamed.num_rows == 1500
            torch.testing.assert_close(streamed.weights().double(), weights / weights.mean(), rtol=1e-4, atol=1e-6)
            streamed.statistics()  # which keeps running sums from here on
    assert streamed.sample_ids.to_pylist() == [f"row-{row}" for row in rows.tolist()]
    torch.testing.assert_close(streamed.logits, plain.logits[rows], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(streamed.weights(), plain.weights()[rows], rtol=1e-3, atol=1e-5)
    assert streamed.statistics() == pytest.approx(plain.statistics(), rel=1e-3, abs=1e-9)
    assert streamed.scored.all()


def test_saved_selector_goes_on_as_if_it_never_stopped(tmp_path):
    def update(selector, ids):
        selector.update(selector.row_numbers(ids), torch.arange(len(ids)).float())

    unbroken, stopped, resumed = StreamedSelector(), StreamedSelector(), StreamedSelector()
    for selector in (unbroken, stopped):
        for start in range(0, 3000, 100):
            update(selector, list(range(start, start + 100)))
    stopped.consumed.add(range(3000))
    stopped.save(tmp_path, fingerprint="")
    resumed.load(tmp_path, fingerprint="")
    assert vars(resumed.consumed) == vars(stopped.consumed)
    for selector in (unbroken, resumed):
        update(selector, [2999, 3000, 5])
    assert resumed.sample_ids.to_pylist() == list(range(3001))
    assert torch.equal(resumed.weights(), unbroken.weights())
    assert resumed.statistics() == unbroken.statistics()
    resumed.row_numbers(list(range(3001, 3500)))
    resumed.update(torch.arange(3400, 3500), torch.arange(100).float())
    resumed.load(tmp_path, fingerprint="")  # back to an earlier state: what was seen since is new again
    update(resumed, [2999, 3000, 5])
    resumed.row_numbers(list(range(3001, 3500)))
    assert torch.equal(resumed.logits[:3001], unbroken.logits)
    assert resumed.logits[3001:].unique().tolist() == [0.0]
    assert not resumed.scored[3001:].any()
    with pytest.raises(ValueError, match=r"written for another run: .*num_rows None \(now 3000\)"):
        DataSelector(3000).load(tmp_path, fingerprint="")


def test_ids_of_two_kinds_are_refused():
    selector = StreamedSelector()
    selector.row_numbers(["a"])
    with pytest.raises(TypeError, match="all strings or all integers, but the stream has int and str"):
        selector.row_numbers([1])
    assert selector.num_rows == 1
