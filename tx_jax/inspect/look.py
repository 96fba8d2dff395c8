"""What a model does inside, of the very model that runs: nothing of its code is changed or repeated.

Calls of its attention and of its blocks are intercepted as JAX traces them. Attention is asked a second time, with the
unit vectors as values, which gives its weights themselves, whatever mask, bias, cap or cache it has.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx_jax.cache import Cache
from tx_jax.errors import require
from tx_jax.models import EncoderDecoder, Model
from tx_jax.modules.attention import Attention
from tx_jax.modules.block import Block
from tx_jax.stacked import SCANNED

SEEN = "seen"  # the collection in which what is found leaves the model


class Seen(NamedTuple):
    """What was found, layer by layer; of rows that are padding, anything.

    >>> seen = Seen(jnp.zeros((1, 3, 7)), jnp.zeros((1, 1, 3, 8)), attention=jnp.full((1, 1, 2, 3, 3), 1 / 3))
    >>> entropy(seen.attention).shape  # of each layer, row, head and query
    (1, 1, 2, 3)
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "L B T D"]  # after each block, before the last norm
    attention: Float[Array, "L B N T S"]  # who attends to whom; over S it sums to 1, but for queries that see nothing
    cross: Float[Array, "L B N T S"] | None = None  # to the source, of an encoder-decoder
    encoder_hidden: Float[Array, "Le B S D"] | None = None
    encoder_attention: Float[Array, "Le B N S S"] | None = None
    cache: Cache | None = None


def look(
    model: Model,
    params: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "#B T"] | None = None,
    *,
    source: Int[Array, "B S"] | None = None,
    source_positions: Int[Array, "#B S"] | None = None,
    memory: Cache | None = None,
    segments: Int[Array, "#B T"] | None = None,
    prefix: Int[Array, " B"] | None = None,
    types: Int[Array, "#B T"] | None = None,
    cache: Cache | None = None,
) -> Seen:
    """A forward pass, with the attention weights of all heads and the hidden vectors of all layers.

    It holds (L, B, N, T, S) weights: look at a sentence, not at a book.

    Arguments are those of the model's `hidden`.

    Args:
        tokens: of the target, a start first, where there is a source.
        source, source_positions: of an encoder-decoder; or memory, what its `encode` gave, (B, S, K, H) a layer.
        cache: attention is then over its slots.

    >>> import tx_jax as tx
    >>> model = tx.build(tx.ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> seen = look(model, tx.init_params(model, jax.random.key(0)), jnp.array([[1, 2, 3]]))
    >>> seen.attention.shape, bool((abs(seen.attention.sum(-1) - 1) < 1e-5).all())
    ((1, 1, 2, 3, 3), True)

    Raises:
        InputError: the layers are stacked, a source is lacking, or something is given that the model does not read.
    """
    both, kind = isinstance(model, EncoderDecoder), type(model).__name__
    inputs = {"source": source, "source_positions": source_positions, "memory": memory, "segments": segments}
    inputs |= {"prefix": prefix, "types": types, "cache": cache}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    unread = ", ".join(name for name in inputs if name not in inspect.signature(model.hidden).parameters)
    require(not unread, f"{kind} reads no {unread}; leave {unread}= out")
    n_sources = len({"source", "memory"} & inputs.keys())
    require(not both or n_sources, f"{kind} reads a source; give source=")
    require(n_sources < 2, "source= and memory= are of the same; leave one out")
    scanned = [name for name, part in params.items() if isinstance(part, dict) and SCANNED in part]
    require(not scanned, f"the layers of {', '.join(scanned)} are stacked; look at unstack_layers(params)")

    def read(module: Any) -> Any:
        x, cache = module.hidden(tokens, positions, **inputs)
        return module.logits(x), cache

    with nn.intercept_methods(_record):
        (logits, cache), state = cast(Any, model.apply)({"params": params}, method=read, mutable=[SEEN])
    parts = state[SEEN]
    of_tokens, encoder = parts["decoder" if both else "stack"], parts.get("encoder")
    return Seen(
        logits,
        _layers(of_tokens, "hidden"),
        _layers(of_tokens, "attention", "weights"),
        _layers(of_tokens, "cross_attention", "weights") if both else None,
        _layers(encoder, "hidden") if encoder else None,
        _layers(encoder, "attention", "weights") if encoder else None,
        cache,
    )


def _record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """A call of a module's method, as it is; what it shows goes to SEEN."""
    result, module = call(*args, **kwargs), context.module
    if isinstance(module, Attention) and context.method_name == "heads":
        q, memory, plan, _ = args
        S = memory.v.shape[2]
        units = jnp.broadcast_to(jnp.eye(S), (*memory.v.shape[:2], S, S))
        weights = call(q, memory._replace(v=units), plan, True)
        module.sow(SEEN, "weights", weights.reshape(*q.shape[:3], S).swapaxes(1, 2))
    if isinstance(module, Block) and context.method_name == "__call__":
        module.sow(SEEN, "hidden", result[0])
    return result


def _layers(stack: dict, *path: str) -> Array:
    """What each block has shown under this name, layers first."""

    def of_block(i: int) -> Array:
        part: Any = stack[f"blocks_{i}"]
        for name in path:
            part = part[name]
        return part[0]

    return jnp.stack([of_block(i) for i in range(len(stack))])


def logit_lens(model: Model, params: dict, hidden: Float[Array, "L B T D"]) -> Float[Array, "L B T V"]:
    """The logits that each layer's hidden vectors would give, were it the last; of the last they are the model's own.

    >>> import tx_jax as tx
    >>> model = tx.build(tx.ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params = tx.init_params(model, jax.random.key(0))
    >>> seen = look(model, params, jnp.array([[1, 2, 3]]))
    >>> bool(jnp.allclose(logit_lens(model, params, seen.hidden)[-1], seen.logits, atol=1e-5))
    True

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    def read(module: Any, x: Array) -> Array:
        stack = module.decoder if isinstance(module, EncoderDecoder) else module.stack
        return module.logits(x if module.cfg.norm_order == "post" else stack.last_norm(x))

    apply: Any = model.apply
    return jnp.stack([apply({"params": params}, x, method=read) for x in hidden])


def entropy(weights: Float[Array, "*b S"]) -> Float[Array, "*b"]:
    """How spread attention is, in nats: 0 on one token, ln S over all alike.

    >>> [f"{nats:.4f}" for nats in entropy(jnp.array([[1.0, 0.0], [0.5, 0.5]]))]
    ['0.0000', '0.6931']
    """
    return jax.scipy.special.entr(weights).sum(-1)
