"""The TinyStories excerpts of the demo model: their split, their tokenizer, and the measurement.

Ronen Eldan and Yuanzhi Li, "TinyStories: How Small Can Language Models Be and Still Speak Coherent
English?", https://huggingface.co/datasets/roneneldan/TinyStories, licence CDLA-Sharing-1.0.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qserve_jax.models import CausalLM
from qserve_jax.runtime.perplexity import Perplexity, perplexity

V1 = "tinystories_v1_train_head_944K.txt"  # of TinyStories-train.txt, end marks gone
V2 = "tinystoriesV2_train_head_1425K.txt"  # of TinyStoriesV2-GPT4-train.txt
END_OF_TEXT = "<|endoftext|>"

MIN_CHARACTERS = 300
HELD_OUT_EVERY = 20
MAX_SHARED = 0.2
SHINGLE_WORDS = 5


class Stories(NamedTuple):
    """train: to learn from. validation: to choose the weights. test: to report, and only that."""

    train: list[str]
    validation: list[str]
    test: list[str]


class Tokens(NamedTuple):
    """Each part of `Stories` as one text, i32[n]."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_stories(data: Path) -> Stories:
    """The stories of the folder `data`, always split alike.

    Held-out stories come from V2, where an end mark closes each: of every 20, the first is test and
    the eleventh validation. A story that shares more than a fifth of its 5-word sequences with a
    held-out one is a near duplicate and is dropped. Raises ValueError where a file is missing.
    """
    for name in (V1, V2):
        if not (data / name).is_file():
            raise ValueError(f"{data} has no {name}: give the folder with the TinyStories excerpts")
    v2 = split_v2((data / V2).read_text(encoding="utf-8"))
    kinds = [i % HELD_OUT_EVERY for i in range(len(v2))]
    test = [s for s, kind in zip(v2, kinds, strict=True) if kind == 0]
    validation = [s for s, kind in zip(v2, kinds, strict=True) if kind == HELD_OUT_EVERY // 2]
    validation = drop_near_duplicates(validation, test)
    rest = [s for s, kind in zip(v2, kinds, strict=True) if kind % (HELD_OUT_EVERY // 2)]
    rest += split_v1((data / V1).read_text(encoding="utf-8"))
    return Stories(drop_near_duplicates(rest, validation + test), validation, test)


def split_v2(text: str) -> list[str]:
    """Stories closed by an end mark; the excerpt's last one is cut off and has none."""
    return [story.strip() for story in text.split(END_OF_TEXT)[:-1] if story.strip()]


def split_v1(text: str) -> list[str]:
    """Stories separated by one newline (paragraphs are by two).

    Some stories have single newlines inside: their short pieces are dropped. So are stories whose
    quotation marks were broken by a wrong encoding.
    """
    stories = (story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", text))
    return [s for s in stories if len(s) >= MIN_CHARACTERS and "â€" not in s]


def drop_near_duplicates(stories: list[str], others: list[str]) -> list[str]:
    """`stories` without those that share more than MAX_SHARED of their shingles with another.

    The share is of the shorter story's shingles, so that an excerpt of a story counts as its copy.
    """
    sizes, owners = [], defaultdict(list)
    for i, other in enumerate(others):
        found = shingles(other)
        sizes.append(len(found))
        for shingle in found:
            owners[shingle].append(i)

    def is_copy(story: str) -> bool:
        mine = shingles(story)
        shared = Counter(i for shingle in mine for i in owners.get(shingle, ()))
        return any(n > MAX_SHARED * min(len(mine), sizes[i]) for i, n in shared.items())

    return [story for story in stories if not is_copy(story)]


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of SHINGLE_WORDS consecutive words, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text is encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(END_OF_TEXT) != 0:
        raise ValueError(
            f"the stories give {tokenizer.get_vocab_size()} tokens instead of {vocab_size}: "
            "train on more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json and what transformers.AutoTokenizer needs beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def tokenize(tokenizer: Tokenizer, stories: Stories) -> Tokens:
    """See `join_stories`."""
    return Tokens(*(join_stories(tokenizer, part) for part in stories))


def join_stories(tokenizer: Tokenizer, stories: list[str]) -> np.ndarray:
    """One text, i32[n]: the end-of-text token before, between and after the stories."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(stories, add_special_tokens=False)
    parts = [np.array([end, *story.ids], np.int32) for story in encoded]
    return np.concatenate([*parts, np.array([end], np.int32)])


def held_out(model: CausalLM, params: Any, tokens: np.ndarray, kv_bits: int = 16) -> Perplexity:
    """Perplexity as the demo's card and table give it.

    Every token has the 512 tokens before it as context, or all there are.
    """
    return perplexity(
        model, params, tokens, seq_len=1024, stride=512, batch_size=4, kv_bits=kv_bits
    )


def bits_per_byte(result: Perplexity, stories: list[str]) -> float:
    """The loss of `held_out` in bits per byte of the stories' UTF-8 text."""
    return result.loss * result.num_tokens / np.log(2) / sum(len(s.encode()) for s in stories)
