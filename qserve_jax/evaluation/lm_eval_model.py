"""Our models in lm-eval (EleutherAI's lm-evaluation-harness), where it is installed."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from qserve_jax.checkpoint import LoadedModel
from qserve_jax.evaluation.candidates import Candidate
from qserve_jax.evaluation.likelihood import log_likelihoods
from qserve_jax.runtime.perplexity import perplexity


def is_installed() -> bool:
    """Whether `lm_eval` can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def run_tasks(
    candidate: Candidate,
    loaded: LoadedModel,
    names: list[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval's tasks `names`, for example {"arc_easy": {"acc": 0.7,
    "acc_stderr": 0.01}}.

    include_path: a folder of tasks of your own (YAML). Tasks fetch their data, so most need a
    network. Raises ValueError for a name that lm-eval does not know.
    """
    import lm_eval  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}: see `lm_eval ls tasks`")
    model = lm_eval_model(candidate, loaded, batch_size)
    found = lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=manager)
    assert found is not None  # None on other ranks than the first; here is one
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that are numbers, "acc,none" as "acc"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name
    }


def lm_eval_model(candidate: Candidate, loaded: LoadedModel, batch_size: int = 8) -> Any:
    """`candidate` as an `lm_eval.api.model.LM`. loaded: its tokenizer, and what the engine
    generates with where a task wants generated text (then candidate must be `measured(loaded)`)."""
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]

    tokenizer = loaded.tokenizer

    class QServeLM(TemplateLM):
        llm: Any = None  # the engine of `generate_until`, made when first needed

        @property
        def eot_token_id(self) -> int:
            return loaded.config.eos_token_ids[0]

        @property
        def prefix_token_id(self) -> int:
            bos = tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            return str(loaded.path)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any):
            special = True if add_special_tokens is None else add_special_tokens
            return tokenizer.encode(string, add_special_tokens=special, verbose=False)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            scores, greedy = log_likelihoods(candidate, pairs, batch_size=batch_size)
            return list(zip(scores.tolist(), greedy.tolist(), strict=True))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            found = perplexity(
                candidate.model,
                candidate.params,
                [self.prefix_token_id, *ids],
                seq_len=loaded.config.context_length,
                stride=loaded.config.context_length // 2,
                kv_bits=candidate.kv_bits,
            )
            return -found.loss * found.num_tokens

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            if candidate.params is not loaded.params:
                raise NotImplementedError(
                    f"tasks that generate text cannot be run for {candidate.name!r}: leave it out "
                    "of --compare"
                )
            self.llm = self.llm or _engine(loaded)
            return [_generate(self.llm, *request.args) for request in requests]

    return QServeLM()


def _engine(loaded: LoadedModel) -> Any:
    from qserve_jax.runtime import LLM

    return LLM(loaded, max_num_seqs=1)


def _generate(llm: Any, context: str, options: dict[str, Any]) -> str:
    """lm-eval's generation options: until, max_gen_toks, do_sample, temperature."""
    from qserve_jax.runtime import SamplingParams

    until = options.get("until") or []
    params = SamplingParams(
        max_tokens=min(int(options.get("max_gen_toks", 256)), llm.max_model_len // 2),
        temperature=float(options.get("temperature", 0)) if options.get("do_sample") else 0.0,
        stop=[text for text in ([until] if isinstance(until, str) else until) if text],
    )
    ids = llm.tokenizer.encode(context, verbose=False)[params.max_tokens - llm.max_model_len :]
    return llm.generate([ids], params)[0].text
