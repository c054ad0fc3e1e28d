"""LLM: requests in, text out. In-flight batching over the paged cache, many device steps per call.

The device keeps the cache and nothing else between calls: the host knows every sequence, so each
call gets a fresh batch of whoever is running, padded to a bucket of few shapes.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np

from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.pallas_kernels.paged_attention import ATTENDS
from qserve_jax.runtime.batch import device_state, prefill_batches, prompt_array
from qserve_jax.runtime.compile_time import clock
from qserve_jax.runtime.decode import decode_loop, prefill_and_sample
from qserve_jax.runtime.detokenizer import IncrementalDetokenizer
from qserve_jax.runtime.kv_cache import default_num_pages, init_cache
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.prompts import Prompt, encode_prompt
from qserve_jax.runtime.sampling_params import SamplingParams, validate_vocab
from qserve_jax.runtime.sequence import RequestOutput, Sequence, StreamOutput, take_logprobs

MAX_DECODE_STEPS = 64
STREAM_DECODE_STEPS = 8
MAX_PREFILL_TOKENS = 8192


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


class LLM:
    """A model with its cache, ready to generate. vLLM's shape, JAX inside.

    model: a Hugging Face directory or id, or a `LoadedModel`, which settles the next three.
    precision, group_size: see QuantConfig.preset. dtype: of activations, embeddings and head.
    max_model_len: longest prompt plus completion; default the model's context.
    page_size: tokens per cache page. num_pages: of the pool; default from free memory.
    max_num_seqs: sequences decoded together. seed: of requests without one of their own.
    attends: "full" or "quantized", what a query sees of the new tokens' K and V
      (see `pallas_kernels.paged_attention`).
    backend: of the kernels; None takes the first that can run.

    Raises ValueError (one line) on bad settings or an unusable checkpoint.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel,
        precision: str = "w4a8kv4",
        group_size: int = 128,
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
        if not isinstance(model, LoadedModel):
            model = load_model(
                model,
                precision=precision,
                group_size=group_size,
                dtype=dtype,
                backend=backend,
                progress=progress,
            )
        self.model, self.config, self.tokenizer = model.model, model.config, model.tokenizer
        self.quant_config = model.quant_config
        self.params = prepare_for_backend(model.params, backend)
        self.max_model_len = checked_max_model_len(self.config, max_model_len)
        self.max_num_seqs = checked_positive("max_num_seqs", max_num_seqs)
        if attends not in ATTENDS:
            raise ValueError(f"attends={attends!r} is unknown: use one of {ATTENDS}")
        self.attends = attends
        self.stats = EngineStats()
        self._next_seed = secrets.randbits(32) if seed is None else seed
        dtype = self.params["embed"]["embedding"].dtype
        page_size = checked_positive("page_size", page_size)
        num_pages = checked_positive(
            "num_pages",
            num_pages
            or default_num_pages(
                self.config,
                page_size=page_size,
                kv_bits=self.quant_config.kv_bits,
                dtype=dtype,
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs,
            ),
        )
        self.pool = PagePool(num_pages, page_size)
        self.cache = init_cache(
            self.config,
            num_pages=num_pages,
            page_size=page_size,
            kv_bits=self.quant_config.kv_bits,
            dtype=dtype,
        )
        static = ("model", "features", "attends", "max_steps")
        self._prefill = jax.jit(
            prefill_and_sample, static_argnames=static[:3], donate_argnames="cache"
        )
        self._decode = jax.jit(decode_loop, static_argnames=static, donate_argnames="cache")

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts together; outputs in their order, n of them per prompt.

        A prompt is a string, a list of token ids, or a list of chat messages
        ({"role": ..., "content": ...}); a single one may be given bare. One SamplingParams
        serves all prompts, or one each.

        Raises ValueError before anything runs if any prompt or parameter is unusable.
        """
        start = clock()
        sequences = self._sequences(prompts, sampling_params)
        for _ in self._run(list(sequences), MAX_DECODE_STEPS):
            pass
        return [sequence.output(start) for sequence in sequences]

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Iterator[StreamOutput]:
        """As `generate`, but yields text as it is made. Closing the iterator cancels the rest."""
        return self._run(self._sequences(prompts, sampling_params), STREAM_DECODE_STEPS)

    def _sequences(self, prompts: Any, sampling_params: Any) -> list[Sequence]:
        prompts = as_prompt_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
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

    def _run(self, sequences: list[Sequence], decode_steps: int) -> Iterator[StreamOutput]:
        """First come, first served: admit while pages and places last, prefill, decode, repeat."""
        waiting, running = deque(sequences), []
        try:
            while waiting or running:
                admitted = self._admit(waiting, self.max_num_seqs - len(running))
                for batch in prefill_batches(admitted, MAX_PREFILL_TOKENS):
                    yield from self._prefill_batch(batch)
                running = self._retire(running + admitted)
                if running:
                    yield from self._decode_batch(running, decode_steps, bool(waiting))
                    running = self._retire(running)
        finally:  # also when the caller stops listening
            for sequence in sequences:
                self.pool.release(sequence.pages)
                sequence.pages = []

    def _admit(self, waiting: deque[Sequence], places: int) -> list[Sequence]:
        """Take sequences in order while their whole length finds pages."""
        admitted = []
        while waiting and len(admitted) < places:
            pages = self.pool.allocate(self.pool.pages_for(waiting[0].total_len))
            if pages is None:
                break
            waiting[0].pages = pages
            admitted.append(waiting.popleft())
        return admitted

    def _retire(self, running: list[Sequence]) -> list[Sequence]:
        """Give back the pages of finished sequences; returns the others."""
        for sequence in running:
            if sequence.finish_reason is not None:
                self.pool.release(sequence.pages)
                sequence.pages = []
        return [sequence for sequence in running if sequence.finish_reason is None]

    def _prefill_batch(self, batch: list[Sequence]) -> Iterator[StreamOutput]:
        start = clock()
        state, features = self._device_state(batch, 0)
        self.cache, out = self._prefill(
            self.model,
            self.params,
            self.cache,
            prompt_array(batch),
            state,
            features=features,
            attends=self.attends,
        )
        out = jax.device_get(out)
        self.stats.prefill_seconds += clock() - start
        self.stats.prefilled_sequences += len(batch)
        self.stats.prompt_tokens += sum(len(s.prompt) for s in batch)
        for row, sequence in enumerate(batch):
            sequence.first_token_time = clock()
            yield self._take(sequence, out, row, None, 1)

    def _decode_batch(
        self, batch: list[Sequence], steps: int, waiting: bool
    ) -> Iterator[StreamOutput]:
        start = clock()
        steps = min(steps, max(s.limit - len(s.tokens) for s in batch))
        state, features = self._device_state(batch, steps)
        self.cache, _, out = self._decode(
            self.model,
            self.params,
            self.cache,
            state,
            steps,
            waiting,
            features=features,
            attends=self.attends,
            max_steps=MAX_DECODE_STEPS,
        )
        out = jax.device_get(out)
        made = (out.tokens >= 0).sum(axis=1)[: len(batch)]
        self.stats.decode_seconds += clock() - start
        self.stats.decode_steps += int(made.max())
        cached = [s.cached for s in batch]
        self.stats.attended_tokens += attended_tokens(cached, made, self.config.sliding_window)
        for row, sequence in enumerate(batch):
            yield self._take(sequence, out, row, 0, int(made[row]))

    def _device_state(self, batch: list[Sequence], extra_tokens: int):
        return device_state(
            batch,
            extra_tokens=extra_tokens,
            page_size=self.pool.page_size,
            vocab_size=self.config.vocab_size,
        )

    def _take(
        self, sequence: Sequence, out: Any, row: int, step: int | None, count: int
    ) -> StreamOutput:
        """Move `count` tokens of a SampleOutput's row to the sequence, up to where it ends."""
        first, text = len(sequence.tokens), ""
        for i in range(count):
            at = None if step is None else step + i
            token = out.tokens[row] if at is None else out.tokens[row, at]
            text += sequence.append(int(token), take_logprobs(out, row, at, sequence.params))
            if sequence.finish_reason is not None:  # a stop string ends before the device does
                break
        sequence.end_time = clock()
        new = sequence.tokens[first:]
        self.stats.generated_tokens += len(new)
        return StreamOutput(sequence.index, sequence.sample, text, new, sequence.finish_reason)


def attended_tokens(cached: Seq[int], made: np.ndarray, window: int | None) -> int:
    """Tokens that sequences with `cached` tokens attend to while each makes made[i] more."""
    steps = np.arange(1, made.max() + 1)
    lens = np.minimum(np.asarray(cached)[:, None] + steps, np.inf if window is None else window)
    return int(lens[steps <= made[:, None]].sum())


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """One bare prompt (a string, token ids, chat messages) or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], (int, np.integer, dict)):
        return [prompts]
    return prompts


def checked_positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value


def checked_max_model_len(config: Any, value: int | None) -> int:
    longest = config.context_length
    if value is None:
        return longest
    if not 2 <= value <= longest:
        raise ValueError(f"max_model_len={value} must be in 2..{longest}, the model's context")
    return value
