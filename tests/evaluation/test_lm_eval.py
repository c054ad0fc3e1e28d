"""Our models as lm-eval's: the methods over a stand-in for its base class, and lm-eval itself where
it is installed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from qserve_jax.evaluation import lm_eval_model
from qserve_jax.evaluation.candidates import comparison, measured
from qserve_jax.quantization import QuantConfig

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside."
HAS_LM_EVAL = lm_eval_model.is_installed()


@pytest.fixture
def model(demo, monkeypatch):
    """The float demo as lm-eval's model; without lm-eval, over an empty base class."""
    if not HAS_LM_EVAL:
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
        modules = {name: ModuleType(name) for name in names}
        modules["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})  # type: ignore
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    return lm_eval_model.lm_eval_model(measured(demo), demo, batch_size=2)


def request(*args):
    return SimpleNamespace(args=args)


def log_probs(demo, ids):
    logits = demo.model.apply({"params": demo.params}, np.array([ids]))[0]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


def test_tokens_and_ends(demo, model):
    assert model.eot_token_id == model.prefix_token_id == 0
    assert model.tok_encode("The cat") == demo.tokenizer.encode("The cat")
    assert model.tok_encode("The cat", add_special_tokens=False) == model.tok_encode("The cat")[1:]
    assert model.tokenizer_name == str(demo.path)


def test_log_likelihoods(demo, model):
    ids = demo.tokenizer.encode(STORY)
    requests = [(("", ""), ids[:n], ids[n : n + 2]) for n in (4, 9, 1)]
    found = model._loglikelihood_tokens(requests)
    expected = log_probs(demo, ids)
    for (score, greedy), n in zip(found, (4, 9, 1), strict=True):
        assert score == pytest.approx(expected[n - 1 : n + 1].sum(), abs=1e-4)
        assert isinstance(score, float) and isinstance(greedy, bool)
    assert found[0][1]  # "Once upon a time" goes on as everyone knows


def test_rolling_scores_every_token_once(demo, model):
    long = 60 * (STORY + "\n\n")
    for text in (STORY, long):
        (score,) = model.loglikelihood_rolling([request(text)])
        ids = [0, *demo.tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) <= 1024:
            assert score == pytest.approx(log_probs(demo, ids).sum(), rel=1e-5)
        else:  # windows of 1024 every 512: the first is scored whole, others from their middle
            expected, done = 0.0, 1
            for begin in range(0, len(ids), 512):
                window = ids[begin : begin + 1024]
                end = begin + len(window)
                expected += log_probs(demo, window)[done - begin - 1 :].sum()
                done = end
                if end == len(ids):
                    break
            assert score == pytest.approx(expected, rel=1e-5)
    assert len(ids) > 1024


def test_generation_stops(demo, model):
    requests = [
        request("Once upon a time", {"until": ["."], "max_gen_toks": 40}),
        request("Once upon a time", {"until": "", "max_gen_toks": 5}),
    ]
    until, short = model.generate_until(requests)
    assert until.startswith(", there was a little girl named") and "." not in until
    assert until.startswith(short) and len(demo.tokenizer.encode(short)) <= 7


def test_yardsticks_do_not_generate(demo, model):
    other = lm_eval_model.lm_eval_model(comparison("w4a16", demo, QuantConfig()), demo)
    with pytest.raises(
        NotImplementedError, match="cannot be run for 'W4A16KV16 g128, fake': leave"
    ):
        other.generate_until([request("a", {})])


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed: pip install lm-eval")
def test_lm_eval_runs_a_local_task(demo, tmp_path):
    questions = [
        ("Once upon a time, there was a little", ["girl", "sky", "jumped", "of"], 0),
        ("Lily was very happy. She hugged her", ["run", "mom", "the", "was"], 1),
        ("They played in the", ["say", "is", "park", "loved"], 2),
        ("The dog barked and ran after the", ["and", "sad", "saw", "ball"], 0),  # wrong
    ]
    rows = [dict(zip(("question", "choices", "answer"), q, strict=True)) for q in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        f"""
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    found = lm_eval_model.run_tasks(measured(demo), demo, ["tiny_choices"], include_path=tmp_path)
    assert found["tiny_choices"]["acc"] == 0.75 and found["tiny_choices"]["acc_stderr"] > 0
    with pytest.raises(ValueError, match="lm-eval has no task 'none_such': see `lm_eval ls tasks`"):
        lm_eval_model.run_tasks(measured(demo), demo, ["none_such"])
