"""The ops on a GPU give what the reference gives on the CPU."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from experiments import smoke

pytestmark = pytest.mark.gpu


# bfloat16 takes the Mosaic kernels where there are any
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("op", smoke.CHECKS)
def test_op(op, dtype):
    for result in smoke.CHECKS[op](None, dtype, smoke.FULL):
        assert result.share <= 1, f"{result.name}: {result.text}"
