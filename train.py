#!/usr/bin/env python3
"""Train a Transformer: `python train.py gpt-shakespeare`. `python train.py --help` lists what else there is."""

import signal
import sys
from collections.abc import Iterable

if __name__ == "__main__":  # before modules load: Ctrl-C ends at once but between steps, where the first one saves
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tx_jax.command_line import keep_compiled, one_line_errors, parse_run
from tx_jax.memory import keep_memory
from tx_jax.processes import connect, is_first
from tx_jax.training.loop import fit
from tx_jax.training.plan import list_presets, plan
from tx_jax.training.stopping import Stop


@one_line_errors()
def main(args: list[str]) -> None:
    """Train what the command line describes."""
    keep_compiled()
    args = connect(args)
    flags = [arg for arg in args if arg != "--dry-run"]
    if not flags:
        tell(list_presets())
        tell(["", "Begin one: python train.py PRESET. With --dry-run it is measured instead; --help lists all flags."])
        return
    cfg = parse_run(flags)
    if len(flags) < len(args):
        tell(plan(cfg))
        return
    stop = Stop()
    state = fit(cfg, stop)
    if state.step < cfg.train.n_steps:
        sys.exit(stop.exit_code)


def tell(lines: Iterable[str]) -> None:
    """Each as soon as it is known, by the process that speaks for all."""
    for line in lines:
        if is_first():
            print(line, flush=True)


if __name__ == "__main__":
    keep_memory()
    main(sys.argv[1:])
