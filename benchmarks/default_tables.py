"""Tables of the default problem, for `docs/results.md`: every method's measures, mean and range over the seeds."""

from collections.abc import Callable, Sequence

from fault_ablations import REFINED
from fault_methods import LARGER_STEPS
from fault_tables import TABLES
from method_names import (
    BMO,
    BMO_SHARP,
    CONSTANT_LAMBDA,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    MIXED,
    NO_VALUE_FUNCTION,
    ORACLE,
    PUBLIC_CODES,
    RANDOM,
    SECOND_ROUND,
    SFT,
    TRUSTED,
)
from result_tables import markdown, spread_and_seeds


ValuesOf = Callable[[str, str], dict[int, float]]
"""Of a method and a measure: values by seed."""

_FIXED_ADAM = "BDS, dense Adam, lambda 0.9"
_ON_SELECTED, _ON_ALL = "BDS, value function on selected rows", "BDS, value function on all rows"
_BILEVEL = (
    *(PUBLIC_CODES, *LARGER_STEPS, EQUAL_WEIGHTS, _FIXED_ADAM, BMO, BMO_SHARP, NO_VALUE_FUNCTION),
    *(_ON_SELECTED, _ON_ALL, CONSTANT_LAMBDA, FIRST_ROUND),
)
_TOOLS = ("DSIR (data-selection)", "gradient influence (bergson)", "confidence (cleanlab)")
_ALL = (SFT, MIXED, RANDOM, TRUSTED, *_BILEVEL[:5], *_TOOLS, *_BILEVEL[5:], SECOND_ROUND, ORACLE)
_WITH_WEIGHTS = tuple(method for method in _BILEVEL if method != EQUAL_WEIGHTS)
_UNSEEN = tuple(method for method in _WITH_WEIGHTS if method not in (*LARGER_STEPS, BMO_SHARP))
_ANSWERS = (
    *(BMO, "BMO, refined: lowest weight", "BMO, refined: random"),
    *(CONSTANT_LAMBDA, REFINED, "BDS, refined: random"),
    *(FIRST_ROUND, "BDS (all defaults), refined: lowest weight"),
)
_LABELS = {
    EQUAL_WEIGHTS: "λ = 0.9, equal weights",
    CONSTANT_LAMBDA: "BDS, constant λ",
    _ON_SELECTED: "BDS, value function on selected rows, constant λ",
    _ON_ALL: "BDS, value function on all rows, constant λ",
    REFINED: "BDS, constant λ, refined: lowest weight",
    "BDS, refined: random": "BDS, constant λ, refined: random",
}
_OF_THE_WAY = "of_the_way"
_TABLES: dict[str, tuple[Sequence[str], dict[str, str]]] = {
    "default: training": (
        _ALL,
        {
            "exact_match": "held-out exact match",
            _OF_THE_WAY: "of the way from SFT to oracle",
            "auroc": "AUROC of the row ranking",
            "kept_good": "good rows among those kept",
        },
    ),
    "default: weights": (
        _WITH_WEIGHTS,
        {
            "effective_sample_ratio": "effective sample ratio",
            "good_weight": "share of the weight on good rows",
            "auroc": "AUROC of the learned weights",
            "final_auroc": "AUROC of a last pass over the rows",
        },
    ),
    "default: answers": (
        _ANSWERS,
        TABLES["Questions and answers"],
    ),
    "default: unseen": (
        _UNSEEN,
        {
            "unseen_auroc": "`score`",
            "unseen_auroc_loss": "the loss alone",
            "unseen_auroc_head": "`selector_score` (amortized selector)",
        },
    ),
}


def default_tables(values_of: ValuesOf) -> dict[str, str]:
    """
    The tables in Markdown by their names. A cell of fewer seeds than others says how many.

    Args:
        values_of (`Callable`): values by seed of a method and a measure, on the default problem.
    """
    return {name: _table(values_of, methods, columns) for name, (methods, columns) in _TABLES.items()}


def _table(values_of: ValuesOf, methods: Sequence[str], columns: dict[str, str]) -> str:
    by_method = {method: [_values(values_of, method, key) for key in columns] for method in methods}
    most = max((len(values) for by_column in by_method.values() for values in by_column), default=0)
    rows = [
        [_LABELS.get(method, method), *(spread_and_seeds(values, most) for values in by_column)]
        for method, by_column in by_method.items()
        if by_column[0]
    ]
    return markdown(["method", *columns.values()], rows)


def _values(values_of: ValuesOf, method: str, key: str) -> list[float]:
    if key != _OF_THE_WAY:
        return [*values_of(method, key).values()]
    own, worst, best = (values_of(name, "exact_match") for name in (method, SFT, ORACLE))
    seeds = [seed for seed in own if seed in worst and seed in best]
    return [(own[seed] - worst[seed]) / (best[seed] - worst[seed]) for seed in seeds]
