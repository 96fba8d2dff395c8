"""Pictures as matplotlib figures: a notebook shows them, `figure.savefig(path)` keeps them.

matplotlib is imported when the first is drawn, and never its global state (pyplot).
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tx_jax.cache import slots_of
from tx_jax.config import ModelConfig
from tx_jax.data.libraries import package
from tx_jax.data.subwords import Subwords
from tx_jax.errors import require
from tx_jax.inspect.look import look
from tx_jax.inspect.page import check_words
from tx_jax.models import EncoderDecoder
from tx_jax.modules.positions import SCHEMES
from tx_jax.ops.masks import Mask
from tx_jax.run_dir import METRICS, read_metrics
from tx_jax.translate import Translation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_of(
    width: int | float, height: int | float, rows: int = 1, columns: int = 1, **how: Any
) -> tuple["Figure", np.ndarray]:
    """An empty figure of so many inches, and its axes, by row and column.

    Raises:
        InputError: matplotlib is not installed.
    """
    package("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def check_picture(path: str | Path) -> None:
    """Hold a picture to a name that can be drawn to, before anything is computed.

    Raises:
        InputError: matplotlib is not installed, path does not end with .png or .svg, or its directory does not exist.
    """
    package("matplotlib", "plots")
    require(Path(path).suffix in (".png", ".svg"), f"{path} is not a picture's name; end it with .png or .svg")
    folder = Path(path).absolute().parent
    require(folder.is_dir(), f"{folder} does not exist, where {Path(path).name} is to be drawn; make it first")


def plot_metrics(run_dir: str | Path) -> "Figure":
    """The losses of run_dir/metrics.jsonl.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run_dir:
    ...     _ = Path(run_dir, "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}')
    ...     plot_metrics(run_dir).axes[0].get_ylabel()
    'loss, nats per token'

    Raises:
        InputError: matplotlib is not installed, or there is no metrics.jsonl.
    """
    log = Path(run_dir) / METRICS
    require(log.is_file(), f"run_dir='{run_dir}' holds no {METRICS}; name the --run-dir of a training run")
    records = read_metrics(Path(run_dir))
    figure, ((axes,),) = figure_of(7, 4)
    for name, label, marker in (("loss", "training", ""), ("valid_loss", "validation", "o")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
            axes.legend()
    axes.set(xlabel="optimiser step", ylabel="loss, nats per token", title=Path(run_dir).name)
    axes.grid(alpha=0.3)
    return figure


def save_metrics(run_dir: Path) -> None:
    """`plot_metrics` as run_dir/plots/loss.png, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    plot_metrics(run_dir).savefig(path, dpi=120)


def plot_attention(
    weights: Float[Array | np.ndarray, "L T S"], queries: Sequence[str], keys: Sequence[str] | None = None
) -> "Figure":
    """Who attends to whom, a picture a layer, with the words of both on the axes (keys of None: the queries').

    >>> plot_attention(np.full((2, 1, 1), 1.0), ["a"]).axes[1].get_title()
    'layer 2'

    Raises:
        InputError: matplotlib is not installed, or there are not as many words as weights.
    """
    return plot_heads(np.asarray(weights)[:, None], queries, keys)


def plot_heads(
    weights: Float[Array | np.ndarray, "L N T S"],
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> "Figure":
    """Who attends to whom, a row a layer and a column a head: `look(…).attention[:, b]`.

    Args:
        layers: those that are drawn, by their numbers from 1; None: all.

    >>> [axes.get_title() for axes in plot_heads(np.ones((1, 2, 1, 1)), ["a"]).axes]  # the last: its scale
    ['layer 1, head 1', 'layer 1, head 2', '']

    Raises:
        InputError: there are not as many words as weights, no such layer, or matplotlib is not installed.
    """
    keys = queries if keys is None else keys
    check_words(weights, queries, keys)
    L, N, T, S = weights.shape
    shown = range(1, L + 1) if layers is None else layers
    rule = f"layers={layers} must be one or more, from 1 to {L}"
    require(len(shown) and all(1 <= layer <= L for layer in shown), rule)
    drawn = np.asarray(weights)[np.array(shown) - 1]
    size = N * (0.25 * S + 0.5) + 1.5, len(shown) * (0.25 * T + 0.5) + 0.8
    figure, panels = figure_of(*size, len(shown), N, sharex=True, sharey=True)
    for (row, head), axes in np.ndenumerate(panels):
        axes.imshow(drawn[row, head], cmap="Blues", vmin=0, vmax=drawn.max(), aspect="auto")
        axes.set_title(f"layer {shown[row]}" + f", head {head + 1}" * (N > 1), fontsize=8)
        axes.set_xticks(range(S), keys, rotation=90, fontsize=8, parse_math=False)
    for axes in panels[:, 0]:
        axes.set_yticks(range(T), queries, fontsize=8, parse_math=False)
    figure.colorbar(panels[0, 0].get_images()[0], ax=panels, label="weight", aspect=50)
    return figure


def plot_translation(
    model: EncoderDecoder, params: dict, tokenizer: Subwords, best: Translation, start_id: int | tuple[int, ...]
) -> "Figure":
    """What a translation attends to in its source, as the mean over heads.

    >>> import tx_jax as tx
    >>> from tx_jax.data.subwords import SubwordTokenizer
    >>> tokenizer = SubwordTokenizer.train("low lower", 260, ("<s>", "</s>"))
    >>> model = tx.build(tx.ModelConfig(stack="encoder_decoder", vocab_size=260, d_model=8, n_heads=2, n_layers=1))
    >>> params, ids = tx.init_params(model, jax.random.key(0)), np.array([9, 1])
    >>> plot_translation(model, params, tokenizer, Translation("", 0.0, ids, ids), start_id=0).axes[0].get_title()
    'layer 1'

    Raises:
        InputError: matplotlib is not installed.
    """
    ids = best.ids
    start = start_id if isinstance(start_id, tuple) else (start_id,)
    tokens = jnp.asarray([[*start, *ids[:-1]]], jnp.int32)
    seen = look(model, params, tokens, source=jnp.asarray(best.source_ids)[None])
    weights = np.asarray(seen.cross)[:, 0, :, len(start) - 1 :].mean(axis=1)
    source, target = ([tokenizer.decode([i], special=True).strip() for i in part] for part in (best.source_ids, ids))
    return plot_attention(weights, target, source)


def plot_positions(cfg: ModelConfig, n: int = 64) -> "Figure":
    """How the model's scheme tells n positions apart: what it adds, how far it turns, what it adds to scores.

    >>> plot_positions(ModelConfig(d_model=8, n_heads=2), n=4).axes[1].get_xlabel()
    'distance, tokens'

    Raises:
        InputError: matplotlib is not installed, or n is below 1.
    """
    require(n >= 1, f"n={n} positions must be at least 1")
    index, causal = jnp.arange(n)[None], cfg.stack != "encoder"
    scheme = SCHEMES[cfg.positions](cfg, causal)

    def said(scheme: Any) -> tuple:
        added = scheme.add(jnp.zeros((1, n, cfg.d_model)), index)
        return added[0], scheme.turn(index), scheme.bias(index, index)

    (added, turn, bias), _ = scheme.init_with_output(jax.random.key(0), method=said)
    figure, ((left, right),) = figure_of(10, 4, 1, 2)
    if bias is not None:
        shown, what, axes = bias[0, 0], "added to the scores of head 1", ("key", "query")
    elif turn is not None:
        shown, what, axes = turn.cos[0, :, 0], "cosine of each pair's angle", ("pair, the fastest first", "position")
    else:
        what, axes = "added to embeddings" if added.any() else "nothing is added", ("column", "position")
        shown = added
    drawn = ", as first drawn" * (cfg.positions in ("learned", "t5"))  # and not yet trained
    figure.colorbar(left.imshow(np.asarray(shown, np.float32), aspect="auto", cmap="RdBu", interpolation="nearest"))
    left.set(xlabel=axes[0], ylabel=axes[1], title=f"{cfg.positions}: {what}{drawn}")
    right.set(xlabel="distance, tokens")
    if bias is None:
        x = np.asarray(shown, np.float64)
        right.plot(x @ x[0] / (np.linalg.norm(x[0]) ** 2 or 1))
        right.set_title("product of a position with the first")
    else:
        heads = np.asarray(bias, np.float32)[0, :, -1]
        lines = right.plot(n - 1 - np.arange(n), heads.T)
        right.legend([lines[0], lines[-1]], ["head 1", f"head {len(heads)}"])
        right.set_title("added to the last query's scores, a line a head")
    right.grid(alpha=0.3)
    return figure


MASKS = {  # of n queries and keys
    "causal": lambda n: Mask(causal=True),
    "bidirectional": lambda n: Mask(),
    "sliding window": lambda n: Mask(causal=True, window=max(n // 3, 1)),
    "window and sinks": lambda n: Mask(causal=True, window=max(n // 3, 1), n_sinks=2),
    "prefix": lambda n: Mask(causal=True, prefix=jnp.array([n // 2])),
    "packed documents": lambda n: Mask(causal=True, q_segments=_halves(n), k_segments=_halves(n)),
    "padding": lambda n: Mask(causal=True, q_positions=_two_thirds(n), k_positions=_two_thirds(n)),
}


def _halves(n: int) -> Array:
    return jnp.arange(n)[None] * 2 // n


def _two_thirds(n: int) -> Array:
    return jnp.where(jnp.arange(n) < 2 * n // 3, jnp.arange(n), -1)[None]


def plot_masks(n: int = 12) -> "Figure":
    """The shapes of attention: who may see whom, of n tokens.

    >>> plot_masks(4).axes[0].get_title()
    'causal'

    Raises:
        InputError: matplotlib is not installed.
    """
    figure, panels = figure_of(2 * len(MASKS), 2.4, 1, len(MASKS))
    for axes, (name, make) in zip(panels[0], MASKS.items(), strict=True):
        axes.imshow(np.asarray(make(n).materialize(n, n)[0]), cmap="Greens", vmin=0, vmax=1.4)
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    return figure


def plot_cache(n_tokens: int, n_slots: int, n_sinks: int = 0) -> "Figure":
    """Which position each slot of a cache holds, after each token: a ring where there are fewer slots than tokens.

    >>> plot_cache(n_tokens=5, n_slots=4).axes[0].get_xlabel()
    'slot'

    Raises:
        InputError: matplotlib is not installed, or a number is below 1 (n_sinks: below 0, or leaves no slot to a ring).
    """
    require(n_tokens >= 1 and n_slots >= 1, f"n_tokens={n_tokens}, n_slots={n_slots} must be at least 1")
    require(0 <= n_sinks < n_slots, f"n_sinks={n_sinks} must be from 0 to {n_slots - 1}, less than n_slots")
    held = np.full((n_tokens + 1, n_slots), -1)
    slots = np.asarray(slots_of(jnp.arange(n_tokens)[None], n_slots, n_sinks))[0]
    for t, slot in enumerate(slots):
        held[t + 1] = held[t]
        held[t + 1, slot] = t
    figure, ((axes,),) = figure_of(0.3 * n_slots + 2, 0.2 * n_tokens + 1)
    image = axes.imshow(np.where(held[1:] < 0, np.nan, held[1:]), cmap="viridis", aspect="auto")
    figure.colorbar(image, label="position")
    axes.set(xlabel="slot", ylabel="after token", title="position that each slot holds")
    return figure
