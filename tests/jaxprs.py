"""Looking into jaxprs."""

import jax


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
