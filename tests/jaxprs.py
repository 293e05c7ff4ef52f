"""Looking into jaxprs."""

import jax
from jax._src.interpreters import partial_eval


def equations(jaxpr, whole=()):
    """Equations of a jaxpr and of those inside them, but for those of the primitives `whole`."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in whole:
            continue
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, whole)


def needed(closed):
    """The jaxpr of what the results hang on."""
    return partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]
