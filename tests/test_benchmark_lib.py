"""What the benchmarks measure with: planted faults, measures of rankings, a chat model's losses and answers."""

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset


@pytest.fixture(autouse=True)
def _benchmarks_are_scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def _load(name):
    return importlib.import_module(name)


# ---- Faults ----
def test_each_fault_does_what_it_says():
    faults = _load("lib.faults")
    answer = " ".join(f"w{number}" for number in range(20))
    for seed in range(30):
        generator = np.random.default_rng(seed)
        start = faults.cut_short(answer, generator)
        assert answer.startswith(f"{start} ")
        assert 4 <= len(start.split()) <= 12  # 20 to 60 % of 20
        words = faults.shuffled(answer, generator)
        assert words != answer
        assert sorted(words.split()) == sorted(answer.split())
        assert faults.refusal(answer, generator) in faults.REFUSALS
    assert faults.cut_short("word", np.random.default_rng(0)) == "word"


def test_faults_are_equally_many_and_swapped_answers_come_from_other_rows():
    faults = _load("lib.faults")
    answers = [f"answer {number} of many" for number in range(40)]
    changed, kinds = faults.inject(answers, 18, seed=0)
    assert sorted(Counter(kinds).values()) == [4, 4, 5, 5, 22]
    assert [new for new, kind in zip(changed, kinds, strict=True) if kind == "good"] == [
        old for old, kind in zip(answers, kinds, strict=True) if kind == "good"
    ]
    swapped = np.flatnonzero(kinds == "swapped")
    assert sorted(changed[row] for row in swapped) == sorted(answers[row] for row in swapped)
    assert all(changed[row] != answers[row] for row in swapped)
    for row in np.flatnonzero(kinds == "refusal"):
        assert changed[row] in faults.REFUSALS
    again = faults.inject(answers, 18, seed=0)
    assert (again[0], again[1].tolist()) == (changed, kinds.tolist())
    assert faults.inject(answers, 18, seed=1)[1].tolist() != kinds.tolist()
    # Nobody to swap with
    assert Counter(faults.inject(answers, 2, seed=0, kinds=("swapped", "shuffled"))[1])["shuffled"] == 2
    assert set(faults.inject(answers, 0, seed=0)[1]) == {"good"}


# ---- Measures ----
def test_rankings_are_measured_by_kind_of_fault():
    measures = _load("lib.measures")
    kinds = np.array(["good", "a", "good", "b"])
    # Over a: both good rows ahead. Over b: one of two. Of the two best one is good
    found = measures.measure_ranking(np.array([4.0, 1.0, 2.0, 3.0]), kinds)
    assert found == {"auroc": 3 / 4, "kept_good": 1 / 2, "auroc, a": 1.0, "auroc, b": 1 / 2}
    assert measures.measure_ranking(np.arange(2.0), np.array(["good", "good"])) == {}


def test_weights_and_cuts():
    measures = _load("lib.measures")
    good = np.array([True, True, False, False])
    weights = measures.measure_weights(np.array([2.0, 1.0, 0.5, 0.5]), good)
    # Linear between the sorted weights: 0.5, 0.5, 1, 2 at 0, 1/3, 2/3, 1
    expected = {"weight_p5": 0.5, "weight_p95": 1 + (0.95 - 2 / 3) * 3, "good_weight": 3 / 4, "bad_over_good": 1 / 3}
    assert weights == pytest.approx(expected)
    assert "bad_over_good" not in measures.measure_weights(np.ones(2), np.array([True, True]))
    cut = measures.measure_cut(np.array([0, 1, 2]), good)
    assert cut == pytest.approx({"kept_ratio": 3 / 4, "kept_precision": 2 / 3, "dropped_good": 0})
    assert measures.measure_cut(np.array([], dtype=int), good) == {"kept_ratio": 0, "dropped_good": 0.5}
    assert measures.measure_cut(np.arange(4), good) == {"kept_ratio": 1, "kept_precision": 0.5}
    scores = np.array([0.5, 2.0, 0.0, 0.5])
    assert measures.best_rows(scores, 2).tolist() == [0, 1]  # among equals the first


def test_cuts_of_their_own():
    measures = _load("lib.measures")
    trusted = np.arange(101.0)  # 95 % of them stay under 95
    assert measures.below_trusted(np.array([96.0, 95.0, 1.0]), trusted).tolist() == [1, 2]
    pytest.importorskip("sklearn")
    losses = np.concatenate([np.linspace(0, 1, 30), np.linspace(9, 10, 20)])
    assert measures.easy_mode(losses[::-1]).tolist() == list(range(20, 50))


def test_answers_that_a_run_ends_with():
    measures = _load("lib.measures")
    right, refined = np.array([True, True, False, False]), np.array([False, True, True, False])
    proved, good = np.array([True, True, True, False]), np.array([True, False, True, False])
    assert measures.measure_answers(right, refined, proved, good) == {
        "right": 0.5, "proved_right": 0.5, "refined": 0.5, "refined_right": 1.0, "refined_spoiled": 0.5,
    }  # fmt: skip
    none = np.zeros(4, dtype=bool)
    assert measures.measure_answers(right, none, proved, good) == {"right": 0.5, "proved_right": 0.5}


# ---- Losses of answers ----
def _conversations(num_rows, row_format="prompt and completion"):
    rows = []
    for number in range(num_rows):
        asked = [{"role": "user", "content": f"Say {number}, please."}]
        said = [{"role": "assistant", "content": "well " * (number % 3) + f"It is {number * 37}."}]
        rows.append({"messages": asked + said} if row_format == "messages" else {"prompt": asked, "completion": said})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("row_format", ["prompt and completion", "messages"])
@pytest.mark.parametrize("max_length", [200, 32])
def test_losses_are_those_of_the_answers_tokens(build_model, tokenizer, monkeypatch, row_format, max_length):
    completions = _load("lib.completions")
    monkeypatch.setattr(completions, "_TOKENS_PER_BATCH", 128)  # several batches
    model, rows = build_model(), _conversations(7, row_format)
    sums, counts = completions.answer_losses(model, tokenizer, rows, max_length)
    for number, row in enumerate(_conversations(7)):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        start = len(prompt["input_ids"])
        labels = torch.tensor([([-100] * start + ids[start:])[:max_length]])
        assert counts[number] == (labels[:, 1:] != -100).sum()
        if counts[number]:
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids[:max_length]]), labels=labels).loss
            assert sums[number] / counts[number] == pytest.approx(loss.item(), rel=1e-5)
        else:
            assert sums[number] == 0


def test_answers_are_those_of_each_prompt_alone(build_model, tokenizer):
    completions = _load("lib.completions")
    model, rows = build_model(), _conversations(5)
    together = completions.greedy_answers(model, tokenizer, rows, max_new_tokens=4, batch_size=3)
    for row, answer in zip(rows, together, strict=True):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
