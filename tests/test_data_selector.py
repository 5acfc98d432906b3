"""The selector: weights, running normaliser, odd rows, and its file."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_bilevel import DataSelector, selector_files
from trl_bilevel.selector_files import SELECTOR_FILE_NAME
from trl_bilevel.weight_sums import WeightSums


MASS = {"softmax": torch.exp, "sigmoid": torch.sigmoid}
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def _reference_weights(logits: torch.Tensor, activation: str) -> torch.Tensor:
    mass = MASS[activation](logits.double())
    return (len(logits) * mass / mass.sum()).float()


@pytest.mark.parametrize("optimizer", ["mirror_descent", "adam"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_weights_stay_normalised_over_many_updates(activation, optimizer):
    selector = DataSelector(50, activation, optimizer, learning_rate=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        rows = torch.randperm(50, generator=generator)[:8]
        selector.update(rows, 4 * torch.rand(8, generator=generator) * (rows % 5))
    weights = selector.weights()
    torch.testing.assert_close(weights, _reference_weights(selector.logits, activation), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(selector.weights_of(torch.tensor([3, 44])), weights[[3, 44]])
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    # the loss grows with row % 5, so rows divisible by 5 must lead and 4, 9, 14, ... must trail
    assert weights[0::5].min() > weights[4::5].max()


def test_normaliser_survives_extreme_logits():
    selector = DataSelector(20, learning_rate=300.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        selector.update(torch.randperm(20, generator=generator)[:4], 10 * torch.rand(4, generator=generator))
    assert selector.logits.max() - selector.logits.min() > 1000  # exp() of this overflows float64
    weights = selector.weights()
    expected = 20 * selector.logits.double().softmax(0)
    torch.testing.assert_close(weights, expected.float(), rtol=1e-5, atol=1e-9)


def test_weights_that_stay_as_they_are_learn_of_no_row():
    selector = DataSelector(4, learning_rate=0.0)
    selector.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert not selector.scored.any()
    assert torch.equal(selector.weights(), torch.ones(4))


def test_large_sigmoid_logits_do_not_sum_all_rows_anew(monkeypatch):
    """Their masses end at 1; only those of the softmax overflow."""
    selector = DataSelector(4, activation="sigmoid", learning_rate=1.0, centered=False)
    monkeypatch.setattr(WeightSums, "refresh", None)
    selector.update(torch.tensor([1]), torch.tensor([-500.0]))
    assert selector.logits[1] == 500
    monkeypatch.undo()
    expected = torch.sigmoid(selector.logits.double())
    torch.testing.assert_close(selector.weights().double(), 4 * expected / expected.sum())


class _LargestResult(TorchDispatchMode):
    """Of the tensors that are made, not those that are written into or looked at."""

    numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, made.numel())
        return result


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_cost_of_a_step_does_not_depend_on_the_number_of_rows(activation):
    selector = DataSelector(200_000, activation=activation)
    rows, losses = torch.arange(0, 200_000, 6_250), torch.rand(32)
    selector.update(rows, losses)
    selector.statistics()  # from here on its sums are kept up to date
    with _LargestResult() as largest:
        selector.weights_of(rows)
        selector.update(rows, losses)
    assert 32 <= largest.numel <= 8 * 32


def test_mirror_descent_touches_only_the_batch():
    selector = DataSelector(10, learning_rate=1.0)
    selector.update(torch.tensor([2, 5]), torch.tensor([1.0, 2.0]))
    assert selector.logits.nonzero().flatten().tolist() == [2, 5]
    assert selector.scored.nonzero().flatten().tolist() == [2, 5]


def test_adam_is_torchs_adam_on_all_logits():
    selector = DataSelector(6, optimizer="adam", learning_rate=0.05)
    reference = torch.nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adam([reference], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, losses = torch.randperm(6, generator=generator)[:3], torch.rand(3, generator=generator)
        selector.update(rows, losses)
        optimizer.zero_grad()
        (6 * reference.softmax(0)[rows] * losses).mean().backward()
        optimizer.step()
    torch.testing.assert_close(selector.logits, reference.data, rtol=1e-4, atol=1e-6)
    assert (selector.logits != 0).all()


@pytest.mark.parametrize("optimizer", ["mirror_descent", "adam"])
def test_row_that_occurs_twice_counts_once(optimizer):
    once, twice = (DataSelector(6, optimizer=optimizer, learning_rate=0.3) for _ in range(2))
    once.update(torch.tensor([4, 1]), torch.tensor([2.0, 1.0]))
    twice.update(torch.tensor([4, 1, 4]), torch.tensor([2.0, 1.0, 2.0]))
    assert torch.equal(once.weights(), twice.weights())


def test_rows_without_a_finite_loss_are_left_alone():
    with_faults, without = DataSelector(6, learning_rate=0.3), DataSelector(6, learning_rate=0.3)
    with_faults.update(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1.0, math.nan, 2.0, math.inf, -math.inf]))
    without.update(torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
    assert torch.equal(with_faults.weights(), without.weights())
    assert with_faults.scored.tolist() == [True, False, True, False, False, False]
    with_faults.update(torch.tensor([5]), torch.tensor([math.nan]))
    assert torch.equal(with_faults.weights(), without.weights())


def test_statistics_of_uniform_and_of_two_level_weights():
    selector = DataSelector(8)
    uniform = selector.statistics()
    assert uniform.entropy == pytest.approx(math.log(8))
    assert uniform.effective_sample_ratio == pytest.approx(1)
    assert uniform.weight_min == uniform.weight_max == 1
    # half the rows get all the weight: entropy log 4, half the rows effective
    selector.learning_rate = 200.0
    selector.update(torch.arange(8), torch.tensor([0.0, 1.0] * 4))
    halves = selector.statistics()
    assert halves.entropy == pytest.approx(math.log(4))
    assert halves.effective_sample_ratio == pytest.approx(0.5)
    assert (halves.weight_min, halves.weight_max) == pytest.approx((0, 2))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_sources", [False, True])
def test_running_statistics_stay_exact(activation, with_sources):
    """Over many updates, large and small, that also drain a weight that had nearly all the mass."""
    num_rows = 500
    generator = torch.Generator().manual_seed(0)
    sources = torch.arange(num_rows) % 50 if with_sources else None
    selector = DataSelector(num_rows, activation=activation, learning_rate=20.0, sources=sources)
    selector.statistics()
    for step in range(400):
        rows = torch.randperm(num_rows, generator=generator)[:8]
        losses = torch.randn(8, generator=generator) * 10.0 ** (step % 3 - 1)
        selector.update(rows, losses + 30 * (step == 200) * (torch.arange(8) - 4))
        found = selector.statistics()
        logits = selector.logits.double()
        share = logits.softmax(0) if activation == "softmax" else logits.sigmoid() / logits.sigmoid().sum()
        assert found.entropy == pytest.approx(torch.special.entr(share).sum().item(), rel=1e-6, abs=1e-9)
        assert found.effective_sample_ratio == pytest.approx(1 / (num_rows * share.square().sum().item()), rel=1e-6)
        assert found.weight_min == pytest.approx(num_rows * share.min().item(), rel=1e-6)
        assert found.weight_max == pytest.approx(num_rows * share.max().item(), rel=1e-6)


def test_statistics_that_a_checkpoint_lacks_are_summed_anew(tmp_path):
    selector = _trained("mirror_descent", 7)
    selector.save(tmp_path, "rows")  # without moments: nobody has asked for statistics
    restored = DataSelector(12, learning_rate=0.4)
    restored.statistics()
    restored.load(tmp_path, "rows")
    assert restored.statistics() == selector.statistics()
    selector.save(tmp_path, "rows")
    _continue(selector, range(7, 15))
    restored.load(tmp_path, "rows")
    _continue(restored, range(7, 15))
    assert restored.statistics() == selector.statistics()  # bit for bit


def test_statistics_of_a_published_selector():
    path = SHARED_DATA / "seal_selector_llama3.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    logits = torch.load(path, weights_only=True, map_location="cpu").detach()
    selector = DataSelector.from_pretrained(path)
    torch.testing.assert_close(selector.weights(), (len(logits) * logits.double().softmax(0)).float())
    # independent: (sum w)^2 / (N sum w^2) in float64; its published value is about 0.21
    share = logits.double().softmax(0)
    assert selector.statistics().effective_sample_ratio == pytest.approx(1 / (len(share) * (share**2).sum().item()))
    assert selector.statistics().effective_sample_ratio == pytest.approx(0.21, abs=0.005)


def _trained(optimizer: str, updates: int) -> DataSelector:
    selector = DataSelector(12, optimizer=optimizer, learning_rate=0.4)
    _continue(selector, range(updates))
    return selector


def _continue(selector: DataSelector, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        selector.update(torch.randperm(12, generator=generator)[:5], torch.rand(5, generator=generator))


@pytest.mark.parametrize("optimizer", ["mirror_descent", "adam"])
def test_restored_selector_continues_bit_for_bit(tmp_path, optimizer):
    _trained(optimizer, 7).save(tmp_path, "rows")
    restored = DataSelector(12, optimizer=optimizer, learning_rate=0.4)
    restored.load(tmp_path, "rows")
    _continue(restored, range(7, 15))
    unbroken = _trained(optimizer, 15)
    assert torch.equal(restored.logits, unbroken.logits)
    assert torch.equal(restored.weights(), unbroken.weights())
    assert torch.equal(restored.scored, unbroken.scored)


def test_state_of_other_rows_or_options_is_refused(tmp_path):
    _trained("mirror_descent", 1).save(tmp_path, "rows")
    with pytest.raises(ValueError, match=r"rows_fingerprint 'rows' \(now 'other rows'\)"):
        DataSelector(12).load(tmp_path, "other rows")
    with pytest.raises(ValueError, match=r"num_rows 12 \(now 13\)"):
        DataSelector(13).load(tmp_path, "rows")
    with pytest.raises(ValueError, match="optimizer 'mirror_descent'"):
        DataSelector(12, optimizer="adam").load(tmp_path, "rows")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=SELECTOR_FILE_NAME):
        DataSelector(12).load(tmp_path, "rows")
    path = _trained("mirror_descent", 1).save(tmp_path, "rows")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{SELECTOR_FILE_NAME} is damaged"):
        DataSelector(12).load(tmp_path, "rows")


def test_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = _trained("mirror_descent", 1).save(tmp_path, "rows")
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(selector_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        _trained("mirror_descent", 2).save(tmp_path, "rows")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "at least one row"),
        ({"num_rows": 3, "activation": "relu"}, "'softmax' or 'sigmoid', got 'relu'"),
        ({"num_rows": 3, "optimizer": "sgd"}, "'mirror_descent' or 'adam', got 'sgd'"),
        ({"num_rows": 3, "learning_rate": -1.0}, "got -1.0"),
        ({"num_rows": 3, "learning_rate": math.nan}, "got nan"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataSelector(**options)


@pytest.mark.parametrize("sources", [None, torch.tensor([0, 1, 1, 0])])
@pytest.mark.parametrize("row", [-1, 4])
def test_positions_that_are_no_rows_are_refused(sources, row):
    selector = DataSelector(4, sources=sources)
    rows = torch.tensor([0, row])
    for call in (selector.weights_of, lambda rows: selector.update(rows, torch.tensor([1.0, 2.0]))):
        with pytest.raises(IndexError, match=f"numbered from 0 to 3, got {row}"):
            call(rows)
    if sources is None:
        for call in (selector.restart, lambda rows: selector.assign(rows, torch.zeros(2))):
            with pytest.raises(IndexError, match=f"numbered from 0 to 3, got {row}"):
                call(rows)
    assert selector.weights().tolist() == [1] * 4
    assert not selector.scored.any()


@pytest.mark.parametrize("sources", [[0, 2, 2], [1, 1, 2], [-1, 0, 1], [0, 0, 10**15]])
def test_sources_with_gaps_are_refused(sources):
    with pytest.raises(ValueError, match=rf"without gaps, got \d of them in {min(sources)} to {max(sources)}"):
        DataSelector(3, sources=torch.tensor(sources))
