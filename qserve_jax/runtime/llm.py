"""LLM: requests in, text out. vLLM's shape, JAX inside; the work is done by `Engine`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import time
import warnings
from collections import deque
from collections.abc import Generator
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np

from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.models.collectives import prepare_model
from qserve_jax.models.sharding import ranks_of, tensor_mesh
from qserve_jax.pallas_kernels.backend import resolve, unavailable
from qserve_jax.pallas_kernels.paged_attention import ATTENDS
from qserve_jax.runtime.batch import MIN_PROMPT_BUCKET
from qserve_jax.runtime.compile_time import clock
from qserve_jax.runtime.detokenizer import IncrementalDetokenizer
from qserve_jax.runtime.distributed import agreed
from qserve_jax.runtime.engine import Engine
from qserve_jax.runtime.engine_stats import EngineStats, EngineStatus
from qserve_jax.runtime.int8_head import with_int8_head
from qserve_jax.runtime.kv_cache import default_num_pages
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.prompts import Prompt, as_prompt_list, encode_prompt
from qserve_jax.runtime.sampling_params import SamplingParams, validate_vocab
from qserve_jax.runtime.sequence import RequestOutput, Sequence, StreamOutput

MAX_PAGE_SIZE = 4096
MAX_NUM_BATCHED_TOKENS = 8192


class LLM:
    """A model with its cache, ready to generate. vLLM's shape, JAX inside.

    model: a Hugging Face directory or id, or a `LoadedModel`, which settles the next three.
    precision, group_size: see `load_model`; w4a8kv4 in groups of 128 by default.
    dtype: of activations, embeddings and head.
    max_model_len: longest prompt plus completion; default the model's context.
    page_size: tokens per cache page. num_pages: of the pool; default from free memory, of each
      device that shares the model.
    max_num_seqs: sequences decoded together. seed: of requests without one of their own.
    max_num_batched_tokens: prompt tokens computed per call, padding included; longer prompts are
      computed in chunks, with decode steps between.
    enable_prefix_caching: prompts that begin with the same full pages share them. Default: where a
      token's arithmetic does not depend on it, so not with attends="full" and a quantised cache.
      (Shapes do, so tokens can still differ where the two best logits nearly tie.)
    attends: what a query sees of the new tokens' K and V: "quantized" (the default) as the cache
      holds them, so that a token's arithmetic does not depend on how its prompt was chunked, shared
      or computed anew; or "full", unquantised, as QServe does (see `paged_attention`).
    lm_head_bits: 16, or 8 for a head in integers (`int8_head`).
    tensor_parallel_size: devices that share the model; a LoadedModel has its own (`load_model`,
      mesh). With several processes (`jax.distributed`) all of their devices, and every process
      makes the same calls.
    backend: of the kernels; None takes the first that can run.

    Threads may share an LLM: their sequences run in one batch. Raises ValueError (one line) on bad
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
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        enable_prefix_caching: bool | None = None,
        seed: int | None = None,
        attends: str = "quantized",
        lm_head_bits: int = 16,
        tensor_parallel_size: int | None = None,
        backend: str | None = None,
        progress: bool = False,
    ):
        self.max_num_seqs = checked_integer("max_num_seqs", max_num_seqs, 1)
        page_size = checked_integer("page_size", page_size, 1, MAX_PAGE_SIZE)
        max_num_batched_tokens = checked_integer(
            "max_num_batched_tokens", max_num_batched_tokens, MIN_PROMPT_BUCKET
        )
        if num_pages is not None:
            num_pages = checked_integer("num_pages", num_pages, 1)
        if seed is not None:
            seed = checked_integer("seed", seed, 0, 2**64 - 1)
        if attends not in ATTENDS:
            raise ValueError(f"attends={attends!r} is unknown: use one of {ATTENDS}")
        if lm_head_bits not in (8, 16):
            raise ValueError(f"lm_head_bits={lm_head_bits!r} is not supported: use 8 or 16")
        if tensor_parallel_size is not None:
            tensor_parallel_size = checked_integer("tensor_parallel_size", tensor_parallel_size, 1)
        if enable_prefix_caching is not None and not isinstance(enable_prefix_caching, bool):
            raise ValueError(
                f"enable_prefix_caching={enable_prefix_caching!r:.40} must be True or False: use "
                "None for the default"
            )
        named = resolve(backend) if backend else ()
        if len(named) == 1 and (reason := unavailable(named[0])):
            raise ValueError(f"backend={backend!r} cannot run: {reason}")
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
                mesh=tensor_mesh(tensor_parallel_size or 1),
            )
        ranks = ranks_of(model.model.mesh)
        if tensor_parallel_size not in (None, ranks):
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} but the model was loaded onto {ranks}"
                " device(s): load it with load_model(mesh=...)"
            )
        if lm_head_bits == 8:
            model = with_int8_head(model)
        self.config, self.tokenizer = model.config, model.tokenizer
        self.quant_config = model.quant_config
        self.model = model.model if backend is None else model.model.clone(backend=backend)
        self.params = prepare_model(self.model, model.params, in_place=loaded_here)
        del model
        longest = self.config.context_length
        if max_model_len is not None:
            max_model_len = checked_integer("max_model_len", max_model_len, 2, longest)
        self.max_model_len = longest if max_model_len is None else max_model_len
        self._seeds = itertools.count(agreed(secrets.randbits(32)) if seed is None else seed)
        kv_bits = self.quant_config.kv_bits
        least = num_pages
        if num_pages is None:
            pages = default_num_pages(
                self.config,
                page_size=page_size,
                kv_bits=kv_bits,
                dtype=self.params["embed"]["embedding"].dtype,
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs,
                mesh=self.model.mesh,
            )
            num_pages = agreed(pages)
        if least is None:
            least = max(num_pages // 5, 1) if jax.process_count() == 1 else num_pages
        if enable_prefix_caching is None:
            enable_prefix_caching = attends == "quantized" or kv_bits == 16
        self.engine = _engine_that_fits(
            num_pages,
            least,
            model=self.model,
            params=self.params,
            page_size=page_size,
            kv_bits=kv_bits,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            attends=attends,
            share_prefixes=enable_prefix_caching,
        )

    @property
    def stats(self) -> EngineStats:
        """What has been done so far."""
        return self.engine.stats

    @property
    def pool(self) -> PagePool:
        """The pages of the cache."""
        return self.engine.pool

    def warm_up(
        self, sampling_params: SamplingParams | None = None, max_len: int | None = None
    ) -> float:
        """Compile whatever requests may need, so that none has to wait for it; returns the seconds.

        max_len: longest prompt plus completion, tokens; default the longest that max_model_len and
          the pool allow. The longer, the more programs, and the wider the block tables of all.
        sampling_params: what requests sample with at most: greedy ones need no other programs than
          those of temperature 1, and none that ask for no penalties need others than those that do;
          the default SamplingParams(). From now on all calls pay for it.

        Requests that need more (longer, with log-probabilities where none were named, or a longer
        `logit_bias`) compile as they come, and while one is here calls of all do. May run beside
        requests of other threads. Raises ValueError on an unusable max_len.
        """
        start, most = time.perf_counter(), self.pool.num_pages * self.pool.page_size
        most = min(self.max_model_len, most)
        max_len = most if max_len is None else checked_integer("max_len", max_len, 2, most)
        params = sampling_params or SamplingParams()
        one = dataclasses.replace(params, max_tokens=max_len - 1, n=1, seed=0)
        (longest,) = self._samples(0, [0], one, [])
        self.engine.warm_up(longest)
        return time.perf_counter() - start

    def status(self) -> EngineStatus:
        """Queue, pages and speed at this moment; printed, it is one line."""
        return self.engine.status()

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
        RuntimeError when the model's logits are not finite.
        """
        start = clock()
        sequences = self.sequences(prompts, sampling_params)
        unfinished = deque(sequences)

        def done() -> bool:  # asked after every step, so it must not go through thousands
            while unfinished and unfinished[0].done:
                unfinished.popleft()
            return not unfinished or bool(errors(sequences))

        try:
            self.engine.add(sequences)
            self.engine.run_until(done)
        finally:  # after an error or Ctrl-C
            self.engine.cancel(sequences)
        for error in errors(sequences):
            raise error
        return [sequence.output(start) for sequence in sequences]

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Generator[StreamOutput]:
        """As `generate`, but yields text as it is made. Closing it cancels the rest."""
        return self._stream(self.sequences(prompts, sampling_params))

    def _stream(self, sequences: list[Sequence]) -> Generator[StreamOutput]:
        outputs: deque[StreamOutput] = deque()
        for sequence in sequences:
            sequence.listener, sequence.streams = outputs.append, True
        unfinished = len(sequences)
        try:
            self.engine.add(sequences)
            while unfinished:
                self.engine.run_until(lambda: outputs)
                for error in errors(sequences):
                    raise error
                output = outputs.popleft()
                unfinished -= output.finish_reason is not None
                yield output
        finally:  # also when the caller stops listening
            self.engine.cancel(sequences)

    def sequences(self, prompts: Any, sampling_params: Any) -> list[Sequence]:
        """The checked sequences of a call of `generate` or `stream`. Raises ValueError."""
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
        sequences, failures = [], []
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                sequences += self._samples(index, prompt, params, failures)
            except ValueError as error:
                which = f"prompt {index}: " if len(prompts) > 1 else ""
                raise ValueError(f"{which}{error}") from None
        return sequences

    def _samples(
        self, index: int, prompt: Prompt, params: SamplingParams, failures: list[Exception]
    ) -> list[Sequence]:
        """The sequences of one request, checked: one per sample."""
        validate_vocab(params, self.config.vocab_size)
        ids = encode_prompt(prompt, self.tokenizer, self.config.vocab_size)
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(ids)} tokens but the context holds {self.max_model_len}: "
                f"at most {self.max_model_len - 1} leave room to generate"
            )
        room = self.max_model_len - len(ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        needed = self.pool.pages_for(len(ids) + limit)
        if needed > self.pool.num_pages:
            raise ValueError(
                f"prompt and max_tokens need {needed} pages of {self.pool.page_size} tokens but "
                f"the pool has {self.pool.num_pages}: raise num_pages or lower max_tokens"
            )
        eos = () if params.ignore_eos else self.config.eos_token_ids
        seed = params.seed
        if seed is None:  # another one for each request, also of later calls
            seed = next(self._seeds)  # in one step: threads may ask at once
        return [
            Sequence(
                index=index,
                sample=sample,
                prompt=ids,
                params=params,
                seed=(seed + (sample << 32)) % 2**64,
                limit=limit,
                stop_ids=(*eos, *(params.stop_token_ids or ())),
                detokenizer=IncrementalDetokenizer(
                    self.tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    stop=tuple(params.stop or ()),
                    include_stop_str_in_output=params.include_stop_str_in_output,
                ),
                failures=failures,
            )
            for sample in range(params.n)
        ]


def _engine_that_fits(num_pages: int, least: int, **settings: Any) -> Engine:
    """An `Engine` of `num_pages`, or fewer, down to `least`, where no piece of the free memory
    holds them: a large model's weights leave it in pieces."""
    while True:
        try:
            return Engine(num_pages=num_pages, **settings)
        except jax.errors.JaxRuntimeError as error:
            fewer = num_pages * 4 // 5
            if "RESOURCE_EXHAUSTED" not in str(error) or fewer < least:
                raise
        warnings.warn(
            f"no piece of the free memory holds {num_pages} pages: trying {fewer} (environment "
            "variable XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async joins the pieces)",
            stacklevel=3,
        )
        num_pages = fewer


def errors(sequences: Seq[Sequence]) -> list[Exception]:
    """Why sequences of a call of `LLM.sequences` ended that could not go on."""
    return sequences[0].failures if sequences else []


def checked_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value. Raises ValueError where it is no integer from low to high."""
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        limit = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        raise ValueError(f"{name}={value!r:.40} must be {limit}")
    return int(value)
