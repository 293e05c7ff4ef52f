"""`python -m experiments.peers`."""

from experiments import cli
from experiments.peers.runner import main

if __name__ == "__main__":
    cli.run(main)
