"""Streamed text == decoded text, for real tokenizers, with and without stop strings."""

import copy
import functools
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from qserve_jax.runtime.detokenizer import IncrementalDetokenizer, decoder_of

SENTENCES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "naïve café — «déjà vu» 😀 👩‍👩‍👧 🇪🇺",
    "日本語と中文 and 한국어\n\n\tmixed,  with   spaces",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


@functools.cache
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def sentencepiece():
    """As Llama 2's: leading spaces in the tokens, bytes for characters out of the vocabulary."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁a", "▁time", "on", ",", "e", "l", "it", "ab", "é", "日", ".", "▁▁"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def metaspace():
    """The other spelling of the same: a Metaspace decoder."""
    pieces = {p: i for i, p in enumerate([*SPECIAL, "▁", "▁a", "b", "▁ab", "日", ".", "▁▁", "é"])}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def token_id(tokenizer, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


TOKENIZERS = [byte_level, sentencepiece, metaspace]


def stream(tokenizer, ids, **kwargs):
    """Feeds ids until the detokenizer stops; returns it and the pieces."""
    detokenizer = IncrementalDetokenizer(tokenizer, **kwargs)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.add(token))
        assert "".join(pieces) == detokenizer.text
        if detokenizer.stopped is not None:
            break
    return detokenizer, [*pieces, detokenizer.finish()]


def expected_text(tokenizer, ids, stop, include, skip):
    """Decodes every prefix in full: the text, the stop string, and how many tokens it took."""
    for length in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:length], skip_special_tokens=skip).rstrip("�")
        if found := [string for string in stop if string in text]:
            matched = min(found, key=text.index)
            return text[: text.index(matched) + include * len(matched)], matched, length
    return tokenizer.decode(ids, skip_special_tokens=skip), None, len(ids)


@st.composite
def cases(draw):
    """A tokenizer, ids that are text, bytes or anything (some unknown), and likely stop strings."""
    tokenizer = draw(st.sampled_from(TOKENIZERS))()
    text = st.sampled_from([*SENTENCES, "日", "é", "😀", "ab\n", " "]).map(
        lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    any_id = st.integers(0, len(tokenizer) + 2)
    ids = sum(draw(st.lists(st.one_of(text, any_id.map(lambda i: [i])), max_size=30)), [])
    skip = draw(st.booleans())
    decoded = tokenizer.decode(ids, skip_special_tokens=skip)
    ends = st.integers(0, len(decoded))
    cut = st.tuples(ends, st.integers(1, 6)).map(lambda c: decoded[c[0] : c[0] + c[1]])
    strings = st.one_of(cut, st.text("abel ,.\né日😀", min_size=1, max_size=3))
    stop = draw(st.lists(strings.filter(lambda s: s and "�" not in s), max_size=3))
    return tokenizer, ids, tuple(stop), draw(st.booleans()), skip


def check(case):
    tokenizer, ids, stop, include, skip = case
    text, matched, length = expected_text(tokenizer, ids, stop, include, skip)
    detokenizer, pieces = stream(
        tokenizer, ids, stop=stop, include_stop_str_in_output=include, skip_special_tokens=skip
    )
    assert detokenizer.text == "".join(pieces) == text
    assert detokenizer.stopped == matched
    if matched is not None:
        assert len(pieces) - 1 == length  # it stopped at the first token that it could


@settings(max_examples=400)
@given(cases())
def test_streamed_text_equals_decoded_text(case):
    check(case)


BYTE = 3  # id of <0x00> in the SentencePiece vocabularies


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.text("aé日😀\n ", max_size=4).map(lambda text: [BYTE + b for b in text.encode()]),
            st.sampled_from([[BYTE + 0xFF], [BYTE + 0xE6], [BYTE + 0x80], [2], [0], [262], [263]]),
        ),
        max_size=16,
    ),
    st.lists(st.sampled_from(["\n", "日", " ", "é日", "a\n", "\n\n"]), max_size=2),
    st.booleans(),
)
@example([[BYTE + 10], [2], [BYTE + 255]], [], True)  # a skipped token does not end the run
@example([[BYTE + 32], [BYTE + 32]], [" "], True)  # the decoder strips one leading space
def test_runs_of_byte_tokens(parts, stop, skip):
    check((sentencepiece(), sum(parts, []), tuple(stop), False, skip))


def test_bundled_tokenizer(shared_data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "stories260k-hf")
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence, add_special_tokens=False)
        check((tokenizer, ids, (), False, True))
        assert stream(tokenizer, ids)[0].text == sentence
    ids = tokenizer.encode(SENTENCES[0])
    detokenizer, pieces = stream(tokenizer, ids, stop=["girl named"])
    assert detokenizer.text == "Once upon a time, there was a little "
    assert len([piece for piece in pieces if piece]) > 5  # it did stream


def test_text_is_shown_as_early_as_it_is_final():
    tokenizer = byte_level()
    euro = [token_id(tokenizer, c) for c in ["â", "Ĥ", "¬"]]  # E2 82 AC
    a = token_id(tokenizer, "a")
    assert stream(tokenizer, [a, *euro, a])[1] == ["a", "", "", "€", "a", ""]
    assert stream(tokenizer, [a, *euro[:2]])[1] == ["a", "", "", "�"]
    assert stream(tokenizer, [a, *euro[:2], a])[1] == ["a", "", "", "�a", ""]

    tokenizer = sentencepiece()
    time, a, on = (token_id(tokenizer, piece) for piece in ["▁time", "▁a", "on"])
    assert stream(tokenizer, [time, a, on])[1] == ["time", " a", "on", ""]
    # A skipped token keeps the space of the next one.
    assert stream(tokenizer, [time, 2, a])[1] == ["time", "", " a", ""]
    # Bytes wait for the end of their run; a stop string among them does not.
    newline = BYTE + 10
    assert stream(tokenizer, [time, newline, on])[1] == ["time", "", "\non", ""]
    assert stream(tokenizer, [time, newline, on], stop=["\n"])[1] == ["time", "", ""]


def test_beginnings_of_stop_strings_are_withheld():
    tokenizer = sentencepiece()
    a, e, el, ab = (token_id(tokenizer, piece) for piece in ("▁a", "e", "l", "ab"))
    detokenizer, pieces = stream(tokenizer, [e, a, el, e, el, ab], stop=["lelx", "elab"])
    assert pieces == ["", "e a", "", "", "", "l", ""]
    assert (detokenizer.text, detokenizer.stopped) == ("e al", "elab")
    _, pieces = stream(tokenizer, [e, el], stop=["elab"])
    assert pieces == ["", "", "el"]  # never completed, so `finish` shows it
    detokenizer, pieces = stream(
        tokenizer, [e, el, ab, a], stop=["ela"], include_stop_str_in_output=True
    )
    assert pieces == ["", "", "ela", ""] and detokenizer.stopped == "ela"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens
        self.decoded = 0

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **kwargs)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_work_per_token_does_not_grow(make):
    ordinary = make().encode(SENTENCES[0], add_special_tokens=False)
    skipped, unknown, one_token, byte_run = 2, 9999, ordinary[-1], BYTE + ord("b")
    for ids in (
        ordinary * 20,
        *([token] * 800 for token in (skipped, unknown, one_token, byte_run)),
    ):
        tokenizer = Counting(make())
        detokenizer, _ = stream(tokenizer, ids, stop=["never"])
        assert detokenizer.text == make().decode(ids, skip_special_tokens=True)
        assert tokenizer.decoded <= 24 * len(ids)


def test_endless_bad_bytes():
    tokenizer = byte_level()
    bad = token_id(tokenizer, "ÿ")  # FF
    counting = Counting(tokenizer)
    detokenizer = IncrementalDetokenizer(counting)
    pieces = [detokenizer.add(bad) for _ in range(300)]
    assert counting.decoded <= 24 * 300
    assert pieces == ["", *["�"] * 299] and detokenizer.finish() == "�"


def word_level(kind=PreTrainedTokenizerFast, **kwargs):
    """A model that is no BPE, whose spaces transformers may clean up."""
    pieces = {p: i for i, p in enumerate([*SPECIAL, "do", "n't", "stop", "!"])}
    tokenizer = Tokenizer(models.WordLevel(pieces, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return kind(tokenizer_object=tokenizer, eos_token="</s>", **kwargs)


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


class Calling(PreTrainedTokenizerFast):
    def decode(self, *args, **kwargs):
        return str(super().decode(*args, **kwargs)).upper()


def test_only_what_adds_nothing_to_decoding_is_left_out(monkeypatch):
    ids = [3, 4, 5, 6, 2]
    plain, cleaning = word_level(), word_level(clean_up_tokenization_spaces=True)
    patched = word_level()
    monkeypatch.setattr(patched, "decode", lambda ids, **_: "?" * len(ids))
    texts = {plain: "do n't stop !", cleaning: "don't stop!", patched: "????"}
    texts |= {word_level(kind): "DO N'T STOP !" for kind in (Shouting, Calling)}
    for tokenizer, text in texts.items():
        decode = decoder_of(tokenizer)
        assert decode(ids[:4], skip_special_tokens=True) == tokenizer.decode(ids[:4]) == text
        left_out = decode == tokenizer.backend_tokenizer.decode
        assert left_out == (tokenizer is plain)
        for skip in (False, True):
            whole = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            assert whole.add_all(ids) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_spaces_of_bpe_are_cleaned_up_only_where_transformers_does():
    backend = byte_level().backend_tokenizer
    ids = backend.encode("do n't stop !").ids
    for corrupts in (False, True):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=True,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=corrupts,
        )
        text = "don't stop!" if corrupts else "do n't stop !"
        decode = decoder_of(tokenizer)
        assert decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text
        assert (decode == tokenizer.backend_tokenizer.decode) != corrupts


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("skip", [False, True])
def test_added_and_special_tokens(make, skip):
    """Those that a tokenizer was given later, too, between text and at both ends."""
    tokenizer = copy.deepcopy(make())
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken(" two words ", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert decoder_of(tokenizer) == tokenizer.backend_tokenizer.decode
    added = [token_id(tokenizer, t) for t in ("<tool>", " two words ", "<|end|>", "</s>")]
    text = tokenizer.encode("a b", add_special_tokens=False)
    for order in itertools.permutations(added):
        ids = [order[0], *text, order[1], order[2], *text, order[3]]
        check((tokenizer, ids, (), False, skip))
        check((tokenizer, ids, ("<tool>", "b <"), True, skip))


def test_without_a_tokenizer():
    detokenizer = IncrementalDetokenizer(None)
    assert [detokenizer.add(5), detokenizer.finish(), detokenizer.text] == ["", "", ""]
    with pytest.raises(ValueError, match="needs a tokenizer, got None: use stop_token_ids"):
        IncrementalDetokenizer(None, stop=("x",))


def test_tokens_after_the_end_are_refused():
    tokenizer = sentencepiece()
    e = token_id(tokenizer, "e")
    detokenizer, _ = stream(tokenizer, [e], stop=["e"])
    assert detokenizer.stopped == "e" and detokenizer.finish() == ""
    with pytest.raises(ValueError, match="comes after the end"):
        detokenizer.add(e)
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.finish()
    with pytest.raises(ValueError, match="comes after the end"):
        detokenizer.add(e)


def test_a_whole_text_at_once():
    for make in (byte_level, sentencepiece):
        tokenizer = make()
        ids = tokenizer.encode(SENTENCES[1], add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert detokenizer.add_all(ids) + detokenizer.finish() == tokenizer.decode(ids)
        assert detokenizer.text == tokenizer.decode(ids)
    assert IncrementalDetokenizer(None).add_all([5, 6]) == ""
    for used in (IncrementalDetokenizer(byte_level(), stop=["x"]), detokenizer):
        with pytest.raises(ValueError, match="add_all is for a whole text without stop strings"):
            used.add_all([5])
