"""The engine's two calls on the device: operands of few shapes, programs, and the arrays that stay.

The cache and the slots lie on the device from call to call; every call takes both and gives them
back. What a call's programs are compiled for beside its rows follows from who is there (`Needs`).

On a GPU who launches a decode call waits until the device is done with it: XLA asks on the host
after every step whether there is another. So a thread of its own launches there (`launches.py`), in
order, and whatever launches alone touches the cache and the slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qserve_jax.models.llama import CausalLM
from qserve_jax.models.sharding import P, axis_of, cache_spec, shardings
from qserve_jax.quantization.qtensor import KVCache
from qserve_jax.runtime.batch import (
    Needs,
    call_shape,
    device_state,
    needs_of,
    pad_column,
    pad_rows,
    power_of_two,
    powers_of_two,
    row_bucket,
    token_counts,
)
from qserve_jax.runtime.decode import DecodeState
from qserve_jax.runtime.device_memory import held_bytes
from qserve_jax.runtime.distributed import to_devices
from qserve_jax.runtime.kv_cache import init_cache
from qserve_jax.runtime.launches import Launched, Launcher
from qserve_jax.runtime.sampling import SampleOutput
from qserve_jax.runtime.scheduler import Chunk
from qserve_jax.runtime.sequence import Sequence
from qserve_jax.runtime.slots import Live, decode_slots, make_live, prefill_slots

MAX_DECODE_STEPS = 64


def launching_waits(mesh: Mesh | None) -> bool:
    """Whether a thread pays. Devices that share a model keep the caller's order of launches: sums
    over devices of one program must not meet those of another."""
    return mesh is None and jax.default_backend() == "gpu"


class DeviceCalls:
    """Prefill and decode of sequences whose slots and pages are settled; for one thread at a time.

    model, params: as `prepare_for_backend` makes them. num_pages, page_size, kv_bits: the cache.
    max_num_seqs: slots. attends: see `paged_attention`.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Any,
        *,
        num_pages: int,
        page_size: int,
        kv_bits: int,
        max_num_seqs: int,
        attends: str,
    ):
        self.model, self.params, self.attends = model, params, attends
        self.max_num_seqs = max_num_seqs
        self._pages = {"num_pages": num_pages, "page_size": page_size, "kv_bits": kv_bits}
        static = ("model", "features", "attends", "max_steps")
        self._mesh = mesh = model.mesh
        options: dict[str, Any] = {"donate_argnames": ("cache", "live")}
        if mesh is not None:
            places = cache_spec(axis_of(mesh)), P(), P()  # of cache, slots and what is made
            options["out_shardings"] = shardings(places, mesh)
        self._prefill = jax.jit(prefill_slots, static_argnames=static[:3], **options)
        self._decode = jax.jit(decode_slots, static_argnames=static, **options)
        self._cache: KVCache | None = None
        self._live: Live | None = None
        self._launcher = Launcher(in_thread=launching_waits(mesh))
        self._place = jax.config.jax_default_device  # which may be this thread's alone
        self._least = Needs()  # what programs are compiled for in any case
        self.forget_shapes()
        cache, _ = self._arrays(counted=False)  # nothing is launched yet
        self.cache_bytes = held_bytes(cache)
        self._cache_type = jax.tree.map(self._type_of, cache)

    def forget_shapes(self) -> None:
        """Nobody is there: the next shapes follow from who comes."""
        self._needs, self._rows = self._least, 0
        self._decoding: tuple[list[Sequence], Needs, jax.Array, DecodeState] | None = None

    def forget_arrays(self) -> None:
        """A call that was interrupted may have taken them with it."""
        self._decoding = None
        self._launcher.launch(self._forget)

    def _forget(self) -> None:
        self._cache = self._live = None

    def _arrays(self, counted: bool) -> tuple[KVCache, Live]:
        """The cache and the slots, new ones where they were lost; token counts where asked for."""
        if self._cache is None:
            cache = init_cache(
                self.model.config,
                **self._pages,
                dtype=self.params["embed"]["embedding"].dtype,
                mesh=self._mesh,
            )
            jax.block_until_ready(cache.pages)  # or too little memory shows in a call, later
            self._cache = cache
        if self._live is None or (self._live.counts is not None) != counted:
            new = self._new_live(counted)
            if self._live is not None:  # who is there already has no penalties, nor needs counts
                new = dataclasses.replace(self._live, counts=new.counts)
            self._live = new
        return self._cache, self._live

    def _new_live(self, counted: bool) -> Live:
        vocab_size = self.model.config.vocab_size if counted else None
        placed: Live = to_devices(make_live(self.max_num_seqs, vocab_size), self._mesh)
        return placed

    def expect(self, sequence: Sequence) -> None:
        """From now on programs serve this one too."""
        self._needs |= self._needs_of(sequence)

    def _needs_of(self, sequence: Sequence) -> Needs:
        return needs_of(sequence, self._pages["page_size"], self.model.config.vocab_size)

    # The calls. They return before the device is done.

    def prefill(self, chunks: Seq[Chunk]) -> Launched[SampleOutput]:
        """The chunks' tokens into the cache, and the first token of those that `sample`."""
        # Fresh prompts that attend to themselves unquantised read no pages.
        fresh = self.attends == "full" and all(c.start == 0 for c in chunks)
        operands = self._prefill_operands(chunks, *call_shape(chunks), self._needs, fresh=fresh)
        return self._call(self._prefill, *operands)

    def decode(
        self, batch: list[Sequence], num_steps: int, enough: int | None
    ) -> Launched[SampleOutput]:
        """At most num_steps steps; fewer where `enough` of the batch have ended (None: never)."""
        rows = self._rows = row_bucket(len(batch), self._rows)
        yield_idle = rows + 1 if enough is None else rows - len(batch) + enough
        operands = *self._decode_operands(batch, rows), num_steps, yield_idle
        return self._call(self._decode, *operands, max_steps=MAX_DECODE_STEPS)

    def _call(self, function: Any, *operands: Any, **static: Any) -> Launched[SampleOutput]:
        """Have a function launched that is given the cache and the slots, and gives them back."""
        static |= {"attends": self.attends, "features": self._needs.features}
        return self._launcher.launch(functools.partial(self._launch, function, operands, static))

    def _launch(self, function: Any, operands: tuple[Any, ...], static: dict[str, Any]) -> Any:
        elsewhere = self._place != jax.config.jax_default_device
        with jax.default_device(self._place) if elsewhere else contextlib.nullcontext():
            cache, live = self._arrays(static["features"].penalties)
            self._cache, self._live, out = function(
                self.model, self.params, cache, live, *operands, **static
            )
        return out

    def _prefill_operands(
        self, chunks: Seq[Chunk], rows: int, width: int, needs: Needs, *, fresh: bool
    ) -> tuple[Any, ...]:
        """What `prefill_slots` takes from `slots` on: the chunks, padded."""
        batch = [c.sequence for c in chunks]
        # Only the last chunk of a sequence leaves something for decoding.
        slots = [
            s.slot if c.end == s.goal else self.max_num_seqs
            for c, s in zip(chunks, batch, strict=True)
        ]
        tokens = [c.sequence.known[c.start : c.end] for c in chunks]
        counts = None
        if needs.features.penalties:
            counts = token_counts(chunks, rows=rows, vocab_size=self.model.config.vocab_size)
        lens = [c.end for c in chunks]
        return (
            pad_column(slots, rows, self.max_num_seqs),
            pad_rows(tokens, rows, width, 0),
            device_state(batch, rows=rows, needs=needs, lens=lens, counts=counts),
            None if fresh else pad_column([c.end - c.start for c in chunks], rows),
            np.asarray([c.samples for c in chunks] + [False] * (rows - len(chunks))),
        )

    def _decode_operands(self, batch: list[Sequence], rows: int) -> tuple[jax.Array, DecodeState]:
        """Slots and state of a decode call. While nobody comes or goes, only pages change."""
        needs = self._needs
        if self._decoding is not None and self._decoding[:2] == (batch, needs):
            *_, slots, state = self._decoding
            table = pad_rows([s.pages for s in batch], rows, needs.columns, -1)
            state = dataclasses.replace(state, block_table=to_devices(table, self._mesh))
        else:
            slots = pad_column([s.slot for s in batch], rows, self.max_num_seqs)
            state = device_state(batch, rows=rows, needs=needs, lens=[0] * len(batch))
            slots, state = to_devices((slots, state), self._mesh)
        self._decoding = batch, needs, slots, state
        return slots, state

    # Programs, before somebody needs them.

    def keep(self, longest: Sequence) -> tuple[Needs, Any, Any]:
        """Make the needs of this one everybody's from now on; returns them all, and the types of
        the arrays."""
        self._least |= self._needs_of(longest)
        self._needs |= self._least
        live = self._new_live(counted=self._least.features.penalties)
        return self._least, self._cache_type, jax.tree.map(self._type_of, live)

    def _type_of(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = None if self._mesh is None else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def programs(
        self, shapes: Seq[tuple[int, int]], needs: Needs, cache: Any, live: Any
    ) -> Iterator[jax.stages.Lowered]:
        """Prefill calls of these shapes (rows, tokens of each), of no sequence, and every decode
        call, lowered for what `keep` returned. Touches nothing that a call does."""
        fixed: dict[str, Any] = {"attends": self.attends, "features": needs.features}
        for fresh in {False, self.attends == "full"}:
            for rows, width in shapes:
                operands = self._prefill_operands([], rows, width, needs, fresh=fresh)
                yield self._prefill.lower(self.model, self.params, cache, live, *operands, **fixed)
        fixed["max_steps"] = MAX_DECODE_STEPS
        for rows in powers_of_two(1, power_of_two(self.max_num_seqs)):
            slots = pad_column([], rows, self.max_num_seqs)
            state = device_state([], rows=rows, needs=needs, lens=[])
            operands = *to_devices((slots, state), self._mesh), 1, 1
            yield self._decode.lower(self.model, self.params, cache, live, *operands, **fixed)
