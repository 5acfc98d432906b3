"""Tables of the default problem, for `docs/results.md`: every method's measures, mean and range over the seeds."""

from collections.abc import Callable, Sequence

from lib.bilevel_options import LARGER_STEPS
from lib.method_names import (
    BMO,
    BMO_SHARP,
    CONFIDENCE,
    CONSTANT_LAMBDA,
    DSIR,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    FIXED_ADAM,
    INFLUENCE,
    MIXED,
    NO_VALUE_FUNCTION,
    ON_ALL,
    ON_SELECTED,
    ORACLE,
    PUBLIC_CODES,
    RANDOM,
    REFINED,
    REFINED_RANDOM,
    SECOND_ROUND,
    SFT,
    TRUSTED,
)
from lib.results import markdown, spread_and_seeds


ValuesOf = Callable[[str, str], dict[int, float]]
"""Of a method and a measure: values by seed."""

_BILEVEL = (
    *(PUBLIC_CODES, *LARGER_STEPS, EQUAL_WEIGHTS, FIXED_ADAM, BMO, BMO_SHARP, NO_VALUE_FUNCTION),
    *(ON_SELECTED, ON_ALL, CONSTANT_LAMBDA, FIRST_ROUND),
)
_TOOLS = (DSIR, INFLUENCE, CONFIDENCE)
_ALL = (SFT, MIXED, RANDOM, TRUSTED, *_BILEVEL[:5], *_TOOLS, *_BILEVEL[5:], SECOND_ROUND, ORACLE)
_WITH_WEIGHTS = tuple(method for method in _BILEVEL if method != EQUAL_WEIGHTS)
_UNSEEN = tuple(method for method in _WITH_WEIGHTS if method not in (*LARGER_STEPS, BMO_SHARP))
_ANSWERS = (
    *(BMO, f"{BMO}, refined: lowest weight", f"{BMO}, refined: random"),
    *(CONSTANT_LAMBDA, REFINED, REFINED_RANDOM),
    *(FIRST_ROUND, f"{FIRST_ROUND}, refined: lowest weight"),
)
_LABELS = {
    EQUAL_WEIGHTS: "λ = 0.9, equal weights",
    CONSTANT_LAMBDA: "BDS, constant λ",
    ON_SELECTED: "BDS, value function on selected rows, constant λ",
    ON_ALL: "BDS, value function on all rows, constant λ",
    REFINED: "BDS, constant λ, refined: lowest weight",
    REFINED_RANDOM: "BDS, constant λ, refined: random",
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
            "auroc_score": "AUROC of a last pass over the rows",
        },
    ),
    "default: answers": (
        _ANSWERS,
        {
            "exact_match": "held-out exact match",
            "refined": "rows refined",
            "refined_right": "right, of those that were wrong",
            "refined_spoiled": "good rows whose answer is wrong now",
            "proved_good": "questions kept",
            "proved_right": "kept with a right answer",
        },
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
