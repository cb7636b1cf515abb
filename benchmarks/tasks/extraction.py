r"""Answers in generated text: as the published code finds them, and strictly.

Paper (AGI-Edgerunners/LLM-Adapters @ 8166572, evaluate.py and commonsense_evaluate.py; DCDmllm/MoA has the
same rules):

    choice_word  first match of the task's whole vocabulary, in any position ("not answer1" is answer1,
                 "answer12" is answer1)
    number       last match of -?\d+\.?\d* once commas are gone ("3-4" ends in -4, "1/2" in 2)
    letter       first of the capitals A to E anywhere ("Because" is B)

Strict: the response ends with its answer sentence, and that sentence occurs once. Nothing may follow but one
full stop. Words and letters must be those of the row's own choices; a number has a sign (hyphen or U+2212),
digits, thousands commas in their places and decimals, and no currency, unit, percent or fraction.

    choice_word  the correct answer is answer2
    number       The answer is 1,234.5.
    letter       The answer is D.  or  The answer is (D).

Nothing found is None.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

TOLERANCE = 1e-3
"""Largest difference of two equal numbers, as in evaluate.py."""

VOCABULARY = {
    stem: [f"{stem}{i + 1}" for i in range(count)]
    for stem, count in {"solution": 2, "answer": 5, "ending": 4, "option": 2}.items()
}
"""What the published patterns look for, whatever the row's number of choices."""


class Extracted(NamedTuple):
    """The answer as the papers' code finds it, and the one of a well-formed response; None where there is
    none."""

    paper: str | None
    strict: str | None


def choice_word(text: str, vocabulary: Sequence[str], words: Sequence[str]) -> Extracted:
    """`vocabulary`: what the published pattern looks for; `words`: what this row offers."""
    text = _response(text)
    found = re.findall("|".join(map(re.escape, vocabulary)), text)
    return Extracted(
        found[0] if found else None, _stated(text, "the correct answer is", "|".join(map(re.escape, words)))
    )


def number(text: str) -> Extracted:
    text = _response(text)
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    strict = _stated(text, "the answer is", r"[-\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
    return Extracted(found[-1] if found else None, strict and strict.replace(",", "").replace("\u2212", "-"))


def letter(text: str, letters: Sequence[str]) -> Extracted:
    """`letters`: those of the row's choices."""
    text = _response(text)
    found, one = re.findall("A|B|C|D|E", text), f"[{''.join(letters)}]"
    strict = _stated(text, "the answer is", rf"{one}|\({one}\)")
    return Extracted(found[0] if found else None, strict and strict.strip("()"))


def same_number(one: str, other: str) -> bool:
    """Equal up to TOLERANCE."""
    return abs(float(one) - float(other)) <= TOLERANCE


def _response(text: str) -> str:
    """The published code cuts the decoded text at "### Response:" and keeps the second part: a repeated
    prompt ends the response."""
    return text.split("### Response:")[0].strip()


def _stated(text: str, phrase: str, answer: str) -> str | None:
    """`answer` (a pattern) where `text` ends in `phrase` and it, and says the phrase once."""
    if len(re.findall(rf"(?i)\b{phrase}\b", text)) != 1:
        return None
    found = re.search(rf"(?i:\b{phrase}) ({answer})\.?$", text, flags=re.ASCII)
    return found[1] if found else None
