"""`python -m experiments.peers`."""

from experiments.peers.runner import main
from spt_jax import cli

if __name__ == "__main__":
    cli.run(main)
