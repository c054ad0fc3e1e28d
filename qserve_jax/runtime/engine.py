"""LLM: requests in, text out. In-flight batching over the paged cache, many device steps per call.

The host knows every sequence; the device keeps the cache, and the state of the running batch for as
long as nobody joins or leaves it. Batches are padded to few shapes, so that few programs are
compiled.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np

from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.pallas_kernels.paged_attention import ATTENDS
from qserve_jax.runtime.batch import (
    device_state,
    prefill_batches,
    prompt_array,
    row_bucket,
    run_features,
)
from qserve_jax.runtime.compile_time import clock
from qserve_jax.runtime.decode import DecodeState, decode_loop, prefill_and_sample
from qserve_jax.runtime.detokenizer import IncrementalDetokenizer
from qserve_jax.runtime.kv_cache import default_num_pages, init_cache
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.prompts import Prompt, encode_prompt
from qserve_jax.runtime.sampling import SamplingFeatures
from qserve_jax.runtime.sampling_params import SamplingParams, validate_vocab
from qserve_jax.runtime.scheduler import Scheduler
from qserve_jax.runtime.sequence import RequestOutput, Sequence, StreamOutput, take_logprobs

MAX_DECODE_STEPS = 64
MAX_PREFILL_TOKENS = 8192
MAX_PAGE_SIZE = 4096
STREAM_SECONDS = 0.1
"""A stream returns from the device about this often."""


@dataclasses.dataclass
class EngineStats:
    """Counts and seconds since the LLM was made; compilation is not in the times (`compile_time`).

    generated_tokens: prefill makes the first of each of the prefilled_sequences, decoding the rest.
    attended_tokens: sum over decode steps and sequences of the cached tokens that one attends to.
    """

    prefilled_sequences: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    attended_tokens: int = 0


@dataclasses.dataclass
class _Run:
    """One call of generate or stream in progress. `state` is None when the batch has changed."""

    scheduler: Scheduler
    features: SamplingFeatures
    streaming: bool
    cache_epoch: int
    rows: int = 0
    state: DecodeState | None = None
    step_seconds: float | None = None


class LLM:
    """A model with its cache, ready to generate. vLLM's shape, JAX inside.

    model: a Hugging Face directory or id, or a `LoadedModel`, which settles the next three.
    precision, group_size: see `load_model`; w4a8kv4 in groups of 128 by default.
    dtype: of activations, embeddings and head.
    max_model_len: longest prompt plus completion; default the model's context.
    page_size: tokens per cache page. num_pages: of the pool; default from free memory.
    max_num_seqs: sequences decoded together. seed: of requests without one of their own.
    attends: "full" or "quantized", what a query sees of the new tokens' K and V
      (see `pallas_kernels.paged_attention`).
    backend: of the kernels; None takes the first that can run.

    Threads may share an LLM; their device calls take turns. Raises ValueError (one line) on bad
    settings or an unusable checkpoint.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel,
        precision: str | None = None,
        group_size: int | None = None,
        dtype: Any = "bfloat16",
        *,
        max_model_len: int | None = None,
        page_size: int = 64,
        num_pages: int | None = None,
        max_num_seqs: int = 64,
        seed: int | None = None,
        attends: str = "full",
        backend: str | None = None,
        progress: bool = False,
    ):
        self.max_num_seqs = checked_integer("max_num_seqs", max_num_seqs, 1)
        page_size = checked_integer("page_size", page_size, 1, MAX_PAGE_SIZE)
        if num_pages is not None:
            checked_integer("num_pages", num_pages, 1)
        if seed is not None:
            checked_integer("seed", seed, 0, 2**64 - 1)
        if attends not in ATTENDS:
            raise ValueError(f"attends={attends!r} is unknown: use one of {ATTENDS}")
        self.attends = attends
        loaded_here = not isinstance(model, LoadedModel)
        if not isinstance(model, LoadedModel):
            model = load_model(
                model,
                precision=precision,
                group_size=group_size,
                dtype=dtype,
                backend=backend,
                progress=progress,
            )
        self.config, self.tokenizer = model.config, model.tokenizer
        self.quant_config = model.quant_config
        self.model = model.model if backend is None else model.model.clone(backend=backend)
        self.params = prepare_for_backend(
            model.params, self.model.backend, act_bits=self.model.act_bits, in_place=loaded_here
        )
        del model
        longest = self.config.context_length
        if max_model_len is not None:
            checked_integer("max_model_len", max_model_len, 2, longest)
        self.max_model_len = longest if max_model_len is None else max_model_len
        self._next_seed = secrets.randbits(32) if seed is None else seed
        if num_pages is None:
            num_pages = default_num_pages(
                self.config,
                page_size=page_size,
                kv_bits=self.quant_config.kv_bits,
                dtype=self._dtype,
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs,
            )
        self.stats = EngineStats()
        self.pool = PagePool(num_pages, page_size)
        self._lock = threading.RLock()
        self._cache_epoch = 0
        self.cache = self._new_cache()
        static = ("model", "features", "attends", "max_steps")
        self._prefill = jax.jit(
            prefill_and_sample, static_argnames=static[:3], donate_argnames="cache"
        )
        self._decode = jax.jit(decode_loop, static_argnames=static, donate_argnames="cache")

    @property
    def _dtype(self) -> Any:
        return self.params["embed"]["embedding"].dtype

    def _new_cache(self):
        return init_cache(
            self.config,
            num_pages=self.pool.num_pages,
            page_size=self.pool.page_size,
            kv_bits=self.quant_config.kv_bits,
            dtype=self._dtype,
        )

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts together; outputs in their order, n of them per prompt.

        A prompt is a string, a list of token ids, or a list of chat messages
        ({"role": ..., "content": ...}); a single one may be given bare. One SamplingParams
        serves all prompts, or one each.

        Raises ValueError before anything runs if any prompt or parameter is unusable, and
        RuntimeError when the pages it needs are held by streams that are still open, or when the
        model's logits are not finite.
        """
        start = clock()
        sequences = self._sequences(prompts, sampling_params)
        for _ in self._run(sequences, streaming=False):
            pass
        return [sequence.output(start) for sequence in sequences]

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Generator[StreamOutput]:
        """As `generate`, but yields text as it is made. Closing it cancels the rest."""
        return self._run(self._sequences(prompts, sampling_params), streaming=True)

    def _sequences(self, prompts: Any, sampling_params: Any) -> list[Sequence]:
        prompts = as_prompt_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        sampling_params = list(sampling_params)
        for params in sampling_params:
            if not isinstance(params, SamplingParams):
                raise ValueError(f"sampling_params holds {params!r:.60}: give SamplingParams(...)")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts but {len(sampling_params)} sampling_params: "
                "give one for all, or one each"
            )
        sequences = []
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                sequences += self._samples(index, prompt, params)
            except ValueError as error:
                which = f"prompt {index}: " if len(prompts) > 1 else ""
                raise ValueError(f"{which}{error}") from None
        return sequences

    def _samples(self, index: int, prompt: Prompt, params: SamplingParams) -> list[Sequence]:
        """The sequences of one request, checked: one per sample."""
        validate_vocab(params, self.config.vocab_size)
        ids = encode_prompt(prompt, self.tokenizer, self.config.vocab_size)
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(ids)} tokens but the context holds {self.max_model_len}: "
                f"at most {self.max_model_len - 1} leave room to generate"
            )
        limit = min(params.max_tokens, self.max_model_len - len(ids))
        needed = self.pool.pages_for(len(ids) + limit)
        if needed > self.pool.num_pages:
            raise ValueError(
                f"prompt and max_tokens need {needed} pages of {self.pool.page_size} tokens but "
                f"the pool has {self.pool.num_pages}: raise num_pages or lower max_tokens"
            )
        eos = () if params.ignore_eos else self.config.eos_token_ids
        seed = params.seed
        if seed is None:  # another one for each request, also of later calls
            seed, self._next_seed = self._next_seed, self._next_seed + 1
        return [
            Sequence(
                index=index,
                sample=sample,
                prompt=ids,
                params=params,
                seed=(seed + (sample << 32)) % 2**64,
                limit=limit,
                stop_ids=(*eos, *params.stop_token_ids),
                detokenizer=IncrementalDetokenizer(
                    self.tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    stop=tuple(params.stop or ()),
                    include_stop_str_in_output=params.include_stop_str_in_output,
                ),
            )
            for sample in range(params.n)
        ]

    def _run(self, sequences: list[Sequence], *, streaming: bool) -> Generator[StreamOutput]:
        """Admit, prefill, decode, retire, until everyone has finished."""
        scheduler = Scheduler(sequences, self.pool, self.max_num_seqs)
        features = run_features(sequences, self.config.vocab_size)
        run = _Run(scheduler, features, streaming, self._cache_epoch)
        try:
            while scheduler.waiting or scheduler.running:
                with self._lock:
                    outputs = self._step(run)
                yield from outputs
        finally:  # also when the caller stops listening
            with self._lock:
                scheduler.close()

    def _step(self, run: _Run) -> list[StreamOutput]:
        """One prefill of everyone admitted, or one call of the decode loop."""
        if run.cache_epoch != self._cache_epoch:
            raise RuntimeError("the cache was lost to a call that was interrupted: start again")
        admitted = run.scheduler.admit()
        if admitted:
            outputs = []
            for batch in prefill_batches(admitted, MAX_PREFILL_TOKENS):
                outputs += self._prefill_batch(batch, run)
        else:
            outputs = self._decode_batch(run)
        if run.scheduler.retire() or admitted:
            run.state = None
        return outputs

    def _prefill_batch(self, batch: list[Sequence], run: _Run) -> list[StreamOutput]:
        start = clock()
        prompts = prompt_array(batch)
        state = self._device_state(batch, len(prompts), run.features)
        _, out = self._device_call(self._prefill, prompts, state, features=run.features)
        self.stats.prefill_seconds += clock() - start
        self.stats.prefilled_sequences += len(batch)
        self.stats.prompt_tokens += sum(len(s.prompt) for s in batch)
        for sequence in batch:
            sequence.first_token_time = clock()
        one_step = jax.tree.map(lambda x: x[:, None], out)
        return [self._take(s, one_step, row, 1) for row, s in enumerate(batch)]

    def _decode_batch(self, run: _Run) -> list[StreamOutput]:
        batch = run.scheduler.running
        start = clock()
        if run.state is None:
            run.rows = row_bucket(len(batch), run.rows)
            run.state = self._device_state(batch, run.rows, run.features)
        run.state, out = self._device_call(
            self._decode,
            run.state,
            decode_steps(run),
            bool(run.scheduler.waiting),
            features=run.features,
            max_steps=MAX_DECODE_STEPS,
        )
        seconds = clock() - start
        made = (out.tokens >= 0).sum(axis=1)[: len(batch)]
        run.step_seconds = seconds / max(int(made.max()), 1)
        self.stats.decode_seconds += seconds
        self.stats.decode_steps += int(made.max())
        cached = [s.cached for s in batch]
        self.stats.attended_tokens += attended_tokens(cached, made, self.config.sliding_window)
        return [self._take(s, out, row, int(made[row])) for row, s in enumerate(batch)]

    def _device_state(
        self, batch: list[Sequence], rows: int, features: SamplingFeatures
    ) -> DecodeState:
        return device_state(
            batch,
            rows=rows,
            features=features,
            page_size=self.pool.page_size,
            vocab_size=self.config.vocab_size,
        )

    def _device_call(self, function: Any, *args: Any, **kwargs: Any) -> tuple[DecodeState, Any]:
        """Run a donating function on the cache; returns the new state and the outputs as numpy.

        An exception (a Ctrl-C, say) may come after the cache has been given away. Then there is a
        new one, and runs that had pages in the old one must end.
        """
        try:
            self.cache, state, out = function(
                self.model, self.params, self.cache, *args, attends=self.attends, **kwargs
            )
            return state, jax.device_get(out)
        except BaseException:
            if self.cache.pages.is_deleted():
                self.cache = self._new_cache()
                self._cache_epoch += 1
            raise

    def _take(self, sequence: Sequence, out: Any, row: int, count: int) -> StreamOutput:
        """Move `count` tokens of a SampleOutput's row to the sequence, up to where it ends."""
        first, text = len(sequence.tokens), ""
        for step in range(count):
            if not out.finite[row, step]:
                raise RuntimeError(
                    f"prompt {sequence.index}: the model's logits at token {len(sequence.tokens)} "
                    f"are not finite in {self._dtype}: use dtype bfloat16 or float32"
                )
            logprobs = take_logprobs(out, row, step, sequence.params)
            text += sequence.append(int(out.tokens[row, step]), logprobs)
            if sequence.finish_reason is not None:  # a stop string ends before the device does
                break
        sequence.end_time = clock()
        new = sequence.tokens[first:]
        self.stats.generated_tokens += len(new)
        return StreamOutput(sequence.index, sequence.sample, text, new, sequence.finish_reason)


def decode_steps(run: _Run) -> int:
    """Steps of the next device call: all that may be needed, in a stream STREAM_SECONDS' worth."""
    steps = max(s.limit - len(s.tokens) for s in run.scheduler.running)
    if run.streaming:
        at_once = 1 if run.step_seconds is None else int(STREAM_SECONDS / run.step_seconds)
        steps = min(steps, max(at_once, 1))
    return min(steps, MAX_DECODE_STEPS)


def attended_tokens(cached: Seq[int], made: np.ndarray, window: int | None) -> int:
    """Tokens that sequences with `cached` tokens attend to while each makes made[i] more."""
    steps = np.arange(1, made.max() + 1)
    lens = np.minimum(np.asarray(cached)[:, None] + steps, np.inf if window is None else window)
    return int(lens[steps <= made[:, None]].sum())


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """One bare prompt (a string, token ids, chat messages) or several, as a list of prompts.

    Raises ValueError on anything else.
    """
    if hasattr(prompts, "tolist"):  # a numpy or JAX array of token ids
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Seq):
        raise ValueError(f"prompt {prompts!r:.60} must be text, token ids or chat messages")
    if prompts and isinstance(prompts[0], (int, np.integer, Mapping)):
        return [prompts]
    for prompt in prompts:
        if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Seq):
            raise ValueError(f"prompt {prompt!r:.60} must be text, token ids or chat messages")
    return list(prompts)


def checked_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value. Raises ValueError where it is no integer from low to high."""
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        limit = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        raise ValueError(f"{name}={value!r:.40} must be {limit}")
    return int(value)
