"""Which questions are refined, what is kept of the responses, and how they reach the batches."""

import os
import pickle
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
import torch
from conftest import QUIET_CPU_RUN
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_bilevel import DataSelector, RefinementConfig, SelfRefiningCollator
from trl_bilevel.refine_prompts import Question
from trl_bilevel.refined_responses import (
    CHECKPOINT_FILE_NAME,
    RESPONSE_SCHEMA,
    RefreshPlan,
    ResponseStore,
    read_arrived,
)
from trl_bilevel.refined_rows import _with_replacements, apply_refined
from trl_bilevel.refinement import Candidates, choose_rows, refresh_metrics
from trl_bilevel.refinement_settings import refinement_settings
from trl_bilevel.response_checks import check_reward_funcs, find_flaws, sum_rewards
from trl_bilevel.reward_identity import describe_reward_func


def _response(row, step=0, response=0, used=True, tokens=(5, 6), text="a", flaw=None):
    return {
        "row": row,
        "step": step,
        "response": response,
        "used": used,
        "flaw": flaw,
        "text": text,
        "prompt_ids": [1, 2, row],
        "completion_ids": list(tokens),
        "log_probs": [-0.5] * len(tokens),
        "weight": 1.0,
        "settings": "{}",
    }


def _table(*responses):
    return pa.Table.from_pylist(list(responses), schema=RESPONSE_SCHEMA)


# ---- Which questions ----
def test_lowest_weight_takes_the_lowest_of_those_that_can_be_refined():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200)
    refinable = rng.random(200) < 0.7
    config = RefinementConfig(refine_ratio=0.1)
    chosen = choose_rows(Candidates(refinable, scores=scores), config, seed=0)
    expected = sorted((index for index in range(200) if refinable[index]), key=lambda index: scores[index])[:20]
    assert sorted(chosen) == sorted(expected)


def test_rows_without_a_question_are_replaced_by_the_next_lowest():
    scores = np.arange(20.0)
    candidates, config = Candidates(np.ones(20, dtype=bool), scores=scores), RefinementConfig(refine_ratio=0.2)
    read = []

    def has_question(row):
        read.append(row)
        return row % 3 == 0

    assert choose_rows(candidates, config, 0, has_question).tolist() == [0, 3, 6, 9]
    assert read == [*range(10)]  # and no more
    assert choose_rows(candidates, config, 0, lambda row: row > 17).tolist() == [18, 19]
    assert choose_rows(candidates, config, 0, lambda row: False).tolist() == []


def test_ties_are_broken_at_random_and_not_by_position():
    candidates = Candidates(np.ones(1000, dtype=bool), scores=np.zeros(1000))
    config = RefinementConfig(refine_ratio=0.1)
    first, again = (choose_rows(candidates, config, seed=1) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.max() > 500
    assert not np.array_equal(first, choose_rows(candidates, config, seed=2))


def test_random_is_a_fixed_share_whatever_the_weights():
    config = RefinementConfig(refine_ratio=0.25, refine_mode="random")
    everything = np.ones(100, dtype=bool)
    first = choose_rows(Candidates(everything, scores=np.arange(100.0)), config, seed=3)
    assert np.array_equal(first, choose_rows(Candidates(everything, scores=-np.arange(100.0)), config, seed=3))
    assert len(first) == 25
    # A row that must not be refined is passed over, not replaced by another
    refinable = everything.copy()
    refinable[first[:5]] = False
    assert np.array_equal(choose_rows(Candidates(refinable), config, seed=3), first[5:])


# ---- The store ----
def test_a_row_uses_the_newest_responses_that_were_there_in_time(tmp_path):
    store = ResponseStore(tmp_path)
    store.write_refresh(5, _table(_response(3, 5, tokens=[7]), _response(4, 5, used=False)), parts=0)
    store.write_refresh(9, _table(_response(3, 9, tokens=[8]), _response(3, 9, 1, tokens=[9])), parts=0)
    store.read_new_files(100)
    assert store.responses_of(3, up_to_step=4) == []
    assert [response.completion_ids for response in store.responses_of(3, up_to_step=8)] == [[7]]
    assert [response.completion_ids for response in store.responses_of(3, up_to_step=9)] == [[8], [9]]
    assert store.responses_of(4, up_to_step=9) == []  # not used
    assert store.responses_of(1, up_to_step=9) == []
    assert store.last_step == 9
    assert len(store.table()) == 4


def test_a_refresh_that_falls_flat_leaves_the_earlier_answer(tmp_path):
    store = ResponseStore(tmp_path)
    store.write_refresh(1, _table(_response(3, 1, tokens=[7])), parts=0)
    store.write_refresh(2, _table(_response(3, 2, tokens=[8], used=False, flaw="truncated")), parts=0)
    store.read_new_files(2)
    assert [response.completion_ids for response in store.responses_of(3, up_to_step=2)] == [[7]]


def test_model_that_gives_the_original_again_goes_back_to_it(tmp_path):
    """By then it knows more than when it wrote the answer that replaced the original."""
    identical = {"used": False, "flaw": "identical"}
    refreshes = [
        [_response(3, 1, text="13"), _response(4, 1, text="13"), _response(5, 1, text="13")],
        # Row 4: one of three; row 6 never had another answer
        [_response(3, 2, **identical), _response(6, 2, **identical), _response(4, 2, 0, **identical)]
        + [_response(4, 2, number, used=False, flaw="truncated") for number in (1, 2)],
        [_response(3, 3, text="14")],
    ]
    store = ResponseStore(tmp_path)
    for step, responses in enumerate(refreshes, start=1):
        store.write_refresh(step, _table(*responses), parts=0)
        store.read_new_files(step)
    assert [response.completion_ids for response in store.responses_of(3, 1)] == [[5, 6]]
    assert store.responses_of(3, 2) == []
    assert len(store.responses_of(3, 3)) == len(store.responses_of(4, 2)) == len(store.responses_of(5, 2)) == 1
    assert [store.rows_that_change(step) for step in (1, 2, 3)] == [[3, 4, 5], [3], [3]]
    rows = Dataset.from_dict({"prompt": ["?"] * 7, "completion": ["12"] * 7})
    for up_to_step, answers in ((1, ["13", "13", "13"]), (2, ["12", "13", "13"]), (3, ["14", "13", "13"])):
        table = store.table().filter(pa.compute.less_equal(store.table().column("step"), up_to_step))
        refined, columns = apply_refined(rows, table)
        assert refined["completion"] == ["12", "12", "12", *answers, "12"]
        sources = ["refined" if answer != "12" else "original" for answer in refined["completion"]]
        assert columns["response_source"].to_pylist() == sources


def test_answer_that_is_given_again_is_no_new_one(tmp_path):
    """What spoke against it still does."""
    store = ResponseStore(tmp_path)
    for step, texts in ((1, ["a", "b"]), (2, ["b", "a"]), (3, ["b", "c"])):
        responses = [_response(3, step, number, text=text) for number, text in enumerate(texts)]
        store.write_refresh(step, _table(*responses), parts=0)
    store.read_new_files(3)
    assert [store.rows_that_change(step) for step in (1, 2, 3)] == [[3], [], [3]]


@pytest.mark.parametrize("arrived", [0, 4, 5, 7, 8, 20])
def test_each_refresh_arrives_once_also_after_an_interruption(tmp_path, arrived):
    """With as many steps between refresh and batch as before, with more, or with fewer."""
    store = ResponseStore(tmp_path)
    for step, row in ((5, 3), (8, 4)):
        store.write_refresh(step, _table(_response(row, step)), parts=0)
    store.read_new_files(8)
    rows = store.rows_that_change(arrived)
    store.save(tmp_path)
    resumed = ResponseStore.load(tmp_path, tmp_path)
    expected = [step for step in (5, 8) if step <= arrived]
    assert resumed.table(arrived_only=True).column("step").to_pylist() == expected
    assert read_arrived(tmp_path / CHECKPOINT_FILE_NAME).equals(resumed.table(arrived_only=True))
    assert len(resumed.table()) == 2
    for step in (arrived, 4, 6, 30):
        rows += resumed.rows_that_change(step)
    assert rows == [3, 4]


def test_many_refreshes_give_what_a_search_through_all_of_them_does(tmp_path):
    rng = np.random.default_rng(0)
    store, rows = ResponseStore(tmp_path), range(12)
    made = []
    for step in range(3, 60, 3):
        responses = [
            _response(row, step, number, bool(rng.random() < 0.5), (step, row, number), text=f"{step} {row} {number}")
            for row in rng.permutation(rows)[:5].tolist()
            for number in range(2)
        ]
        for response in responses:
            if not response["used"]:
                response["flaw"] = str(rng.choice(["identical", "truncated"]))
        store.write_refresh(step, _table(*responses), parts=0)
        made += responses
        if step % 9 == 0:  # some are read one by one, some together
            store.read_new_files(step)
    store.read_new_files(60)
    worker = pickle.loads(pickle.dumps(store))
    worker.read_new_files(60)
    dataset = Dataset.from_dict({"prompt": ["?"] * 12, "completion": ["the original"] * 12})
    answers = {row: [] for row in rows}
    num_back = 0
    for up_to_step in range(62):
        changed = set()
        for row in rows:
            group = [r for r in made if r["row"] == row and r["step"] == up_to_step]
            used = [r["completion_ids"] for r in group if r["used"]]
            is_original = 2 * sum(r["flaw"] == "identical" for r in group) >= len(group) > 0
            if used or (is_original and answers[row]):
                answers[row] = used
                changed.add(row)
                num_back += not used
        assert store.rows_that_change(up_to_step) == sorted(changed)
        for row in [*rows, 1000, -(2**62)]:
            for each in (store, worker):
                found = [response.completion_ids for response in each.responses_of(row, up_to_step)]
                assert found == answers.get(row, [])
        # What is published is of those that training has
        table = store.table().filter(pa.compute.less_equal(store.table().column("step"), up_to_step))
        texts = {tuple(r["completion_ids"]): r["text"] for r in made}
        for row, text in enumerate(apply_refined(dataset, table)[0]["completion"]):
            assert text in ([texts[tuple(ids)] for ids in answers[row]] or ["the original"])
            assert (text == "the original") == (not answers[row])
    assert num_back > 5


def test_memory_of_many_refreshes_is_a_few_bytes_a_row(tmp_path):
    store, num_rows, num_refreshes = ResponseStore(tmp_path), 2_000, 10
    table = _table(*[_response(row, 0) for row in range(num_rows)])
    for step in range(num_refreshes):
        steps = pa.array([step] * num_rows)
        store.write_refresh(step, table.set_column(1, "step", steps), parts=0)
    tracemalloc.start()
    try:
        store.read_new_files(num_refreshes)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # two int64 and one int32 per row of each refresh, one of each per row; the rest does not depend on the rows
    assert held < num_refreshes * num_rows * 20 + num_rows * 12 + num_refreshes * 4_000


def test_checkpoint_brings_back_every_response(tmp_path):
    store = ResponseStore(tmp_path / "runs", "0abc")
    store.write_refresh(5, _table(_response(3, 5), _response(4, 5, used=False, flaw="empty")), parts=0)
    store.read_new_files(5)
    (tmp_path / "checkpoint").mkdir()
    store.save(tmp_path / "checkpoint")
    restored = ResponseStore.load(tmp_path / "checkpoint", tmp_path / "elsewhere")
    assert restored.table().equals(store.table())
    assert restored.folder == tmp_path / "elsewhere" / "0abc-0"
    assert restored.responses_of(3, 5) == store.responses_of(3, 5)


def test_checkpoint_wins_over_what_another_attempt_left_behind(tmp_path):
    store = ResponseStore(tmp_path, "0abc")
    store.write_refresh(5, _table(_response(3, 5, tokens=[7])), parts=0)
    store.read_new_files(5)
    (tmp_path / "checkpoint").mkdir()
    store.save(tmp_path / "checkpoint")
    store.write_refresh(5, _table(_response(3, 5, tokens=[8])), parts=0)
    restored = ResponseStore.load(tmp_path / "checkpoint", tmp_path)
    assert restored.responses_of(3, 5)[0].completion_ids == [7]


@pytest.mark.parametrize("damage", [b"", b"PAR1 torn"])
def test_damaged_checkpoint_names_the_file(tmp_path, damage):
    with pytest.raises(FileNotFoundError, match=r"_refined_responses\.pq"):
        ResponseStore.load(tmp_path, tmp_path)
    (tmp_path / "_refined_responses.pq").write_bytes(damage)
    with pytest.raises(ValueError, match="damaged"):
        ResponseStore.load(tmp_path, tmp_path)


def test_checkpoint_cannot_point_out_of_the_output_folder(tmp_path):
    store = ResponseStore(tmp_path, "0abc")
    store.save(tmp_path)
    table = pa.parquet.read_table(tmp_path / "_refined_responses.pq")
    table = table.replace_schema_metadata({"run": "../../elsewhere"})
    pa.parquet.write_table(table, tmp_path / "_refined_responses.pq")
    with pytest.raises(ValueError, match="damaged"):
        ResponseStore.load(tmp_path, tmp_path)


def test_an_interrupted_refresh_is_found_again(tmp_path):
    store = ResponseStore(tmp_path, "0abc", "11")
    plan = RefreshPlan([1, 2], [1.0, 0.5])
    store.write_plan(5, plan)
    store.write_part(5, 0, _table(_response(1, 5)))
    again = ResponseStore(tmp_path, "0abc", "11")
    assert again.read_plan(5) == plan
    assert len(again.read_part(5, 0)) == 1
    assert again.read_plan(6) is None
    # With other settings there is nothing to go on with
    other = ResponseStore(tmp_path, "0abc", "22")
    assert other.read_plan(5) is None
    assert other.read_part(5, 0) is None


def test_other_settings_see_the_checkpoint_and_no_later_answers(tmp_path):
    store = ResponseStore(tmp_path, "0abc", "11")
    store.write_refresh(5, _table(_response(3, 5)), parts=0)
    store.read_new_files(5)
    store.save(tmp_path)
    store.write_refresh(8, _table(_response(4, 8)), parts=0)
    other = ResponseStore.load(tmp_path, tmp_path, "22")
    other.read_new_files(10)
    assert [response["row"] for response in other.table().to_pylist()] == [3]
    same = ResponseStore.load(tmp_path, tmp_path, "11")
    same.read_new_files(10)
    assert [response["row"] for response in same.table().to_pylist()] == [3, 4]
    assert same.rows_that_change(6) == [3]
    assert same.rows_that_change(8) == [4]


def test_nothing_half_written_is_ever_read(tmp_path, monkeypatch):
    store = ResponseStore(tmp_path)
    store.write_refresh(1, _table(_response(3, 1)), parts=0)

    def disk_full(table, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.feather.write_feather", disk_full)
    with pytest.raises(OSError, match="No space"):
        store.write_refresh(2, _table(_response(3, 2)), parts=0)
    store.read_new_files(2)
    assert store.last_step == 1
    assert [path.name for path in store.folder.iterdir()] == ["refresh-00000001.arrow"]


# ---- The collator ----
ROWS = [{"input_ids": [1, 2, row, 9], "labels": [-100, -100, -100, 9]} for row in range(6)]


def _row_key(row):
    return row["input_ids"][2]


def _collator(store):
    collator = SelfRefiningCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    collator.connect(store, _row_key)
    return collator


def test_collator_puts_every_response_in_place_of_the_original(tmp_path):
    store = ResponseStore(tmp_path)
    store.write_refresh(0, _table(_response(1, tokens=[5, 6, 7]), _response(1, response=1, tokens=[8])), parts=0)
    collator = _collator(store)
    plain = DataCollatorForLanguageModeling(pad_token_id=0)(ROWS[:3])
    assert collator(ROWS[:3])["input_ids"].tolist() == plain["input_ids"].tolist()  # not published yet
    collator.publish(0)
    batch = collator(ROWS[:3])
    assert batch["input_ids"].tolist() == [
        [1, 2, 0, 9, 0, 0],
        [1, 2, 1, 5, 6, 7],
        [1, 2, 1, 8, 0, 0],
        [1, 2, 2, 9, 0, 0],
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 9, -100, -100],
        [-100, -100, -100, 5, 6, 7],
        [-100, -100, -100, 8, -100, -100],
        [-100, -100, -100, 9, -100, -100],
    ]
    row = {**ROWS[1], "attention_mask": [1] * 4, "completion_mask": [0, 0, 0, 1], "source": "web"}
    masked = collator.refine([row], [1], up_to_step=0).sequences[0]
    assert masked["attention_mask"] == [1] * 6
    assert masked["completion_mask"] == [0, 0, 0, 1, 1, 1]
    assert masked.keys() == {"input_ids", "labels", "attention_mask", "completion_mask", "source"}
    refined = collator.refine(ROWS[:3], [0, 1, 2], up_to_step=0)
    assert refined.row_of_sequence == [0, 1, 1, 2]
    assert refined.log_probs == [[], [-0.5] * 3, [-0.5], []]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_refresh_reaches_workers_that_live_on(tmp_path, context):
    """Persistent workers, started before the refresh: the public code looks its responses up once and keeps them."""
    store = ResponseStore(tmp_path)
    collator = _collator(store)
    loader = DataLoader(
        ROWS, batch_size=2, collate_fn=collator, num_workers=2, persistent_workers=True,
        multiprocessing_context=context, prefetch_factor=1,
    )  # fmt: skip
    completions = lambda: [row[3] for batch in loader for row in batch["input_ids"].tolist()]  # noqa: E731
    assert completions() == [9] * 6
    for step, token in ((0, 5), (1, 7)):
        store.write_refresh(step, _table(_response(1, step, tokens=[token])), parts=0)
        collator.publish(step)
        assert completions() == [9, token, 9, 9, 9, 9]


def test_collator_holds_no_model_and_travels_without_its_responses(tmp_path):
    store = ResponseStore(tmp_path)
    store.write_refresh(0, _table(*(_response(row, tokens=range(500)) for row in range(200))), parts=0)
    store.read_new_files(0)
    assert len(pickle.dumps(store)) < 1000
    restored = pickle.loads(pickle.dumps(store))
    restored.read_new_files(0)
    assert restored.table().equals(store.table())


# ---- Guard rails ----
def _flaw(text="12", tokens=(1, 2), log_probs=(-0.1, -0.2), finished=True, original="13"):
    return find_flaws([text], [list(tokens)], [list(log_probs)], [finished], original)[0]


def test_answers_are_replaced_chunk_by_chunk():
    """As one array a column of more than 2 GiB does not fit into Arrow."""
    values = [f"row {row}" for row in range(20)]
    column = pa.chunked_array([values[:5], values[5:12], values[12:12], values[12:]])
    rows = np.array([19, 0, 13, 4])
    replaced = _with_replacements(column, rows, pa.array(["a", "b", "c", "d"]))
    expected = {**dict(enumerate(values)), 19: "a", 0: "b", 13: "c", 4: "d"}
    assert replaced.to_pylist() == [*expected.values()]
    assert [len(chunk) for chunk in replaced.chunks] == [5, 7, 0, 8]
    assert replaced.chunk(1).buffers()[2].address == column.chunk(1).buffers()[2].address  # untouched, not copied


def test_flaws_by_themselves():
    assert _flaw() is None
    assert _flaw(text="  \n") == "empty"
    assert _flaw(tokens=[4, 5] * 20) == "repeated"
    assert _flaw(tokens=list(range(40))) is None
    assert _flaw(finished=False) == "truncated"
    assert _flaw(log_probs=[-0.1, float("nan")]) == "nonfinite"
    assert _flaw(text=" 13 ") == "identical"


def test_unsure_responses_are_those_of_a_low_geometric_mean():
    def flaw(*probabilities):
        log_probs = [float(np.log(probability)) for probability in probabilities]
        return find_flaws(["12"], [[1, 2]], [log_probs], [True], "13", min_probability=0.5)[0]

    assert flaw(0.9, 0.3) is None  # sqrt(0.27) = 0.52
    assert flaw(0.9, 0.25) == "unsure"  # sqrt(0.225) = 0.47


def test_a_majority_for_the_original_speaks_against_the_others():
    def flaws(*texts):
        count = len(texts)
        return find_flaws(list(texts), [[1]] * count, [[-0.1]] * count, [True] * count, "13")

    assert flaws("13", "12", "13", "14") == ["identical", "outvoted", "identical", "outvoted"]
    assert flaws("13", "12", "12") == ["identical", None, None]


def _question(row):
    columns = {"prompt": f"question {row}", "completion": "original", "level": row}
    return Question(row, [1], [1], columns["prompt"], columns["completion"], columns)


def test_reward_functions_are_called_as_trl_calls_them():
    calls = []

    def length(completions, **kwargs):
        calls.append(kwargs)
        return [float(len(text)) for text in completions]

    def sometimes(prompts, level, **kwargs):
        return [None if value == 0 else -10.0 for value in level]

    rewards = sum_rewards([length, sometimes], [_question(0), _question(1)], ["abc", "de"], [[1], [2]])
    assert rewards == [3.0, -8.0]
    assert calls[0]["prompts"] == ["question 0", "question 1"]
    assert calls[0]["completion_ids"] == [[1], [2]]
    assert calls[0]["level"] == [0, 1]
    assert "completion" not in calls[0]
    assert sum_rewards([sometimes], [_question(0)], ["abc"], [[1]]) == [None]


def test_bad_reward_functions_are_refused():
    async def reward(prompts, completions, **kwargs):
        return [1.0]

    class Reward:
        async def __call__(self, prompts, completions, **kwargs):
            return [1.0]

    for function in (reward, Reward(), partial(reward, None), partial(Reward(), None)):
        with pytest.raises(TypeError, match="not async"):
            check_reward_funcs(function)
    with pytest.raises(TypeError, match="reward model"):
        check_reward_funcs(["some/reward-model"])
    with pytest.raises(ValueError, match="1 rewards for 2"):
        sum_rewards([lambda **kwargs: [1.0]], [_question(0), _question(1)], ["a", "b"], [[1], [2]])


class Longest:
    """A reward function with a state."""

    def __init__(self, limit):
        self.limit = limit
        self.model = object()  # of another address in every session

    def __call__(self, completions, **kwargs):
        return [float(len(text) <= self.limit) for text in completions]


def at_most(limit, completions, **kwargs):
    return [float(len(text) <= limit) for text in completions]


def closing_over(limit):
    def reward(completions, **kwargs):
        return [float(len(text) <= limit) for text in completions]

    return reward


DIFFERENT_REWARDS = {
    "argument of a partial": (partial(at_most, 3), partial(at_most, 4)),
    "keyword of a partial": (partial(at_most, limit=3), partial(at_most, limit=4)),
    "function of a partial": (partial(at_most, 3), partial(closing_over(3))),
    "attribute of an object": (Longest(3), Longest(4)),
    "object of a method": (Longest(3).__call__, Longest(4).__call__),
    "what is closed over": (closing_over(3), closing_over(4)),
    "code": (lambda completions, **_: [1.0], lambda completions, **_: [2.0]),
    "number": (at_most, None),
}


@pytest.mark.parametrize(("first", "second"), DIFFERENT_REWARDS.values(), ids=DIFFERENT_REWARDS)
def test_settings_know_another_reward_function(tmp_path, first, second):
    """Else a run that goes on with another would keep what the first one accepted."""
    args = SFTConfig(str(tmp_path), **QUIET_CPU_RUN)

    def settings(function):
        return refinement_settings(RefinementConfig(), args, [] if function is None else [function])

    assert settings(first) == settings(first)
    assert settings(first) != settings(second)


def test_description_of_a_reward_function_is_that_of_every_session():
    """Whatever addresses and hashes are there."""
    code = "from test_refinement import DIFFERENT_REWARDS as pairs; from trl_bilevel.reward_identity import *; "
    code += "print(*[describe_reward_func(one) for pair in pairs.values() for one in pair])"
    sessions = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]
    assert sessions[0] == sessions[1]
    assert " at 0x" not in sessions[0]


def test_reward_function_that_holds_itself_is_described():
    reward = Longest(3)
    reward.own = reward
    assert describe_reward_func(reward)


def test_metrics_count_every_response():
    table = _table(
        _response(1, tokens=[1, 2, 3]),
        _response(1, response=1, tokens=[1], used=False, flaw="truncated"),
        _response(2, tokens=[1, 2], used=False, flaw="empty"),
        _response(2, response=1, tokens=[1, 2]),
    )
    metrics = refresh_metrics(table)
    assert metrics["refine/questions"] == 2
    assert metrics["refine/response_length"] == 2
    assert metrics["refine/used_ratio"] == 0.5
    assert metrics["refine/truncated_ratio"] == metrics["refine/empty_ratio"] == 0.25
    assert metrics["refine/identical_ratio"] == 0
    assert all(np.isfinite(list(refresh_metrics(_table()).values())))


def test_restart_forgets_what_spoke_against_an_answer(tmp_path):
    selector = DataSelector(6, activation="sigmoid", prior=0.2, centered=False)
    selector.update(torch.arange(6), torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0, -1.0]))
    before = selector.logits
    selector.restart(torch.tensor([0, 1]))
    assert selector.logits[0].item() == pytest.approx(np.log(0.2 / 0.8), abs=1e-6)
    assert torch.equal(selector.logits[1:], before[1:])  # a good row keeps its weight
    assert selector.scored.all()
    assert selector.judged.tolist() == [False, False, True, True, True, True]
    selector.save(tmp_path, "rows")
    again = DataSelector(6, activation="sigmoid", prior=0.2, centered=False)
    again.load(tmp_path, "rows")
    assert torch.equal(again.judged, selector.judged)
    selector.update(torch.tensor([0]), torch.tensor([0.1]))
    assert selector.judged[0]
    assert selector.weights().mean().item() == pytest.approx(1, abs=1e-6)

    softmax = DataSelector(6)
    softmax.update(torch.arange(6), torch.arange(6.0))
    mean_mass = softmax.logits.double().exp().mean()
    assert softmax.proved_good.tolist() == (softmax.weights() > 1).tolist()
    softmax.restart(torch.tensor([5]))
    assert softmax.logits[5].item() == pytest.approx(mean_mass.log().item(), abs=1e-6)
    assert softmax.weights().mean().item() == pytest.approx(1, abs=1e-6)


def test_restart_leaves_weights_that_are_not_the_rows_own():
    frozen = DataSelector(4, learning_rate=0.0)
    of_sources = DataSelector(4, sources=torch.tensor([0, 0, 1, 1]))
    of_sources.update(torch.arange(4), torch.tensor([0.0, 0.0, 2.0, 2.0]))
    for selector in (frozen, of_sources):
        before = selector.logits.clone()
        selector.restart(torch.tensor([2, 3]))
        assert torch.equal(selector.logits, before)
