"""Loss on held-out text against a loop over one text; what the texts are, and what is said where there are
none.

pytest tests/benchmarks/test_forgetting.py
"""

import random
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch

from moabench.benchmarks import world
from moabench.benchmarks.evaluation import forgetting
from moabench.benchmarks.evaluation.forgetting import change, held_out_texts, text_loss, windows
from moabench.methods.spec import ConfigError

WORDS = [
    "red",
    "fox",
    "sleeps",
    "under",
    "old",
    "stone",
    "bridge",
    "while",
    "green",
    "river",
    "carries",
    "many",
    "small",
    "boats",
]


def cfg(value, kind="builtin"):
    return SimpleNamespace(forgetting=str(value), model=SimpleNamespace(kind=kind))


def texts(count=9):
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 4, 20, 60]))) for _ in range(count)]


@pytest.mark.parametrize(
    "name", ["none", "lora", "mixlora", "moa_instance", "molora_oracle", "molora_random"]
)
def test_the_loss_of_each_token_once_whatever_the_batch(name, attached, tokenizer, monkeypatch):
    monkeypatch.setattr(forgetting, "WINDOW", 16)
    model = attached(name).train()
    found = {size: text_loss(model, tokenizer, texts(), size) for size in (1, 64)}
    assert model.training
    model.eval()
    total, tokens = 0.0, 0
    for number, text in enumerate(texts()):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        tokens += len(ids) - 1
        for start in range(0, len(ids) - 1, 16):
            window = torch.tensor([ids[start : start + 17]])
            facts = {
                "prompt_mask": torch.arange(window.shape[1])[None] < 1,
                "skill_ids": torch.tensor([number]),
            }
            facts = {key: value for key, value in facts.items() if getattr(model, f"accepts_{key}", False)}
            with torch.no_grad():
                scores = model(input_ids=window, **facts).logits[0].log_softmax(-1)
            total -= sum(scores[i, window[0, i + 1]].item() for i in range(window.shape[1] - 1))
    for result in found.values():
        assert result["tokens"] == tokens
        assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert result["perplexity"] == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-4)


def test_windows_lose_no_token_and_repeat_none(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(forgetting, "WINDOW", 7)
    text = " ".join(WORDS * 3)
    cut = windows(llama, tokenizer, [text])
    assert max(len(w.ids) for w in cut) == 8 and all(w.start == 1 for w in cut)
    assert [token for w in cut for token in w.ids[1:]] == tokenizer(text)["input_ids"]
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(cut))


def test_the_shipped_model_is_asked_about_the_held_out_corpus():
    found = held_out_texts(cfg("auto"))
    assert len(found) == forgetting.PARAGRAPHS
    assert found == list(islice(world.corpus(heldout=True), len(found)))
    assert not set(found) & set(islice(world.corpus(), 20_000))


@pytest.mark.parametrize(("value", "kind"), [("none", "builtin"), ("auto", "pretrained"), ("auto", "random")])
def test_without_text_nothing_is_measured(value, kind):
    assert held_out_texts(cfg(value, kind)) == []


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\ntwo\n\n", ["one", "two"]),
        ("one\r\ntwo", ["one", "two"]),
        ("\n\n one\n still one\n\n\ntwo\n", [" one\n still one", "two"]),
        ("\ufeffgrün\n", ["grün"]),
    ],
)
def test_documents_are_lines_or_stand_between_blank_lines(content, documents, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    assert held_out_texts(cfg(path, "pretrained")) == documents


def test_files_that_cannot_serve(tmp_path):
    with pytest.raises(
        ConfigError, match=r"forgetting=.*missing\.txt.*no such file.*Expected auto, none or a text file"
    ):
        held_out_texts(cfg(tmp_path / "missing.txt"))
    with pytest.raises(ConfigError, match="is a directory"):
        held_out_texts(cfg(tmp_path))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ConfigError, match=r"empty\.txt.*no text"):
        held_out_texts(cfg(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt.*not UTF-8 \(byte 2 is 0xfc\)"):
        held_out_texts(cfg(tmp_path / "latin.txt"))


def test_random_states_are_left_as_they_were(attached, tokenizer):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    text_loss(attached("lora").train(), tokenizer, texts(2), 4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), want)


def test_what_was_lost():
    assert change({"forgetting/loss": 1.0}, {"forgetting/loss": 1.5}) == {
        "forgetting/before": 1.0,
        "forgetting/change": 0.5,
    }
