"""Activations computed again in the backward pass: all of a layer, or what is soon computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import devices

_CHOICE = "spt_choice"


def rematerialized(layer: Callable[..., Any]) -> Callable[..., Any]:
    """`layer`, whose activations are computed again in the backward pass.

    What it passes to `choice` is kept.
    """
    # a function of its own for every call: checkpoint caches by function what it closed over
    policy = jax.checkpoint_policies.save_only_these_names(_CHOICE)
    return jax.checkpoint(lambda *args: layer(*args), policy=policy)


def recomputed[Result](function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, of which on a CPU the backward pass keeps the arguments alone.

    For norms, activations and the like, which are computed in less time than they are stored. A
    product at the end costs nothing more: its gradients need its operands and not its result.
    Compiled for GPUs, XLA's fusions compute such things again as they see fit, in less memory.
    """
    if devices.default_device().platform != "cpu":
        return function(*args)
    return jax.checkpoint(lambda *args: function(*args))(*args)


def choice[Tree](chosen: Tree) -> Tree:
    """`chosen`, small integers that take long to find, which `rematerialized` keeps.

    So the backward pass is of what the forward pass chose, however activations that are computed
    again are rounded.
    """
    return jax.tree.map(lambda array: checkpoint_name(array, _CHOICE), chosen)
