"""Token statistics of answers, and the evidence that they are against a row."""

import numpy as np
import pytest
import torch

from trl_bilevel.screening.answer_statistics import STATISTICS, AnswerStatistics, answer_statistics
from trl_bilevel.screening.evidence import PIECES, gather_evidence, surprise, surprise_of_reference
from trl_bilevel.screening.reasons import give_reasons


END = 9


def _batch(padding_side):
    """Two rows: a prompt 1 2 and the answer 3 4 3 4 END; a prompt 5 and the answer 5 END. Losses are made up."""
    rows = [([1, 2, 3, 4, 3, 4, END], 2), ([5, 5, END], 1)]
    losses = {3: 1.0, 4: 0.05, 5: 2.0, END: 4.0}
    length = 7
    ids, answer, read = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length).bool(), None
    read = torch.zeros(2, length).bool()
    for number, (tokens, prompt) in enumerate(rows):
        start = 0 if padding_side == "right" else length - len(tokens)
        ids[number, start : start + len(tokens)] = torch.tensor(tokens)
        read[number, start : start + len(tokens)] = True
        answer[number, start + prompt : start + len(tokens)] = True
    log_probs = torch.tensor([[-losses.get(int(token), 7.0) for token in row] for row in ids])[:, 1:]
    return log_probs, torch.full_like(log_probs, 0.5), ids, answer[:, 1:], read


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_statistics_of_answers_by_hand(padding_side):
    found = answer_statistics(*_batch(padding_side), {END})
    first = np.array([1.0, 0.05, 1.0, 0.05, 4.0])
    assert found.loss == pytest.approx([first.mean(), 3.0])
    assert found.loss_std == pytest.approx([first.std(), 1.0])
    assert found.loss_max == pytest.approx([4.0, 4.0])
    assert found.surprise == pytest.approx([first.mean() - 0.5, 2.5])
    assert found.entropy == pytest.approx([0.5, 0.5])
    assert found.num_tokens.tolist() == [5, 2]
    assert found.certain_share == pytest.approx([2 / 5, 0])
    assert found.begin_loss == pytest.approx([first[:4].mean(), 3.0])
    assert found.end_loss == pytest.approx([4.0, 4.0])
    assert found.repetition == pytest.approx([1 - 3 / 4, 0])  # 34, 43, 34, 4E
    assert found.copied_share == pytest.approx([0, 1 / 2])


def test_every_turn_has_a_beginning_and_an_end():
    # An answer of five tokens and its end, a question, an answer of one token and its end
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, END, 1, 7, END]])
    is_answer = torch.tensor([[True] * 6 + [False] + [True] * 2])
    losses = torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0, 2.0, 100.0, 3.0, 6.0]])
    found = answer_statistics(-losses, torch.zeros(1, 9), ids, is_answer, torch.ones(1, 10).bool(), {END})
    assert found.begin_loss == pytest.approx([(4 * 1.0 + 3.0 + 6.0) / 6])
    assert found.end_loss == pytest.approx([(2.0 + 6.0) / 2])
    assert found.loss == pytest.approx([(4 + 9 + 2 + 3 + 6) / 8])


def test_a_row_without_answer_or_end_is_not_a_number():
    log_probs, entropy, ids, answer, read = _batch("right")
    answer[0] = False
    found = answer_statistics(log_probs, entropy, ids, answer, read, {77})
    assert np.isnan(found.loss[0])
    assert np.isnan(found.end_loss).all()
    assert found.loss[1] == pytest.approx(3.0)


def test_equal_answers_have_equal_hashes_whatever_the_prompt():
    ids = torch.tensor([[1, 3, 4], [2, 3, 4], [1, 4, 3]])
    is_answer = torch.tensor([[True, True]] * 3)
    found = answer_statistics(-torch.ones(3, 2), torch.ones(3, 2), ids, is_answer, torch.ones(3, 3).bool(), {4})
    assert found.answer_hash[0] == found.answer_hash[1] != found.answer_hash[2]


def test_surprise_is_the_share_and_then_an_exponential_tail():
    reference = np.arange(1.0, 11.0)  # 80 % quantile 8.2, above it 9 and 10, mean excess 1.3
    found = surprise(np.array([0.0, 5.0, 8.0, 11.0, np.nan]), reference)
    expected = [0.0, -np.log(7 / 11), -np.log(4 / 11), -np.log(0.2) + (11 - 8.2) / 1.3, 0.0]
    assert found == pytest.approx(expected)


def test_surprise_of_a_trusted_row_leaves_it_out():
    reference = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 30.0, np.nan])
    found = surprise_of_reference(reference)
    quantile = np.quantile(reference[:10], 0.8)
    assert found[2] == pytest.approx(-np.log(8 / 10))  # itself and seven others are at least as high
    assert found[9] == pytest.approx(-np.log(0.2) + (30 - quantile) / (9 - quantile))  # the other one's excess
    assert found[10] == 0


def _statistics(generator, num_rows):
    values = {name: generator.gamma(3.0, size=num_rows) for name in STATISTICS}
    return AnswerStatistics(**values, answer_hash=generator.integers(2**60, size=num_rows))


def test_trusted_and_good_rows_have_the_same_evidence_against_them():
    shares = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        rows, trusted = gather_evidence(_statistics(generator, 100), _statistics(generator, 50))
        shares.append((rows.score[:, None] > trusted.score[None]).mean())
    # Half of all pairs, as for two samples of one distribution; 0.01 is the standard error of the mean
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("statistic", "value", "piece", "reason"),
    [
        ("loss", 40.0, "loss", "hard to predict"),
        ("begin_loss", 40.0, "beginning", "does not follow"),
        ("end_loss", 40.0, "end", "ends early"),
        ("copied_share", 40.0, "copy", "repeats the prompt"),
        ("num_tokens", 1e-9, "distance", "unlike the trusted rows: short"),
        ("repetition", 40.0, "distance", "unlike the trusted rows: many repetitions"),
    ],
)
def test_each_fault_shows_in_its_piece_and_has_its_reason(statistic, value, piece, reason):
    generator = np.random.default_rng(0)
    rows, trusted = _statistics(generator, 50), _statistics(generator, 80)
    getattr(rows, statistic)[7] = value
    evidence, _ = gather_evidence(rows, trusted)
    assert evidence.score.argmax() == 7
    assert evidence.pieces[:, PIECES.index(piece)].argmax() == 7
    reasons = give_reasons(evidence, rows, trusted)
    assert reason in reasons[7]
    assert reasons[7].count(";") <= 1


def test_copies_of_an_answer_are_named():
    generator = np.random.default_rng(1)
    rows, trusted = _statistics(generator, 60), _statistics(generator, 80)
    rows.answer_hash[[3, 17, 40]] = 5
    evidence, of_trusted = gather_evidence(rows, trusted)
    duplicate = PIECES.index("duplicate")
    assert np.flatnonzero(evidence.pieces[:, duplicate] > 1).tolist() == [3, 17, 40]
    assert evidence.pieces[3, duplicate] == pytest.approx(np.log(81))  # no trusted row has a copy
    assert (of_trusted.pieces[:, duplicate] == 0).all()
    reasons = give_reasons(evidence, rows, trusted)
    assert "same answer as row 17" in reasons[3]
    assert "same answer as row 3" in reasons[17]
    assert "same answer as row 3" in reasons[40]


def test_too_few_trusted_rows_are_refused():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"9 trusted rows are too few.*at least 10"):
        gather_evidence(_statistics(generator, 20), _statistics(generator, 9))
