"""How a run goes on: from which checkpoint, with which data, in a directory that no other process writes to."""

import sys
from pathlib import Path
from typing import Any

import jax

from tx_jax import checkpoint
from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.vocabulary_files import find_tokenizer, fingerprint
from tx_jax.errors import require
from tx_jax.processes import is_first
from tx_jax.run_config import RunConfig
from tx_jax.run_dir import METRICS, changes_of, check_fields, check_run_dir, claim_run_dir, fields_of
from tx_jax.training.step import TrainState
from tx_jax.training.tasks import parse_mixture

MIXTURE = "data.mixture"
TEXTS = frozenset({"data.path", "data.corpus", "data.target_path", MIXTURE})  # name texts, known by their SHA-256


def find_step(run_dir: Path, cfg: RunConfig, tokenizer: AnyTokenizer) -> int:
    """The step at which this run goes on in run_dir; 0: it begins.

    Raises:
        InputError: run_dir holds another run, or another tokenizer, that of another text; or cfg.resume does not fit.
    """
    held = find_tokenizer(run_dir / "tokenizer")
    then, now = ("" if held is None else fingerprint(held)), fingerprint(tokenizer)
    rule = f"run_dir='{run_dir}' holds a run with another tokenizer, such as that of another text"
    remedy = "use another --run-dir, or its text, --data.tokenizer and --init"
    require(held in (None, tokenizer), f"{rule}: of SHA-256 {then[:8]}…, not {now[:8]}…; {remedy}")
    newest, how, end = checkpoint.latest_step(run_dir), cfg.resume, cfg.train.n_steps
    step = newest or 0
    check_run_dir(run_dir, cfg, TEXTS if step else frozenset())
    if how.isdecimal():
        require(int(how), f"resume={how!r} is before the first step; use another --run-dir to begin anew")
        step = int(checkpoint.step_dir(run_dir, int(how)).name)
    rule = f"resume='never', but run_dir='{run_dir}' holds a run up to step {newest}"
    require(how != "never" or newest is None, f"{rule}; use another --run-dir")
    rule = f"resume='must', but run_dir='{run_dir}' holds no checkpoint"
    require(how != "must" or newest is not None, f"{rule}; give the --run-dir of a run, or leave out --resume")
    rule = f"train.n_steps={end} is before step {step}, up to which run_dir='{run_dir}' has come"
    require(step <= end, f"{rule}; give more, or --resume an earlier step")
    if newest is None and (run_dir / METRICS).exists():
        _say(f"WARNING: run_dir='{run_dir}' has a log but no checkpoint: the run begins anew")
    return step


def settle(run_dir: Path, cfg: RunConfig, tokenizer: AnyTokenizer) -> int:
    """Write down that the run is this one: all that may be refused has not been."""
    claim_run_dir(run_dir, cfg, TEXTS)
    for part in (run_dir / "tokenizer").glob("*.part"):  # of a kill
        part.unlink(missing_ok=True)
    tokenizer.save(run_dir / "tokenizer")
    return 0


def identity(cfg: RunConfig, tokenizer: AnyTokenizer, text_sha256: str) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    return {"config": fields_of(cfg), "tokenizer_sha256": fingerprint(tokenizer), "text_sha256": text_sha256}


def resume(
    run_dir: Path, cfg: RunConfig, state: TrainState, step: int, now: dict[str, Any]
) -> tuple[int, TrainState, Any]:
    """The step of the newest checkpoint from `step` down that is whole, its state, and its place in the data, if any.

    Once there is one, later steps and those that are not whole are set aside: the run will write its own. In data that
    were changed on purpose a place would mean nothing: they begin anew. A step that cfg.resume names is taken or
    refused; many processes take or refuse the newest, too.

    Args:
        state: its shapes.
        now: the `identity` of this run.

    Raises:
        CheckpointError: none is whole.
        InputError: it is of another run.
    """
    frozen = checkpoint.restore_base(run_dir, state.frozen)
    while True:
        try:
            moving, saved = checkpoint.restore(run_dir, state.moving, step)
            break
        except checkpoint.CheckpointError as error:
            earlier = [other for other in checkpoint.saved_steps(run_dir) if 0 < other < step]
            if cfg.resume.isdecimal() or jax.process_count() > 1:
                raise
            if not earlier:
                raise error.instead("no earlier one is whole; use another --run-dir to begin anew") from None
            _say(f"WARNING: {error.instead(f'the run goes on after step {earlier[-1]} if that is whole')}")
            step = earlier[-1]
    anew = _check_same(run_dir, cfg, saved, now)
    for later in [other for other in checkpoint.saved_steps(run_dir) if other > step and is_first()]:
        _say(f"step {later} is set aside as {checkpoint.set_aside(run_dir, later)}")
    return step, TrainState(**moving._asdict(), frozen=frozen), None if anew else saved["batches"]


def _check_same(run_dir: Path, cfg: RunConfig, saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the data, or their order, are others than those that a checkpoint was saved with, as was asked for.

    What was asked for before counts where config.json says so, and the checkpoint does not: none was saved since.

    Raises:
        InputError: it was not, or another field differs.
    """
    then, here = saved.get("config", {}), now["config"]
    asked = changes_of(run_dir).items()
    changes = cfg.changes | {name for name, value in asked if then.get(name) != here[name] == value}
    held, text = saved["text_sha256"], now["text_sha256"]
    path = here["data.path"]
    of = f"that of data.path={path!r} has" if path else "this one has"
    rule = f"run_dir='{run_dir}' began with a text of SHA-256 {held[:8]}…, and {of} {text[:8]}…"
    remedy = "use another --run-dir, bring its text back, or begin with this one by --change data.path"
    require(held == text or changes & TEXTS, f"{rule}; {remedy}")
    words = now["tokenizer_sha256"]
    theirs = saved.get("tokenizer_sha256", words)  # 0.1 did not say
    rule = f"run_dir='{run_dir}' has a checkpoint with a tokenizer of SHA-256 {theirs[:8]}…, not {words[:8]}…"
    require(theirs == words, f"{rule}; bring tokenizer/ back, or use another --run-dir")
    names = TEXTS if _shares(then) == _shares(here) else TEXTS - {MIXTURE}
    old = check_fields(f"run_dir='{run_dir}' has a checkpoint of a run", then, cfg, changes | names)
    for name, value in old.items():
        ends = name == "train.n_steps" and cfg.optim.schedule != "constant"
        also = f"; its {cfg.optim.schedule} schedule ends there, too" if ends else ""
        _say(f"{name} is {here[name]!r} from here on, and was {value!r}{also}")
    if held != text:
        _say(f"the text is that of SHA-256 {text[:8]}… from here on, and was that of {held[:8]}…")
    anew = held != text or any(name.startswith(("data.", "train.seed")) and name not in names for name in old)
    if anew:
        _say("the data begin at their first batch")
    return anew


def _shares(fields: dict[str, Any]) -> list[float]:
    return [share for _, share in parse_mixture(fields[MIXTURE])] if fields.get(MIXTURE) else []


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)
