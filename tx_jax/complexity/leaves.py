"""The parameters of a model, each with the component that it belongs to and how often a token meets it."""

import re
from typing import NamedTuple

import jax

from tx_jax.config import ModelConfig
from tx_jax.models import build, init_params

COMPONENTS = (  # of a parameter whose path has the pattern, the first that does
    (r"norm", "norms"),
    (r"cross_attention/", "cross-attention projections"),
    (r"attention/", "attention projections"),
    (r"mlp/", "feed-forward"),
    (r"^(head|pool)/", "head"),
    (r"embed/table|positions/table|^types$", "embedding"),
)
OF_SOURCE = r"^(encoder|source_embed)/|cross_attention/[kv](_norm)?/"  # what tokens of the source meet


class Leaf(NamedTuple):
    """A parameter; a token meets `times` of it, or of a kernel of experts one matrix `times`."""

    component: str
    name: str  # kernel, bias, scale, offset, table, types
    shape: tuple[int, ...]
    of_source: bool
    times: int = 1
    n_params: int = 0  # 0: it is another's too, and counted there

    @property
    def matrix(self) -> int:
        """Numbers that one product reads."""
        return self.shape[-2] * self.shape[-1]


def leaves(cfg: ModelConfig) -> list[Leaf]:
    """Those of `init_params`, and the uses of a table that is shared; nothing is allocated.

    >>> sum(leaf.n_params for leaf in leaves(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1)))
    848
    """
    shapes = jax.eval_shape(lambda key: init_params(build(cfg), key), jax.random.key(0))
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    found = [_leaf(cfg, "/".join(entry.key for entry in path), leaf) for path, leaf in paths]
    table, both = (cfg.vocab_size or 0, cfg.d_model), cfg.stack == "encoder_decoder"
    head = [Leaf("head", "kernel", table, of_source=False)] if cfg.tie_head else []
    source = [Leaf("embedding", "table", table, of_source=True)] if both and cfg.tie_source else []
    return found + head + source


def _leaf(cfg: ModelConfig, path: str, leaf: jax.ShapeDtypeStruct) -> Leaf:
    component = next(name for pattern, name in COMPONENTS if re.search(pattern, path))
    times = cfg.n_experts_per_token if "/experts/" in path else 0 if path.startswith("pool/") else 1
    times = {"q_norm": cfg.n_heads, "k_norm": cfg.K}.get(path.split("/")[-2] if "/" in path else "", times)
    of_source = re.search(OF_SOURCE, path) is not None
    return Leaf(component, path.split("/")[-1], leaf.shape, of_source, times, leaf.size)


def windows(cfg: ModelConfig, n_keys: int) -> list[int]:
    """How many of n_keys a query sees in each layer, causality apart.

    >>> windows(ModelConfig(n_layers=3, window=4, window_pattern="wf"), 10)
    [4, 10, 4]
    """
    seen = {"f": n_keys, "w": min(n_keys, n_keys if cfg.window is None else cfg.window + cfg.n_sinks)}
    return [seen[cfg.window_pattern[i % len(cfg.window_pattern)]] for i in range(cfg.n_layers)]
