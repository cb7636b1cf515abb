"""Forms: how a row becomes a prompt, an answer and the texts that are compared, under each protocol.

    loglikelihood  template `lm_eval`: the task file's own templates, and log-likelihoods of whole choices
    generate       template `llm_adapters`: instruction and greedy response, extracted (`extraction.py`)
    label          template `letters`: question, lettered choices, "Answer:", and arg-max over the letters

Where choices are compared, `requests(row)[label] == (prompt(row), answer(row))`: what is trained is what is
scored.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from moabench.methods.spec import ConfigError, nearest

from . import extraction
from .extraction import Extracted
from .file import FOLDER, TaskFile, load

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One task under one protocol."""

    task: TaskFile
    template: str

    protocol = ""
    extraction = None
    """Rule that finds the answer in a generated text; None where nothing is generated."""
    max_new_tokens = None

    @property
    def names(self) -> dict[str, str | None]:
        """What a result says about how it was had."""
        return {"protocol": self.protocol, "template": self.template, "extraction": self.extraction}

    def prompt(self, row: Row) -> str:
        """The text before the answer."""
        raise NotImplementedError

    def answer(self, row: Row) -> str:
        """The right answer as it continues the prompt: what is trained."""
        raise NotImplementedError

    def requests(self, row: Row) -> list[tuple[str, str]]:
        """(context, continuation) of each choice, whose log-likelihoods are compared."""
        raise TypeError(f"{self.task.name}: protocol {self.protocol} compares no choices")

    def choices(self, row: Row) -> list[str]:
        """The continuations that are compared."""
        return [continuation for _, continuation in self.requests(row)]

    def lengths(self, row: Row) -> list[int]:
        """Characters of each choice as lm-eval counts them for acc_norm: without the blank that joins it to
        the prompt."""
        return [max(1, len(choice.removeprefix(" "))) for choice in self.choices(row)]

    def extract(self, text: str, row: Row) -> Extracted:
        """The answer in a generated `text`."""
        raise TypeError(f"{self.task.name}: protocol {self.protocol} generates nothing")

    def correct(self, prediction: str | None, row: Row) -> bool:
        """Whether an extracted answer is right."""
        raise TypeError(f"{self.task.name}: protocol {self.protocol} generates nothing")


class Continuations(Form):
    """lm-eval's multiple choice, from the `doc_to_*` keys of the task's file (of `_choice.yaml` for tasks
    that are generated natively).

    A `doc_to_text` that gives a number says that the choices are contexts of one and the same continuation
    (WinoGrande), as in lm-eval.
    """

    protocol = "loglikelihood"

    def __init__(self, task: TaskFile, template: str | None = None):
        super().__init__(task, "lm_eval")

    @cached_property
    def _config(self) -> dict[str, Any]:
        return self.task.config if self.task.native == "loglikelihood" else load(FOLDER / "_choice.yaml")

    def prompt(self, row: Row) -> str:
        return self.requests(row)[row["label"]][0]

    def answer(self, row: Row) -> str:
        return self.requests(row)[row["label"]][1]

    def requests(self, row: Row) -> list[tuple[str, str]]:
        choices, gap = self._choices(row), self._config.get("target_delimiter", " ")
        if self._config["doc_to_text"] in row:  # lm-eval: the index of the right context
            rest = _render(self._config["doc_to_target"], row)
            return [(context, gap + rest) for context in choices]
        prompt = _render(self._config["doc_to_text"], row)
        return [(prompt, gap + choice) for choice in choices]

    def _choices(self, row: Row) -> list[str]:
        given = self._config["doc_to_choice"]
        if isinstance(given, list):
            return given
        return list(row[given]) if given in row else ast.literal_eval(_render(given, row))


class Letters(Form):
    """Lettered choices and the letter as answer.

    Layout of AdaMoLE (zefang-liu/AdaMoLE @ 5e8599a, data.py) for every task, without its blank after
    "Answer:", which belongs to the letter here as in lm-eval. AdaMoLE compares bare letters, up to the
    largest number of choices in a batch. MoE-PEFT, the code of MixLoRA (TUDB-Labs/MoE-PEFT @ 40f8cb7,
    moe_peft/tasks/qa_tasks.py), compares " A" with its blank; it has "(A) text" in one line for ARC,
    OpenBookQA and CommonsenseQA and other words around the rest, the words true and false for BoolQ, and all
    of 1-4 and A-E for ARC. Here a row's own letters are compared.
    """

    protocol = "label"

    def __init__(self, task: TaskFile, template: str | None = None):
        super().__init__(task, "letters")

    def prompt(self, row: Row) -> str:
        lines = [row["context"]] if row.get("context") else []
        lines += [f"Question: {row['question']}", "Choices:"]
        lines += [f"{letter}. {choice}" for letter, choice in zip(letters(row), row["choices"], strict=True)]
        return "\n".join([*lines, "Answer:"])

    def answer(self, row: Row) -> str:
        return " " + letters(row)[row["label"]]

    def requests(self, row: Row) -> list[tuple[str, str]]:
        return [(self.prompt(row), f" {letter}") for letter in letters(row)]


TEMPLATES = {
    # evaluate.py and commonsense_evaluate.py of AGI-Edgerunners/LLM-Adapters @ 8166572, which DoRA uses too.
    # Its finetune.py has one more blank after "request." and a line of 16 blanks before "### Response:";
    # training and evaluation are the same text here.
    "llm_adapters": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request. \n\n                ### Instruction:\n                {}\n\n                ### "
        "Response:\n                "
    ),
    # The code of MoA (DCDmllm/MoA @ d1a17ed, data/dataset.py) has the layout of Alpaca, and the response
    # follows the colon.
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{}\n\n### Response:"
    ),
}


class Instruction(Form):
    """The instruction format of LLM-Adapters: an instruction in a template, a response, and its extraction.

    The instruction's template sees the row's keys and: `stem` (context, a blank and the question; the
    question alone without a context), `options` ("Answer1: x Answer2: y"), `lettered` ("(A) x (B) y"),
    `words` ("answer1/answer2").
    """

    protocol = "generate"

    def __init__(self, task: TaskFile, template: str | None = None):
        if template not in (None, *TEMPLATES):
            raise ConfigError(
                f"template={template!r}: expected one of "
                f"{', '.join(TEMPLATES)}.{nearest(str(template), TEMPLATES)}"
            )
        super().__init__(task, template or "llm_adapters")

    @property
    def extraction(self) -> str:
        return self.task.facts["extraction"]

    @property
    def max_new_tokens(self) -> int:
        return self.task.facts["tokens"]

    def prompt(self, row: Row) -> str:
        return TEMPLATES[self.template].format(self.instruction(row))

    def instruction(self, row: Row) -> str:
        """What is asked, without the template around it."""
        seen = dict(row, stem=" ".join(filter(None, [row.get("context"), row["question"]])))
        if row.get("choices"):
            words = self.words(row)
            pairs = list(zip(words, letters(row), row["choices"], strict=True))
            seen |= {
                "options": " ".join(f"{word.capitalize()}: {choice}" for word, _, choice in pairs),
                "lettered": " ".join(f"({letter}) {choice}" for _, letter, choice in pairs),
                "words": "/".join(words),
            }
        return _render(self.task.facts["instruction"], seen)

    def answer(self, row: Row) -> str:
        if self.extraction == "choice_word":
            return f"the correct answer is {self.words(row)[row['label']]}"
        worked = _CALCULATOR.sub("", row.get("solution") or row.get("equation") or "").strip()
        if self.extraction == "letter":
            worked = _CONCLUSION.sub("", worked).rstrip()
        return f"{worked}\nThe answer is {row['answer']}.".lstrip()

    def words(self, row: Row) -> list[str]:
        """How the choices of this row are called: answer1, answer2, ..."""
        given = self.task.facts["words"]
        return (
            list(given)
            if isinstance(given, list)
            else [f"{given}{i + 1}" for i in range(len(row["choices"]))]
        )

    def extract(self, text: str, row: Row) -> Extracted:
        if self.extraction == "number":
            return extraction.number(text)
        if self.extraction == "letter":
            return extraction.letter(text, letters(row))
        given = self.task.facts["words"]
        return extraction.choice_word(
            text, given if isinstance(given, list) else extraction.VOCABULARY[given], self.words(row)
        )

    def correct(self, prediction: str | None, row: Row) -> bool:
        if prediction is None:
            return False
        if self.extraction == "number":
            return extraction.same_number(prediction, row["answer"])
        names = letters(row) if self.extraction == "letter" else self.words(row)
        return prediction == names[row["label"]]


_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""Marks of GSM8K: 16 - 3 - 4 = <<16-3-4=9>>9."""

_CONCLUSION = re.compile(r"\bthe answer is\W*[a-e]\W*$", re.IGNORECASE)
"""How many solutions of AQuA and MathQA end: a response says it once."""


def letters(row: Row) -> list[str]:
    """A, B, C, ... for the choices of a row."""
    return [chr(ord("A") + i) for i in range(len(row["choices"]))]


FORMS = {form.protocol: form for form in (Continuations, Instruction, Letters)}


def _render(template: str, row: Row) -> str:
    return _compiled(template).render(**row)


@lru_cache
def _compiled(template: str):
    from jinja2 import Environment, StrictUndefined

    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
