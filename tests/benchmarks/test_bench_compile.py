"""Programs compiled beside each other: one that fails, and Ctrl-C."""

import time
import types

import jax
import jax.numpy as jnp
import pytest

from qserve_jax.benchmarks import compile as compiling


def test_one_that_fails_stands_for_itself():
    def wrong(x):
        raise ArithmeticError("no")

    x = jnp.ones(2)
    compiled = compiling.compile_all({"a": (wrong, (x,)), "b": (lambda x: x + 1, (x,))})
    assert compiling.call(compiled["b"], x).tolist() == [2, 2]
    with pytest.raises(ArithmeticError, match="no"):
        compiling.call(compiled["a"], x)


def test_ctrl_c_waits_for_no_program_that_has_not_begun(monkeypatch):
    begun = []

    def lower(name):
        if name == "pressed":
            raise KeyboardInterrupt
        return types.SimpleNamespace(compile=lambda: (begun.append(name), time.sleep(0.3)))

    monkeypatch.setattr(jax, "jit", lambda _: types.SimpleNamespace(lower=lower))
    jobs: dict = {name: (None, (name,)) for name in ("first", "second", "third", "pressed")}
    with pytest.raises(KeyboardInterrupt):
        compiling.compile_all(jobs, at_once=1)
    assert begun in (["first"], [])
