"""A small run as a process of its own, which kills itself where `test_resume.py` says.

Usage: python -m tests.spt_jax.training.interrupted_run OUT [write COUNT | SECONDS]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from flax import nnx

from spt_jax.config import TrainConfig
from spt_jax.training import cross_entropy, supervised, train, weights_fingerprint
from tests.spt_jax.training.toy import Toy, examples

CONFIG = TrainConfig(
    steps=60, batch_size=16, accumulation=2, learning_rate=0.02, eval_every=12, checkpoint_every=4
)


def kill_later(checkpoints: Path, how: list[str]) -> None:
    """End this process in the middle of the COUNTth write, or SECONDS after the first."""

    def watch() -> None:
        seen: set[str] = set()
        while True:
            names = os.listdir(checkpoints) if checkpoints.exists() else []
            seen |= {name for name in names if "tmp" in name}
            now = how[0] == "write" and len(seen) >= int(how[1])
            if how[0] != "write" and seen:
                time.sleep(float(how[0]))
                now = True
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1e-4)

    threading.Thread(target=watch, daemon=True).start()


def main(out: Path, how: list[str]) -> None:
    if how:
        kill_later(out / "checkpoints", how)
    model = Toy()
    result = train(
        model,
        examples(100),
        CONFIG,
        out,
        objective=supervised(cross_entropy),
        eval_data=examples(40, 1),
        metrics=("matthews", "accuracy"),
        resume=True,
    )
    params = weights_fingerprint(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    exact = {
        "params": params,
        "metrics": result.metrics,
        "train_loss": result.train_loss,
        "best_step": result.best_step,
        "steps": result.steps,
    }
    print(json.dumps({"exact": exact, "resumed_from": result.resumed_from}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
