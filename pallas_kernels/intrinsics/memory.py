"""Addresses, loads and stores. Addresses in shared memory are I32 byte offsets, as in PTX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith, llvm

from qserve_jax.pallas_kernels.intrinsics._mlir import (
    Register,
    do_ptx,
    integer_type,
    mlir_i32,
    ptx_value,
    ptx_values,
    vector,
)
from qserve_jax.pallas_kernels.intrinsics.registers import F32, I32


class Address(Register):
    """A byte address in global memory, 64 bits."""

    @staticmethod
    def mlir_type() -> Any:
        return integer_type(64)

    def advance(self, index: I32 | int, stride: int) -> Address:
        """index * stride bytes further, in 64 bits; index >= 0."""
        wide = arith.extui(self.mlir_type(), mlir_i32(index))
        step = arith.muli(wide, mgpu.utils.c(stride, self.mlir_type()))
        return Address(arith.addi(self.value, step))


def global_address(ref: Any) -> Address:
    """Of an operand or an output of `launch`."""
    return Address(llvm.ptrtoint(Address.mlir_type(), mgpu.utils.memref_ptr(ref)))


def shared_address(ref: Any) -> I32:
    """Of the scratch or the barriers of `launch`."""
    return I32(llvm.ptrtoint(I32.mlir_type(), mgpu.utils.memref_ptr(ref)))


def load_shared[R: (I32, F32)](
    address: I32, offset: int = 0, *, count: int = 1, kind: type[R] = I32
) -> list[R]:
    """`count` (1, 2, 4) consecutive words of shared memory, aligned to all of them."""
    return _load("shared", address, offset, count, kind)


def load_global[R: (I32, F32)](address: Address, *, count: int = 1, kind: type[R] = I32) -> list[R]:
    """`count` (1, 2, 4) words, aligned to all of them, that no one writes during the kernel."""
    return _load("global.nc", address, 0, count, kind)


def load_shared_by_devices(address: Address, *, count: int = 1) -> list[I32]:
    """`count` (1, 2, 4) words, aligned to all of them, that another device may have written before
    it raised a flag (peers.py)."""
    return _load("relaxed.sys.global", address, 0, count, I32)


def store_shared(address: I32, value: I32 | F32, offset: int = 0) -> None:
    """One word."""
    do_ptx(f"st.shared{_suffix(type(value), 1)} [$0+{offset}], $1;", address, value)


def store_shared_words(address: I32, values: Sequence[I32], offset: int = 0) -> None:
    """Consecutive words (1, 2 or 4), aligned to all of them."""
    count = len(values)
    code = f"st.shared{_suffix(I32, count)} [$0+{offset}], {vector(1, count)};"
    do_ptx(code, address, *values)


def store_global(address: Address, values: Sequence[I32]) -> None:
    """Consecutive words (1, 2 or 4), aligned to all of them."""
    count = len(values)
    do_ptx(f"st.global{_suffix(I32, count)} [$0], {vector(1, count)};", address, *values)


def address_in_block(address: I32, rank: int) -> I32:
    """The same address in the shared memory of the block of this rank in the cluster (Hopper)."""
    return ptx_value(I32, "mapa.shared::cluster.u32 $0, $1, $2;", address, rank)


def load_cluster(address: I32, offset: int = 0, *, count: int = 1) -> list[F32]:
    """`count` (1, 2, 4) words at an `address_in_block`."""
    return _load("shared::cluster", address, offset, count, F32)


def _load[R: (I32, F32)](
    space: str, address: Register, offset: int, count: int, kind: type[R]
) -> list[R]:
    code = f"ld.{space}{_suffix(kind, count)} {vector(0, count)}, [${count}+{offset}];"
    return ptx_values(kind, count, code, address, effect=True)


def _suffix(kind: type, count: int) -> str:
    """What PTX calls `count` words of a kind."""
    return (f".v{count}" if count > 1 else "") + (".f32" if kind is F32 else ".b32")
