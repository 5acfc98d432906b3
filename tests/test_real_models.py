"""The benchmark on real models, on stand-ins: tiny models and local files; its judge, on verdicts that are known."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen3Config


@pytest.fixture(autouse=True)
def _benchmarks_are_scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def model(build_model, tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def qwen(tokenizer, tmp_path):
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    return str(tmp_path / "qwen")


def _write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def options(tmp_path, model):
    """Files in the formats of the Hub's datasets, and sizes at which numbers mean nothing."""
    orca = [
        {"system_prompt": "Be kind.", "question": f"What is {n // 2}?", "response": f"It is {n}."} for n in range(90)
    ]
    alpaca = [{"instruction": f"Say {n}.", "input": "twice" * (n % 2), "output": f"{n} {n}"} for n in range(40)]
    # As in BeaverTails a question has several answers, safe and unsafe ones
    labelled = [
        {
            "prompt": f"Do harm {n // 4}!",
            "response": f"Sure. {n}" if n % 2 else f"No. {n}",
            "category": {"a": True},
            "is_safe": n % 2 == 0,
        }
        for n in range(80)
    ]
    files = {
        "orca": _write(tmp_path / "orca.jsonl", orca),
        "alpaca": _write(tmp_path / "alpaca.jsonl", alpaca),
        "labelled": _write(tmp_path / "labelled.jsonl", labelled),
    }
    return {
        "quality": {"train_dataset_name": files["alpaca"], "trusted_dataset_name": files["orca"]},
        "safety": {
            "train_dataset_name": files["orca"], "trusted_dataset_name": files["orca"],
            "harmful_dataset_name": files["labelled"], "harmful_split": "train", "harmful_ratio": 0.5,
        },
        "sizes": {
            "output_dir": str(tmp_path / "results"), "num_train_rows": 24, "num_trusted_rows": 8,
            "num_held_out_rows": 6, "num_judged_rows": 3, "max_steps": 2, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "max_length": 128, "refine_max_new_tokens": 4, "max_new_tokens": 4,
            "judge_max_new_tokens": 4, "judge_model": model, "use_cpu": True,
        },
    }  # fmt: skip


def _arguments(settings, options, setting, **changes):
    return settings.BenchmarkArguments(setting=setting, **{**options[setting], **options["sizes"], **changes})


def _model_arguments(settings, name, **changes):
    return settings.RealModelConfig(**{"model_name_or_path": name, "dtype": "float32", "lora_r": 4, **changes})


# ---- The whole ----
@pytest.mark.filterwarnings("ignore")  # of libraries, about settings that do not matter here
def test_all_methods_in_the_safety_setting_and_once_only(options, qwen, capsys, monkeypatch):
    benchmark, methods = importlib.import_module("real_models"), importlib.import_module("real_model_methods")
    settings = importlib.import_module("real_model_settings")
    args, model_args = _arguments(settings, options, "safety"), _model_arguments(settings, qwen)
    benchmark.main(args, model_args)
    printed = capsys.readouterr().out
    files = settings.SeedFiles(Path(args.output_dir) / "seed0")
    steps = []
    rows = re.findall(r"^│ (\S.*?) +│", printed, flags=re.MULTILINE)
    assert [name for name in rows if name in methods.METHODS] == list(methods.METHODS)
    for method in methods.METHODS:
        result = json.loads(files.result(method).read_text())
        assert all(np.isfinite(value) for value in result.values())
        expected = {"seconds", "validation_loss", "held_out_loss", "harmful_kept", "auroc", "empty_answers"}
        expected |= {"effective_sample_ratio"} if method in (*methods.BILEVEL_OPTIONS, methods.REFINED) else set()
        refined = {"refined", "harmful_refined"} if method == methods.REFINED else set()
        assert expected <= result.keys() <= expected | refined
        assert "refined" in result or method != methods.REFINED
        answers = json.loads(files.answers(method).read_text())
        assert len(answers["questions"]) == len(answers["answers"]) == 3
        if method != methods.SFT:
            judged = json.loads(files.judged(method, args).read_text())
            assert 0 <= judged["win_rate"] <= 1
    assert printed.count(": judging ") == len(methods.METHODS) - 1
    assert "The judge gave no verdict in" in printed

    def fail(*arguments, **keywords):
        steps.append(arguments)
        raise AssertionError

    for module, name in ((methods, "build_problem"), (methods, "_train"), (benchmark, "LocalJudge")):
        monkeypatch.setattr(module, name, fail)
    benchmark.main(args, model_args)  # all is there
    assert not steps
    again = capsys.readouterr().out
    assert ": judging " not in again
    assert again.splitlines()[-4:] == printed.splitlines()[-4:]
    with pytest.raises(AssertionError):
        benchmark.main(dataclasses.replace(args, judge_max_new_tokens=5), model_args)  # other verdicts
    assert steps.pop()
    with pytest.raises(ValueError, match=r"results of other settings \(max_steps: 2 there, 3 here\)"):
        benchmark.main(dataclasses.replace(args, max_steps=3), model_args)


@pytest.mark.filterwarnings("ignore")
def test_interrupted_run_goes_on_with_what_is_missing(options, model, monkeypatch):
    methods, settings = importlib.import_module("real_model_methods"), importlib.import_module("real_model_settings")
    args = _arguments(settings, options, "quality", methods=["loss difference"], judge_model="")
    files, trained = settings.SeedFiles(Path(args.output_dir) / "seed0"), []

    def recording(method, run, train=methods._train):
        trained.append(method)
        if trained.count(methods.TRUSTED) == 1 and method == methods.TRUSTED:
            raise KeyboardInterrupt
        return train(method, run)

    monkeypatch.setattr(methods, "_train", recording)
    run = args, _model_arguments(settings, model), files, 0, Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        methods.run_missing(*run)
    methods.run_missing(*run)
    assert trained == [methods.SFT, methods.TRUSTED, methods.TRUSTED, methods.DIFFERENCE]
    scores = [np.load(files.scores(method)) for method in (methods.TRUSTED, methods.SFT, methods.DIFFERENCE)]
    np.testing.assert_allclose(scores[2], scores[0] - scores[1])
    assert "harmful_kept" not in json.loads(files.result(methods.DIFFERENCE).read_text())  # nothing says which are
    assert not [*files.folder.glob("*.partial")]


@pytest.mark.filterwarnings("ignore")
def test_in_4_bit(options, model):
    pytest.importorskip("bitsandbytes")
    benchmark, settings = importlib.import_module("real_models"), importlib.import_module("real_model_settings")
    args = _arguments(settings, options, "quality", methods=["BDS (all defaults)"], judge_load_in_4bit=True)
    model_args = _model_arguments(settings, model, dtype="bfloat16", load_in_4bit=True, use_bnb_nested_quant=True)
    benchmark.main(args, model_args)
    files = settings.SeedFiles(Path(args.output_dir) / "seed0")
    assert json.loads(files.result("BDS (all defaults)").read_text())["validation_loss"] > 0
    assert files.judged("BDS (all defaults)", args).is_file()
    assert "4 bits" in files.judged("BDS (all defaults)", args).name


# ---- Rows ----
def test_rows_are_disjoint_and_labelled(options):
    settings = importlib.import_module("real_model_settings")
    problem = settings.build_problem(_arguments(settings, options, "safety"), seed=0)
    parts = [[(p[-1]["content"], c[-1]["content"]) for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
             for rows in problem]  # fmt: skip
    assert [len(part) for part in parts] == [24, 8, 6]
    assert len(set().union(*parts)) == sum(map(len, parts))
    questions = [{question for question, _ in part} for part in parts]
    assert len(questions[0]) < len(parts[0])  # an answer more to some
    assert not questions[0] & questions[1]
    assert not questions[0] & questions[2]
    assert not questions[1] & questions[2]
    assert problem.harmful.tolist() == [answer.startswith("Sure.") for _, answer in parts[0]]
    assert problem.harmful.sum() == 12
    assert sum(answer.startswith("No.") for _, answer in parts[1]) == 4
    assert not any(answer.startswith("Sure.") for _, answer in [*parts[1], *parts[2]])
    again = settings.build_problem(_arguments(settings, options, "safety"), seed=0)
    assert again.training.to_list() == problem.training.to_list()
    other = settings.build_problem(_arguments(settings, options, "safety"), seed=1)
    assert other.training.to_list() != problem.training.to_list()


def test_labels_of_the_training_rows_themselves(options):
    """As RedOrca with a column for it: nothing is mixed in, and harmful rows are counted all the same."""
    settings = importlib.import_module("real_model_settings")
    labelled = options["safety"]["harmful_dataset_name"]
    changes = {"train_dataset_name": labelled, "harmful_dataset_name": ""}
    args = _arguments(settings, {**options, "safety": {**options["safety"], **changes}}, "safety")
    problem = settings.build_problem(args, seed=0)
    answers = [completion[-1]["content"] for completion in problem.training["completion"]]
    assert problem.harmful.tolist() == [answer.startswith("Sure.") for answer in answers]


@pytest.mark.parametrize(
    "row",
    [
        {"system_prompt": "s", "question": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": [{"role": role, "content": role[0]} for role in ("system", "q", "a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
    ids=lambda row: ", ".join(row),
)
def test_formats_of_rows(row):
    assert importlib.import_module("real_model_settings").question_and_answer(row, "data") == ("q", "a")


def test_what_cannot_be_loaded_or_used_is_named(options, model, tmp_path, tokenizer, build_model):
    settings, methods = importlib.import_module("real_model_settings"), importlib.import_module("real_model_methods")
    judge = importlib.import_module("judge")
    missing = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="The rows of 'x' have the columns"):
        settings.question_and_answer({"text": "q"}, "x")
    args = _arguments(settings, options, "quality", num_train_rows=41)
    with pytest.raises(ValueError, match=r"41 rows were asked of .*alpaca\.jsonl', and 40 were left"):
        settings.build_problem(args, seed=0)
    with pytest.raises(ValueError, match="nothing' cannot be loaded"):
        settings.build_problem(dataclasses.replace(args, train_dataset_name=missing), seed=0)
    with pytest.raises(ValueError, match="nothing' cannot be loaded"):
        methods.check_model(args, _model_arguments(settings, missing))
    with pytest.raises(ValueError, match="nothing' cannot be loaded"):
        judge.LocalJudge(missing, 1, 1, Console())
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    build_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no chat template\. Set `chat_template_path`"):
        methods.check_model(args, _model_arguments(settings, str(tmp_path / "bare")))
    methods.check_model(dataclasses.replace(args, chat_template_path=model), _model_arguments(settings, model))
    with pytest.raises(ValueError, match=r"no chat template\. Name an instruction-tuned"):
        judge.LocalJudge(str(tmp_path / "bare"), 1, 1, Console())
    with pytest.raises(ValueError, match="Unknown methods"):
        methods.with_needs(["magic"])
    with pytest.raises(ValueError, match="`setting` must be one of"):
        settings.BenchmarkArguments(setting="speed")


# ---- The judge ----
def _shown(conversation):
    text = conversation[0]["content"]
    return [text.split(f"<answer_{name}>\n")[1].split(f"\n</answer_{name}>")[0] for name in "AB"]


def _by_quality(quality, ties=()):
    """Prefers the answer of the higher number, whatever the order."""

    def judge(conversations):
        replies = []
        for first, second in map(_shown, conversations):
            if {first, second} & set(ties):
                replies.append("[[tie]]")
            else:
                replies.append("[[A]]" if quality[first] > quality[second] else "[[B]]")
        return replies

    return judge


def test_win_rate_of_known_verdicts():
    judge = importlib.import_module("judge")
    quality = {"good": 2, "fair": 1, "bad": 0, "even": 1}
    # Wins, loses, ties; and one pair of equal answers, of which the judge is not asked
    answers, baseline = ["good", "bad", "even", "same"], ["fair", "fair", "fair", " same\n"]
    found = judge.win_rate(_by_quality(quality, ties=["even"]), ["q"] * 4, answers, baseline)
    assert found.win_rate == (1 + 0 + 1 / 2 + 1 / 2) / 4
    assert found.ties == 2 / 4
    assert found.unparsed == 0
    assert found.consistent == 1
    assert found.first_preferred == 1 / 2  # each of the two decided pairs is won once from each position
    swapped = judge.win_rate(_by_quality(quality, ties=["even"]), ["q"] * 4, baseline, answers)
    assert swapped.win_rate == 1 - found.win_rate


@pytest.mark.parametrize("position", "AB")
def test_position_bias_cancels(position):
    judge = importlib.import_module("judge")
    answers, baseline = ["good", "bad", "x"], ["fair", "fair", "y"]
    found = judge.win_rate(lambda prompts: [f"[[{position}]]"] * len(prompts), ["q"] * 3, answers, baseline)
    assert found.win_rate == 1 / 2
    assert found.consistent == 0
    assert found.first_preferred == (position == "A")

    def half_biased(prompts):  # decides by quality what is clear, and by position what is not
        return ["[[A]]" if "good" in _shown(p)[0] else "[[B]]" if "good" in _shown(p)[1] else "[[A]]" for p in prompts]

    assert judge.win_rate(half_biased, ["q"] * 3, answers, baseline).win_rate == (1 + 1 / 2 + 1 / 2) / 3


def test_replies_without_a_verdict_count_as_ties_and_are_reported():
    judge = importlib.import_module("judge")
    found = judge.win_rate(lambda prompts: ["I like both."] * len(prompts), ["q"], ["a"], ["b"])
    assert (found.win_rate, found.ties, found.unparsed) == (1 / 2, 1, 1)
    with pytest.raises(ValueError, match="no questions"):
        judge.win_rate(None, [], [], [])


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        (" [[ b ]] ", "B"),
        ("[[C]]", "tie"),
        ("[B]", "B"),
        ("[[Answer A]]", "A"),
        ("First I thought [[A]]. On reflection: [[B]]", "B"),
        ("<think>Surely [[A]].</think>\n[[tie]]", "tie"),
        ("<think>Surely [[A]], but", None),
        ("**B**", "B"),
        ("Verdict: A.", "A"),
        ("Answer B is better.", "B"),
        ("The better answer is A", "A"),
        ("a", "A"),
        ("A good question!", None),
        ("", None),
    ],
)
def test_verdicts_are_parsed(reply, verdict):
    assert importlib.import_module("judge").parse_verdict(reply) == verdict


def test_prompt_shows_the_answers_as_they_are():
    judge = importlib.import_module("judge")
    seen = []
    judge.win_rate(lambda prompts: seen.extend(prompts) or ["tie"] * 2, ["{{ question }}"], ["{% a %}"], ["<b>&"])
    assert [_shown(prompt) for prompt in seen] == [["{% a %}", "<b>&"], ["<b>&", "{% a %}"]]
    assert "<request>\n{{ question }}\n</request>" in seen[0][0]["content"]


def test_replies_are_those_of_one_prompt_at_a_time(build_model, tokenizer):
    """Batches, padding and the order by length change nothing; activation checkpointing is as it was."""
    judge, model = importlib.import_module("judge"), build_model()
    conversations = [[{"role": "user", "content": "a" * length}] for length in (3, 40, 1, 17, 40)]
    options = {"max_new_tokens": 6, "description": "", "console": Console(quiet=True)}
    batched = judge.generate_replies(model, tokenizer, conversations, batch_size=3, **options)
    for conversation, reply in zip(conversations, batched, strict=True):
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs.pop("token_type_ids", None)
        outputs = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert reply == tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
