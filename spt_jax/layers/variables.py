"""Variable types. What trains is chosen by type: a filter over these, never a path string."""

from flax import nnx


class LoRAParam(nnx.Param):
    """A low-rank factor added to a frozen weight."""


class RouterParam(nnx.Param):
    """Weight or bias of an FFN router."""


class CodebookParam(nnx.Param):
    """Codewords of a product quantizer that has a codebook loss."""


class HeadParam(nnx.Param):
    """Weight of a task head, trained whatever the method."""


class TableParam(nnx.Param):
    """An embedding or output matrix under LoRA that came with an adapter; saved with it, frozen."""


class CalibrationStat(nnx.Variable):
    """A constant measured on the calibration batch; saved with the adapter, never trained."""


ADAPTER = nnx.Any(LoRAParam, RouterParam, CodebookParam, HeadParam)
"""Filter for everything that an adapted model trains, as `nnx.split` and `nnx.state` take it."""
