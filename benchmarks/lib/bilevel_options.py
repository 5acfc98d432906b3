"""The options of the bilevel trainer in every run that is compared: the methods, and ablations of one option each."""

from typing import Any

from lib.method_names import (
    BMO,
    BMO_SHARP,
    CONSTANT_LAMBDA,
    DEFAULT,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    FIXED_ADAM,
    NO_VALUE_FUNCTION,
    ON_ALL,
    ON_SELECTED,
    PUBLIC_CODES,
    REFINED,
    REFINED_RANDOM,
)


# One option at a time: lambda must not follow what the option does to the rows
CONSTANT: dict[str, Any] = {"adaptive_validation_weight": False}
BY_THE_LOSS: dict[str, Any] = {"value_function": "none"}
# Lambda falling from 1, mean of row means; the released codes have no value function
_PUBLIC_CODES: dict[str, Any] = {
    **BY_THE_LOSS,
    "selector_optimizer": "adam",
    "validation_weight": 1.0,
    "validation_weight_decay": 0.03,
    "loss_normalization": "row",
}
# Their step, 0.005, is for runs of many thousand steps
LARGER_STEPS = {"dense Adam, step 0.02": 0.02, "dense Adam, step 0.1": 0.1}
BILEVEL_OPTIONS: dict[str, dict[str, Any]] = {
    # Weights from a screen, to which training adds where the model does not see the positive control well
    DEFAULT: {},
    # All others without a screen; this one is the default where the model does not see the control at all
    FIRST_ROUND: {},
    # What the trusted rows in each batch do alone
    EQUAL_WEIGHTS: {**CONSTANT, **BY_THE_LOSS, "selector_learning_rate": 0.0},
    PUBLIC_CODES: _PUBLIC_CODES,
    **{name: {**_PUBLIC_CODES, "selector_learning_rate": step} for name, step in LARGER_STEPS.items()},
    FIXED_ADAM: {"selector_optimizer": "adam"},
    BMO: {"selection_method": "bmo"},
    BMO_SHARP: {"selection_method": "bmo", "bmo_temperature": 0.3},
    NO_VALUE_FUNCTION: BY_THE_LOSS,
    CONSTANT_LAMBDA: CONSTANT,
    ON_ALL: {**CONSTANT, "value_function_rows": "all"},
    ON_SELECTED: {**CONSTANT, "value_function_rows": "selected"},
}

# Answers that the model writes anew, greedily: in each of five refreshes those of the 30 % of the rows of the lowest
# weight, or of a fixed random 60 %
GREEDY_ANSWERS: dict[str, Any] = {"refine_ratio": 0.3, "refine_max_new_tokens": 16}
_LOWEST = {**CONSTANT, **GREEDY_ANSWERS}
_RANDOM = {**_LOWEST, "refine_ratio": 0.6, "refine_mode": "random"}
REFINED_OPTIONS: dict[str, dict[str, Any]] = {
    REFINED: _LOWEST,
    REFINED_RANDOM: _RANDOM,
    f"{FIRST_ROUND}, refined: lowest weight": GREEDY_ANSWERS,
    f"{BMO}, refined: lowest weight": {"selection_method": "bmo", **GREEDY_ANSWERS},
    f"{BMO}, refined: random": {"selection_method": "bmo", **_RANDOM},
}

# Runs that differ from a method above in one option
ABLATION_OPTIONS: dict[str, dict[str, Any]] = {
    "lambda 0.5": {"validation_weight": 0.5},
    "lambda 0.7": {"validation_weight": 0.7},
    "lambda 1": {"validation_weight": 1.0},
    "adaptive lambda": {"adaptive_validation_weight": True},
    "lambda 1.0, 0.8, 0.6, 0.4": {"validation_weight": 1.0, "validation_weight_decay": 0.2},
    "lambda 1.0, 0.7, 0.4, 0.1": {"validation_weight": 1.0, "validation_weight_decay": 0.3},
    "step 1": {**CONSTANT, "selector_learning_rate": 1.0},
    "step 10": {**CONSTANT, "selector_learning_rate": 10.0},
    "prior 0.5": {**CONSTANT, "selector_prior": 0.5},
    "prior 0.05": {**CONSTANT, "selector_prior": 0.05},
    "softmax weights, step 1": {"selector_activation": "softmax", "selector_learning_rate": 1.0},
    "a quarter of each batch filtered": {**CONSTANT, "filter_ratio": 0.25},
    "half of each batch filtered": {**CONSTANT, "filter_ratio": 0.5},
    # As many trusted rows beside them; the epochs stay, and so other numbers of steps
    "batches of 16": {**CONSTANT, "per_device_train_batch_size": 16},
    "batches of 64": {**CONSTANT, "per_device_train_batch_size": 64},
    "8 trusted rows in a batch": {**CONSTANT, "per_device_validation_batch_size": 8},
    "64 trusted rows in a batch": {**CONSTANT, "per_device_validation_batch_size": 64},
    "loss: lambda 0.5": {**BY_THE_LOSS, "validation_weight": 0.5},
    "loss: lambda 1.0, 0.8, 0.6, 0.4": {**BY_THE_LOSS, "validation_weight": 1.0, "validation_weight_decay": 0.2},
    "loss: step 0.3": {**BY_THE_LOSS, "selector_learning_rate": 0.3},
    "loss: step 3": {**BY_THE_LOSS, "selector_learning_rate": 3.0},
    "loss: half of each batch filtered": {**BY_THE_LOSS, "filter_ratio": 0.5},
    "loss: sigmoid weights": {**BY_THE_LOSS, "selector_activation": "sigmoid"},
    "loss: dense Adam, step 0.02": {"selector_optimizer": "adam", "selector_learning_rate": 0.02},
    "loss: dense Adam, step 0.1": {"selector_optimizer": "adam", "selector_learning_rate": 0.1},
    "loss: dense Adam, step 0.3": {"selector_optimizer": "adam", "selector_learning_rate": 0.3},
    "BMO, temperature 0.1": {"selection_method": "bmo", "bmo_temperature": 0.1},
    "refined: 10 %": {**_LOWEST, "refine_ratio": 0.1},
    "refined: 60 %": {**_LOWEST, "refine_ratio": 0.6},
    "refined: random 30 %": {**_LOWEST, "refine_mode": "random"},
    "refined: temperature 0.5": {**_LOWEST, "refine_temperature": 0.5},
    "refined: temperature 1": {**_LOWEST, "refine_temperature": 1.0},
    "refined: 4 responses": {**_LOWEST, "num_refined_responses": 4},
    "refined: 4 responses, temperature 0.5": {**_LOWEST, "num_refined_responses": 4, "refine_temperature": 0.5},
    "refined: clip 1": {**_LOWEST, "importance_ratio_clip": 1.0},
    "refined: clip 2": {**_LOWEST, "importance_ratio_clip": 2.0},
    "refined: ratio per sequence": {**_LOWEST, "importance_sampling_level": "sequence"},
    f"{REFINED}, sure answers": {**_LOWEST, "refine_min_probability": 0.95},
}
OPTIONS: dict[str, dict[str, Any]] = {
    name: options if name == DEFAULT else {"screen": False, **options}
    for name, options in {**BILEVEL_OPTIONS, **REFINED_OPTIONS, **ABLATION_OPTIONS}.items()
}
"""Of every run of the bilevel trainer."""

# What is shown together: the value of the option, and the run
ABLATIONS: dict[str, dict[str, str]] = {
    "validation_weight": {"0.5": "lambda 0.5", "0.7": "lambda 0.7", "0.9": CONSTANT_LAMBDA, "1": "lambda 1"},
    "adaptive_validation_weight": {"False": CONSTANT_LAMBDA, "True": FIRST_ROUND},
    "validation_weight_decay": {
        "0.9 throughout": CONSTANT_LAMBDA,
        "1 to 0.4": "lambda 1.0, 0.8, 0.6, 0.4",
        "1 to 0.1": "lambda 1.0, 0.7, 0.4, 0.1",
    },
    "value_function_rows": {
        "none": NO_VALUE_FUNCTION,
        "selected": ON_SELECTED,
        "all": ON_ALL,
        "rejected": CONSTANT_LAMBDA,
    },
    "selector_learning_rate": {"1": "step 1", "3": CONSTANT_LAMBDA, "10": "step 10"},
    "selector_optimizer, without value function": {
        "mirror_descent": NO_VALUE_FUNCTION,
        "adam": FIXED_ADAM,
        "adam, step 0.02": "loss: dense Adam, step 0.02",
        "adam, step 0.1": "loss: dense Adam, step 0.1",
        "adam, step 0.3": "loss: dense Adam, step 0.3",
        "(BMO)": BMO,
    },
    "selector_activation": {"sigmoid": CONSTANT_LAMBDA, "softmax": "softmax weights, step 1"},
    "selector_prior": {"0.05": "prior 0.05", "0.2": CONSTANT_LAMBDA, "0.5": "prior 0.5"},
    "filter_ratio": {
        "0": CONSTANT_LAMBDA,
        "0.25": "a quarter of each batch filtered",
        "0.5": "half of each batch filtered",
    },
    "per_device_train_batch_size": {"16": "batches of 16", "32": CONSTANT_LAMBDA, "64": "batches of 64"},
    "per_device_validation_batch_size": {
        "8": "8 trusted rows in a batch",
        "32": CONSTANT_LAMBDA,
        "64": "64 trusted rows in a batch",
    },
    "refine_ratio": {"0": CONSTANT_LAMBDA, "0.1": "refined: 10 %", "0.3": REFINED, "0.6": "refined: 60 %"},
    "refine_mode": {
        "lowest_weight, 0.3": REFINED,
        "random, 0.3": "refined: random 30 %",
        "random, 0.6": REFINED_RANDOM,
    },
    "num_refined_responses": {
        "1": REFINED,
        "4": "refined: 4 responses",
        "4, temperature 0.5": "refined: 4 responses, temperature 0.5",
    },
    "refine_temperature": {"0": REFINED, "0.5": "refined: temperature 0.5", "1": "refined: temperature 1"},
    "importance_ratio_clip": {"1": "refined: clip 1", "2": "refined: clip 2", "10": REFINED},
    "importance_sampling_level": {"token": REFINED, "sequence": "refined: ratio per sequence"},
    "refine_min_probability": {"0": REFINED, "0.95": f"{REFINED}, sure answers"},
    "validation_weight, without value function": {
        "0.5": "loss: lambda 0.5",
        "0.9": NO_VALUE_FUNCTION,
        "1 to 0.4": "loss: lambda 1.0, 0.8, 0.6, 0.4",
    },
    "selector_learning_rate, without value function": {
        "0.3": "loss: step 0.3",
        "1": NO_VALUE_FUNCTION,
        "3": "loss: step 3",
    },
    "selector_activation, without value function": {
        "softmax": NO_VALUE_FUNCTION,
        "sigmoid": "loss: sigmoid weights",
    },
    "filter_ratio, without value function": {"0": NO_VALUE_FUNCTION, "0.5": "loss: half of each batch filtered"},
    "bmo_temperature": {"0.1": "BMO, temperature 0.1", "0.3": BMO_SHARP, "1": BMO},
}
ABLATION_METHODS = tuple(dict.fromkeys(method for points in ABLATIONS.values() for method in points.values()))
"""Every run of an ablation, once."""
