"""How a run goes on: from which checkpoint, with which data, in a directory that no other process writes to."""

import sys
from pathlib import Path
from typing import Any

import jax

from tx_jax import checkpoint
from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.vocabulary_files import find_tokenizer
from tx_jax.errors import require
from tx_jax.processes import is_first
from tx_jax.run_config import RunConfig
from tx_jax.run_dir import claim_run_dir
from tx_jax.training.step import TrainState


def claim(run_dir: Path, cfg: RunConfig, tokenizer: AnyTokenizer) -> int:
    """Make run_dir the home of this run; the step at which it goes on, 0 for a new one.

    Raises:
        InputError: it holds another run, or another tokenizer: that of another text; or cfg.resume does not fit it.
    """
    held = find_tokenizer(run_dir / "tokenizer")
    rule = f"run_dir='{run_dir}' holds a run with another tokenizer, such as that of another text"
    require(held in (None, tokenizer), f"{rule}; use another --run-dir, or its text, --data.tokenizer and --init")
    step = _wanted(run_dir, cfg.resume)
    claim_run_dir(run_dir, cfg)
    tokenizer.save(run_dir / "tokenizer")
    return step


def _wanted(run_dir: Path, how: str) -> int:
    """The step that `how` (RunConfig.resume) names; 0: none."""
    newest = checkpoint.latest_step(run_dir)
    if how.isdecimal():
        require(int(how), f"resume={how!r} is before the first step; use another --run-dir to begin anew")
        return int(checkpoint.step_dir(run_dir, int(how)).name)
    rule = f"resume='never', but run_dir='{run_dir}' holds a run up to step {newest}"
    require(how != "never" or newest is None, f"{rule}; use another --run-dir")
    rule = f"resume='must', but run_dir='{run_dir}' holds no checkpoint"
    require(how != "must" or newest is not None, f"{rule}; give the --run-dir of a run, or leave out --resume")
    return newest or 0


def resume(run_dir: Path, state: TrainState, step: int, how: str) -> tuple[int, TrainState, dict[str, Any]]:
    """The step of the newest checkpoint from `step` down that is whole, its state, and its place in the data.

    Once there is one, later steps and those that are not whole are set aside: the run will write its own.

    Args:
        state: its shapes.
        how: RunConfig.resume. A step that it names is taken or refused; many processes take or refuse the newest, too.

    Raises:
        CheckpointError: none is whole.
    """
    frozen = checkpoint.restore_base(run_dir, state.frozen)
    while True:
        try:
            moving, position = checkpoint.restore(run_dir, state.moving, step)
            break
        except checkpoint.CheckpointError as error:
            earlier = [other for other in checkpoint.saved_steps(run_dir) if 0 < other < step]
            if how.isdecimal() or jax.process_count() > 1 or not earlier:
                raise
            _say(f"WARNING: {error}. The run goes on after step {earlier[-1]} if that is whole")
            step = earlier[-1]
    for later in [other for other in checkpoint.saved_steps(run_dir) if other > step and is_first()]:
        _say(f"step {later} is set aside as {checkpoint.set_aside(run_dir, later)}")
    return step, TrainState(**moving._asdict(), frozen=frozen), position


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)


def check_text(run_dir: Path, held: str, now: str) -> None:
    """Hold a run that goes on to the text that it began with: its place in another would mean nothing.

    Raises:
        InputError: the text is another.
    """
    rule = f"run_dir='{run_dir}' began with a text of SHA-256 {held[:8]}…, and this one has {now[:8]}…"
    require(held == now, f"{rule}; use another --run-dir, or bring its text back")
