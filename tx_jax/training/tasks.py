"""What a run trains on: an objective's data as batches, and what there is to see and to score on the way.

Text and pairs have a function each; both give a Task, and the loop asks no further.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.batches import (
    Batch,
    Objective,
    PairBatch,
    next_token,
    split,
    train_batches,
    valid_batches,
    valid_windows,
)
from tx_jax.data.buckets import train_pair_batches, valid_pair_batches
from tx_jax.data.corpora import load_text
from tx_jax.data.objectives import mask_tokens, pair_lengths, prefix_lm, span_corruption, span_lengths
from tx_jax.data.pairs import Pairs, by_source, load_pairs, report_faults, split_pairs
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.decoding.generate import generate
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import require
from tx_jax.run_config import DataConfig, RunConfig
from tx_jax.training.start import open_start
from tx_jax.translate import score_texts, translate

Scores = dict[str, float]
Sample = Callable[[Any, dict, jax.Array], str]  # (model, params, key) → a text that shows what was learnt


class Task(NamedTuple):
    """What the loop needs to know of a run's data."""

    cfg: RunConfig  # with the model that is trained
    tokenizer: AnyTokenizer
    load: Callable[[Mesh | None], dict] | None  # (mesh) → parameters to begin with; None: the run's own, or fresh
    sha256: str  # of what is read: a place in other data would mean nothing
    batches: Any  # an endless iterator with get_state and set_state
    held_out: Sequence[Any]  # Examples
    sample: Sample
    score: Callable[[Any, dict], Scores] = lambda model, params: {}  # of a fixed part of the validation split
    test: Callable[[Any, dict], Scores] | None = None  # of the whole test split, at the end


def open_task(cfg: RunConfig) -> Task:
    """The task that cfg.data describes.

    Raises:
        InputError: what is to be read is not there or will not do, or does not fit the model.
    """
    return (translation_task if cfg.data.objective == "translate" else text_task)(cfg)


def text_task(cfg: RunConfig) -> Task:
    """Texts, cut into crops."""
    text = load_text(cfg.data.path, cfg.data.corpus)
    cfg, tokenizer, load = open_start(cfg, text, special_tokens(cfg.data))
    check_objective(cfg)
    train = cfg.train
    if train.sample_prompt is None and cfg.model.stack == "decoder":
        train = dataclasses.replace(train, sample_prompt="\n" if "\n" in text else text[0])
        cfg = dataclasses.replace(cfg, train=train)
    train_ids, valid_ids = split(tokenizer.encode(text), cfg.data.valid_fraction)
    shape = {"seq_len": cfg.data.seq_len, "batch_size": cfg.data.batch_size}
    objective = make_objective(cfg.data.objective, tokenizer)
    if objective is next_token:
        held_out = valid_batches(valid_ids, **shape)
    else:
        held_out = valid_windows(valid_ids, objective, **shape)
    return Task(
        cfg, tokenizer, load, hashlib.sha256(text.encode()).hexdigest(),
        iter(train_batches(train_ids, **shape, seed=train.seed, objective=objective)), held_out,
        SAMPLES[cfg.model.stack](cfg, tokenizer, held_out[0]),
    )  # fmt: skip


def check_objective(cfg: RunConfig) -> None:
    """Hold the model to what its objective needs.

    Raises:
        InputError: prefix-LM with a window, or corrupted texts that are longer than the model's positions.
    """
    data, model = cfg.data, cfg.model
    sees_all = data.objective != "prefix_lm" or model.window is None
    require(sees_all, f"model.window={model.window} hides a prefix; leave it out with data.objective='prefix_lm'")
    longest = max(pair_lengths(data.seq_len)) if data.objective == "span_corruption" else 0
    rule = f"data.seq_len={data.seq_len} gives corrupted texts of {longest} tokens, more than model.max_len"
    require(longest <= model.max_len, f"{rule}={model.max_len}; raise it")


def special_tokens(data: DataConfig) -> tuple[str, ...]:
    """What the objective needs besides the text's own tokens."""
    n_spans = span_lengths(data.seq_len)[1] if data.objective == "span_corruption" else 0
    sentinels = (f"<extra_id_{i}>" for i in range(n_spans))  # T5's names
    return {"masked_lm": ("<mask>",), "span_corruption": ("<s>", "</s>", *sentinels)}.get(data.objective, ())


def make_objective(name: str, tokenizer: AnyTokenizer) -> Objective:
    """The objective with the ids that its tokenizer has for it."""
    special, V = getattr(tokenizer, "special_tokens", {}), tokenizer.vocab_size
    made: dict[str, Callable[[], Objective]] = {
        "next_token": lambda: next_token,
        "prefix_lm": lambda: prefix_lm,
        "masked_lm": lambda: functools.partial(mask_tokens, mask_id=special["<mask>"], ids_below=V),
        "span_corruption": lambda: functools.partial(
            span_corruption,
            sentinels=[i for token, i in special.items() if token.startswith("<extra_id_")],
            start_id=special["<s>"],
            eos_id=special["</s>"],
        ),
    }
    return made[name]()


def go_on(cfg: RunConfig, tokenizer: Any, batch: Batch) -> Sample:
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


SHOWN = 4  # translations of a sample on the way


def translation_task(cfg: RunConfig) -> Task:
    """Pairs, in buckets of like lengths; scored by BLEU, chrF and exact match against all targets of a source."""
    score_texts(["a"], [["a"]])  # finds a missing package before the training does
    data = cfg.data
    pairs = load_pairs(data.path, data.target_path, data.corpus, data.bad_lines)
    learnt = split_pairs(pairs, data.valid_fraction, data.test_fraction)[0]  # of which the tokenizer is made
    cfg, made, load = open_start(cfg, "\n".join(learnt.sources + learnt.targets), ("<s>", "</s>"))
    tokenizer = cast(SubwordTokenizer, made)  # no other kind has special tokens
    pairs, encoded = encode_pairs(pairs, tokenizer, cfg)
    parts = split_pairs(pairs, data.valid_fraction, data.test_fraction)
    index = {line: i for i, line in enumerate(pairs.lines)}
    train, valid = (
        {name: [ids[index[line]] for line in part.lines] for name, ids in encoded.items()} for part in parts[:2]
    )
    shape: Any = {"seq_len": data.seq_len, "batch_size": data.batch_size, "start_id": cast(int, tokenizer.bos_id)}
    sources, references = by_source(parts[1])
    chosen = np.random.default_rng(0).permutation(len(sources))[: cfg.train.n_scored]
    fixed = [sources[i] for i in chosen], [references[i] for i in chosen]
    whole = by_source(parts[2])

    def sample(model: Any, params: dict, key: jax.Array) -> str:
        told = translate(model, params, tokenizer, fixed[0][:SHOWN], n_beams=1)
        rows = zip(fixed[0], fixed[1], told, strict=False)
        return "\n\n".join(f"{source}\n→ {best[0].text}\n  ({gold[0]})" for source, gold, best in rows)

    def score(texts: list[str], gold: list[list[str]], n_beams: int) -> Callable[[Any, dict], Scores]:
        def scores(model: Any, params: dict) -> Scores:
            told = translate(model, params, tokenizer, texts, n_beams=n_beams)
            return score_texts([best[0].text for best in told], gold)

        return scores

    return Task(
        cfg, tokenizer, load, hashlib.sha256("\n".join(pairs.sources + pairs.targets).encode()).hexdigest(),
        iter(train_pair_batches(**train, **shape, seed=cfg.train.seed)), valid_pair_batches(**valid, **shape),
        sample, score(*fixed, 1), score(*whole, 4),
    )  # fmt: skip


def encode_pairs(pairs: Pairs, tokenizer: SubwordTokenizer, cfg: RunConfig) -> tuple[Pairs, dict[str, list]]:
    """The pairs that are no longer than data.seq_len, and their ids, each with its end.

    Raises:
        InputError: a pair is longer, and data.bad_lines is not skip.
    """
    sides = {name: tokenizer.encode_lines(getattr(pairs, name)) for name in ("sources", "targets")}
    longest, most = [max(map(len, both)) for both in zip(*sides.values(), strict=True)], cfg.data.seq_len
    kept = [i for i, length in enumerate(longest) if length <= most]
    faults = [
        (pairs.lines[i], f"has {length} tokens, more than data.seq_len={most}")
        for i, length in enumerate(longest)
        if length > most
    ]
    report_faults(cfg.data.path or cfg.data.corpus, faults, len(longest), cfg.data.bad_lines)
    return pairs.take(kept), {name: [ids[i] for i in kept] for name, ids in sides.items()}
