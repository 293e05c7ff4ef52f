"""Compiles for a GPU that is not there, from a description of it.

XLA, Mosaic and ptxas run as on a machine with that GPU, down to machine code, so registers, spills,
shared memory and the memory of a whole program are the real ones. It needs the packages of
`make gpu-check` and `JAX_PLATFORMS=cpu`. One description serves a process.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies

# The kernel's name is the last scope but one, before that of the primitive.
_LAUNCH = re.compile(
    r'custom_call_target="(?:mosaic_gpu|triton_kernel)[^\n]*?'
    r'op_name="[^"\n]*?([^"/\n]+)/[^"/\n]+"'
)


@dataclass(frozen=True, kw_only=True)
class GPU:
    """What XLA wants to know of a GPU; the figures are NVIDIA's and those of its device query.

    Attributes:
        name: name of the device.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        shared_memory_bytes: of a multiprocessor.
        block_shared_memory_bytes: most that a thread block can ask for.
        l2_bytes: second-level cache.
        memory_bytes: device memory.
        memory_bytes_per_s: its bandwidth.
        clock_ghz: boost clock.
        threads: of a multiprocessor.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory_bytes: int
    block_shared_memory_bytes: int
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_s: int
    clock_ghz: float
    threads: int = 2048

    @property
    def architecture(self) -> str:
        """What ptxas calls it."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    def proto(self) -> str:
        """The description as the text of a `GpuTargetConfigProto`."""
        major, minor = self.capability
        cuda, cudnn = (13, 0, 0), (9, 12, 0)
        toolkit = ".".join(map(str, cuda))
        info: dict[str, object] = {
            "name": f'"{self.name}"',
            "device_vendor": '"NVIDIA Corporation"',
            "core_count": self.multiprocessors,
            "fpus_per_core": 128,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "memory_bandwidth": self.memory_bytes_per_s,
            "l2_cache_size": self.l2_bytes,
            "shared_memory_per_core": self.shared_memory_bytes,
            "shared_memory_per_block": 48 << 10,  # without asking for more
            "shared_memory_per_block_optin": self.block_shared_memory_bytes,
            "registers_per_core_limit": 1 << 16,
            "registers_per_block_limit": 1 << 16,
            "threads_per_warp": 32,
            "threads_per_block_limit": 1024,
            "threads_per_core_limit": self.threads,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "device_address_bits": 64,
            "driver_version": f'"{toolkit}"',
            "runtime_version": f'"{toolkit}"',
            "compile_time_toolkit_version": f'"{toolkit}"',
            "dnn_version": f'"{".".join(map(str, cudnn))}"',
        }
        fields = "\n".join(f"  {key}: {value}" for key, value in info.items())
        capability = f"major: {major} minor: {minor}"
        if major >= 9:
            capability += " feature_extension: ACCELERATED_FEATURES"
        return f"""
gpu_device_info {{
{fields}
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ {" ".join(map("{}: {}".format, ("major", "minor", "patch"), cudnn))} }}
device_description_str: "{self.name}"
"""


H200 = GPU(
    name="NVIDIA H200",
    capability=(9, 0),
    multiprocessors=132,
    shared_memory_bytes=228 << 10,
    block_shared_memory_bytes=227 << 10,
    l2_bytes=50 << 20,
    memory_bytes=150_000_000_000,
    memory_bytes_per_s=4_800_000_000_000,
    clock_ghz=1.98,
)


H100 = replace(
    H200,
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85_000_000_000,
    memory_bytes_per_s=3_350_000_000_000,
)
A100 = GPU(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    multiprocessors=108,
    shared_memory_bytes=164 << 10,
    block_shared_memory_bytes=163 << 10,
    l2_bytes=40 << 20,
    memory_bytes=85_000_000_000,
    memory_bytes_per_s=2_039_000_000_000,
    clock_ghz=1.41,
)
A10 = GPU(
    name="NVIDIA A10",
    capability=(8, 6),
    multiprocessors=72,
    shared_memory_bytes=100 << 10,
    block_shared_memory_bytes=99 << 10,
    l2_bytes=6 << 20,
    memory_bytes=24_000_000_000,
    memory_bytes_per_s=600_000_000_000,
    clock_ghz=1.695,
    threads=1536,
)
L4 = GPU(
    name="NVIDIA L4",
    capability=(8, 9),
    multiprocessors=58,
    shared_memory_bytes=100 << 10,
    block_shared_memory_bytes=99 << 10,
    l2_bytes=48 << 20,
    memory_bytes=24_000_000_000,
    memory_bytes_per_s=300_000_000_000,
    clock_ghz=2.04,
    threads=1536,
)
B200 = replace(
    H200,
    name="NVIDIA B200",
    capability=(10, 0),
    multiprocessors=148,
    l2_bytes=126 << 20,
    memory_bytes=191_000_000_000,
    memory_bytes_per_s=8_000_000_000_000,
    clock_ghz=1.965,
)
RTX_5090 = replace(
    L4,
    name="NVIDIA GeForce RTX 5090",
    capability=(12, 0),
    multiprocessors=170,
    l2_bytes=96 << 20,
    memory_bytes=34_000_000_000,
    memory_bytes_per_s=1_792_000_000_000,
    clock_ghz=2.407,
)
GPUS = {
    "H200": H200,
    "H100": H100,
    "A100": A100,
    "A10": A10,
    "L4": L4,
    "B200": B200,
    "RTX5090": RTX_5090,
}


def described_device(gpu: GPU) -> Any:
    """The described GPU as a JAX device, for which programs compile but do not run."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=gpu.name, topology="1x1x1", target_config=gpu.proto()
    )
    return topology.devices[0]


def trace_for(device: Any, function: Callable[..., Any], *arguments: Any) -> jax.stages.Traced:
    """Traces a function for a described GPU.

    Args:
      device: Result of `described_device`; kernels must see it as the default device, here and
        while what is returned is lowered and compiled.
      function: What to trace; jitted already, or a plain function.
      *arguments: Pytrees of anything with a shape and a dtype.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    described = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    traced = function if hasattr(function, "trace") else jax.jit(function)
    with jax.default_device(device):
        return traced.trace(*described)


def kernel_launches(program: str) -> Counter[str]:
    """Mosaic and Triton kernels in the text of a program, by name; a loop's body counts once."""
    return Counter(_LAUNCH.findall(program))
