"""The two forms of an adapted model: sparse, as it trains, and dense, as other tools serve it."""

from __future__ import annotations

from typing import get_args

from flax import nnx

from spt_jax.config import Form
from spt_jax.layers import RoutedFFN, SparseAttention

FORMS: tuple[Form, ...] = get_args(Form)


def has_sparse_parts(model: nnx.Module) -> bool:
    """Whether the two forms of a model differ."""
    parts = SparseAttention | RoutedFFN
    return any(isinstance(module, parts) for _, module in nnx.iter_modules(model))


def set_form(model: nnx.Module, form: Form) -> None:
    """Make a model compute in one of its forms from now on.

    `sparse`: attention over the keys that are selected, FFN blocks that the router chooses.
    `dense`: all keys and all hidden units, with the same LoRA factors; what `save_pretrained` and
    `save_adapter` hand to other tools. Both read the same arrays: no weight is copied. A model
    without sparse parts has but one form, and stays as it is. A jitted function that took the model
    before has to be traced again, which `nnx.jit` does by itself.

    Args:
        model: any model of this library; changed in place.
        form: "sparse" or "dense".

    Raises:
        ValueError: there is no such form.

    Example:
        >>> from flax import nnx
        >>> import spt_jax
        >>> spt_jax.set_form(nnx.Dict(), "dence")
        Traceback (most recent call last):
        ...
        ValueError: form must be sparse or dense, got 'dence'
    """
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
    model.set_attributes(form=form, raise_if_not_found=False)
