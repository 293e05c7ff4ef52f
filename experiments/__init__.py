"""Runnable experiments: `python -m experiments.NAME --out DIR`."""

from pkgutil import extend_path

# An installed package would hide a user's folder `experiments` that has no `__init__.py`, wherever
# that lies on the path: such folders come first, in the path's order.
__path__ = [*extend_path([], __name__), *__path__]
