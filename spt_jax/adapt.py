"""Turn a dense model into the SPT one, in place."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from spt_jax.calibration import (
    Path,
    Routing,
    fit_routing,
    fit_sparse_attention,
    random_routing,
    record_activations,
)
from spt_jax.config import LoRAConfig, RoutedFFNConfig, SPTConfig
from spt_jax.layers import (
    Attention,
    Embedding,
    FeedForward,
    Linear,
    LoRA,
    RoutedFFN,
    SparseAttention,
)
from spt_jax.models.common import check_batch, token_array


def adapt[Model: nnx.Module](
    model: Model,
    config: SPTConfig,
    *,
    calibration_batch: Mapping[str, jax.Array | np.ndarray] | None = None,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Add LoRA factors, sparse attention and routed FFNs to every layer of `model`.

    Codebooks, blocks of hidden units and routers are fitted to the activations of
    `calibration_batch` (blocks and routers only where `RoutedFFNConfig.calibration` says so). LoRA
    factors start at zero and permuting hidden units changes no output, so
    before training the model differs from the dense one only by what its sparse parts leave out.

    Args:
        model: a model of `load_pretrained`, or any module made of `spt_jax.layers`.
        config: the parts to add; a part that is None stays dense.
        calibration_batch: `input_ids` int `[B, S]` and, optionally, `attention_mask`,
            `token_type_ids` and `segment_ids`; some thousand tokens of the task at hand, in
            sequences as long as it has: codebooks fitted to short ones know no later positions.
            Needed for the sparse parts only.
        rngs: seeds LoRA factors, k-means and random routers; None stands for `nnx.Rngs(0)`.

    Returns:
        The same model.

    Raises:
        ValueError: the model is adapted already, has no layer to adapt, or one that is stacked or
            not called; the calibration batch is missing or too small, or a size does not divide.
            The model is then unchanged.

    Example:
        >>> model = spt_jax.load_pretrained("bert-base-uncased")  # doctest: +SKIP
        >>> batch = {"input_ids": ids, "attention_mask": mask}  # doctest: +SKIP
        >>> model = spt_jax.adapt(model, SPTConfig(), calibration_batch=batch)  # doctest: +SKIP
    """
    if not isinstance(config, SPTConfig):
        raise ValueError(
            f"config is of the type {type(config).__name__}; give SPTConfig(lora=..., ...)"
        )
    rngs = rngs or nnx.Rngs(0)
    modules = dict(nnx.iter_modules(model))
    attentions = {path: m for path, m in modules.items() if isinstance(m, Attention)}
    ffns = {path: m for path, m in modules.items() if isinstance(m, FeedForward)}
    _check(modules, config, calibration_batch)

    sparse: dict[Path, SparseAttention] = {}
    routed: dict[Path, tuple[Routing, RoutedFFNConfig]] = {}
    if config.attention is not None or config.ffn is not None:
        assert calibration_batch is not None  # checked above
        activations = record_activations(model, calibration_batch)
        for path in [*(attentions if config.attention else ()), *(ffns if config.ffn else ())]:
            if path not in activations:
                raise ValueError(
                    f"{_dotted(path)} read nothing of the calibration batch: the model does not "
                    "call it, or calls a copy, as nnx.remat, nnx.jit and nnx.scan make; call the "
                    "layer itself"
                )
        if config.attention is not None:
            for path, attention in attentions.items():
                sparse[path] = fit_sparse_attention(
                    **activations[path],
                    config=config.attention,
                    causal=attention.causal,
                    key=rngs.params(),
                )
        if config.ffn is not None:
            for path, ffn in ffns.items():
                if config.ffn.calibration == "random":
                    routing = random_routing(ffn, config.ffn, key=rngs.params())
                else:
                    routing = fit_routing(**activations[path], ffn=ffn, config=config.ffn)
                routed[path] = routing, config.ffn

    # nothing was changed so far, and nothing fails from here on
    if config.lora is not None:
        _add_lora(modules, config.lora, rngs)
    for path, sparse_attention in sparse.items():
        attentions[path].sparse = sparse_attention
    replaced = {
        id(ffns[path]): RoutedFFN(ffns[path], **routing._asdict(), config=ffn_config)
        for path, (routing, ffn_config) in routed.items()
    }
    for owner in modules.values():
        for name, child in list(nnx.iter_children(owner)):
            if id(child) in replaced:  # in all places of an FFN that several share
                setattr(owner, str(name), replaced[id(child)])
    return model


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _check(
    modules: Mapping[Path, nnx.Module],
    config: SPTConfig,
    batch: Mapping[str, jax.Array | np.ndarray] | None,
) -> None:
    if any(isinstance(m, LoRA | SparseAttention | RoutedFFN) for m in modules.values()):
        raise ValueError("the model is adapted already; load it again to adapt it anew")
    if not any(isinstance(m, Attention | FeedForward) for m in modules.values()):
        raise ValueError(
            f"{type(modules[()]).__name__} has neither Attention nor FeedForward layers to adapt"
        )
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
        if weight.ndim != 2:
            raise ValueError(
                f"{_dotted(path)} is several layers, stacked by nnx.vmap or nnx.scan (a weight is "
                f"{list(weight.shape)}): keep them one by one in an nnx.List, and adapt that model"
            )
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


def _add_lora(modules: Mapping[Path, nnx.Module], config: LoRAConfig, rngs: nnx.Rngs) -> None:
    targets: list[Linear | Embedding] = []
    for path, module in modules.items():
        match module:
            case Attention() if "attention" in config.targets:
                targets += [module.q_proj, module.k_proj, module.v_proj, module.o_proj]
            case FeedForward() if "ffn" in config.targets:
                targets += [m for m in (module.up, module.gate, module.down) if m is not None]
            # not OPT's positions, for which PEFT looks up rows without their offset
            case Embedding() if "embeddings" in config.targets and path != ("position",):
                targets.append(module)
    for target in targets:
        shape = target.kernel.shape if isinstance(target, Linear) else target.embedding.shape
        target.lora = LoRA(*shape, config=config, rngs=rngs)
