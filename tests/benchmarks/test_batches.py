"""Where prompts end, with tokenizers that join blanks and line ends differently; masks; and grouping by
length.

pytest tests/benchmarks/test_batches.py
"""

import random
from collections import Counter

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moabench.benchmarks import tasks
from moabench.benchmarks.config.sections import DataConfig
from moabench.benchmarks.data import batches
from moabench.benchmarks.data.batches import Example
from moabench.benchmarks.tasks.rows import load_rows
from moabench.methods.spec import ConfigError

TEXT = [
    "Below is an instruction that describes a task. Write a response. \n\n                ### "
    "Instruction:\n                Please choose.",
    "\n\n                ### Response:\n                the correct answer is answer3",
    "Question: What colour is the sky at night?\nAnswer: black 12 34",
    "\n    indented by four blanks:\n\n\n        and by eight. 3 + 4 = 7",
]


def byte_level(*before, prefix=False):
    """A byte-level BPE; `before`: further pre-tokenizers."""
    bpe = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(
        add_prefix_space=prefix, use_regex=not any(isinstance(b, str) for b in before)
    )
    split = [pre_tokenizers.Split(Regex(b), "isolated") if isinstance(b, str) else b for b in before]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([*split, whole]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(TEXT * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def sentence_pieces():
    """Blanks as part of words (Llama 2, Gemma): a word's blank is its first character."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    alphabet = sorted(set("".join(TEXT) + "\n▁")) + [chr(c) for c in range(33, 127)]
    bpe.train_from_iterator(
        TEXT * 5, trainers.BpeTrainer(vocab_size=420, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = {
    "gpt2": lambda: byte_level(),
    "single_digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama3": lambda: byte_level(LLAMA3),
    "sentence_pieces": sentence_pieces,
}


@pytest.fixture(params=[*TOKENIZERS, "shipped"])
def any_tokenizer(request):
    if request.param == "shipped":
        from transformers import AutoTokenizer

        from moabench.benchmarks.world import MODEL

        return AutoTokenizer.from_pretrained(MODEL)
    return TOKENIZERS[request.param]()


PROMPTS = [
    "Question: What colour?\nAnswer:",
    "### Instruction:\nPlease.\n\n### Response:\n",
    "### Instruction:\n                Please.\n\n                ### Response:\n                ",
    "The red fox ",
    "two blanks  ",
]
ANSWERS = ["the correct answer is answer3", "3 + 4 = 7\nThe answer is 7.", "(A)", "-12", "x"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_training_and_generation_go_on_from_the_same_token(prompt, any_tokenizer):
    """Whatever the answer begins with, its example has the prompt that generation is given; nothing is lost
    or added."""
    gap = "" if prompt[-1].isspace() else " "
    given = batches.encode_prompts(any_tokenizer, [prompt])[0]
    assert given.start == len(given.ids) > 0
    for answer in ANSWERS:
        example = batches.encode(any_tokenizer, [(prompt, gap + answer)], eos=True)[0]
        assert example.ids[: example.start] == given.ids, f"answer {answer!r}"
        assert example.ids[-1] == any_tokenizer.eos_token_id
        assert example.ids[:-1] == any_tokenizer(prompt + gap + answer)["input_ids"]
        response = any_tokenizer.decode(example.ids[example.start : -1])
        assert response.strip() == answer, "what is trained and generated holds the whole answer"


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
def test_every_task_trains_on_what_generation_sees(protocol, any_tokenizer):
    """Rows of every built-in task: the same boundary, and the prompt alone is not shortened where it ends in
    no blank."""
    for name in tasks.names():
        if tasks.get(name).unavailable("builtin", protocol):
            continue
        form = tasks.get(name).form(protocol)
        rows = load_rows(name, tasks.get(name).split, DataConfig("builtin", eval_limit=4))
        prompts = [form.prompt(row) for row in rows]
        examples = batches.encode(any_tokenizer, list(zip(prompts, map(form.answer, rows), strict=True)))
        for prompt, example, given in zip(
            prompts, examples, batches.encode_prompts(any_tokenizer, prompts), strict=True
        ):
            assert example.ids[: example.start] == given.ids, name
            if not prompt[-1].isspace():
                assert given.ids == any_tokenizer(prompt)["input_ids"], name


def ending(tokenizer, template):
    """A tokenizer that puts its own tokens around a text, as `template` says."""
    end = tokenizer.eos_token
    ids = [(end, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("E", end), special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize("template", ["$A E", "E $A E", "E $A", "$A E E"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_end_that_the_tokenizer_appends_ends_no_prompt_and_is_trained_once(prompt, template):
    """What it puts before a text stays."""
    plain, given = byte_level(), ending(byte_level(), template)
    before = [plain.eos_token_id] * template.startswith("E")
    gap = "" if prompt[-1].isspace() else " "
    pairs = [(prompt, gap + answer) for answer in ANSWERS]
    for eos in (True, False):
        want = batches.encode(plain, pairs, eos=eos)
        assert batches.encode(given, pairs, eos=eos) == [
            Example([*before, *e.ids], e.start + len(before)) for e in want
        ]
    (want,) = batches.encode_prompts(plain, [prompt])
    assert batches.encode_prompts(given, [prompt])[0].ids == [*before, *want.ids]


def test_a_tokenizer_without_an_end_token_trains_nothing():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end token"):
        batches.encode(tokenizer, [("a", " b")], eos=True)
    assert batches.encode(tokenizer, [("a", " b")])[0].ids == tokenizer("a b")["input_ids"]


def test_line_ends_stay_with_the_prompt():
    tokenizer = byte_level()
    example = batches.encode(tokenizer, [("### Response:\n", "the correct answer")])[0]
    assert tokenizer.decode(example.ids[: example.start]) == "### Response:\n"
    assert tokenizer.decode(example.ids[example.start :]) == "the correct answer"


def test_a_cut_keeps_answer_and_skill():
    example = Example(list(range(10)), 7, 4)
    assert example.last(5) == Example([5, 6, 7, 8, 9], 2, 4)
    assert example.last(2) == Example([8, 9], 1, 4)
    assert example.last(10) is example
    assert example.prompt() == Example(list(range(7)), 7, 4)


def test_batches_say_what_is_prompt_answer_padding_and_skill():
    batch = batches.collate([Example([5, 6, 7, 8], 2, 3), Example([9, 4], 1)], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["prompt_mask"].tolist() == [[True, True, False, False], [True, False, False, False]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 4, -100, -100]]
    assert batch["skill_ids"].tolist() == [3, -1] and batch["skill_ids"].dtype == torch.int64
    assert batch["kept"] == 4
    left = batches.collate_prompts([[5, 6, 7], [9]], [3, -1], pad=1)
    assert left["input_ids"].tolist() == [[5, 6, 7], [1, 1, 9]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left["prompt_mask"].tolist() == [[True, True, True], [False, False, True]]


class Told(torch.nn.Module):
    """Notes what it is called with."""

    def __init__(self, *names):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        for name in names:
            setattr(self, f"accepts_{name}", True)


def test_only_models_that_ask_are_told_more():
    batch = batches.collate([Example([5, 6], 1)], pad=0)
    plain = {"input_ids", "attention_mask"}
    assert set(batches.inputs(Told(), batch)) == plain
    assert set(batches.inputs(Told("skill_ids"), batch)) == plain | {"skill_ids"}
    assert set(batches.inputs(Told("prompt_mask", "skill_ids"), batch)) == plain | {
        "prompt_mask",
        "skill_ids",
    }


def test_grouping_mixes_no_examples(attached):
    """A batch of a grouped order is its examples, whole and one a row; each has the logits that it has alone,
    neighbours or not."""
    rng = random.Random(0)
    examples = [
        Example([rng.randrange(3, 300) for _ in range(length)], 1 + length // 2, 0)
        for length in rng.sample(range(2, 40), 12)
    ]
    order = batches.training_order([len(e.ids) for e in examples], 4, 3, seed=1)
    assert sorted(order) == list(range(12))
    model = attached("moa_instance").eval()
    for i in range(0, 12, 4):
        chosen = [examples[k] for k in order[i : i + 4]]
        batch = batches.collate(chosen, pad=2)
        assert [
            row[mask].tolist()
            for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ] == [e.ids for e in chosen]
        with torch.no_grad():
            logits = batches.forward(model, batch, batch["input_ids"].shape[1])
            for row, example in zip(logits, chosen, strict=True):
                alone = batches.forward(model, batches.collate([example], 2), len(example.ids))[0]
                torch.testing.assert_close(row[: len(example.ids)], alone, atol=3e-5, rtol=1e-5)


def padding_share(lengths, order, batch):
    chunks = [[lengths[i] for i in order[k : k + batch]] for k in range(0, len(order), batch)]
    return 1 - sum(map(sum, chunks)) / sum(len(chunk) * max(chunk) for chunk in chunks)


def test_grouping_leaves_little_padding_in_a_mixed_set():
    """Three kinds of task, as long as passages, facts and word problems; every row once a pass, in an order
    that steps cannot tell."""
    rng = random.Random(0)
    lengths = [max(2, round(rng.gauss(*kind))) for kind in ((90, 15), (30, 5), (60, 20)) for _ in range(800)]
    steps, batch = len(lengths) // 16, 16
    order = batches.training_order(lengths, batch, steps, seed=0)
    assert Counter(order) == Counter(range(len(lengths)))
    shuffled = random.Random(0).sample(range(len(lengths)), len(lengths))
    assert padding_share(lengths, shuffled, batch) > 0.3
    assert padding_share(lengths, order, batch) < 0.06
    means = [sum(lengths[i] for i in order[k : k + batch]) / batch for k in range(0, len(order), batch)]
    halves = sum(means[: steps // 2]) / (steps // 2), sum(means[steps // 2 :]) / (steps - steps // 2)
    assert halves[0] == pytest.approx(halves[1], rel=0.25), "long and short batches come mixed"
