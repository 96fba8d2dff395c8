"""Texts that a run writes on the way, to show what it has learnt: one kind for each stack."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.batches import Batch, PairBatch
from tx_jax.decoding.generate import generate
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import require
from tx_jax.run_config import RunConfig

Sample = Callable[[Any, dict, jax.Array], str]  # (model, params, key) → a text


def go_on(cfg: RunConfig, tokenizer: Any, batch: Batch | None = None) -> Sample:
    """A text that goes on from train.sample_prompt, at temperature 0.8."""
    prompt, most = read_prompt(cfg, tokenizer), cfg.train.sample_tokens
    how = {"sampler": Sampler(temperature=0.8), "prefix_lm": cfg.data.objective == "prefix_lm"}

    def sample(model: Any, params: dict, key: jax.Array) -> str:
        room = min(most, model.cfg.max_len - prompt.shape[1])
        new = generate(model, params, prompt, max_new_tokens=room, key=key, **how)
        ids = np.concatenate([prompt[0], np.asarray(new.tokens[0])])
        return tokenizer.decode(ids[ids < tokenizer.vocab_size])  # a table may be padded

    return sample


def fill_in(cfg: RunConfig, tokenizer: Any, batch: Batch) -> Sample:
    """A masked text of the validation split, and what the model takes for it."""
    tokens, hidden = jnp.asarray(batch.tokens[:1]), batch.weights[0] > 0

    def sample(model: Any, params: dict, key: jax.Array) -> str:
        logits, _ = model.apply({"params": params}, tokens)
        guess = np.where(hidden, np.asarray(logits[0].argmax(-1)), batch.tokens[0])
        return f"{tokenizer.decode(batch.tokens[0], special=True)}\n→ {tokenizer.decode(guess, special=True)}"

    return sample


def restore_spans(cfg: RunConfig, tokenizer: Any, batch: PairBatch) -> Sample:
    """A corrupted text of the validation split, and what the model says of its spans."""
    source, start, T = jnp.asarray(batch.source[:1]), batch.tokens[:1, :1], batch.tokens.shape[1]

    def sample(model: Any, params: dict, key: jax.Array) -> str:
        memory = model.apply({"params": params}, source, method="encode")
        new = generate(model, params, start, max_new_tokens=T, memory=memory, eos_id=tokenizer.eos_ids)
        parts = (source[0], np.asarray(new.tokens[0])[: int(new.lengths[0])], batch.targets[0])
        text, told, gold = (tokenizer.decode(part, special=True) for part in parts)
        return f"{text}\n→ {told}\n  ({gold})"

    return sample


SAMPLES = {"decoder": go_on, "encoder": fill_in, "encoder_decoder": restore_spans}  # of a text's task, by its model


def read_prompt(cfg: RunConfig, tokenizer: AnyTokenizer) -> np.ndarray:
    """The ids (1, T) of the prompt of samples on the way.

    Raises:
        InputError: there is none, or it leaves no room to go on.
    """
    prompt, room = tokenizer.encode(cfg.train.sample_prompt or ""), cfg.model.max_len
    rule = f"train.sample_prompt has {len(prompt)} tokens; it must have 1 to {room - 1}, less than model.max_len"
    require(0 < len(prompt) < room, rule)
    return prompt[None]
