"""What tests of several processes share."""

from __future__ import annotations

import socket

#: XLA's flag by which tests, and what they start, compile without LLVM's optimizations.
UNOPTIMIZED = "--xla_backend_optimization_level=0"


def free_address() -> str:
    """An address of this machine with a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"
