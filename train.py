"""Train a Transformer: `python train.py gpt-shakespeare`. `python train.py --help` lists what else there is."""

import sys

from tx_jax.command_line import keep_compiled, one_line_errors, parse_run
from tx_jax.training.loop import fit

if __name__ == "__main__":
    with one_line_errors():
        keep_compiled()
        fit(parse_run(sys.argv[1:]))
