"""What the model is asked, what it answers, and that training is left as it was."""

import copy
import inspect
from importlib import resources

import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from trl.generation.vllm_generation import VLLMGeneration

from trl_bilevel import IMPROVE_ANSWER_TEMPLATE, RefinementConfig
from trl_bilevel.random_state import batch_seed
from trl_bilevel.refine_prompts import QuestionReader, check_refinable, decode_response, stop_token_ids, visible_answer
from trl_bilevel.response_generation import TransformersGenerator, VLLMGenerator, ready_to_generate


def _config(**options):
    return RefinementConfig(**{"refine_ratio": 0.1, "refine_max_new_tokens": 8, **options})


def _reader(rows, tokenizer, template=None):
    return QuestionReader(Dataset.from_list(rows), tokenizer, None, template)


# ---- Prompts ----
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
SECOND = [{"role": "user", "content": "times 3?"}, {"role": "assistant", "content": "6 of course"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "add 1 and 2:", "completion": " 3"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": [SYSTEM, *TURNS, SECOND[0]], "completion": SECOND[1:]},
        {"prompt": TURNS[:1], "completion": [TURNS[1], *SECOND]},
        {"messages": [SYSTEM, *TURNS]},
        {"messages": [*TURNS, *SECOND]},
        {"conversations": [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": "2"}]},
    ],
    ids=["text", "conversation", "system and turns", "two answers", "messages", "multi-turn messages", "ShareGPT"],
)
def test_prompt_is_what_training_puts_before_the_last_answer(make_trainer, tokenizer, row):
    """Against the trainer's own preparation of the same row."""
    trusted = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    trusted_row = {"messages": trusted} if "prompt" not in row else {"prompt": trusted[:1], "completion": trusted[1:]}
    if isinstance(row.get("prompt"), str):
        trusted_row = {"prompt": "Why?", "completion": " Because."}
    validation = Dataset.from_list([trusted_row] * 4)
    trainer = make_trainer(train_dataset=Dataset.from_list([row] * 4), validation_dataset=validation)
    tokens = trainer.train_dataset[0]["input_ids"]
    question = _reader([row], tokenizer).read(0)
    assert tokens[: len(question.prompt_ids)] == question.prompt_ids
    assert question.generation_ids == question.prompt_ids
    answer = decode_response(tokenizer, question.prompt_ids, tokens[len(question.prompt_ids) :])
    assert answer.strip() == question.original.strip()
    if "prompt" in row and len(row["completion"]) != 3:
        assert trainer.train_dataset[0]["labels"].count(-100) == len(question.prompt_ids)


def test_tools_are_part_of_the_prompt(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "add"}}]
    question = _reader([{"messages": TURNS, "tools": tools}], tokenizer).read(0)
    assert '"add"' in tokenizer.decode(question.prompt_ids)
    as_text = _reader([{"messages": TURNS, "tools": '[{"type": "function", "function": {"name": "add"}}]'}], tokenizer)
    assert as_text.read(0).prompt_ids == question.prompt_ids


def test_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    row = {"prompt": "add 1 and 2:", "completion": " 3<eos>"}
    assert ending(row["prompt"])["input_ids"][-1] == tokenizer.eos_token_id
    question = _reader([row], ending).read(0)
    assert question.prompt_ids == tokenizer(row["prompt"])["input_ids"]
    assert question.original == " 3"


def test_empty_prompts_are_passed_over(tokenizer):
    assert _reader([{"prompt": "", "completion": "a"}], tokenizer).read(0) is None


@pytest.mark.parametrize(
    "messages",
    [
        TURNS[:1],
        [*TURNS, SECOND[0]],
        [TURNS[0], {"role": "assistant", "content": None}],
        TURNS[1:],
        [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}],
    ],
    ids=["no answer", "ends with the user", "nothing", "no prompt", "tool call"],
)
def test_rows_without_an_answer_in_text_are_passed_over(tokenizer, messages):
    assert _reader([{"messages": messages}], tokenizer).read(0) is None


def test_tokenized_rows_are_cut_before_the_last_answer(tokenizer):
    labels = {"input_ids": [7, 8, 9, 4, 5, 6], "labels": [-100, 8, -100, -100, 5, 6]}
    question = _reader([labels], tokenizer).read(0)
    assert question.prompt_ids == [7, 8, 9, 4]
    mask = {"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1]}
    assert _reader([mask], tokenizer).read(0).prompt_ids == [7]
    assert _reader([{"input_ids": [7, 8], "labels": [7, 8]}], tokenizer).read(0) is None


def test_template_shows_the_original_answer_and_training_does_not(tokenizer):
    text = _reader([{"prompt": "add 1 and 2:", "completion": " 4"}], tokenizer, IMPROVE_ANSWER_TEMPLATE).read(0)
    assert tokenizer.decode(text.prompt_ids) == "add 1 and 2:"
    asked = tokenizer.decode(text.generation_ids)
    assert asked.startswith("add 1 and 2:")
    assert " 4" in asked
    assert "better answer" in asked
    template = "{{ prompt }} Not: {{ completion }}"
    chat = _reader([{"messages": [SYSTEM, *TURNS, *SECOND]}], tokenizer, template).read(0)
    asked = tokenizer.decode(chat.generation_ids)
    assert "times 3? Not: 6 of course" in asked
    assert "Be brief." in asked
    assert "Not:" not in tokenizer.decode(chat.prompt_ids)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no prompt here"}, "language-modeling rows"),
        ({"input_ids": [1, 2]}, "`labels` or `completion_mask`"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "None of the first"),
        ({"messages": TURNS[:1]}, "None of the first"),
    ],
)
def test_rows_without_a_prompt_are_refused(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        check_refinable(_reader([row] * 3, tokenizer), has_formatting_func=False)


def test_formatted_rows_and_tokenized_rows_with_a_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="formatting_func"):
        check_refinable(_reader([{"prompt": "a", "completion": "b"}], tokenizer), has_formatting_func=True)
    tokenized = _reader([{"input_ids": [1, 2], "labels": [-100, 2]}], tokenizer, "{{ prompt }}")
    with pytest.raises(ValueError, match="tokenized already"):
        check_refinable(tokenized, has_formatting_func=False)


def test_the_end_of_a_turn_ends_a_response_where_the_chat_template_applies(tokenizer):
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = stop_token_ids(tokenizer, 0, None, {"messages": TURNS})
    assert set(chat) == {0, tokenizer.eos_token_id, end_of_turn}
    assert stop_token_ids(tokenizer, [3], None, {"prompt": "a", "completion": "b"}) == [tokenizer.eos_token_id, 3]
    assert end_of_turn in stop_token_ids(tokenizer, None, None, {"input_ids": [5, end_of_turn]})
    assert end_of_turn not in stop_token_ids(tokenizer, None, None, {"input_ids": [5, 6]})


def test_the_default_of_several_templates_is_taken(tokenizer):
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages | tojson }}"}
    reader, expected = (_reader([{"messages": TURNS}], each) for each in (several, tokenizer))
    assert reader.read(0).prompt_ids == expected.read(0).prompt_ids
    assert reader._answer_header == expected._answer_header
    assert stop_token_ids(several, 0, None, {"messages": TURNS}) == stop_token_ids(
        tokenizer, 0, None, {"messages": TURNS}
    )


# ---- Generation ----
@pytest.fixture
def prompts(tokenizer):
    return [tokenizer(row["prompt"])["input_ids"] for row in prompt_completion_rows(5)]


def _generator(model, tokenizer, **options):
    return TransformersGenerator(model, tokenizer, [tokenizer.eos_token_id], _config(**options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_responses_are_the_most_likely_tokens(build_model, tokenizer, prompts, family):
    """Against one forward pass per token, without padding and without a cache."""
    model = build_model(family)
    model.config.use_cache = False
    responses = _generator(model, tokenizer, refine_temperature=0).generate(prompts, seed=0)
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = list(prompt)
        for token in response:
            with torch.no_grad():
                assert model.eval()(torch.tensor([tokens])).logits[0, -1].argmax() == token
            tokens.append(token)
        assert len(response) == 8 or response[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["gpt2"])
def test_responses_stay_within_the_positions_of_the_model(build_model, tokenizer, family):
    """GPT-2 here has 256 positions; one more is an index error."""
    prompts = [tokenizer("a" * 250)["input_ids"], tokenizer("b")["input_ids"]]
    assert len(prompts[0]) == 250
    generator = TransformersGenerator(build_model(family), tokenizer, [tokenizer.pad_token_id], _config())
    assert [len(response) for response in generator.generate(prompts, seed=0)] == [6, 6]


def _gpt_oss(tokenizer):
    """A tokenizer with the control tokens of gpt-oss, and its template as TRL has it."""
    tokenizer = copy.deepcopy(tokenizer)
    names = ("start", "end", "message", "channel", "return", "constrain", "call")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    template = resources.files("trl").joinpath("chat_templates/gptoss.jinja").read_text(encoding="utf-8")
    return tokenizer, template


@pytest.mark.parametrize(
    "response",
    [
        "<|channel|>final<|message|>13<|return|>",
        "<|channel|>analysis<|message|>12 + 1<|end|><|start|>assistant<|channel|>final<|message|>13<|return|>",
        "13<|return|>",
    ],
    ids=["answer", "thoughts and answer", "bare"],
)
def test_what_the_template_puts_before_an_answer_is_no_part_of_it(tokenizer, response):
    tokenizer, template = _gpt_oss(tokenizer)
    messages = [{"role": "user", "content": "12 + 1"}, {"role": "assistant", "content": "13"}]
    reader = QuestionReader(Dataset.from_list([{"messages": messages}]), tokenizer, template, None)
    question = reader.read(0)
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert reader.text_of(question, tokens, [tokens[-1]]) == question.original == "13"
    ids = question.prompt_ids + tokens  # the same row, tokenized
    row = {"input_ids": ids, "labels": [-100] * len(question.prompt_ids) + tokens}
    tokenized = QuestionReader(Dataset.from_list([row]), tokenizer, template, None)
    question = tokenized.read(0)
    assert tokenized.text_of(question, tokens, [tokens[-1]]) == question.original == "13"


def test_text_keeps_all_but_the_token_that_ends_it(tokenizer):
    """Of a base model trained on conversations in text, each turn of which has a mark at its end."""
    reader = _reader([{"prompt": "<|im_start|>user\n12 + 1", "completion": " 13<|im_end|>"}], tokenizer)
    question = reader.read(0)
    tokens = tokenizer(question.original)["input_ids"]
    for completion in (tokens, [*tokens, tokenizer.eos_token_id]):
        assert reader.text_of(question, completion, [tokenizer.eos_token_id]) == question.original
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert reader.text_of(question, [mark], [tokenizer.eos_token_id]) == ""  # an answer of nothing


def test_messages_without_a_content(tokenizer):
    """A call of a tool in rows from JSON, as OpenAI's format has it."""
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    turns = [{"role": "user", "content": "1 + 1? <|im_end|>"}, call, {"role": "tool", "content": "2"}]
    template = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content or m.tool_calls }}<|im_end|>{% endfor %}"
    for last, found in (({"role": "assistant", "content": "2"}, True), (call, False), ({"role": "assistant"}, False)):
        reader = QuestionReader([{"messages": [*turns, last]}], tokenizer, template, None)
        assert (reader.read(0) is not None) == found


def test_thoughts_do_not_count_as_the_answer():
    assert visible_answer("<think>\n\n</think>\n\n13", original="12") == "13"
    assert visible_answer("it is\n</think>\n13", original="12") == "13"
    shown = "<think>12 + 1</think>13"
    assert visible_answer(shown, original="<think>?</think>12") == shown
    assert visible_answer(" 13", original="12") == " 13"


def test_sampling_options_reach_the_sampler(build_model, tokenizer, prompts, monkeypatch):
    model = build_model()
    model.generation_config.top_k = 3
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    seen = {}
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: seen.update(kwargs) or generate(**kwargs))
    generator = _generator(model, tokenizer, refine_temperature=0.7, refine_top_p=0.9, num_refined_responses=3)
    responses = generator.generate(prompts, seed=0)
    config = seen["generation_config"]
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (0.7, 0.9, 0, 1.0)
    assert config.use_cache
    assert len(responses) == 15
    assert responses[0] != responses[1]


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_models_own_generation_config_has_no_say(build_model, tokenizer, prompts, wrapped, temperature):
    """Whatever it sets and ours does not: the responses are those of a model without any of it."""
    sampling = {"refine_temperature": temperature, "num_refined_responses": 1 + temperature}
    model = build_model()
    free = _generator(model, tokenizer, **sampling).generate(prompts, seed=0)
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    suppressed = sorted({token for response in free for token in response[:2]})
    model.generation_config.update(
        suppress_tokens=suppressed, no_repeat_ngram_size=2, min_p=0.9, min_new_tokens=4, typical_p=0.1,
        bad_words_ids=[[token] for token in suppressed], sequence_bias=[[[suppressed[0]], -50.0]], num_beams=2,
    )  # fmt: skip
    own = model.generation_config
    assert _generator(model, tokenizer, **sampling).generate(prompts, seed=0) == free
    assert model.generation_config is own
    assert own.suppress_tokens == suppressed


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapter"])
def test_the_models_own_generation_config_is_restored_after_an_error(
    build_model, tokenizer, prompts, wrapped, monkeypatch
):
    model = build_model()
    own = model.generation_config
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(type(build_model()), "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        _generator(model, tokenizer).generate(prompts, seed=0)
    assert model.generation_config is own
    assert "generation_config" not in vars(model) or not wrapped


def test_temperature_sharpens_as_the_softmax_says(build_model, tokenizer):
    """Frequencies of the first token against softmax(logits / T), the nucleus cut off."""
    model = build_model()
    model.lm_head.weight.data.mul_(20)
    prompt = tokenizer("add 1 and 2:")["input_ids"]
    logits = model(torch.tensor([prompt])).logits[0, -1].detach()
    expected = (logits / 0.5).softmax(-1)
    ordered = expected.sort(descending=True)
    nucleus = ordered.indices[: int((ordered.values.cumsum(0) < 0.8).sum()) + 1]
    config = {"refine_temperature": 0.5, "refine_top_p": 0.8, "refine_max_new_tokens": 1}
    generator = _generator(model, tokenizer, num_refined_responses=3000, **config)
    first = torch.tensor([response[0] for response in generator.generate([prompt], seed=1)])
    assert set(first.tolist()) <= set(nucleus.tolist())
    frequencies = first.bincount(minlength=len(expected)) / 3000
    expected = torch.zeros_like(expected).index_copy_(0, nucleus, expected[nucleus])
    torch.testing.assert_close(frequencies, expected / expected.sum(), atol=0.03, rtol=0)


def test_response_ends_with_its_first_stop_token(build_model, tokenizer, prompts):
    model = build_model()
    never = [tokenizer.pad_token_id]
    free = TransformersGenerator(model, tokenizer, never, _config(refine_temperature=0)).generate(prompts, seed=0)
    stop = free[0][2]
    generator = TransformersGenerator(model, tokenizer, [stop], _config(refine_temperature=0))
    for before, after in zip(free, generator.generate(prompts, seed=0), strict=True):
        end = before.index(stop) + 1 if stop in before else 8
        assert after == before[:end]


def test_same_seed_same_responses_and_the_random_state_stays(build_model, tokenizer, prompts):
    generator = _generator(build_model(), tokenizer, num_refined_responses=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generator.generate(prompts, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert generator.generate(prompts, seed=3) == first
    assert generator.generate(prompts, seed=4) != first


def test_seeds_differ_between_steps_and_batches():
    seeds = {batch_seed(7, step, batch) for step in range(20) for batch in range(20)}
    assert len(seeds) == 400


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(build_model, fails):
    """Module by module: what the user keeps in eval mode stays so, and checkpointing keeps its options."""
    model = get_peft_model(build_model(), LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    model.train()
    model.base_model.model.model.layers[0].eval()
    model.activation_checkpointing_enable(every_n_layers=2)
    flags = lambda: [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]  # noqa: E731
    before, states = flags(), []
    try:
        with ready_to_generate(model):
            states = flags()
            assert not torch.is_grad_enabled()
            assert model.active_adapters == ["default"]
            if fails:
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert fails
    assert any(checkpointing for _, checkpointing in before)
    assert not any(training or checkpointing for training, checkpointing in states)
    assert flags() == before
    assert torch.is_grad_enabled()


# ---- vLLM ----
class _FakeVLLM:
    """Stands for TRL's bridge: records what it is given, answers with the prompt's length and the seed."""

    def __init__(self, **options):
        self.options = options
        self.generation_kwargs = options["generation_kwargs"]
        self.calls = []

    def sync_weights(self):
        self.calls.append("sync")

    def generate(self, prompts, images, num_generations):
        assert images is None
        assert num_generations == 1
        self.calls.append(len(prompts))
        return prompts, [[len(prompt), self.generation_kwargs["seed"]] for prompt in prompts], None, None


def test_vllm_is_wired_as_in_trl(monkeypatch, build_model, tokenizer):
    monkeypatch.setattr("trl_bilevel.response_generation.VLLMGeneration", _FakeVLLM)
    config = _config(
        use_vllm=True, vllm_mode="server", vllm_server_base_url="http://127.0.0.1:8000", refine_temperature=0.6,
        refine_top_p=0.9, num_refined_responses=2, vllm_max_model_length=99,
    )  # fmt: skip
    model = build_model()
    generator = VLLMGenerator(model, "accelerator", tokenizer, [1, 3], config, batch_size=16)
    options = generator.vllm.options
    assert set(options) <= set(inspect.signature(VLLMGeneration.__init__).parameters)  # of the real one
    assert options["model"] is model
    assert (options["mode"], options["server_base_url"]) == ("server", "http://127.0.0.1:8000")
    assert (options["temperature"], options["top_p"], options["max_completion_length"]) == (0.6, 0.9, 8)
    assert options["max_model_length"] == 99
    assert options["generation_kwargs"]["stop_token_ids"] == [1, 3]
    # Equal requests of one call share the seed: each of the G responses is a call of its own
    assert generator.generate([[5], [5, 6]], seed=10) == [[1, 10], [1, 11], [2, 10], [2, 11]]


@pytest.mark.parametrize("trusted", [False, True])
def test_vllm_gets_no_longer_sequences_and_no_more_trust_than_the_options_say(
    monkeypatch, make_trainer, tokenizer, train_dataset, trusted
):
    """The model itself could read longer prompts."""
    limit = sorted(len(tokenizer(prompt)["input_ids"]) for prompt in train_dataset["prompt"])[12]
    monkeypatch.setattr("trl_bilevel.response_generation.VLLMGeneration", _FakeVLLM)
    trainer = make_trainer(
        refine_ratio=1.0, use_vllm=True, vllm_max_model_length=limit, refine_max_new_tokens=8,
        trust_remote_code=trusted,
    )  # fmt: skip
    assert trainer.refiner.generator.vllm.options["trust_remote_code"] is trusted
    questions = [trainer.refiner.reader.read(row) for row in range(24)]
    fitting = {question.row for question in questions if len(question.prompt_ids) < limit}
    assert 0 < len(fitting) < 24
    kept = trainer.refiner._questions(list(range(24)))
    assert {question.row for question in kept} == fitting
    assert all(len(q.prompt_ids) + trainer.refiner._room(q) <= limit for q in kept)


def test_vllm_has_the_weights_of_the_moment(monkeypatch, make_trainer, tokenizer):
    def generate(vllm, prompts, images, num_generations):
        vllm.calls.append(len(prompts))
        return prompts, [[5, tokenizer.eos_token_id]] * len(prompts), None, None

    monkeypatch.setattr("trl_bilevel.response_generation.VLLMGeneration", _FakeVLLM)
    monkeypatch.setattr(_FakeVLLM, "generate", generate)
    trainer = make_trainer(
        use_vllm=True, refine_ratio=0.5, refine_start_step=0, refine_every_steps=2, refine_discard_flawed=False,
        refine_batch_size=12,
    )  # fmt: skip
    trainer.train()
    assert trainer.refiner.generator.vllm.calls == ["sync", 12] * 3


def test_vllm_methods_exist_in_trl():
    assert {"prompts", "images", "num_generations"} <= set(inspect.signature(VLLMGeneration.generate).parameters)


def test_reward_functions_get_the_columns_as_they_are(tokenizer):
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    rows = Dataset.from_list([{"conversations": talk, "solution": 1}])
    question = QuestionReader(rows, tokenizer, None, None).read(0)
    assert question.original == "So."
    assert question.columns == {"conversations": talk, "solution": 1}


def test_question_ends_with_the_header_that_the_rows_are_trained_with(make_trainer):
    """TRL keeps the roles of ShareGPT rows, so that no row has the header of the template's own assistant."""

    def talk(num_rows, offset=0):
        turns = [("human", "what is {}?"), ("gpt", "it is {}")]
        return Dataset.from_list(
            [
                {"conversations": [{"from": role, "value": text.format(i)} for role, text in turns]}
                for i in range(offset, offset + num_rows)
            ]
        )

    trainer = make_trainer(
        train_dataset=talk(16), validation_dataset=talk(8, 100), refine_ratio=0.5, refine_start_step=1
    )
    trained = trainer.train_dataset[0]["input_ids"]
    asked = trainer.refiner.reader.read(0).prompt_ids
    assert asked == trained[: len(asked)]
    assert trainer.processing_class.decode(trained[len(asked) :]).startswith("it is 0")
