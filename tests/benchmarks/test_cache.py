"""Tokens from the cache equal those made anew; whatever they depend on is in the key; broken, half-written
and old files do no harm.

pytest tests/benchmarks/test_cache.py
"""

import multiprocessing
import os
import time

import numpy as np
import pytest

from moabench.benchmarks.data import batches, cache

PAIRS = [
    (f"Question: what is {i}?\nAnswer:" + "\n" * (i % 3), f" the number {i * i}") for i in range(cache.FEWEST)
]


@pytest.fixture
def counting(tokenizer):
    """encode(...) that notes how often it was called."""

    def encode(tokenizer, pairs, eos=False):
        encode.calls += 1
        return batches.encode(tokenizer, pairs, eos)

    encode.calls = 0
    return encode


def get(folder, tokenizer, encode, pairs=PAIRS, eos=True, **options):
    return cache.encoded(folder, tokenizer, pairs, eos, encode, **options)


def files(folder):
    return sorted(folder.glob("*.npz"))


@pytest.mark.parametrize("eos", [True, False])
def test_cached_is_equal(tmp_path, tokenizer, counting, eos):
    expected = batches.encode(tokenizer, PAIRS, eos)
    assert get(tmp_path, tokenizer, counting, eos=eos) == expected
    again = get(tmp_path, tokenizer, counting, eos=eos)
    assert again == expected
    assert counting.calls == 1
    assert all(type(token) is int for token in again[0].ids)
    assert len(files(tmp_path)) == 1


def test_small_sets_and_python_tokenizers_are_not_kept(tmp_path, tokenizer, counting):
    get(tmp_path, tokenizer, counting, pairs=PAIRS[1:])

    class Slow:
        is_fast, eos_token_id = False, 1

        def __call__(self, texts, **options):
            return tokenizer(texts, **options)

    get(tmp_path, Slow(), counting)
    assert counting.calls == 2
    assert not files(tmp_path)


def test_the_key_holds_everything_that_matters(tokenizer):
    def other(tokenizer, pairs, eos):
        return []

    def changed():
        copy = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>"
        )
        copy.backend_tokenizer.add_tokens(["number"])
        return copy

    moved = [(PAIRS[0][0] + " ", PAIRS[0][1][1:]), *PAIRS[1:]]  # the same text, cut elsewhere
    keys = {
        cache.key(tokenizer, PAIRS, True, batches.encode),
        cache.key(tokenizer, PAIRS, False, batches.encode),
        cache.key(tokenizer, PAIRS[::-1], True, batches.encode),
        cache.key(tokenizer, moved, True, batches.encode),
        cache.key(tokenizer, PAIRS, True, other),
        cache.key(
            type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>"),
            PAIRS,
            True,
            batches.encode,
        ),
    }
    assert len(keys) == 6
    assert cache.key(tokenizer, PAIRS, True, batches.encode) in keys
    assert cache.key(changed(), PAIRS, True, batches.encode) not in keys


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other count", "no zip"])
def test_a_broken_file_is_made_anew(tmp_path, tokenizer, counting, damage):
    expected = get(tmp_path, tokenizer, counting)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    if damage == "other count":
        np.savez(path, ids=np.array([1, 2]), lengths=np.array([2]), starts=np.array([1]))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(
            {"empty": b"", "cut": content[:middle], "flipped": flipped, "no zip": b"text" * 99}[damage]
        )
    assert get(tmp_path, tokenizer, counting) == expected
    assert counting.calls == 2
    assert path.read_bytes() == content
    assert get(tmp_path, tokenizer, counting) == expected
    assert counting.calls == 2


def test_large_vocabularies_keep_their_ids(tmp_path, tokenizer):
    def encode(tokenizer, pairs, eos):
        return [batches.Example([0, 2**16 + i, 5], 2) for i in range(len(pairs))]

    first = get(tmp_path, tokenizer, encode)
    assert get(tmp_path, tokenizer, encode) == first
    assert first[3].ids == [0, 2**16 + 3, 5]


def test_the_folder_stays_within_its_limit(tmp_path, tokenizer, counting):
    sets = [[(f"{i} {prompt}", answer) for prompt, answer in PAIRS] for i in range(4)]
    for age, pairs in zip((40, 30, 20), sets, strict=False):
        get(tmp_path, tokenizer, counting, pairs=pairs)
        newest = max(files(tmp_path), key=os.path.getmtime)
        os.utime(newest, (time.time() - age, time.time() - age))
    size = newest.stat().st_size
    abandoned, fresh = tmp_path / ".a.tmp", tmp_path / ".b.tmp"
    abandoned.touch(), fresh.touch()
    os.utime(abandoned, (0, 0))
    get(tmp_path, tokenizer, counting, pairs=sets[0])  # used: no longer the oldest
    get(tmp_path, tokenizer, counting, pairs=sets[3], limit=int(3.5 * size))
    assert len(files(tmp_path)) == 3
    calls = counting.calls
    get(tmp_path, tokenizer, counting, pairs=sets[0])
    assert counting.calls == calls
    assert not abandoned.exists()
    assert fresh.exists()
    get(tmp_path, tokenizer, counting, pairs=sets[1], limit=1)  # the newest stays, whatever the limit
    assert len(files(tmp_path)) == 1


def rewrite(path, examples):
    for _ in range(25):
        cache._write(path, examples)
        assert cache._read(path, len(examples)) == examples


def test_processes_may_write_the_same_file(tmp_path):
    """Readers see a whole file at every moment while two processes write it over and over."""
    path, examples = tmp_path / "same.npz", [batches.Example([i % 999] * 200, 7) for i in range(1000)]
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=rewrite, args=(path, examples)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert cache._read(path, len(examples)) == examples
            seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen > 5
    assert [file.name for file in tmp_path.iterdir()] == ["same.npz"]
