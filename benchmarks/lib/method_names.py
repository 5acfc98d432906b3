"""What the methods are called in the results, tables and figures of all benchmarks."""

BASE = "base model"
# Plain SFT, on these rows
SFT = "SFT"
MIXED = "SFT, trusted rows mixed in"
TRUSTED = "SFT on the trusted rows"
RANDOM = "SFT on random rows"
ORACLE = "SFT on the good rows (oracle)"
# Rankings by plain models, then SFT on what they prefer
BASE_LOSS = "loss of the base model"
SFT_LOSS = "loss of the SFT model"
TRUSTED_LOSS = "loss of the trusted rows' model"
DIFFERENCE = "loss difference"
# The same, told nothing: the ranking finds by itself which rows to keep
OWN_CUT = ", cut of its own"
ABOVE_ZERO = f"{DIFFERENCE}{OWN_CUT}"
# Rankings by other people's tools
DSIR = "DSIR (data-selection)"
INFLUENCE = "gradient influence (bergson)"
CONFIDENCE = "confidence (cleanlab)"
# Bilevel training
PUBLIC_CODES = "dense Adam, as the public codes"
EQUAL_WEIGHTS = "lambda 0.9, equal weights"
CONSTANT_LAMBDA = "BDS, constant lambda"
FIXED_ADAM = "BDS, dense Adam, lambda 0.9"
NO_VALUE_FUNCTION = "BDS, no value function"
ON_ALL = "BDS, value function on all rows"
ON_SELECTED = "BDS, value function on selected rows"
BMO = "BMO"
BMO_SHARP = "BMO, temperature 0.3"
DEFAULT = "BDS (all defaults)"
FIRST_ROUND = "BDS, learned weights"
# Bilevel training with answers that the model writes anew
REFINED = "BDS, refined: lowest weight"
REFINED_RANDOM = "BDS, refined: random"
# SFT on the trusted rows and on rows of the first round: as many as are good, as the rankings above are told
SECOND_ROUND = "second round: SFT on trusted and kept rows"
# those that proved good, which nobody has to be told
PROVED_ROUND = "second round: SFT on trusted and proved rows"
ROUNDS = (SECOND_ROUND, PROVED_ROUND)
