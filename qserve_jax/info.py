"""What is here and what can run: `python -m qserve_jax.info`.

Versions, devices, driver, the backends of every operation and why one cannot run, the folder of
compiled programs. stdout holds the answer, as text or, with --output json, as one object.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qserve_jax import __version__, _cli

DRIVER_FILE = Path("/proc/driver/nvidia/version")
PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin")
CUDA13_DRIVER = 580  # the oldest that CUDA 13 runs with


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.info", info, argv)


def info(argv: Sequence[str]) -> None:
    """Check the flags and print. Raises UsageError for wrong flags."""
    args = build_parser().parse_args(argv)
    if not args.debug:
        _cli.quiet_libraries()
    found = gather()
    print(json.dumps(found) if args.output == "json" else as_text(found))


def build_parser() -> _cli.Parser:
    """The flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.info",
        description="Versions, devices, and which backends can run here.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", choices=("text", "json"), default="text", help="(default: text)")
    add("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    return parser


def gather() -> dict[str, Any]:
    """Everything that is printed, as JSON has it.

    versions  name -> version, of the packages that are installed
    driver    of NVIDIA, None without one; cuda: what JAX was built for, None on other devices
    devices   [{"id", "kind", "compute_capability", "memory_bytes"}], null where unknown
    devices_error, advice   one line each, or null
    backends  operation -> backend -> {"runs", "by_default", "reason"}; reason is null where it runs
    compile_cache   {"folder", "programs"}
    """
    devices, error = find_devices()
    versions = {"qserve_jax": __version__, "python": sys.version.split()[0]} | package_versions()
    driver = nvidia_driver(DRIVER_FILE)
    platform = None if error else devices[0].platform
    return {
        "versions": versions,
        "driver": driver,
        "cuda": cuda_version(devices),
        "platform": platform,
        "devices": [describe_device(device) for device in devices],
        "devices_error": error,
        "advice": advice(driver, platform, versions),
        "backends": {} if error else find_backends(),
        "compile_cache": compile_cache(),
    }


def find_devices() -> tuple[list[Any], str | None]:
    """Those where JAX computes, or why there are none."""
    import jax

    try:
        return jax.devices(), None
    except RuntimeError as error:  # JAX_PLATFORMS names what is not here
        return [], str(error).strip().splitlines()[0]


def package_versions() -> dict[str, str]:
    """Of the packages that matter and are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def nvidia_driver(file: Path) -> str | None:
    """The version in the file by which the Linux driver tells it."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def cuda_version(devices: list[Any]) -> str | None:
    """As JAX's client tells it, "cuda 13000" being 13.0."""
    found = re.search(r"cuda (\d+)", devices[0].client.platform_version) if devices else None
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else None


def describe_device(device: Any) -> dict[str, Any]:
    """One device, as in `gather`."""
    memory = (device.memory_stats() or {}).get("bytes_limit")
    capability = getattr(device, "compute_capability", None)
    return {
        "id": device.id,
        "kind": device.device_kind,
        "compute_capability": capability,
        "memory_bytes": memory,
    }


def advice(driver: str | None, platform: str | None, versions: dict[str, str]) -> str | None:
    """What to do where there is an NVIDIA driver and JAX does not compute on the GPU."""
    if driver is None or platform == "gpu":
        return None
    new = int(driver.split(".")[0]) >= CUDA13_DRIVER
    here = f"NVIDIA driver {driver} is here, but JAX does not use the GPU"
    install = f"pip install 'qserve_jax[{'cuda13' if new else 'cuda12'}]'"
    if os.environ.get("JAX_PLATFORMS"):
        return f"{here}: JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} says so, unset it"
    if "jax-cuda13-plugin" in versions and not new:
        return f"{here}: CUDA 13 needs driver {CUDA13_DRIVER} or newer; update it, or {install}"
    if not any("cuda" in name for name in versions):
        return f"{here}: {install}"
    return f"{here}: --debug shows what JAX has to say"


def find_backends() -> dict[str, dict[str, Any]]:
    """For each operation and backend whether it can run, as in `gather`."""
    from qserve_jax.pallas_kernels import backend
    from qserve_jax.pallas_kernels.append_kv.api import APPEND_BACKENDS
    from qserve_jax.pallas_kernels.paged_attention.api import ATTENTION_BACKENDS
    from qserve_jax.pallas_kernels.quantize_activation.api import REFERENCE as ELEMENTWISE
    from qserve_jax.pallas_kernels.w4a8_matmul.api import W4A8_BACKENDS

    tables: dict[str, Any] = {
        "w4a8_matmul": W4A8_BACKENDS,
        **dict.fromkeys(ELEMENTWISE, backend.BACKENDS),
        "paged_attention": ATTENTION_BACKENDS,
        "append_kv": APPEND_BACKENDS,
    }

    def one(op: str, table: Any, name: str) -> dict[str, Any]:
        there = name in table
        reason = backend.unavailable(name) if there else "not in this version"
        runs = reason is None
        return {
            "runs": runs,
            "by_default": runs and name in backend.usable(None),
            "reason": reason,
        }

    return {
        op: {name: one(op, table, name) for name in backend.BACKENDS}
        for op, table in tables.items()
    }


def compile_cache() -> dict[str, Any]:
    """The folder of compiled programs, and how many there are."""
    folder = _cli.cache_folder()
    try:
        programs = sum(1 for _ in Path(folder).expanduser().glob("*-cache"))
    except (OSError, RuntimeError):  # RuntimeError: ~ is nobody's home
        programs = 0
    return {"folder": folder, "programs": programs}


def as_text(found: dict[str, Any]) -> str:
    """What `gather` found, for people."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    cache = found["compile_cache"]
    lines = [versions]
    if found["driver"]:
        lines.append(f"NVIDIA driver {found['driver']}, CUDA {found['cuda'] or 'not in use'}")
    lines += [_device_line(found["platform"], device) for device in found["devices"]]
    lines += [line for line in (found["devices_error"], found["advice"]) if line]
    for op, backends in found["backends"].items():
        lines.append(f"{op}:")
        lines += [f"  {name:<12} {_answer(answer)}" for name, answer in backends.items()]
    lines.append(f"compiled programs: {cache['programs']} in {cache['folder']}")
    return "\n".join(lines)


def _device_line(platform: str, device: dict[str, Any]) -> str:
    line = f"{platform} {device['id']}: {device['kind']}"
    if device["compute_capability"]:
        line += f", compute capability {device['compute_capability']}"
    if device["memory_bytes"]:
        line += f", {device['memory_bytes'] / 2**30:.1f} GiB for JAX"
    return line


def _answer(answer: dict[str, Any]) -> str:
    if not answer["runs"]:
        return f"no: {answer['reason']}"
    return "yes" if answer["by_default"] else "yes, where it is named"


if __name__ == "__main__":
    sys.exit(main())
