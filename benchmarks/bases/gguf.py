"""A base from a GGUF file: converted once into a folder of the user's cache, then read as any other.

The folder is named by the file's content and `VERSION`. It holds what save_pretrained writes, in fp32 (four
bytes a parameter), and in gguf.json where it is from and the hash of each file. Imports no torch before it
converts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.machine import files
from moabench.methods.spec import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moabench.benchmarks.config.sections import ModelConfig

VERSION = 1
"""Of the converter: a change of what it writes from the same file is another base."""
RECORD = "gguf.json"

WHOLE, DIGITS = ("gpt-2",), ("smollm", "starcoder", "refact", "command-r")
"""Byte-level BPE files whose text is cut by GPT-2's expression alone, or with each digit on its own first, as
`tokenizer.ggml.pre` calls them. The expressions of others are transformers'."""

TOLD = "Expected the model as a folder written by save_pretrained."


def check(cfg: ModelConfig) -> None:
    """ConfigError for a base whose GGUF file is not there, is none, or cannot be read here."""
    what, file = _what(cfg), cfg.gguf
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise ConfigError(
            f"{what}: {file} cannot be read ({error.strerror}); expected a GGUF file."
        ) from error
    if start != b"GGUF":
        raise ConfigError(
            f"{what}: {file} begins with {start!r}; expected a GGUF file, which begins with GGUF."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f'{what}: needs the package gguf, which is not installed; `pip install "moabench[real]"`.'
        )


def digest(content: str) -> str:
    """What a base from the file is (16 hex digits). content: SHA-256 (hex) of the file."""
    return hashlib.sha256(json.dumps([VERSION, content]).encode()).hexdigest()[:16]


def cache() -> Path:
    """The project's folder of the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "moabench"


def place(base: str) -> Path:
    """The folder of a converted base, by its digest."""
    return cache() / f"gguf-{base}"


def contents(base: str) -> dict[Path, str]:
    """file -> SHA-256 (hex) as it was written, of a converted base by its digest; empty where there is
    none."""
    folder = place(base)
    known = (files.cached(folder / RECORD) or {}).get("files")
    return {folder / name: content for name, content in known.items()} if isinstance(known, dict) else {}


def converted(cfg: ModelConfig, base: str) -> ModelConfig:
    """`cfg` with the folder of the converted base for its path. base: digest of the file's content.

    The first process makes the folder and the others wait for it; one that is cut is made anew. Raises
    ConfigError for a file that cannot become a model that is surely its own, StorageError.
    """
    folder = place(base)
    if not _whole(folder, base):
        check(cfg)
        with _alone():
            if not _whole(folder, base):
                print(f"{cfg.gguf} is converted into {folder}, once", file=sys.stderr, flush=True)
                try:
                    files.write_folder(folder, lambda new: _convert(cfg, new))
                except files.StorageError as error:
                    raise _unwritable(folder, error.__cause__) from error
    return dataclasses.replace(cfg, path=str(folder))


def _whole(folder: Path, base: str) -> bool:
    """Whether all files are there, as long as they were. Their content is compared by `Fingerprint.check`."""
    known = contents(base)
    sizes = (files.cached(folder / RECORD) or {}).get("sizes")
    return bool(known) and all(
        file.is_file() and file.stat().st_size == sizes.get(file.name) for file in known
    )


def _unwritable(path: Path, error: OSError) -> files.StorageError:
    return files.StorageError(
        f"cannot write {path}: {error.strerror or error}; expected room for what is kept between runs, in "
        "XDG_CACHE_HOME=path/to/folder."
    )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process converts at a time; the kernel lets the lock go when its owner dies, however it dies.
    What one that died left is removed."""
    file = cache() / "gguf.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        files.remove_unfinished(cache())
        yield
    finally:
        os.close(descriptor)


def _convert(cfg: ModelConfig, new: Path) -> None:
    """Writes model, tokenizer and record into the folder `new`."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    what = _what(cfg)
    with _one_error(what):
        source = _Source(cfg.gguf)
        tokenizer = source.tokenizer(what)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source.place, dtype=torch.float32, output_loading_info=True
        )
    source.check(what, model, report)
    del model.config.quantization_config  # unpacked; save_pretrained refuses packed models
    model.hf_quantizer = None
    try:
        model.save_pretrained(new)
    except SafetensorError as error:  # a full disk
        raise OSError(" ".join(str(error).split())) from error
    tokenizer.save_pretrained(new)
    again = AutoTokenizer.from_pretrained(str(new), local_files_only=True)
    if again(PROBE).input_ids != tokenizer(PROBE).input_ids:
        raise ConfigError(f"{what}: its tokenizer gives other tokens once it is saved. {TOLD}")
    written = sorted(path for path in new.iterdir() if path.is_file())
    record = {
        "source": cfg.path,
        "files": {path.name: _sha256(path) for path in written},
        "sizes": {path.name: path.stat().st_size for path in written},
    }
    files.write_json(new / RECORD, record)


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Whatever transformers and gguf raise as one ConfigError; the bar that the loader draws is not drawn."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except ConfigError:
        raise
    except Exception as error:  # they raise a dozen types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{what}: transformers cannot read it ({reason}). {TOLD}") from error


PROBE = "It's 12  345.6\n\n  Ünï½ <|endoftext|></s> a\tB"


class _Source:
    """A GGUF file, and what it says of itself that transformers' loader passes over."""

    def __init__(self, file: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(file)
        self.place: dict[str, Any] = {
            "pretrained_model_name_or_path": str(file.parent),
            "gguf_file": file.name,
            "local_files_only": True,
        }
        self.kind, self.pre = (
            reader.fields[name].contents() if name in reader.fields else None
            for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        )
        self.rope = sorted(
            [name for name in reader.fields if ".rope.scaling." in name]
            + [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
        )
        self.numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)

    def check(self, what: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
        """Raises ConfigError where the model is another than that of the file: its positions are scaled,
        tensors are left over, or lack and were drawn at random. report: transformers' loading info."""
        if self.rope:
            raise ConfigError(
                f"{what}: scales its rotary positions ({self.rope[0]}), which transformers passes over in "
                f"GGUF files. {TOLD}"
            )
        read = sum(p.numel() for p in model.parameters())
        lacking = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
        if lacking or read != self.numbers:
            raise ConfigError(
                f"{what}: transformers makes {read:,} parameters of its {self.numbers:,} numbers"
                + (f" and none for {lacking[0]}" if lacking else "")
                + f", so that the model would be another. {TOLD}"
            )

    def tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """With the way in which the file says that text is cut before BPE: transformers has GPT-2's for all
        that it does not know. Raises ConfigError for one that is not known here either."""
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(**self.place)
        if self.kind != "gpt2":  # SentencePiece: the vocabulary says it all
            return tokenizer
        backend = tokenizer.backend_tokenizer
        if self.pre in DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif self.pre not in WHOLE and json.loads(backend.to_str())["pre_tokenizer"]["type"] == "ByteLevel":
            raise ConfigError(
                f"{what}: tokenizer.ggml.pre={self.pre!r}, a way of cutting text that neither transformers "
                f"nor this project knows; known here: {', '.join((*WHOLE, *DIGITS))}. {TOLD}"
            )
        return tokenizer


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _what(cfg: Any) -> str:
    return f"model={cfg.name}, model.path={cfg.path!r}"
