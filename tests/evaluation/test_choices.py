"""Multiple-choice questions: files in, log-likelihoods against an unpadded model call, answers."""

import json

import jax
import numpy as np
import pytest

from qserve_jax.evaluation.candidates import comparison
from qserve_jax.evaluation.choices import (
    Answers,
    Question,
    answer_questions,
    prompt,
    read_questions,
)
from qserve_jax.evaluation.likelihood import encode_pair, log_likelihoods
from qserve_jax.quantization import QuantConfig

CAT = Question("What says meow?", ("A cat.", "A dog, big", "A tree", 'The "sun"'), 0)
TWO = Question("1 + 1 =", ("1", "3", "2", "4"), 2)
STORIES = [
    Question("Once upon a time, there was a little", ("girl", "sky", "jumped", "of"), 0),
    Question("Lily was very happy. She hugged her", ("run", "mom", "the", "was"), 1),
    Question("They played in the", ("say", "is", "park", "loved"), 2),
    Question("The dog barked and ran after the", ("and", "sad", "saw", "ball"), 3),
]


def test_files_in_each_form_hold_the_same_questions(tmp_path):
    lines = ['What says meow?,A cat.,"A dog, big",A tree,"The ""sun""",A', "1 + 1 =,1,3,2,4,C"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text("\n".join(["question,A,B,C,D,answer", "", *lines, ""]))
    lists = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in (CAT, TWO)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lists)))
    named = [
        {
            "question": q.question,
            **dict(zip("ABCD", q.choices, strict=True)),
            "answer": "ABCD"[q.answer],
        }
        for q in (CAT, TWO)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, named)))
    for name in ("a.csv", "b.csv", "c.jsonl", "d.jsonl"):
        assert read_questions(tmp_path / name) == [CAT, TWO], name


GOOD = {"question": "q", "choices": list("wxyz"), "answer": 0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "", "q.csv holds no questions: give at least one"),
        ("q.csv", "q,a,b,c,d", "q.csv:1 has 5 columns: give question, A, B, C, D, answer"),
        ("q.csv", 'q,a,b,c,d,A\nq,"a,b', "q.csv:2 is not CSV .*: correct it"),
        ("q.csv", "q,a,b,c,d,A\nq,a,b,c,d,E", "q.csv:2 has the answer 'E': give A, B, C or D"),
        ("q.csv", "q,a,b,,d,A", "q.csv:1 needs a question and four choices that are texts"),
        ("q.jsonl", "[1]", "q.jsonl:1 is not an object: give question, choices and answer"),
        ("q.jsonl", json.dumps(GOOD | {"choices": ["a", "b"]}), "q.jsonl:1 needs a question and"),
        ("q.jsonl", json.dumps(GOOD | {"choices": "abcd"}), "q.jsonl:1 needs a question and four"),
        ("q.jsonl", json.dumps(GOOD | {"answer": 4}), "has the answer 4: give A, B, C or D, or 0"),
        ("q.jsonl", json.dumps(GOOD | {"answer": True}), "has the answer True: give A, B, C or D"),
        ("q.jsonl", json.dumps(GOOD | {"answer": [0]}), r"has the answer \[0\]: give A, B, C or D"),
    ],
)
def test_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_questions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_prompts():
    assert prompt(TWO, "letter") == (
        "1 + 1 =\nA. 1\nB. 3\nC. 2\nD. 4\nAnswer:",
        [" A", " B", " C", " D"],
    )
    assert prompt(TWO, "completion") == ("1 + 1 =", [" 1", " 3", " 2", " 4"])


def test_spaces_belong_to_the_continuation(demo):
    left, right = (
        encode_pair(demo.tokenizer, *texts) for texts in (("The", " cat"), ("The ", "cat"))
    )
    assert left == right
    assert demo.tokenizer.decode(left[1]) == " cat"


def test_log_likelihoods_are_those_of_single_unpadded_calls(demo):
    candidate = comparison("rtn", demo, QuantConfig())
    texts = [
        ("The dog", " barked"),
        ("Once upon a time, there was", " a little girl"),
        ("A", " zq"),
    ]
    pairs = [encode_pair(demo.tokenizer, *text) for text in texts]
    pairs.append((list(range(1, 1030)), [7, 8]))  # longer than the context of 1024
    scores, greedy = log_likelihoods(candidate, pairs, batch_size=3)
    for i, (context, continuation) in enumerate(pairs):
        ids = np.array([*context, *continuation][-1024:])
        variables = {"params": candidate.params}
        logits = candidate.model.apply(variables, ids[None], kv_bits=candidate.kv_bits)[0]
        first = len(ids) - len(continuation)
        found = jax.nn.log_softmax(logits)[np.arange(first - 1, len(ids) - 1), ids[first:]].sum()
        assert scores[i] == pytest.approx(float(found), abs=2e-4), i
        likeliest = np.asarray(logits.argmax(axis=-1))[first - 1 : -1]
        assert greedy[i] == np.array_equal(likeliest, ids[first:]), i
    assert greedy.tolist()[:3] == [False, True, False]


def test_log_likelihoods_refuse(demo):
    candidate = comparison("float", demo, QuantConfig())
    with pytest.raises(ValueError, match="context of 0 and a continuation of 1 tokens: give at"):
        log_likelihoods(candidate, [([], [1])])
    with pytest.raises(ValueError, match="has 1024 tokens: give fewer than the model's context"):
        log_likelihoods(candidate, [([1], [1] * 1024)])


def test_answers_of_the_demo_model(demo):
    """It knows how its stories go on, and W4A8KV4 answers as float does."""
    exact = answer_questions(
        comparison("float", demo, QuantConfig()), demo.tokenizer, STORIES, style="completion"
    )
    assert exact.chosen.tolist() == [0, 1, 2, 3]
    assert exact.accuracy == (1, 0)
    found = answer_questions(
        comparison("rtn", demo, QuantConfig()), demo.tokenizer, STORIES, style="completion"
    )
    assert found.agreement(exact) == (1, 0)


def test_shares_and_errors():
    a = Answers(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0]))
    b = Answers(np.array([0, 1, 1, 1]), a.right)
    assert a.accuracy == (0.75, pytest.approx((0.75 * 0.25 / 3) ** 0.5))
    assert a.agreement(b) == (0.5, pytest.approx((0.5 * 0.5 / 3) ** 0.5))
