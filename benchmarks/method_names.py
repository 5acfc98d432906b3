"""What the methods are called in the results, tables and figures of all benchmarks."""

# Plain SFT, on these rows
SFT = "SFT"
MIXED = "SFT, trusted rows mixed in"
TRUSTED = "SFT on the trusted rows"
RANDOM = "SFT on random rows"
ORACLE = "SFT on the good rows (oracle)"
# Rankings by plain models, then SFT on what they prefer
SFT_LOSS = "loss of the SFT model"
TRUSTED_LOSS = "loss of the trusted rows' model"
DIFFERENCE = "loss difference"
ABOVE_ZERO = "loss difference above zero"
# Bilevel training
PUBLIC_CODES = "dense Adam, as the public codes"
EQUAL_WEIGHTS = "lambda 0.9, equal weights"
CONSTANT_LAMBDA = "BDS, constant lambda"
NO_VALUE_FUNCTION = "BDS, no value function"
BMO = "BMO"
BMO_SHARP = "BMO, temperature 0.3"
FIRST_ROUND = "BDS (all defaults)"
# SFT on the trusted rows and on rows of the first round: as many as are good, as the rankings above are told
SECOND_ROUND = "second round: SFT on trusted and kept rows"
# those that proved good, which nobody has to be told
PROVED_ROUND = "second round: SFT on trusted and proved rows"
ROUNDS = (SECOND_ROUND, PROVED_ROUND)
