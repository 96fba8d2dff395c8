"""One training step as a pure function, (state, batch) → (state, metrics): not jitted, and ignorant of the model.

Its random key is a function of the step, so a checkpoint needs no other state. With an axis_name it adds the sums
of all devices before the one division, so any number of devices gives the same update.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tx_jax.errors import require
from tx_jax.models import STACKS, Model, init_params
from tx_jax.modules.moe import LOSSES
from tx_jax.training.losses import chunked_cross_entropy
from tx_jax.training.optim import mean_params


@runtime_checkable  # for the shape checks under pytest
class Examples(Protocol):
    """A batch of any model: `inputs` are the keyword arguments of its call, with gold ids and their weights."""

    targets: Any
    weights: Any

    @property
    def inputs(self) -> dict[str, Any]: ...


class Moving(NamedTuple):
    """What a step changes: a checkpoint holds this."""

    step: Int[Array, ""]
    params: dict
    opt_state: optax.OptState
    key: PRNGKeyArray
    ema: Any = ()


class TrainState(NamedTuple):
    """Everything that a run is made of, but for its place in the data.

    >>> state = TrainState(jnp.int32(0), {"scale": jnp.ones(3)}, opt_state=(), key=jax.random.key(0))
    >>> state.moving._fields  # what a checkpoint holds
    ('step', 'params', 'opt_state', 'key', 'ema')
    """

    step: Int[Array, ""]  # optimiser steps done
    params: dict  # what is trained
    opt_state: optax.OptState
    key: PRNGKeyArray
    frozen: Any = ()  # what is not: the parameters that adapters are beside
    ema: Any = ()  # a mean of params over the steps so far, which is what to evaluate; (): none is kept

    @property
    def moving(self) -> Moving:
        return Moving(self.step, self.params, self.opt_state, self.key, self.ema)


class Metrics(NamedTuple):
    """Of one step, over all devices.

    >>> metrics = Metrics(*map(jnp.asarray, (0.0, 1.0, 32.0, False)))
    >>> float(jnp.exp(metrics.loss))  # the perplexity, where nothing is added to the loss
    1.0
    """

    loss: Float[Array, ""]  # nats per token, smoothing included
    grad_norm: Float[Array, ""]  # global, before clipping
    n_tokens: Float[Array, ""]  # tokens with weight
    skipped: Bool[Array, ""]  # whether loss or gradient is not finite: then nothing but the step has changed


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    params: dict | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, with these parameters or fresh ones; `ema`: of a run that keeps a mean.

    >>> from tx_jax import ModelConfig, build
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> int(init_state(model, optax.sgd(0.1), jax.random.key(0)).step)
    0
    """
    init_key, key = jax.random.split(key)
    params = init_params(model, init_key) if params is None else params
    mean = jax.tree.map(jnp.copy, params) if ema else ()  # buffers of its own: a launcher gives both up
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, ema=mean)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    z_loss_rate: float = 0.0,
    balance_rate: float = 0.0,
    router_z_rate: float = 0.0,
    ema_rate: float = 0.0,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
    assemble: Callable[[Any, Any], dict] = lambda params, frozen: params,
) -> Callable[[TrainState, Examples], tuple[TrainState, Metrics]]:
    """A pure (state, batch) → (state, metrics).

    Args:
        label_smoothing, z_loss_rate: of `cross_entropy`.
        balance_rate, router_z_rate: of what each layer of experts adds to the loss (modules/moe.py).
        ema_rate: the share of the mean so far in state.ema (`init_state(…, ema=True)`); less in the first steps, so
            that those do not weigh for long: (1 + step) / (10 + step) at most, as in TensorFlow. 0: the mean is that
            of a schedule-free optimiser, or none is kept.
        accumulate_steps: parts of a batch that are read in turn, every so manyth row in one. Their sums are added and
            divided once, so that the update is that of the whole batch, in less memory.
        axis_name: that of a `pmap`, if it runs inside one.
        assemble: (state.params, state.frozen) → the model's parameters, such as adapters with what they adapt.

    >>> from tx_jax import Batch, ModelConfig, build
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> ids, state = jnp.ones((2, 4), int), init_state(model, optax.sgd(0.1), jax.random.key(0))
    >>> step = jax.jit(make_train_step(model, optax.sgd(0.1)))
    >>> state, metrics = step(state, Batch(tokens=ids, targets=ids, weights=jnp.ones((2, 4))))
    >>> int(state.step), float(metrics.n_tokens)
    (1, 8.0)

    Raises:
        InputError: in a step, rows of a batch that are no multiple of accumulate_steps.
    """

    how = {"label_smoothing": label_smoothing, "z_loss_rate": z_loss_rate, "routing": (balance_rate, router_z_rate)}

    def loss(params: dict, frozen: Any, batch: Examples, key: PRNGKeyArray) -> tuple[Array, Array]:
        return _loss(model, assemble(params, frozen), batch, key, **how)

    def gradient(params: dict, frozen: Any, batch: Examples, key: PRNGKeyArray) -> Any:
        """((sum of nats, count of tokens), the gradient of the sum)."""
        whole = jax.value_and_grad(loss, has_aux=True)
        if accumulate_steps == 1:
            return whole(params, frozen, batch, key)

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            i, rows = part
            return jax.tree.map(jnp.add, sums, whole(params, frozen, rows, jax.random.fold_in(key, i))), None

        parts = jnp.arange(accumulate_steps), _parts(batch, accumulate_steps)
        shapes = jax.eval_shape(whole, params, frozen, jax.tree.map(lambda leaf: leaf[0], parts[1]), key)
        return jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), parts)[0]

    def step(state: TrainState, batch: Examples) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        (total, count), grads = gradient(state.params, state.frozen, batch, key)
        if axis_name is not None:
            total, count, grads = jax.lax.psum((total, count, grads), axis_name)
        divisor = jnp.where(count > 0, count, 1.0)  # a batch of padding alone has a gradient of 0
        grads = jax.tree.map(lambda g: g / divisor, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        # A branch, and not a choice of each leaf, which would hold the old and the new ones at once.
        state = jax.lax.cond(finite, updated, lambda state, grads: state, state, grads)
        return state._replace(step=state.step + 1), Metrics(total / divisor, norm, count, ~finite)

    def updated(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        mean = _mean(state, params, opt_state, ema_rate)
        return state._replace(params=params, opt_state=opt_state, ema=mean)

    return step


def _mean(state: TrainState, params: Any, opt_state: Any, rate: float) -> Any:
    """The mean of the parameters, with the new ones; as it is, if none is kept."""
    if rate:
        share = jnp.minimum(rate, (1 + state.step) / (10 + state.step))
        return jax.tree.map(lambda old, new: share * old + (1 - share) * new, state.ema, params)
    return mean_params(opt_state, params) if jax.tree.leaves(state.ema) else state.ema


def _parts(batch: Any, n: int) -> Any:
    """A batch of B rows as n of B / n: every n-th row in one, so that each device keeps the rows that it has."""

    def cut(leaf: Array) -> Array:
        rule = f"a batch of {len(leaf)} rows is no multiple of accumulate_steps={n}"
        require(len(leaf) % n == 0, f"{rule}; change the one or the other")
        return jnp.moveaxis(leaf.reshape(-1, n, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)


def make_eval_step(model: Model) -> Callable[[dict, Examples], tuple[Array, Array]]:
    """A pure (params, batch of (B, T) tokens) → (sum of nats, count of tokens), without dropout or smoothing.

    >>> from tx_jax import Batch, ModelConfig, build
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, ids = jax.tree.map(jnp.zeros_like, init_params(model, jax.random.key(0))), jnp.ones((2, 4), int)
    >>> nats, n_tokens = jax.jit(make_eval_step(model))(params, Batch(ids, ids, weights=jnp.ones((2, 4))))
    >>> f"{nats / n_tokens:.4f}"  # ln 7
    '1.9459'
    """

    def step(params: dict, batch: Examples) -> tuple[Array, Array]:
        return _loss(model, params, batch)

    return step


def _loss(
    model: Model, params: dict, batch: Examples, key: Any = None, routing: tuple[float, float] = (0.0, 0.0), **how: Any
) -> tuple[Array, Array]:
    """The sum of nats and the count of tokens, with dropout if there is a key; (B, T, V) logits are never held."""
    drop = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
    apply: Any = functools.partial(model.apply, mutable=[LOSSES])
    (hidden, _), left = apply({"params": params}, **batch.inputs, **drop, method="hidden")
    rest = {name: part for name, part in params.items() if name not in STACKS}  # what logits can need
    head: Any = functools.partial(model.apply, method="logits")
    total, count = chunked_cross_entropy(
        lambda rest, hidden: head({"params": rest}, hidden), rest,
        hidden, batch.targets, batch.weights, vocab_size=cast(int, model.cfg.vocab_size), **how,
    )  # fmt: skip
    return total + sum(jnp.dot(jnp.array(routing), leaf) for leaf in jax.tree.leaves(left)), count
