"""One training step as a pure function, (state, batch) → (state, metrics): not jitted, and ignorant of the model.

Its random key is a function of the step, so a checkpoint needs no other state. With an axis_name it adds the sums
of all devices before the one division, so any number of devices gives the same update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tx_jax.models import Model, init_params
from tx_jax.training.losses import cross_entropy
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
    """Everything that a run is made of, but for its place in the data."""

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
    """Of one step, over all devices."""

    loss: Float[Array, ""]  # nats per token, smoothing included
    grad_norm: Float[Array, ""]  # global, before clipping
    n_tokens: Float[Array, ""]  # tokens with weight


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    params: dict | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, with these parameters or fresh ones; `ema`: of a run that keeps a mean."""
    init_key, key = jax.random.split(key)
    params = init_params(model, init_key) if params is None else params
    mean = jax.tree.map(jnp.copy, params) if ema else ()  # buffers of its own: a launcher gives both up
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, ema=mean)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    ema_rate: float = 0.0,
    axis_name: str | None = None,
    assemble: Callable[[Any, Any], dict] = lambda params, frozen: params,
) -> Callable[[TrainState, Examples], tuple[TrainState, Metrics]]:
    """A pure (state, batch) → (state, metrics).

    Args:
        ema_rate: the share of the mean so far in state.ema (`init_state(…, ema=True)`); less in the first steps, so
            that those do not weigh for long: (1 + step) / (10 + step) at most, as in TensorFlow. 0: the mean is that
            of a schedule-free optimiser, or none is kept.
        axis_name: that of a `pmap`, if it runs inside one.
        assemble: (state.params, state.frozen) → the model's parameters, such as adapters with what they adapt.
    """

    def loss(params: dict, frozen: Any, batch: Examples, key: PRNGKeyArray) -> tuple[Array, Array]:
        whole = assemble(params, frozen)
        logits, _ = model.apply({"params": whole}, **batch.inputs, deterministic=False, rngs={"dropout": key})
        return cross_entropy(logits, batch.targets, batch.weights, label_smoothing=label_smoothing)

    def step(state: TrainState, batch: Examples) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        (total, count), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.frozen, batch, key)
        if axis_name is not None:
            total, count, grads = jax.lax.psum((total, count, grads), axis_name)
        divisor = jnp.where(count > 0, count, 1.0)  # a batch of padding alone has a gradient of 0
        grads = jax.tree.map(lambda g: g / divisor, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = Metrics(total / divisor, optax.tree.norm(grads), count)
        share = jnp.minimum(ema_rate, (1 + state.step) / (10 + state.step))
        mean = state.ema
        if ema_rate:
            mean = jax.tree.map(lambda old, new: share * old + (1 - share) * new, mean, params)
        elif jax.tree.leaves(mean):
            mean = mean_params(opt_state, params)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=mean), metrics

    return step


def make_eval_step(model: Model) -> Callable[[dict, Examples], tuple[Array, Array]]:
    """A pure (params, batch) → (sum of nats, count of tokens), without dropout or smoothing."""

    def step(params: dict, batch: Examples) -> tuple[Array, Array]:
        logits, _ = model.apply({"params": params}, **batch.inputs)
        return cross_entropy(logits, batch.targets, batch.weights)

    return step
