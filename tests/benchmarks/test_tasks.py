"""Tasks: extraction on strings with results written by hand, our requests against lm-eval's own task files,
and names and suites.

pytest tests/benchmarks/test_tasks.py
"""

import ast
import importlib
import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template

from moabench.benchmarks import tasks
from moabench.benchmarks.config.sections import DataConfig
from moabench.benchmarks.tasks import extraction, formats, hub
from moabench.benchmarks.tasks import rows as data
from moabench.benchmarks.tasks.extraction import VOCABULARY, Extracted
from moabench.methods.spec import ConfigError

PUBLIC = [name for name in tasks.names() if not tasks.get(name).unavailable("local")]
COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
ROW = {"question": "Why?", "choices": ["one", "two"], "label": 1}
TRAP = "\n\n                ### Response:\n                "

NUMBERS = [  # text, as the papers' code finds it, strict
    ("The answer is 8.", "8.", "8"),
    ("The answer is 8", "8", "8"),
    ("The answer is -8.", "-8.", "-8"),
    ("The answer is \u22128.", "8.", "-8"),
    ("The answer is 1,234.", "1234.", "1234"),
    ("The answer is 1,234.5.", "1234.5", "1234.5"),
    ("The answer is 1,000,000.", "1000000.", "1000000"),
    ("The answer is 12,34.", "1234.", None),
    ("The answer is 1 000.", "000.", None),
    ("The answer is 0.125 mile.", "0.125", None),
    ("The answer is $18.", "18.", None),
    ("The answer is 50%.", "50", None),
    ("The answer is 1/2.", "2.", None),
    ("The answer is .5", "5", None),
    ("The answer is 5.0.", "5.0", "5.0"),
    ("The answer is 1e3.", "3.", None),
    ("The answer is 007.", "007.", "007"),
    ("The answer is seven.", None, None),
    ("The answer is - 8.", "8.", None),
    ("The answer is 12..", "12.", None),
    ("The answer is 5 .", "5", None),
    ("The answer is \u0663.", "\u0663.", None),
    ("The answer is 2 x 3 = 6.", "6.", None),
    ("The answer is 7 or 8.", "8.", None),
    ("The answer is 7. The answer is 8.", "8.", None),
    ("The answer is 3.14159, roughly 3.", "3.", None),
    ("He has 3 and 4. The answer is 7.", "7.", "7"),
    ("Therefore, the answer is 8.", "8.", "8"),
    ("The answer is 7.\n\n### Instruction:\nNext 9", "9", None),
    (f"The answer is 7.{TRAP}9", "7.", "7"),
    ("3-4", "-4", None),
    ("16 - 3 - 4 = 9", "9", None),
    ("16-3-4=-9", "-9", None),
    ("A room at 10:30 costs 45", "45", None),
    ("8", "8", None),
    ("none", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "paper", "strict"), NUMBERS)
def test_numbers(text, paper, strict):
    assert extraction.number(text) == Extracted(paper, strict)


LETTERS = [
    ("The answer is D.", "D", "D"),
    ("The answer is (D).", "D", "D"),
    ("The answer is D", "D", "D"),
    ("the answer is E", "E", "E"),
    ("\n\nThe answer is B.\n", "B", "B"),
    ("The answer is (D", "D", None),
    ("The answer is D)", "D", None),
    ("The answer is D..", "D", None),
    ("The answer is D!", "D", None),
    ("The answer is: B.", "B", None),
    ("The answer is **B**.", "B", None),
    ("The answer is option B.", "B", None),
    ("The answer is (A) 5.", "A", None),
    ("The answer is F.", None, None),
    ("The answer is a.", None, None),
    ("The answer is 12.", None, None),
    ("The answer is AB.", "A", None),
    ("The answer is A or B.", "A", None),
    ("The answer is A. The answer is B.", "A", None),
    ("The answer is not A.", "A", None),
    ("The Answer is B.", "A", "B"),
    ("The correct answer is C.", "C", None),
    ("A car costs 5. The answer is C.", "A", "C"),
    ("Because 2 + 2 = 4, the answer is (E).", "B", "E"),
    ("Rationale: Each has 2. The answer is B.", "E", "B"),
    ("(A) 1 (B) 2 The answer is (B).", "A", "B"),
    (f"The answer is C{TRAP}B", "C", "C"),
    ("Answer: C", "A", None),
    ("DATA INADEQUATE", "D", None),
    ("option C", "C", None),
    ("CBA", "C", None),
    ("D", "D", None),
    ("d", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "paper", "strict"), LETTERS)
def test_letters(text, paper, strict):
    assert extraction.letter(text, "ABCDE") == Extracted(paper, strict)


def test_a_strict_letter_is_one_of_the_row():
    assert extraction.letter("The answer is D.", "ABC") == Extracted("D", None)


WORDS = [  # {1}, {2}: the first two words of the vocabulary; {s}: its stem
    ("the correct answer is {2}", "{2}", "{2}"),
    ("the correct answer is {2}.", "{2}", "{2}"),
    ("The correct answer is {1}", "{1}", "{1}"),
    ("THE CORRECT ANSWER IS {1}", "{1}", "{1}"),
    ("  the correct answer is {1} \n", "{1}", "{1}"),
    ("The question asks for a cause. Hence the correct answer is {1}.", "{1}", "{1}"),
    ("{C}1: red {C}2: blue the correct answer is {2}", "{2}", "{2}"),
    ("{1} is wrong, so the correct answer is {2}", "{1}", "{2}"),
    ("the correct answer is {1}" + TRAP + "the correct answer is {2}", "{1}", "{1}"),
    ("the correct answer is {C}2", None, None),
    ("the correct answer is {1} or {2}", "{1}", None),
    ("the correct answer is {1} the correct answer is {2}", "{1}", None),
    ("the correct answer is {1} the correct answer is {1}", "{1}", None),
    ("the correct answer is {s}12", "{1}", None),
    ("the correct answer is {s}9", None, None),
    ("the correct answer is {s} 2", None, None),
    ("the correct answer is {s}", None, None),
    ("the correct answer is 2", None, None),
    ("the correct answer is", None, None),
    ("the correct answer is {2}!", "{2}", None),
    ("the correct answer is {2}..", "{2}", None),
    ("the correct answer is: {2}", "{2}", None),
    ("the correct answer is '{2}'", "{2}", None),
    ("the correct answer is\n{2}", "{2}", None),
    ("the correct answer is{1}", "{1}", None),
    ("the correct answer is {2}\n\n### Instruction:\n{1}", "{2}", None),
    (TRAP + "the correct answer is {1}", None, None),
    ("the answer is {1}", "{1}", None),
    ("not {1} but {2}", "{1}", None),
    ("the{1}", "{1}", None),
    ("{2}.", "{2}", None),
    ("{2}", "{2}", None),
    ("   \n", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("stem", VOCABULARY)
@pytest.mark.parametrize(("text", "paper", "strict"), WORDS)
def test_choice_words(stem, text, paper, strict):
    words = VOCABULARY[stem]

    def filled(template):
        return template and template.format(None, *words, s=stem, C=stem.capitalize())

    assert extraction.choice_word(filled(text), words, words) == Extracted(filled(paper), filled(strict))


def test_a_strict_word_is_one_of_the_row_and_the_papers_is_one_of_all_tasks():
    text = "the correct answer is answer4"
    assert extraction.choice_word(text, VOCABULARY["answer"], VOCABULARY["answer"][:3]) == Extracted(
        "answer4", None
    )


TRUTHS = [
    ("the correct answer is true", "true", "true"),
    ("the correct answer is false", "false", "false"),
    ("the correct answer is false.", "false", "false"),
    ("The correct answer is true.", "true", "true"),
    ("\n\nthe correct answer is false\n", "false", "false"),
    (f"the correct answer is true{TRAP}false", "true", "true"),
    ("Answer format: true/false the correct answer is false", "true", "false"),
    ("It is false that it is true. the correct answer is true", "false", "true"),
    ("truely the correct answer is false", "true", "false"),
    ("true", "true", None),
    ("untrue", "true", None),
    ("false, not true", "false", None),
    ("both true and false", "true", None),
    ("the correct answer is not true", "true", None),
    ("the correct answer is true or false", "true", None),
    ("the correct answer is true false", "true", None),
    ("the correct answer is truefalse", "true", None),
    ("the correct answer is falsehood", "false", None),
    ("the correct answer is true\nthe correct answer is false", "true", None),
    ("the correct answer is\ntrue", "true", None),
    ("the correct answer is  true", "true", None),
    ("the correct answer is true </s>", "true", None),
    ("the correct answer is 'true'", "true", None),
    ("the correct answer is true, because", "true", None),
    ("the correct answer is true\u3002", "true", None),
    ("the correct answer is tru", None, None),
    ("the correct answer is True", None, None),
    ("the correct answer is 1", None, None),
    ("the correct answer is yes", None, None),
    ("FALSE", None, None),
    ("yes", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "paper", "strict"), TRUTHS)
def test_truths(text, paper, strict):
    assert tasks.get("boolq").form("generate").extract(
        text, {"choices": ["false", "true"], "label": 0}
    ) == Extracted(paper, strict)


@pytest.mark.parametrize("cases", [NUMBERS, LETTERS, WORDS, TRUTHS])
def test_there_are_thirty_strings_for_each_pattern(cases):
    assert len({text for text, _, _ in cases}) == len(cases) >= 30


def test_numbers_are_equal_up_to_a_thousandth():
    form = tasks.get("gsm8k").form()
    assert [form.correct(text, {"answer": "0.125"}) for text in ("0.1255", ".125", "0.127", "12.5")] == [
        True,
        True,
        False,
        False,
    ]
    assert form.correct("8.", {"answer": "8"})
    assert not form.correct("-8", {"answer": "8"})
    assert not form.correct(None, {"answer": "8"})


ARC_RAW = {
    "id": "Q",
    "question": "Why so?",
    "choices": {"text": ["x", "it's", "z"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
# one public row, as the hub has it, for each task that lm-eval has: (its file, module of its functions, row)
RAW = {
    "arc_easy": ("arc/arc_easy.yaml", None, ARC_RAW),
    "arc_challenge": ("arc/arc_challenge.yaml", None, ARC_RAW),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        None,
        {**{k: ARC_RAW[k] for k in ("id", "choices", "answerKey")}, "question_stem": "The sun is"},
    ),
    "commonsenseqa": (
        "commonsense_qa/default.yaml",
        None,
        {
            **ARC_RAW,
            "choices": {"text": ["p", "q", "r", "s", "t"], "label": list("ABCDE")},
            "question": " Where? ",
        },
    ),
    "boolq_passage": (
        "super_glue/boolq/default.yaml",
        None,
        {"question": "is it so", "passage": "It -- It is\nso.", "idx": 0, "label": 1},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        None,
        {"goal": 'To "cut" it,', "sol1": "use a knife.", "sol2": "use a spoon.", "label": 0},
    ),
    "siqa": (
        "siqa/siqa.yaml",
        None,
        {
            "context": "Ann left.",
            "question": "Why?",
            "answerA": "tired",
            "answerB": "sad",
            "answerC": "late",
            "label": "3",
        },
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "hellaswag.utils",
        {
            "activity_label": "Cooking",
            "ctx_a": "[header] How to cook [title] Take a pot.",
            "ctx_b": "then HE",
            "endings": ["stirs.", "[step] eats  it.", "a", "b"],
            "label": "1",
        },
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "winogrande.preprocess_winogrande",
        {"sentence": "Ann's cat likes Bo, so _ feeds it.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    ),
    "mathqa": (
        "mathqa/mathqa.yaml",
        "mathqa.utils",
        {
            "Problem": "1 + 1 ?",
            "Rationale": "add",
            "options": "a ) 1 , b ) 2 , c ) 1 / 3 , d ) 4 , e ) none of these",
            "correct": "b",
            "category": "general",
        },
    ),
}


def theirs(name):
    """lm-eval's own requests and target for the raw row: (context, continuation) pairs and the index of the
    right one."""
    file, module, raw = RAW[name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file, resolve_func=False)
    functions = importlib.import_module(f"lm_eval.tasks.{module}") if module else None
    if hasattr(functions, "process_docs"):
        import datasets

        raw = functions.process_docs(datasets.Dataset.from_list([raw]))[0]

    def value(key):
        given = config[key]
        if isinstance(given, str) and hasattr(functions, given.rpartition(".")[2]):
            return getattr(functions, given.rpartition(".")[2])(raw)
        if isinstance(given, list):
            return given
        return raw[given] if given in raw else apply_template(given, raw)

    text, choices, target = value("doc_to_text"), value("doc_to_choice"), value("doc_to_target")
    choices = choices if isinstance(choices, list) else ast.literal_eval(choices)
    if isinstance(text, int):  # contexts, and one continuation
        return [(choice, f" {target}") for choice in choices], text
    label = int(target) if str(target).isdigit() else choices.index(target)
    return [(text, f" {choice}") for choice in choices], label


@pytest.mark.parametrize("name", RAW)
def test_requests_equal_those_of_lm_evals_own_files(name):
    row = hub.READERS[tasks.get(name).facts["hub"]["reader"]](RAW[name][2])
    asked, label = theirs(name)
    form = tasks.get(name).form("loglikelihood")
    assert (form.requests(row), row["label"]) == (asked, label)
    assert (form.prompt(row), form.answer(row)) == asked[label]


def test_boolq_without_its_passage_is_the_same_from_the_question_on():
    row = {"question": "is it so", "choices": ["false", "true"], "label": 0}
    assert tasks.get("boolq").form("loglikelihood").requests(row) == [
        ("Question: is it so?\nAnswer:", f" {word}") for word in ("no", "yes")
    ]
    assert tasks.get("boolq").form("loglikelihood").lengths(row) == [2, 3]


def test_the_instruction_template_is_that_of_llm_adapters():
    """Characters of evaluate.py: one blank ends the first line, 16 blanks before each later one, and 16 end
    the prompt."""
    prompt = tasks.get("gsm8k").form("generate").prompt({"question": "2 {} 2?", "answer": "4"})
    assert prompt.split("\n") == [
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request. ",
        "",
        " " * 16 + "### Instruction:",
        " " * 16 + "2 {} 2?",
        "",
        " " * 16 + "### Response:",
        " " * 16,
    ]


INSTRUCTIONS = {  # as LLM-Adapters' test files write them
    "boolq": (
        {"question": "is it so", "choices": ["false", "true"], "label": 1},
        "Please answer the following question with true or false, question: is it so?\n\nAnswer "
        "format: true/false",
        "the correct answer is true",
    ),
    "piqa": (
        {"question": "Cut it", "choices": ["a knife", "a spoon"], "label": 0},
        "Please choose the correct solution to the question: Cut it\n\nSolution1: a knife\n\nSolution2: a "
        "spoon\n\nAnswer format: solution1/solution2",
        "the correct answer is solution1",
    ),
    "siqa": (
        {"context": "Ann left.", "question": "Why?", "choices": ["tired", "sad", "late"], "label": 2},
        "Please choose the correct answer to the question: Ann left. Why?\n\nAnswer1: tired Answer2: sad "
        "Answer3: late\n\nAnswer format: answer1/answer2/answer3",
        "the correct answer is answer3",
    ),
    "hellaswag": (
        {"question": "Cooking: He", "choices": ["stirs.", "eats."], "label": 1},
        "Please choose the correct ending to complete the given sentence: Cooking: He\n\nEnding1: stirs. "
        "Ending2: eats.\n\nAnswer format: ending1/ending2",
        "the correct answer is ending2",
    ),
    "winogrande": (
        {"question": "Ann saw Bo, so _ left.", "choices": ["Ann", "Bo"], "label": 1},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann saw Bo, "
        "so _ left.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        "the correct answer is option2",
    ),
    "arc_easy": (
        ROW,
        "Please choose the correct answer to the question: Why?\n\nAnswer1: one Answer2: "
        "two\n\nAnswer format: answer1/answer2",
        "the correct answer is answer2",
    ),
    "aqua": (
        {**ROW, "answer": "B", "solution": "It is\ntwo."},
        "Why? Answer Choices: (A) one (B) two",
        "It is\ntwo.\nThe answer is B.",
    ),
    "mathqa": ({**ROW, "answer": "B"}, "Why? The options: A ) one , B ) two", "The answer is B."),
    "gsm8k": (
        {"question": "2 + 2?", "answer": "4", "solution": "It is 2+2=<<2+2=4>>4."},
        "2 + 2?",
        "It is 2+2=4.\nThe answer is 4.",
    ),
    "addsub": (
        {"question": "2 + 2?", "answer": "4", "equation": "X = 2 + 2"},
        "2 + 2?",
        "X = 2 + 2\nThe answer is 4.",
    ),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_and_responses(name):
    row, instruction, response = INSTRUCTIONS[name]
    form = tasks.get(name).form("generate")
    assert form.instruction(row) == instruction
    assert form.prompt(row) == formats.TEMPLATES["llm_adapters"].format(instruction)
    assert form.answer(row) == response
    assert form.correct(form.extract(response, row).strict, row)


def test_the_template_of_moa_can_be_had():
    form = tasks.get("arc_easy").form("generate", "alpaca")
    assert form.prompt(ROW).endswith("\n\n### Response:")
    assert form.names["template"] == "alpaca"
    with pytest.raises(ConfigError, match=r"template='alpacca'.*Did you mean 'alpaca'"):
        tasks.get("arc_easy").form("generate", "alpacca")


def test_letters_are_compared_under_label():
    form = tasks.get("siqa").form("label")
    row = INSTRUCTIONS["siqa"][0]
    prompt = "Ann left.\nQuestion: Why?\nChoices:\nA. tired\nB. sad\nC. late\nAnswer:"
    assert form.requests(row) == [(prompt, " A"), (prompt, " B"), (prompt, " C")]
    assert (form.prompt(row), form.answer(row)) == (prompt, " C")
    assert form.lengths(row) == [1, 1, 1]


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
@pytest.mark.parametrize("name", tasks.names())
def test_builtin_rows_have_every_form(name, protocol):
    if tasks.get(name).unavailable("builtin", protocol):
        pytest.skip("not in the built-in world")
    form = tasks.get(name).form(protocol)
    for row in data.load_rows(name, tasks.get(name).split, DataConfig("builtin", eval_limit=20)):
        assert form.prompt(row).strip()
        if protocol == "generate":
            found = form.extract(form.answer(row), row)
            assert form.correct(found.strict, row)
            assert form.max_new_tokens in (32, 256)
        else:
            asked = form.requests(row)
            assert (form.prompt(row), form.answer(row)) == asked[row["label"]]
            assert form.choices(row) == [continuation for _, continuation in asked]
            assert len(asked) == len(row["choices"]) == len(set(asked)), row


READ_BACK = {"aqua": (2, 168), "mathqa": (21, 0)}
"""Misread on their own trained responses, strictly (these solutions say "the answer is" within) and by the
papers' rule (solutions of AQuA have capitals, and the first A to E counts)."""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_real_row_has_a_native_form_and_a_response_that_is_read_back(name, datasets_folder):
    """On all rows of the reported split: the trained response is well-formed, and right by its own
    extraction."""
    task = tasks.get(name)
    native, generate = task.form(), task.form("generate")
    rows = data.load_rows(name, task.split, DataConfig("local", root=str(datasets_folder)))
    assert all(native.prompt(row) + native.answer(row) for row in rows)
    found = [(generate.extract(generate.answer(row), row), row) for row in rows]
    missed = (
        sum(not generate.correct(one.strict, row) for one, row in found),
        sum(not generate.correct(one.paper, row) for one, row in found),
    )
    assert missed == READ_BACK.get(name, (0, 0))


@pytest.mark.parametrize("source", ["builtin", "local"])
@pytest.mark.parametrize("name", tasks.names())
def test_every_file_works_in_plain_lm_eval(name, source, request):
    """Its native protocol, through lm-eval's own task manager: text, choices or response, and what our forms
    say."""
    task = tasks.get(name)
    if task.unavailable(source):
        pytest.skip(f"{name} is not in the {source} data")
    root = str(request.getfixturevalue("datasets_folder")) if source == "local" else None
    metadata = {"source": source, "root": root, "eval_limit": 3, "seed": 0}
    manager = TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata)
    loaded = manager.load([name])["tasks"][name]
    docs, form = list(loaded.eval_docs), task.form()
    assert len(docs) == 3
    if task.native == "loglikelihood":
        loaded.set_config("num_fewshot", 0)
        loaded.build_all_requests(rank=0, world_size=1)
        assert [asked.args for asked in loaded.instances] == [
            pair for doc in docs for pair in form.requests(doc)
        ]
        return
    for doc in docs:
        assert loaded.doc_to_text(doc) == form.prompt(doc)
        assert loaded.doc_to_target(doc) == form.answer(doc)
        assert loaded.process_results(doc, [form.answer(doc)])["acc_strict"] == 1
        assert loaded.config.generation_kwargs["max_gen_toks"] == form.max_new_tokens


def test_plain_lm_eval_asks_what_the_harness_asks_whatever_the_first_row_lacks(tmp_path):
    """Keys that only a later row has, and keys whose types differ between rows."""
    (tmp_path / "siqa").mkdir()
    plain = {"question": "Why?", "choices": ["p", "q", "r"], "label": 1}
    rows = [plain, {**plain, "context": "Ann left.", "skill": "s", "note": 3}, {**plain, "note": ["x"]}]
    (tmp_path / "siqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metadata = {"source": "local", "root": str(tmp_path)}
    manager = TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata)
    loaded = manager.load(["siqa"])["tasks"]["siqa"]
    loaded.set_config("num_fewshot", 0)
    loaded.build_all_requests(rank=0, world_size=1)
    read = data.load_rows("siqa", "validation", DataConfig("local", root=str(tmp_path)))
    assert list(loaded.eval_docs) == read
    form = tasks.get("siqa").form()
    assert [asked.args for asked in loaded.instances] == [pair for row in read for pair in form.requests(row)]
    assert loaded.instances[3].args[0] == "Q: Ann left. Why?\nA:"


def test_suites_are_groups_of_lm_eval():
    manager = TaskManager(
        include_path=str(tasks.FOLDER),
        include_defaults=False,
        metadata={"source": "builtin", "eval_limit": 2},
    )
    assert set(tasks.suites()) <= set(manager.all_groups)
    assert set(manager.load(["arc"])["tasks"]) == set(tasks.suites()["arc"])


@pytest.mark.parametrize(
    "name", [name for name in tasks.names() if not tasks.get(name).unavailable("builtin")]
)
def test_the_stated_chance_is_that_of_the_choices(name):
    rows = data.load_rows(name, tasks.get(name).split, DataConfig("builtin"))
    assert sum(1 / len(row["choices"]) for row in rows) / len(rows) == pytest.approx(
        tasks.get(name).chance("label"), abs=0.002
    )


def test_suites_and_their_order():
    found = tasks.suites()
    assert found["arc"] == ("arc_easy", "arc_challenge")
    assert found["commonsense"] == COMMONSENSE
    assert found["math"] == ("gsm8k", "aqua", "svamp", "addsub", "singleeq", "multiarith", "mawps")
    assert {task for suite in found.values() for task in suite} <= set(tasks.names())
    assert not set(found) & set(tasks.names())


def test_resolve():
    assert tasks.resolve("arc") == ("arc", ("arc_easy", "arc_challenge"))
    assert tasks.resolve("gsm8k") == ("gsm8k", ("gsm8k",))
    assert tasks.resolve(["arc", "gsm8k"]) == ("arc+gsm8k", ("arc_easy", "arc_challenge", "gsm8k"))
    assert tasks.resolve(["arc_challenge", "arc", "arc"]) == (
        "arc_challenge+arc",
        ("arc_challenge", "arc_easy"),
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("aarc", "task='aarc': no such task or suite. Did you mean 'arc'"),
        (["arc", "gsm8"], "task='gsm8': no such task or suite. Did you mean 'gsm8k'"),
        ("maths", "Did you mean 'math'"),
        ([], r"task=\[\]: expected a task, a suite \(arc, commonsense"),
        (None, "task=None: expected"),
        ([3], "task=3: no such"),
    ],
)
def test_resolve_names_what_is_wrong(value, reason):
    with pytest.raises(ConfigError, match=reason):
        tasks.resolve(value)


def test_titles_and_protocols():
    assert tasks.title("arc_easy", "builtin") == "arc_easy@builtin:loglikelihood"
    assert tasks.title("gsm8k", "local") == "gsm8k@local:generate"
    assert tasks.title("gsm8k", "builtin", "label") == "gsm8k@builtin:label"
    with pytest.raises(ConfigError, match=r"protocol='lable'.*Did you mean 'label'"):
        tasks.get("arc_easy").form("lable")


@pytest.mark.parametrize("name", ["addsub", "singleeq", "multiarith", "svamp", "mawps", "gsm8k"])
@pytest.mark.parametrize("protocol", ["loglikelihood", "label"])
def test_free_answers_are_compared_in_the_world_only(name, protocol):
    task = tasks.get(name)
    assert "free answer" in task.unavailable("local", protocol)
    assert "free answer" in task.unavailable("hub", protocol)
    assert task.unavailable("builtin", protocol) is None
    assert task.unavailable("local", "generate") is task.unavailable("local", "native") is None
    assert (task.chance("generate"), task.chance(protocol), task.chance()) == (0, 0.25, 0)


@pytest.mark.parametrize("name", tasks.names())
def test_every_file_states_its_facts(name):
    task, facts = tasks.get(name), tasks.get(name).facts
    assert 0 < task.chance("label") < 1
    assert task.split in data.SPLITS
    assert facts["version"] >= 1
    assert task.kind in ("choices", "number", "letter")
    assert facts["protocol"].strip()
    assert task.unavailable("hub") or facts["hub"]["reader"] in hub.READERS
    for protocol in tasks.PROTOCOLS:
        named = task.form(protocol).names
        assert named["protocol"] == protocol
        assert (named["template"], named["extraction"]) == {
            "loglikelihood": ("lm_eval", None),
            "label": ("letters", None),
            "generate": ("llm_adapters", facts["extraction"]),
        }[protocol]


def test_a_form_says_what_it_cannot_do():
    with pytest.raises(TypeError, match="generates nothing"):
        tasks.get("arc_easy").form("label").extract("x", ROW)
    with pytest.raises(TypeError, match="compares no choices"):
        tasks.get("gsm8k").form("generate").choices(ROW)
