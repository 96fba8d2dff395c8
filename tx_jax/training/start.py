"""What a run starts from: a tokenizer of its text and fresh weights, or both of another model (RunConfig.init).

And what is trained of it: all parameters, or adapters (RunConfig.lora) beside a base that stays as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from tx_jax.checkpoint import latest_step
from tx_jax.config import OF_THE_RUN, ModelConfig
from tx_jax.convert.sources import AnyTokenizer, find_source, load_tokenizer, open_source
from tx_jax.errors import require
from tx_jax.lora import init_lora, merge_lora
from tx_jax.models import Model, init_params
from tx_jax.run_config import LoraConfig, RunConfig
from tx_jax.run_dir import changes_of, read_config
from tx_jax.training.step import TrainState, init_state


class Start(NamedTuple):
    """What is there before the first step."""

    cfg: RunConfig  # with the model that is trained
    tokenizer: AnyTokenizer
    load: Callable[[Mesh | None], dict] | None = None  # (mesh) → parameters; None: the run's own, or fresh


def open_start(cfg: RunConfig, make_tokenizer: Callable[[], AnyTokenizer], special_tokens: Sequence[str] = ()) -> Start:
    """The start of a run. One that goes on needs nothing but its run directory.

    Args:
        make_tokenizer: of a run without cfg.init.
        special_tokens: that the objective needs of it.

    Raises:
        InputError: the tokenizer cannot be made, cfg.init is not there, or the two do not fit together.
    """
    goes_on = latest_step(cfg.run_dir)  # 0: weights that were put there, with which nothing was trained
    if cfg.init is None:
        changes = cfg.changes | changes_of(cfg.run_dir).keys() if goes_on else ()
        keeps = any(name.startswith("data.") for name in changes)  # in other data, its own words
        tokenizer = load_tokenizer(cfg.run_dir) if keeps else make_tokenizer()
        return Start(dataclasses.replace(cfg, model=fill_vocabulary(cfg.model, tokenizer)), tokenizer)
    if goes_on:
        model, tokenizer, load = read_config(cfg.run_dir).model, load_tokenizer(cfg.run_dir), None
    else:
        path = find_source(cfg.init)
        source, tokenizer = open_source(path), load_tokenizer(path)
        model, load = source.cfg, functools.partial(source.load, "float32")
    stack = model.stack
    rule = (
        f"init={cfg.init!r} cannot begin a run with data.objective={cfg.data.objective!r}, which has tokens of its own"
    )
    require(not special_tokens, f"{rule}; leave it out")
    require(stack == "decoder", f"init={cfg.init!r} is an {stack}, which does not go on from text; give a decoder")
    ids, known, long = tokenizer.vocab_size, model.vocab_size or 0, cfg.data.seq_len
    require(ids <= known, f"init={cfg.init!r} has a tokenizer of {ids} ids for {known} vectors; they are of two models")
    require(long <= model.max_len, f"data.seq_len={long} exceeds the {model.max_len} tokens of {cfg.init}; shorten it")
    own = {name: getattr(cfg.model, name) for name in OF_THE_RUN}
    return Start(dataclasses.replace(cfg, model=dataclasses.replace(model, **own)), tokenizer, load)


def fill_vocabulary(cfg: ModelConfig, tokenizer: AnyTokenizer) -> ModelConfig:
    """The config with the tokenizer's vocabulary, if it has none of its own.

    Raises:
        InputError: its own is another: there would be ids without text, or text without ids.
    """
    V, needed = cfg.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size
    require(needed == V, f"model.vocab_size={V} is not the tokenizer's {needed}; leave it out")
    return dataclasses.replace(cfg, vocab_size=V)


def first_state(
    cfg: LoraConfig,
    model: Model,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    params: dict | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, with these parameters or fresh ones; with adapters, they are its `frozen`."""
    if not cfg.rank:
        return init_state(model, optimizer, key, params, ema=ema)
    lora_key, key = jax.random.split(key)
    base = init_params(model, key) if params is None else params
    adapters = init_lora(base, lora_key, cfg.rank, cfg.targets)
    return init_state(model, optimizer, key, adapters, ema=ema)._replace(frozen=base)


def make_assemble(cfg: LoraConfig) -> Callable[[Any, Any], dict]:
    """(state.params, state.frozen) → the parameters that the model runs on."""
    return (lambda lora, base: merge_lora(base, lora, cfg.alpha)) if cfg.rank else (lambda params, frozen: params)
