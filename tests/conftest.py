"""Shared by all tests: one thread, a tiny random Llama and its tokenizer built in memory, the folder of real
data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import moabench  # noqa: F401, I001  first: it takes the checkout's root off the module search path
import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter; read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is unset

DATASETS = Path(__file__).resolve().parents[2] / "shared" / "datasets"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Several times faster on busy machines, and sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE over a few sentences: every text has tokens, words have several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    text = [
        "Question: What colour is the sky at night?\nAnswer: black",
        "Which animal eats grass and gives milk?",
        "The red fox sleeps.",
    ]
    bpe.train_from_iterator(
        text * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def llama(tokenizer):
    """A random Llama, 32 wide, 2 layers, the same in every test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough for answers to differ
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def datasets_folder():
    """The folder of real data sets in our JSONL layout."""
    if not DATASETS.is_dir():
        pytest.skip("real data sets are not here: no folder ../shared/datasets beside the checkout")
    return DATASETS
