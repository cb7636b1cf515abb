"""Public data sets of the hub in our row format: one reader for each layout of columns.

A task's file names its reader (`metadata.hub.reader`). A reader takes one public row and gives ours without
`task`; it raises KeyError for a missing column and ValueError for a content that it does not know (hidden
labels among them). The sets are plain files (parquet or JSON) at a pinned commit: `datasets` runs no loading
scripts since version 4.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

Row = dict[str, Any]


def lettered(row: Row) -> Row:
    """ARC, OpenBookQA, CommonsenseQA: options with letters (or digits) and the right one's."""
    question = row["question_stem"] if "question_stem" in row else row["question"]
    names, key = list(row["choices"]["label"]), row["answerKey"].strip()
    return {
        "id": row["id"],
        "question": question,
        "choices": list(row["choices"]["text"]),
        "label": _index(key, names, "answerKey"),
    }


def boolq(row: Row) -> Row:
    """google/boolq without its passage, as LLM-Adapters asks it."""
    return {"question": row["question"], "choices": ["false", "true"], "label": int(row["answer"])}


def boolq_passage(row: Row) -> Row:
    """BoolQ of SuperGLUE."""
    return {
        "question": row["question"],
        "context": row["passage"],
        "choices": ["false", "true"],
        "label": row["label"],
    }


def piqa(row: Row) -> Row:
    return {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "label": row["label"]}


def siqa(row: Row) -> Row:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return {
        "question": row["question"],
        "context": row["context"],
        "choices": choices,
        "label": _index(str(row["label"]).strip(), ["1", "2", "3"], "label"),
    }


def hellaswag(row: Row) -> Row:
    """Cleaned as in lm-evaluation-harness 0.4.13, tasks/hellaswag/utils.py."""
    begin = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "question": _untagged(begin),
        "choices": [_untagged(ending) for ending in row["endings"]],
        "label": _index(str(row["label"]), ["0", "1", "2", "3"], "label"),
    }


def winogrande(row: Row) -> Row:
    return {
        "question": row["sentence"],
        "choices": [row["option1"], row["option2"]],
        "label": _index(row["answer"], ["1", "2"], "answer"),
    }


def gsm8k(row: Row) -> Row:
    solution, mark, answer = row["answer"].partition("####")
    if not mark:
        raise ValueError(f"answer={row['answer']!r}: expected a solution, #### and a number")
    return {"question": row["question"], "answer": _number(answer), "solution": solution.strip()}


def aqua(row: Row) -> Row:
    """Options are "A)21"; the prefix goes."""
    choices, letters = [option.partition(")")[2].strip() for option in row["options"]], "ABCDE"
    label = _index(row["correct"], letters[: len(choices)], "correct")
    return {
        "question": row["question"],
        "choices": choices,
        "label": label,
        "answer": letters[label],
        "solution": row["rationale"],
    }


def mathqa(row: Row) -> Row:
    """Options are one text "a ) 38 , b ) 12 , 000 , ...", in some rows that of a list. lm-eval ends an option
    at its first comma."""
    text = row["options"]
    parts = ast.literal_eval(text) if text.startswith("[") else re.split(r" , (?=[a-e] \) )", text)
    choices, letters = [part.strip()[4:] for part in parts], "abcde"
    label = _index(row["correct"], letters[: len(choices)], "correct")
    return {
        "question": row["Problem"],
        "choices": choices,
        "label": label,
        "answer": letters[label].upper(),
        "solution": row["Rationale"],
        "category": row["category"],
    }


def svamp(row: Row) -> Row:
    """A full stop joins body and question where the body ends without a mark."""
    body = row["Body"].strip()
    body += "" if body.endswith((".", "!", "?", ",")) else "."
    found = {"question": f"{body} {row['Question'].strip()}", "answer": _number(row["Answer"])}
    return {"id": row["ID"], **found, "equation": row["Equation"], "type": row["Type"]}


def multiarith(row: Row) -> Row:
    return {"question": row["question"].strip(), "answer": _number(row["final_ans"])}


def mawps(row: Row) -> Row:
    equation = {"equation": row["equation"]} if row.get("equation") else {}
    return {"id": row["id"], "question": row["question"], "answer": _number(row["result"])} | equation


def lila(row: Row) -> Row:
    """AddSub and SingleEq in allenai/lila."""
    return {"question": row["input"].strip(), "answer": _number(row["output_answer"])}


READERS: dict[str, Callable[[Row], Row]] = {
    reader.__name__: reader
    for reader in (
        lettered,
        boolq,
        boolq_passage,
        piqa,
        siqa,
        hellaswag,
        winogrande,
        gsm8k,
        aqua,
        mathqa,
        svamp,
        multiarith,
        mawps,
        lila,
    )
}


def _index(given: str, names: Any, key: str) -> int:
    if given not in list(names):
        raise ValueError(f"{key}={given!r}: expected one of {', '.join(names)}")
    return list(names).index(given)


def _number(given: Any) -> str:
    """ " 1,234.0", "+.5" and "1e3" as "1234", "0.5" and "1000": digits, as a response says them. What is no
    number stays, and the row check names it."""
    text = str(given).strip().replace(",", "")
    if not re.fullmatch(r"(?a:[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?)", text, re.IGNORECASE):
        return text
    plain = format(Decimal(text), "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _untagged(text: str) -> str:
    """WikiHow's tags ([title], [header], [step]) leave the text."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
