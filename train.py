"""Train a Transformer: `python train.py gpt-shakespeare`. `python train.py --help` lists what else there is."""

import signal
import sys

if __name__ == "__main__":  # before modules load: Ctrl-C ends at once but between steps, where the first one saves
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tx_jax.command_line import keep_compiled, one_line_errors, parse_run
from tx_jax.memory import keep_memory
from tx_jax.processes import connect
from tx_jax.training.loop import fit
from tx_jax.training.stopping import Stop


@one_line_errors()
def main(args: list[str]) -> None:
    """Train what the command line describes."""
    keep_compiled()
    cfg = parse_run(connect(args))
    stop = Stop()
    state = fit(cfg, stop)
    if state.step < cfg.train.n_steps:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    keep_memory()
    main(sys.argv[1:])
