"""What a run took: as numbers, and as the line that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from qserve_jax.models.sharding import rank_config, ranks_of
from qserve_jax.quantization.qtensor import W4PerChannel, W4PerGroup, is_quantized
from qserve_jax.runtime.compile_time import compile_time
from qserve_jax.runtime.device_memory import held_bytes, peak_bytes
from qserve_jax.runtime.kv_cache import cache_bytes_per_token
from qserve_jax.runtime.llm import LLM


def run_stats(llm: LLM, load_seconds: float, first_tokens: Sequence[float]) -> dict[str, Any]:
    """Counts, seconds, bytes and rates of all that `llm` generated; None for what was not measured.

    Compilation is in compile_seconds alone. Decoding makes every token but each sample's first.
    decode_bytes_per_second counts what decoding cannot avoid to read: the weights once a step, and
    the cached tokens that each sequence attends to. Of devices that share the model, bytes are what
    one of them holds, has had at most and reads.

    first_tokens: seconds to the first token of each sample, compilation apart; we report the mean.
    """
    stats, dtype = llm.stats, llm.params["embed"]["embedding"].dtype
    ranks = ranks_of(llm.model.mesh)
    own = rank_config(llm.config, ranks)
    kv_bytes = cache_bytes_per_token(own, llm.quant_config.kv_bits, dtype)
    decoded = stats.generated_tokens - stats.prefilled_sequences
    bytes_read = stats.decode_steps * _weights_read(llm.params) + stats.attended_tokens * kv_bytes
    return {
        "load_seconds": load_seconds,
        "compile_seconds": compile_time.seconds,
        "compile_cached": 0 < compile_time.cache_requests == compile_time.cache_hits,
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_per_second": _ratio(stats.prompt_tokens, stats.prefill_seconds),
        "time_to_first_token": sum(first_tokens) / len(first_tokens),
        "generated_tokens": stats.generated_tokens,
        "generated_tokens_per_second": _ratio(decoded, stats.decode_seconds),
        "seconds_per_step": _ratio(stats.decode_seconds, stats.decode_steps),
        "weight_bytes": held_bytes(llm.params),
        "weight_format": weight_format(llm),
        "kv_bits": _real_bits(llm.quant_config.kv_bits, dtype),
        "kv_bytes_per_token": kv_bytes,
        "peak_bytes": peak_bytes(),
        "decode_bytes_per_second": _ratio(bytes_read, stats.decode_seconds),
        "device": f"{ranks} x " * (ranks > 1) + jax.local_devices()[0].device_kind,
    }


def format_stats(stats: dict[str, Any]) -> str:
    """`run_stats` in one line; what was not measured is left out."""
    cached = " (cached)" if stats["compile_cached"] else ""
    prompt = [f"prompt {stats['prompt_tokens']} tok", _rate(stats["prompt_tokens_per_second"])]
    generation = [f"generation {stats['generated_tokens']} tok"]
    bandwidth = []
    if stats["seconds_per_step"] is not None:
        step = f"({_milliseconds(stats['seconds_per_step'])}/tok)"
        generation.append(f"{_rate(stats['generated_tokens_per_second'])} {step}")
        bandwidth = [f"{_bandwidth(stats['decode_bytes_per_second'])} on {stats['device']}"]
    return " · ".join(
        [
            f"Load {stats['load_seconds']:.1f} s",
            f"compile {stats['compile_seconds']:.1f} s{cached}",
            ", ".join([*prompt, f"TTFT {_milliseconds(stats['time_to_first_token'])}"]),
            ", ".join(generation),
            f"weights {_size(stats['weight_bytes'])} {stats['weight_format']}",
            f"KV{stats['kv_bits']} {stats['kv_bytes_per_token']} B/tok",
            f"peak {_size(stats['peak_bytes'])}",
            *bandwidth,
        ]
    )


def weight_format(llm: LLM) -> str:
    """`W4A8 g128`: as the kernels are, not as asked; some K are no multiple of the group size.

    What is not quantised has the bits of its dtype: `W32A32` for float32.
    """
    leaves = jax.tree.leaves(llm.params, is_leaf=is_quantized)
    groups = sorted({f"g{leaf.group_size}" for leaf in leaves if isinstance(leaf, W4PerGroup)})
    channels = ["per-channel"] if any(isinstance(leaf, W4PerChannel) for leaf in leaves) else []
    config, dtype = llm.quant_config, llm.params["embed"]["embedding"].dtype
    weight_bits, act_bits = (_real_bits(b, dtype) for b in (config.weight_bits, config.act_bits))
    return f"W{weight_bits}A{act_bits} {'+'.join(groups + channels)}".rstrip()


def _real_bits(bits: int, dtype: Any) -> int:
    """A precision's 16 stands for not quantised."""
    return 8 * dtype.itemsize if bits == 16 else bits


def _weights_read(params: dict[str, Any]) -> int:
    """Bytes a decode step reads. An embedding that is not also the head is read by row only."""
    return held_bytes(params) - (held_bytes(params["embed"]) if "lm_head" in params else 0)


def _ratio(amount: float, of: float) -> float | None:
    return amount / of if amount and of else None


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.{0 if tokens_per_second >= 100 else 1}f} tok/s"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.1f} KiB"


def _bandwidth(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e11:
        return f"{bytes_per_second / 1e12:.2f} TB/s"
    if bytes_per_second >= 1e8:
        return f"{bytes_per_second / 1e9:.2f} GB/s"
    return f"{bytes_per_second / 1e6:.2f} MB/s"
