"""Measured configurations, per device: pallas_kernels/w4a8_matmul/tuned/<device>.json.

  {"device": ..., "jax": ..., "commit": ...,
   "entries": [{"design": "mma", "m": 16, "n": 4096, "k": 4096, "per_group": true,
                "config": {...}, "us": 5.1, "heuristic_us": 5.6}, ...]}

jax and commit are of the last run; entries of others have their own.

An entry is taken for a product of exactly these n, k and per_group and of m/2 < M <= m tokens, m
being a power of two, where M takes as many of the config's tiles as m: others fill other rounds.
For everything else the design's own heuristic chooses.
scripts/tune_kernels.py writes the files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qserve_jax.pallas_kernels.backend import default_device
from qserve_jax.pallas_kernels.w4a8_matmul import mma_config, mma_rules, sm90_config, sm90_rules

MMA_TOKENS = 32
"""Up to so many, mma.sync is faster: wgmma takes 64 channels at least, and so fewer blocks."""
LONG_TOKENS, LONG_FEATURES = 17, 10000
"""From so many of both wgmma is: by 6 to 20 % at K = 11008 to 29568 (not with 16 tokens)."""
FOLDER = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Design:
    """A kernel design with configurations of its own.

    backend: the one whose `matmul` takes config=.
    config: a frozen dataclass of integers and booleans; `tokens` are those of a tile.
    choose: (m, n, k, per_group) -> config, by rules. Raises NotImplementedError.
    check: (config, m, n, k, per_group); raises ValueError unless the kernel runs with it for all
      of 1..m tokens.
    others: as choose, configs that the tuner tries beside that one.
    """

    backend: str
    config: type
    choose: Callable[[int, int, int, bool], Any]
    check: Callable[[Any, int, int, int, bool], None]
    others: Callable[[int, int, int, bool], list[Any]] = lambda m, n, k, per_group: []


DESIGNS: dict[str, Design] = {
    "mma": Design(
        "mosaic_mma",
        mma_config.MmaConfig,
        mma_rules.choose_config,
        lambda config, m, n, k, per_group: mma_config.check_config(config, k, per_group),
    ),
    "wgmma": Design(
        "mosaic_sm90",
        sm90_config.Sm90Config,
        sm90_rules.choose_config,
        lambda config, m, n, k, per_group: sm90_config.check_config(config, m, n, per_group),
        sm90_rules.other_configs,
    ),
}

Key = tuple[str, int, int, int, bool]
"""design, m (a power of two), n, k, per_group"""


def chosen_design(m: int, n: int, k: int, per_group: bool) -> str:
    """ "mma" or "wgmma", for `mosaic_sm90`, which has both."""
    long = m >= LONG_TOKENS and k >= LONG_FEATURES
    return "wgmma" if m > MMA_TOKENS or long else "mma"


def chosen_config(design: str, m: int, n: int, k: int, per_group: bool) -> Any:
    """The measured config, or else the one of the rules."""
    sizes = m, n, k, per_group
    return tuned_config(design, *sizes) or DESIGNS[design].choose(*sizes)


def tuned_config(design: str, m: int, n: int, k: int, per_group: bool) -> Any | None:
    """The measured config for a product on the device where JAX computes by default, if any."""
    entries = load_tuned(default_device().device_kind)
    config = entries.get((design, bucket(m), n, k, per_group))
    same = config is not None and -(-m // config.tokens) == -(-bucket(m) // config.tokens)
    return config if same else None


def bucket(m: int) -> int:
    """The power of two that is m or next above it."""
    return 1 << (m - 1).bit_length()


def tuned_path(device_kind: str) -> Path:
    """ "NVIDIA H200" -> tuned/nvidia_h200.json."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower())}.json"


@functools.cache
def load_tuned(device_kind: str) -> dict[Key, Any]:
    """The configs of a device's file; empty where there is none. Read once per process.

    What cannot be used is left out with a warning of one line, and the heuristic goes on.
    """
    path = tuned_path(device_kind)
    try:
        entries = list(json.loads(path.read_text())["entries"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        _refuse(path, f"{type(error).__name__}: {error}")
        return {}
    configs = {}
    for number, entry in enumerate(entries):
        try:
            key, config = entry_of(entry)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            _refuse(path, f"entry {number}, {type(error).__name__}: {error}")
        else:
            configs[key] = config
    return configs


def entry_of(entry: Any) -> tuple[Key, Any]:
    """The key and the config of an entry. Raises ValueError, TypeError, KeyError or ArithmeticError
    (where a rule divides by a field) on a bad one."""
    name, m, n, k = entry["design"], entry["m"], entry["n"], entry["k"]
    per_group = entry["per_group"]
    if name not in DESIGNS:
        raise ValueError(f"design {name!r} is none of {', '.join(DESIGNS)}")
    sizes = (m, n, k)
    if not all(type(size) is int and size >= 1 for size in sizes) or bucket(m) != m:
        raise ValueError(f"m={m!r}, n={n!r}, k={k!r} must be integers and m a power of two")
    if type(per_group) is not bool:
        raise ValueError(f"per_group={per_group!r} must be true or false")
    design = DESIGNS[name]
    config = config_from_dict(design.config, entry["config"])
    design.check(config, m, n, k, per_group)
    return (name, m, n, k, per_group), config


def config_from_dict(kind: type, fields: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`; a field that is newer than the entry has its default.

    Raises ValueError on other fields or other types.
    """
    types = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if not isinstance(fields, dict) or not needed <= fields.keys() <= types.keys():
        raise ValueError(f"config {fields!r} must have the fields {', '.join(types)}")
    for name, value in fields.items():
        if type(value) is not types[name]:
            raise ValueError(f"config has {name}={value!r}, which must be {types[name].__name__}")
    return kind(**fields)


def _refuse(path: Path, reason: str) -> None:
    line = " ".join(reason.split())
    warnings.warn(f"{path}: not used, {line}: run scripts/tune_kernels.py again", stacklevel=2)
