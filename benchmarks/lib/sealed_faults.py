"""Faults that nothing was chosen on: what a screen or a training run finds of them is looked at once, at the end."""

from collections.abc import Callable

import numpy as np


_PLACEHOLDERS = (
    "[Insert answer here]",
    "TODO: write the answer to this one.",
    "N/A",
    "<answer>",
    "Answer goes here. Replace this text before publishing.",
    "null",
    "...",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore.",
)
_FOREIGN = (
    "Das hängt davon ab, was genau gemeint ist, und lässt sich so allgemein nicht beantworten.",
    "La respuesta depende de muchos factores, y conviene consultar varias fuentes antes de decidir.",
    "Il faut d'abord lire attentivement la consigne, puis répondre point par point.",
    "Questa è una domanda interessante, ma servono più dettagli per dare una risposta utile.",
    "A resposta varia conforme o contexto, e é preciso saber mais sobre o assunto.",
    "Het antwoord hangt af van de situatie, en er zijn meerdere mogelijkheden.",
    "Wir haben den Text gelesen und kommen morgen mit einem Vorschlag zurück.",
    "No estoy seguro de haber entendido la pregunta, pero lo intentaré de todos modos.",
)


def leaked_prompt(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """The next row's question follows the answer, with the mark of the format."""
    mark = ("\n\n### Instruction:\n", "\n\nUser: ", "\n\nQ: ")[generator.integers(3)]
    return f"{answer}{mark}{other}"


def placeholder(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """What a template has where the answer should be."""
    return _PLACEHOLDERS[generator.integers(len(_PLACEHOLDERS))]


def markup(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """A web page's tags around and between the words."""
    tags = ("<br/>", "&nbsp;", "</span><span>", "</p><p>")
    words = answer.split(" ")
    for position in range(3, len(words), 6):
        words[position] += tags[generator.integers(len(tags))]
    return f'<div class="post-body"><p>{" ".join(words)}</p></div>'


def wrong_encoding(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """UTF-8 that was read as Latin-1, in some of the words."""
    words = answer.split(" ")
    damage = {"a": "Ã¤", "e": "Ã©", "o": "Ã¶", "u": "Ã¼", "'": "â€™"}
    for position in range(int(generator.integers(2)), len(words), 3):
        words[position] = "".join(damage.get(letter, letter) for letter in words[position])
    return " ".join(words)


def doubled(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """The answer twice."""
    return f"{answer}{('', ' ', chr(10))[generator.integers(3)]}{answer}"


def foreign(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """One or two sentences in another language, which answer nothing."""
    chosen = generator.choice(len(_FOREIGN), size=int(generator.integers(1, 3)), replace=False)
    return " ".join(_FOREIGN[number] for number in chosen)


def counting(answer: str, question: str, other: str, generator: np.random.Generator) -> str:
    """Numbers in a row, as of an export of ids."""
    first, length = int(generator.integers(1, 60)), int(generator.integers(8, 30))
    separator = (" ", ", ", "\n")[generator.integers(3)]
    return separator.join(str(number) for number in range(first, first + length))


SEALED_FAULTS: dict[str, Callable[[str, str, str, np.random.Generator], str]] = {
    "leaked prompt": leaked_prompt,
    "placeholder": placeholder,
    "markup": markup,
    "wrong encoding": wrong_encoding,
    "doubled": doubled,
    "foreign": foreign,
    "counting": counting,
}
"""Of an answer, its question and the question of another row."""
