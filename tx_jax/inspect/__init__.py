"""To see a model: its attention, its hidden vectors, its architecture, its runs."""

from tx_jax.inspect.architecture import draw, gallery
from tx_jax.inspect.look import Seen, entropy, logit_lens, look
from tx_jax.inspect.page import Page, browse
from tx_jax.inspect.plots import (
    plot_attention,
    plot_cache,
    plot_heads,
    plot_masks,
    plot_metrics,
    plot_positions,
    plot_translation,
)

__all__ = [
    "Page",
    "Seen",
    "browse",
    "draw",
    "entropy",
    "gallery",
    "logit_lens",
    "look",
    "plot_attention",
    "plot_cache",
    "plot_heads",
    "plot_masks",
    "plot_metrics",
    "plot_positions",
    "plot_translation",
]
