"""Saves and loads what `adapt` adds: LoRA in PEFT's format, SPT's own modules beside it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flax import nnx

from spt_jax.adaptation import ADAPTATION_FILE, AdaptationReport
from spt_jax.export import modules, peft
from spt_jax.export.dense import check_model
from spt_jax.export.files import check_replaceable, new_directory
from spt_jax.layers import LoRA, RoutedFFN, SparseAttention
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.hub import find_files

_FILES = (
    peft.CONFIG_FILE,
    peft.WEIGHTS_FILE,
    modules.CONFIG_FILE,
    modules.MODULES_FILE,
    ADAPTATION_FILE,
)

_log = logging.getLogger(__name__)


def save_adapter(
    model: Encoder | Decoder,
    out_dir: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write what `adapt` added to `model`, and its task head.

    LoRA factors and the head go into PEFT's `adapter_config.json` and `adapter_model.safetensors`,
    which `peft` loads onto the original model; sparse attention and routed FFNs into
    `spt_config.json` and `spt_modules.safetensors`, which `load_adapter` reads too; what was chosen
    and measured (`model.adaptation`) into `adaptation.json`. A model without
    LoRA has nothing for PEFT, and the log says so. The directory appears whole or not at all.

    Args:
        model: an adapted model.
        out_dir: the directory, absent or empty.
        base_model: name or directory of the original model, for PEFT's configuration.
        overwrite: replace the whole of an earlier export in `out_dir`.

    Raises:
        ValueError: the model is of no known family or not adapted, or `out_dir` holds files that
            must not be replaced.
        OSError: the directory cannot be written; what was there is as before.

    Example:
        >>> spt_jax.save_adapter(model, "adapter", base_model="minilm")  # doctest: +SKIP
    """
    check_model("save_adapter", model)
    out = Path(out_dir)
    check_replaceable(out, overwrite=overwrite)
    adapted = peft.adapted_modules(model)
    sparse = bool(modules.sparse_modules(model))
    if not adapted and not sparse:
        raise ValueError(
            "the model has neither LoRA factors nor SPT modules to save; save_pretrained writes "
            "the whole model"
        )
    with new_directory(out, overwrite=overwrite) as directory:
        if adapted:
            peft.write_peft(model, adapted, directory, base_model)
        if sparse:
            modules.write_modules(model, directory, with_head=not adapted)
        modules.write_report(model, directory)
    if not adapted:
        _log.warning(
            "%s: the model has no LoRA factors, so there is nothing for PEFT; %s are written for "
            "spt_jax.load_adapter",
            out,
            modules.describe(model),
        )


def load_adapter[Model: Encoder | Decoder](
    model: Model,
    adapter_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Model:
    """Add an adapter of `save_adapter` or of PEFT to `model`, in place.

    Reads LoRA on linear maps and embeddings, scaled by alpha / r or as rsLoRA, with ranks and
    alphas by pattern, and modules that were saved whole, such as heads: their weights are replaced
    and become trainable. A head's weights under LoRA are frozen, as in PEFT, and so are tables that
    lie under LoRA factors; `save_adapter` writes them back. Left out are tables that PEFT's
    `save_embedding_layers` stored as they are in the model and, by a backbone, what belongs to
    heads, which a warning lists. SPT modules beside them are installed; they may also
    lie alone, or in a directory of `save_pretrained`.

    Args:
        model: the dense model that the adapter was made for.
        adapter_dir: a directory or a Hub id.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for `huggingface_hub`'s cache.
        local_files_only: take Hub repositories from the cache only.

    Returns:
        The same model, ready to be used and to be trained further.

    Raises:
        ValueError: the adapter is not found or incomplete, does not fit the model, or is of a kind
            that is not supported (such as DoRA); or the model is of no known family, or adapted
            already. The model is then unchanged.
        ConnectionError: the Hub cannot be reached.

    Example:
        >>> model = spt_jax.load_pretrained("minilm")  # doctest: +SKIP
        >>> model = spt_jax.load_adapter(model, "adapter")  # doctest: +SKIP
    """
    check_model("load_adapter", model)
    if any(isinstance(m, LoRA | SparseAttention | RoutedFFN) for _, m in nnx.iter_modules(model)):
        raise ValueError("the model is adapted already; load it again to load another adapter")
    directory = find_files(
        adapter_dir,
        files=_FILES,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    parts: list[peft.PEFTAdapter | modules.SparseModules] = []
    if (directory / peft.CONFIG_FILE).is_file():
        parts.append(peft.read_peft(model, directory))
    if (directory / modules.CONFIG_FILE).is_file():
        parts.append(modules.read_modules(model, directory))
    if not parts:
        raise ValueError(
            f"{directory} has neither {peft.CONFIG_FILE} nor {modules.CONFIG_FILE}; give the "
            "directory of a saved adapter"
        )
    record, report = directory / ADAPTATION_FILE, AdaptationReport(layers=())
    if record.is_file():
        report = AdaptationReport.load(record)
    # nothing was changed so far, and nothing fails from here on
    for part in parts:  # LoRA first: routed FFNs regroup its rows and columns with the weights
        part.install(model)
    setattr(model, "adaptation", report)  # noqa: B010  as adapt does
    return model
