"""SamplingParams: defaults, normalisation, and one-line errors naming value, limit and cure."""

import math
import re
from typing import Any

import pytest

from qserve_jax.runtime.sampling_params import SamplingParams, validate_vocab


def test_defaults_are_greedy_and_valid():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.n) == (0.0, 256, 1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert params.stop == () and params.stop_token_ids == ()
    assert params.logprobs is None and params.seed is None


def test_sequences_become_tuples():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()
    assert SamplingParams(stop_token_ids=[3, 5]).stop_token_ids == (3, 5)


def test_values_at_the_limits_are_allowed():
    SamplingParams(
        n=2, max_tokens=1, temperature=1e-6, top_p=1e-9, top_k=-1, min_p=1, presence_penalty=-2,
        frequency_penalty=2, logit_bias={0: -100, 7: 100.0}, seed=2**64 - 1, logprobs=20,
    )  # fmt: skip
    SamplingParams(logprobs=0, seed=0, temperature=0, min_p=0)


BAD = [
    ("n", 0, "[1, 16384]"),
    ("n", True, "[1, 16384]"),
    ("n", 16385, "[1, 16384]"),
    ("max_tokens", 0, ">= 1"),
    ("max_tokens", -5, ">= 1"),
    ("max_tokens", 2.5, ">= 1"),
    ("temperature", -0.1, ">= 0"),
    ("temperature", math.nan, "finite"),
    ("temperature", math.inf, "finite"),
    ("temperature", 1e39, "finite"),
    ("temperature", 10**400, "finite"),  # no float holds it
    ("temperature", "1", "finite"),
    ("top_p", 0, "(0, 1]"),
    ("top_p", 1.0001, "(0, 1]"),
    ("top_p", math.nan, "(0, 1]"),
    ("top_k", -2, ">= -1"),
    ("top_k", 1.5, ">= -1"),
    ("min_p", -0.1, "[0, 1]"),
    ("min_p", 1.1, "[0, 1]"),
    ("repetition_penalty", 0, "> 0"),
    ("repetition_penalty", -1, "> 0"),
    ("repetition_penalty", 1e-60, "> 0"),  # 0 in float32
    ("presence_penalty", 2.1, "[-2, 2]"),
    ("frequency_penalty", -2.1, "[-2, 2]"),
    ("seed", -1, "2**64"),
    ("seed", 2**64, "2**64"),
    ("seed", 1.0, "2**64"),
    ("logprobs", -1, "[0, 20]"),
    ("logprobs", 21, "[0, 20]"),
    ("ignore_eos", "no", "True or False"),
    ("include_stop_str_in_output", 1, "True or False"),
    ("skip_special_tokens", None, "True or False"),
    ("stop", 5, "strings"),
    ("stop", "a\udcff", "UTF-8"),
    ("stop", "", "non-empty"),
    ("stop", ["a", ""], "non-empty"),
    ("stop", ["a", 3], "non-empty"),
    ("stop_token_ids", [-1], ">= 0"),
    ("stop_token_ids", ["a"], ">= 0"),
    ("stop_token_ids", "abc", "list"),
    ("logit_bias", {"5": 1.0}, "integer >= 0"),
    ("logit_bias", {-1: 1.0}, "integer >= 0"),
    ("logit_bias", {5: 101.0}, "[-100, 100]"),
    ("logit_bias", {5: math.nan}, "[-100, 100]"),
    ("logit_bias", [5], "dict"),
]


@pytest.mark.parametrize(("field", "value", "limit"), BAD, ids=lambda x: repr(x)[:20])
def test_bad_values_are_refused_in_one_line(field, value, limit):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{field: value})
    message = str(error.value)
    assert message.startswith(field) and limit in message and ": " in message
    assert "\n" not in message
    shown = value if not isinstance(value, (dict, list)) else list(value)[-1]
    assert repr(shown)[:40] in message


@pytest.mark.parametrize("field", ["temperature", "stop", "stop_token_ids", "logit_bias"])
def test_long_values_are_shortened(field):
    long: Any = {"stop": ["x" * 10**5, ""], "logit_bias": ["x" * 10**5]}.get(field, "x" * 10**5)
    with pytest.raises(ValueError, match=rf"^{field}=.*xxx \.\.\. .*: (use|remove) ") as error:
        SamplingParams(**{field: long})
    assert len(str(error.value)) < 200


def test_what_is_not_taken_is_said():
    """vLLM's other fields are named, and those named are not taken."""
    named = re.search(r"vLLM's (min_tokens, .*?)\.", SamplingParams.__doc__ or "", re.DOTALL)
    assert named
    fields = re.findall(r"[a-z]\w*_\w+|detokenize", named[1])
    assert {"bad_words", "allowed_token_ids", "prompt_logprobs"} < set(fields)
    for field in fields:
        given: dict[str, Any] = {field: 1}
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
            SamplingParams(**given)


def test_equal_greedy_completions_are_refused():
    with pytest.raises(ValueError, match="n=3 greedy .* temperature > 0"):
        SamplingParams(n=3)
    assert SamplingParams(n=3, temperature=0.5).n == 3


def test_validate_vocab_names_id_and_size():
    validate_vocab(SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9], logprobs=10), 10)
    with pytest.raises(ValueError, match=r"logit_bias has token id 10, but vocab_size=10"):
        validate_vocab(SamplingParams(logit_bias={10: 1.0}), 10)
    with pytest.raises(ValueError, match=r"stop_token_ids has token id 11, but vocab_size=10"):
        validate_vocab(SamplingParams(stop_token_ids=[11]), 10)
    with pytest.raises(ValueError, match=r"logprobs=11 exceeds vocab_size=10"):
        validate_vocab(SamplingParams(logprobs=11), 10)
