"""Turn a dense model into the SPT one, in place."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from spt_jax.adaptation import AdaptationReport
from spt_jax.calibration import Path, inputs_of
from spt_jax.config import SPTConfig
from spt_jax.fitting import Fit, Fitting, install
from spt_jax.layers import (
    Attention,
    Embedding,
    FeedForward,
    LoRA,
    RoutedFFN,
    SparseAttention,
)
from spt_jax.models.common import check_batch, token_array
from spt_jax.targets import LoRAPlan, check_unstacked, plan_lora

_log = logging.getLogger(__name__)


def adapt[Model: nnx.Module](
    model: Model,
    config: SPTConfig,
    *,
    calibration_batch: Mapping[str, jax.Array | np.ndarray] | None = None,
    rngs: nnx.Rngs | None = None,
    choices: AdaptationReport | None = None,
    use_cache: bool = True,
    training_tokens: int | None = None,
) -> Model:
    """Add LoRA factors, sparse attention and routed FFNs to layers of `model`.

    Without a budget (`SPTConfig.loss_budget`, `SPTConfig.serve`) every layer gets the parts that
    the configuration has. With one, adapt measures what sparse attention, and an FFN of which 3/4,
    1/2 or 1/4 of the blocks are active, cost each layer and what they save in time on this device,
    and takes what saves most while the sparse form's loss, on calibration rows that nothing was
    fitted to, stays within the budget. `model.adaptation` says what was chosen.

    Codebooks, blocks of hidden units and routers are fitted to the activations of
    `calibration_batch` (blocks and routers only where `RoutedFFNConfig.calibration` says so). LoRA
    factors start at zero and permuting hidden units changes no output, so before training the model
    differs from the dense one only by what its sparse parts leave out. Fits, choices and times are
    kept on disk (`$SPT_JAX_CACHE_DIR`, by default `~/.cache/spt_jax`) by the hash of weights, batch
    and configuration.

    Args:
        model: a model of `load_pretrained`, or any module made of `spt_jax.layers`.
        config: the parts to add; a part that is None stays dense.
        calibration_batch: `input_ids` int `[B, S]` and, optionally, `attention_mask`,
            `token_type_ids` and `segment_ids`; some thousand tokens of the task at hand, in
            sequences as long as it has: codebooks fitted to short ones know no later positions, and
            time is measured at this length. Needed for the sparse parts only. A budget is measured
            on a quarter of the rows, to which nothing is fitted; a single row serves for both.
        rngs: seeds LoRA factors, k-means and random routers; None stands for `nnx.Rngs(0)`.
        choices: what to choose in place of measuring: an earlier run's `model.adaptation`.
        use_cache: whether fits, choices and times of an earlier run are taken from disk.
        training_tokens: tokens that training will read, padding included. With a budget, layers
            stay dense where sparse parts cannot save as much time on so many as it takes to fit
            them, some seconds a layer. None counts that time for nothing.

    Returns:
        The same model.

    Raises:
        ValueError: the model is adapted already, has no layer to adapt, or one that is stacked or
            not called; LoRA's configuration names a module that the model does not have, or that
            takes no factors; the calibration batch is missing or too small, a size does not divide,
            or the choices are of another model. The model is then unchanged.

    Example:
        >>> model = spt_jax.load_pretrained("bert-base-uncased")  # doctest: +SKIP
        >>> batch = {"input_ids": ids, "attention_mask": mask}  # doctest: +SKIP
        >>> config = SPTConfig(serve="dense")  # doctest: +SKIP
        >>> model = spt_jax.adapt(model, config, calibration_batch=batch)  # doctest: +SKIP
        >>> print(model.adaptation.summary())  # doctest: +SKIP
    """
    if not isinstance(config, SPTConfig):
        raise ValueError(
            f"config is of the type {type(config).__name__}; give SPTConfig(lora=..., ...)"
        )
    if training_tokens is not None and training_tokens < 1:
        raise ValueError(f"training_tokens must be at least 1, got {training_tokens}")
    begun = time.perf_counter()
    rngs = rngs or nnx.Rngs(0)
    modules = dict(nnx.iter_modules(model))
    plan = _check(model, modules, config, calibration_batch)
    layers = {
        path: module
        for path, module in modules.items()
        if (isinstance(module, Attention) and config.attention is not None)
        or (isinstance(module, FeedForward) and config.ffn is not None)
    }
    _check_choices(choices, layers, config)
    # drawn whatever is chosen, so that LoRA's factors do not depend on it
    keys = {path: rngs.params() for path, module in layers.items() if _draws(module, config)}

    fits: dict[Path, Fit] = {}
    report = AdaptationReport(layers=())
    if layers:
        assert calibration_batch is not None  # checked above
        inputs = inputs_of(calibration_batch)
        fitting = Fitting(model, layers, config, inputs, keys, plan, training_tokens)
        fits, report = fitting.run(choices, use_cache=use_cache)

    # nothing was changed so far, and nothing fails from here on
    plan.install(rngs)
    install(model, fits)
    report = replace(report, seconds=time.perf_counter() - begun)
    setattr(model, "adaptation", report)  # noqa: B010  of any module
    if layers:
        _log.info("adapted: %s", report.summary())
    if report.is_costly:
        _log.warning(
            "the sparse form's %s is %.2f above the dense model's: serve this adapter dense "
            '(evaluate_as="dense", spt_jax.set_form, save_pretrained), or adapt with a loss_budget',
            report.measure,
            report.added,
        )
    return model


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _draws(layer: nnx.Module, config: SPTConfig) -> bool:
    """Whether fitting a layer's sparse part draws at random."""
    if isinstance(layer, Attention):
        return True
    assert config.ffn is not None
    return config.ffn.calibration == "random"


def _check_choices(
    choices: AdaptationReport | None, layers: Mapping[Path, nnx.Module], config: SPTConfig
) -> None:
    if choices is None:
        return
    if not config.has_budget:
        raise ValueError(
            "choices are for a configuration with a budget; give SPTConfig(serve=...), or leave "
            "them out"
        )
    paths = {_dotted(path): layer for path, layer in layers.items()}
    for line in choices.layers:
        if line.path not in paths:
            raise ValueError(f"choices: {line.path} is no layer of this model that is to be sparse")
        if isinstance(paths[line.path], FeedForward):
            assert config.ffn is not None
            if not (line.active * config.ffn.num_blocks).is_integer():
                raise ValueError(
                    f"choices: {line.active} of {config.ffn.num_blocks} blocks of {line.path} are "
                    "no whole number"
                )


def _check(
    model: nnx.Module,
    modules: Mapping[Path, nnx.Module],
    config: SPTConfig,
    batch: Mapping[str, jax.Array | np.ndarray] | None,
) -> LoRAPlan:
    """Raise a ValueError for what cannot be done; what LoRA is to be is returned."""
    _check_layers(modules)
    plan = LoRAPlan({}, {}) if config.lora is None else plan_lora(model, config.lora)
    if not plan.factors and not any(
        isinstance(m, Attention | FeedForward) for m in modules.values()
    ):
        raise ValueError(
            f"{type(model).__name__} has neither Attention nor FeedForward layers to adapt"
        )
    _check_calibration(modules, config, batch)
    return plan


def _check_layers(modules: Mapping[Path, nnx.Module]) -> None:
    if any(isinstance(m, LoRA | SparseAttention | RoutedFFN) for m in modules.values()):
        raise ValueError("the model is adapted already; load it again to adapt it anew")
    for path, module in modules.items():
        match module:
            case Attention():
                weight = module.q_proj.kernel
            case FeedForward():
                weight = module.up.kernel
            case Embedding():
                weight = module.embedding
            case _:
                continue
        check_unstacked(_dotted(path), weight)


def _check_calibration(
    modules: Mapping[Path, nnx.Module],
    config: SPTConfig,
    batch: Mapping[str, jax.Array | np.ndarray] | None,
) -> None:
    if config.attention is None and config.ffn is None:
        return
    if batch is None:
        raise ValueError(
            "sparse attention and routed FFNs are fitted to activations: give calibration_batch, "
            "or set SPTConfig(attention=None, ffn=None) for LoRA alone"
        )
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration_batch is of the type {type(batch).__name__}; give a mapping of "
            'arrays, as {"input_ids": ...} or Examples.columns'
        )
    if "input_ids" not in batch:
        raise ValueError(f"calibration_batch needs input_ids; it has {sorted(batch)}")
    token_array(batch["input_ids"], "input_ids of calibration_batch")
    check_batch(modules[()], batch, "calibration_batch")
    if config.ffn is not None:
        if isinstance(modules[()], FeedForward):
            raise ValueError("the model is a FeedForward itself; give the module that holds it")
        for module in modules.values():
            if isinstance(module, FeedForward) and module.up.out_features % config.ffn.num_blocks:
                raise ValueError(
                    f"{module.up.out_features} hidden units do not split into "
                    f"num_blocks={config.ffn.num_blocks} blocks"
                )
