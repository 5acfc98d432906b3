"""Options of online self-refining generation, shared by the bilevel trainer and the callback for plain TRL."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jinja2 import TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment


RefineMode = Literal["lowest_weight", "random"]
ImportanceSamplingLevel = Literal["token", "sequence"]
VLLMMode = Literal["colocate", "server"]

IMPROVE_ANSWER_TEMPLATE = (
    "{{ prompt }}\n\nHere is an answer that may be wrong or poor:\n\n{{ completion }}\n\n"
    "Write a better answer to the same question. Give the answer only."
)
"""A `refine_prompt_template` that shows the model its question and the original answer."""


@dataclass
class RefinementConfig:
    r"""
    Options of online self-refining generation (arXiv 2511.21056): the model answers chosen questions anew.

    Parameters:
        > Parameters that control which questions are refined, and when

        refine_ratio (`float`, *optional*, defaults to `0.0`):
            Share of the training rows whose answers are regenerated in every refresh, in [0, 1]. 0 turns refinement
            off.
        refine_mode (`str`, *optional*, defaults to `"lowest_weight"`):
            `"lowest_weight"`: the rows of the lowest weight at the time of the refresh. `"random"`: the same rows in
            every refresh, drawn at random once. With learned weights neither takes a row whose original answer has
            proved good: its weight stands above the one that a new answer starts with.
        refine_start_step (`float`, *optional*, defaults to `0.5`):
            Optimizer step before which the first refresh takes place: a step, or if smaller than 1 a share of all
            steps, as in `save_steps`. Let the trusted rows shape the model first.
        refine_every_steps (`float`, *optional*, defaults to `0.1`):
            Steps from one refresh to the next: a number, or if smaller than 1 a share of all steps.

        > Parameters that control the generation

        num_refined_responses (`int`, *optional*, defaults to `1`):
            Responses generated for each question, G. All that are used train the model, at the cost of G sequences.
        refine_max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest response, in tokens.
        refine_temperature (`float`, *optional*):
            Temperature of the sampling; 0 takes the most likely token. If `None`, 0 for one response and 1 for
            several. Samples at temperature 1 leave the model where it is on average, since their importance-weighted
            loss has no gradient in expectation; more likely ones make it surer of itself.
        refine_top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling: only the most likely tokens of this total probability, in (0, 1].
        refine_batch_size (`int`, *optional*):
            Questions per call of `generate`. If `None`, 4 times `per_device_train_batch_size`.
        refine_prompt_template (`str`, *optional*):
            If `None`, the model is asked the bare question. Otherwise a Jinja template with `prompt` and `completion`,
            the question and its original answer, for instance `trl_bilevel.IMPROVE_ANSWER_TEMPLATE`; in a conversation
            it takes the place of the last message before the answer. The model trains on the bare question all the
            same, and the importance ratio accounts for the difference.

        > Parameters that control how responses are used

        importance_ratio_clip (`float`, *optional*, defaults to `10.0`):
            Upper limit of the importance ratio of the policy to the one that generated the response.
        importance_sampling_level (`str`, *optional*, defaults to `"token"`):
            `"token"`: a ratio per token. `"sequence"`: one per response, the geometric mean of its tokens' ratios, as
            in [`~trl.GRPOConfig`].
        refine_discard_flawed (`bool`, *optional*, defaults to `True`):
            Do not use responses that are empty, repeat themselves, hit the length limit or give the original answer
            again, nor any of a question whose original answer at least half of them give again. They are counted and
            stored in any case.
        refine_min_probability (`float`, *optional*, defaults to `0.0`):
            Use only responses that the model is sure of: whose tokens have at least this probability, as a geometric
            mean, in [0, 1). For answers of one right wording; other text is never that likely.
        refine_reward_threshold (`float`, *optional*, defaults to `0.0`):
            With `reward_funcs`, a response is used if the sum of its rewards is larger than this.

        > Parameters that control vLLM, see [`~trl.GRPOConfig`] for those of the same names

        use_vllm (`bool`, *optional*, defaults to `False`):
            Generate with vLLM, through TRL's own bridge. Needs `pip install trl[vllm]` and a GPU.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: vLLM shares the training GPUs. `"server"`: a running vLLM server.
        vllm_server_base_url (`str`, *optional*):
            Address of the server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port of the group that updates the server's weights.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that a colocated vLLM spans.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU memory that a colocated vLLM reserves.
        vllm_max_model_length (`int`, *optional*):
            Context length of vLLM, in tokens.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Offload the weights of a colocated vLLM while the model trains.
    """

    refine_ratio: float = field(
        default=0.0,
        metadata={"help": "Share of the training rows whose answers are regenerated in every refresh; 0 for none."},
    )
    refine_mode: RefineMode = field(
        default="lowest_weight",
        metadata={"help": "Which rows: `'lowest_weight'`, or `'random'` for a fixed random share."},
    )
    refine_start_step: float = field(
        default=0.5,
        metadata={"help": "Step before which answers are first regenerated; smaller than 1: a share of all steps."},
    )
    refine_every_steps: float = field(
        default=0.1,
        metadata={"help": "Steps between two refreshes of the answers; smaller than 1: a share of all steps."},
    )
    num_refined_responses: int = field(default=1, metadata={"help": "Responses generated for each question."})
    refine_max_new_tokens: int = field(default=256, metadata={"help": "Longest regenerated response, in tokens."})
    refine_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature of the responses; 0 takes the most likely token. If `None`, 0 for one "
            "response and 1 for several."
        },
    )
    refine_top_p: float = field(
        default=1.0, metadata={"help": "Total probability of the tokens that responses are sampled from, in (0, 1]."}
    )
    refine_batch_size: int | None = field(
        default=None,
        metadata={"help": "Questions per call of `generate`. If `None`, 4 times `per_device_train_batch_size`."},
    )
    refine_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Jinja template with `prompt` and `completion` (the original answer) that asks for a better "
            "answer. If `None`, the bare question."
        },
    )
    importance_ratio_clip: float = field(
        default=10.0, metadata={"help": "Upper limit of the importance ratio of a regenerated response."}
    )
    importance_sampling_level: ImportanceSamplingLevel = field(
        default="token", metadata={"help": "Importance ratio per `'token'` or per `'sequence'`."}
    )
    refine_discard_flawed: bool = field(
        default=True,
        metadata={"help": "Do not use empty, repetitive, truncated or unchanged responses."},
    )
    refine_min_probability: float = field(
        default=0.0,
        metadata={"help": "Least probability of a response's tokens, as a geometric mean, for it to be used."},
    )
    refine_reward_threshold: float = field(
        default=0.0,
        metadata={"help": "With reward functions, a response is used if its rewards add up to more than this."},
    )
    use_vllm: bool = field(default=False, metadata={"help": "Generate responses with vLLM, through TRL's bridge."})
    vllm_mode: VLLMMode = field(
        default="colocate",
        metadata={"help": "`'colocate'`: vLLM shares the training GPUs; `'server'`: a running vLLM server."},
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Address of the vLLM server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the vLLM server."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Port of the group that updates its weights."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that a colocated vLLM spans."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU memory that a colocated vLLM reserves."}
    )
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Context length of vLLM, in tokens."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Offload the weights of a colocated vLLM while the model trains."}
    )

    def __post_init__(self) -> None:
        check_refinement(self)

    @property
    def sampling_temperature(self) -> float:
        """`refine_temperature`, resolved."""
        if self.refine_temperature is None:
            return 0.0 if self.num_refined_responses == 1 else 1.0
        return self.refine_temperature

    @property
    def generation_settings(self) -> dict[str, Any]:
        """What a response depends on besides the model and its question, as JSON values."""
        names = (
            "num_refined_responses",
            "refine_max_new_tokens",
            "refine_top_p",
            "refine_prompt_template",
        )
        return {"refine_temperature": self.sampling_temperature, **{name: getattr(self, name) for name in names}}


def check_refinement(config: RefinementConfig) -> None:
    """
    Check the ranges of the options.

    Raises:
        `ValueError`: for a value out of range, or one that the others would ignore.
    """
    _check_ranges(config)
    _check_combinations(config)
    if config.refine_prompt_template is not None:
        _check_prompt_template(config.refine_prompt_template)


def _check_ranges(config: RefinementConfig) -> None:
    for name, choices in (
        ("refine_mode", get_args(RefineMode)),
        ("importance_sampling_level", get_args(ImportanceSamplingLevel)),
        ("vllm_mode", get_args(VLLMMode)),
    ):
        if getattr(config, name) not in choices:
            allowed = " or ".join(f"'{choice}'" for choice in choices)
            raise ValueError(f"`{name}` must be {allowed}, got {getattr(config, name)!r}.")
    infinity = float("inf")
    for name, holds, allowed in (
        ("refine_ratio", 0 <= config.refine_ratio <= 1, "from 0 to 1"),
        ("refine_start_step", 0 <= config.refine_start_step < infinity, "0 or larger"),
        ("refine_every_steps", 0 < config.refine_every_steps < infinity, "larger than 0"),
        ("num_refined_responses", config.num_refined_responses >= 1, "at least 1"),
        ("refine_max_new_tokens", config.refine_max_new_tokens >= 1, "at least 1"),
        ("refine_temperature", 0 <= config.sampling_temperature < infinity, "a finite number, 0 or larger"),
        ("refine_top_p", 0 < config.refine_top_p <= 1, "larger than 0 and at most 1"),
        ("refine_batch_size", config.refine_batch_size is None or config.refine_batch_size >= 1, "at least 1"),
        ("importance_ratio_clip", config.importance_ratio_clip >= 1, "at least 1, the ratio of an unchanged policy"),
        ("refine_min_probability", 0 <= config.refine_min_probability < 1, "at least 0 and less than 1"),
        ("refine_reward_threshold", abs(config.refine_reward_threshold) < infinity, "a finite number"),
    ):
        if not holds:
            raise ValueError(f"`{name}` must be {allowed}, got {getattr(config, name)}.")
    for name in ("refine_start_step", "refine_every_steps"):
        value = getattr(config, name)
        if value >= 1 and value != int(value):
            raise ValueError(f"`{name}` must be a whole number of steps, or a share smaller than 1, got {value}.")


def _check_combinations(config: RefinementConfig) -> None:
    if config.refine_min_probability > 0 and not config.refine_discard_flawed:
        raise ValueError(
            f"`refine_min_probability={config.refine_min_probability}` has no effect with "
            "`refine_discard_flawed=False`, which uses unsure responses too. Leave one of them out."
        )
    if config.sampling_temperature == 0 and config.refine_top_p < 1:
        raise ValueError(
            f"`refine_top_p={config.refine_top_p}` has no effect at temperature 0, the default for one response. Set "
            "`refine_temperature`, for instance to 1, or leave it out."
        )
    if config.refine_temperature == 0 and config.num_refined_responses > 1:
        raise ValueError(
            f"`refine_temperature=0` always gives the same response, so `num_refined_responses="
            f"{config.num_refined_responses}` has no effect. Use 1, or a temperature above 0."
        )
    if config.refine_ratio == 0:
        for name, option in RefinementConfig.__dataclass_fields__.items():
            if getattr(config, name) != option.default:
                raise ValueError(
                    f"`{name}={getattr(config, name)!r}` has no effect without refinement. Set `refine_ratio`, for "
                    "instance to 0.1, or leave it out."
                )
    if not config.use_vllm:
        for name, option in RefinementConfig.__dataclass_fields__.items():
            if name.startswith("vllm_") and getattr(config, name) != option.default:
                raise ValueError(
                    f"`{name}={getattr(config, name)!r}` has no effect with `use_vllm=False`. Leave it out, or set "
                    "`use_vllm=True`."
                )


def _check_prompt_template(template: str) -> None:
    environment = SandboxedEnvironment()
    try:
        names = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise ValueError(f"`refine_prompt_template` is not a Jinja template ({error}): {template!r}.") from error
    if "prompt" not in names or names - {"prompt", "completion"}:
        raise ValueError(
            "`refine_prompt_template` must use `{{ prompt }}`, may use `{{ completion }}` and nothing else, got "
            f"{template!r}."
        )
