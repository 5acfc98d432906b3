"""Options of refinement: bad ones are refused before anything is loaded, ignored ones too."""

import pytest

from trl_bilevel import IMPROVE_ANSWER_TEMPLATE, BilevelSFTConfig, RefinementConfig
from trl_bilevel.refinement import is_refresh_due


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_ratio": 1.5}, "from 0 to 1"),
        ({"refine_mode": "highest_weight"}, "'lowest_weight' or 'random'"),
        ({"refine_start_step": -1}, "0 or larger"),
        ({"refine_every_steps": 0}, "larger than 0"),
        ({"refine_every_steps": 2.5}, "whole number"),
        ({"num_refined_responses": 0}, "at least 1"),
        ({"refine_max_new_tokens": 0}, "at least 1"),
        ({"refine_temperature": float("nan")}, "finite"),
        ({"refine_temperature": 0, "num_refined_responses": 2}, "no effect"),
        ({"refine_top_p": 0, "refine_temperature": 1}, "at most 1"),
        ({"refine_top_p": 0.9}, "no effect at temperature 0"),
        ({"refine_min_probability": 1.0}, "less than 1"),
        ({"refine_min_probability": 0.9, "refine_discard_flawed": False}, "no effect with"),
        ({"refine_batch_size": 0}, "at least 1"),
        ({"importance_ratio_clip": 0.5}, "unchanged policy"),
        ({"importance_sampling_level": "row"}, "'token' or 'sequence'"),
        ({"refine_reward_threshold": float("inf")}, "finite"),
        ({"refine_prompt_template": "{{ prompt "}, "not a Jinja template"),
        ({"refine_prompt_template": "Better: {{ completion }}"}, "must use"),
        ({"refine_prompt_template": "{{ prompt }} {{ question }}"}, "nothing else"),
        ({"vllm_gpu_memory_utilization": 0.5}, "use_vllm"),
        ({"vllm_mode": "remote", "use_vllm": True}, "'colocate' or 'server'"),
        ({"refine_ratio": 0, "refine_temperature": 0.5}, "no effect without refinement"),
        ({"refine_ratio": 0, "use_vllm": True}, "no effect without refinement"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RefinementConfig(**{"refine_ratio": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        BilevelSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{"refine_ratio": 0.1, **options})


def test_the_template_that_ships_is_accepted():
    assert RefinementConfig(refine_ratio=0.1, refine_prompt_template=IMPROVE_ANSWER_TEMPLATE)


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [
        (0, 4, [0, 4, 8]),
        (3, 1, [3, 4, 5, 6, 7, 8, 9]),
        (0.5, 0.2, [5, 7, 9]),
        (0.25, 5, [3, 8]),  # a share is rounded up, as for save_steps
        (20, 5, []),
    ],
)
def test_refreshes_are_due_from_a_step_on_at_an_interval(start, every, expected):
    config = RefinementConfig(refine_ratio=0.1, refine_start_step=start, refine_every_steps=every)
    assert [step for step in range(10) if is_refresh_due(step, max_steps=10, config=config)] == expected
