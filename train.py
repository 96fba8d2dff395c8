"""Train a Transformer: `python train.py gpt-shakespeare`. `python train.py --help` lists what else there is."""

import sys

from tx_jax.command_line import keep_compiled, keep_memory, one_line_errors, parse_run
from tx_jax.processes import connect
from tx_jax.training.loop import fit


@one_line_errors()
def main(args: list[str]) -> None:
    """Train what the command line describes."""
    keep_compiled()
    fit(parse_run(connect(args)))


if __name__ == "__main__":
    keep_memory()
    main(sys.argv[1:])
