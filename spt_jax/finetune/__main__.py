"""The command `python -m spt_jax.finetune`."""

from __future__ import annotations

import sys

from spt_jax import cli
from spt_jax.finetune.arguments import parse_arguments
from spt_jax.finetune.run import REPORT_FILE, finetune
from spt_jax.training import form_of


def main() -> None:
    """Run the command."""
    config = parse_arguments(sys.argv[1:])
    console = cli.console()
    console.print(cli.device_line(config.dtype))
    result = finetune(config)
    names = {"train_loss", "step_ms", *result.report["before"]}
    for name, value in result.report["before"].items():
        console.print(f"before: {name} {value:.4f}")
    names |= {name for name in result.figures if name.startswith("eval_loss")}
    names |= {"accuracy", "matthews", "f1_micro", "exact_match", "pearson", "spearman"}
    for name, value in result.figures.items():
        if name in names and form_of(name) is None:
            console.print(f"{name} {value:.4f}")
    console.print(f"{result.directory} (figures in {config.out / REPORT_FILE})", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
