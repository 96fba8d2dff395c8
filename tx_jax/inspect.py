"""Pictures of runs and of architectures."""

import importlib.util
import json
from pathlib import Path


def plot_metrics(run_dir: str | Path) -> Path | None:
    """Draw the losses of run_dir/metrics.jsonl to run_dir/plots/loss.png; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    records = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, marker in (("loss", "training", ""), ("valid_loss", "validation", "o")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel="optimiser step", ylabel="loss, nats per token", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
