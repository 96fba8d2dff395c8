"""What a run trains on: an objective's data as batches, and what there is to see and to score on the way.

TASKS has one function for each kind of data; all give a Task, and the loop asks no further.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.batches import split, train_batches, valid_batches
from tx_jax.data.buckets import train_pair_batches, valid_pair_batches
from tx_jax.data.corpora import load_text
from tx_jax.data.pairs import Pairs, by_source, load_pairs, report_faults, split_pairs
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.decoding.generate import generate
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import require
from tx_jax.models import Model
from tx_jax.run_config import RunConfig
from tx_jax.training.start import open_start
from tx_jax.training.step import Examples
from tx_jax.translate import score_texts, translate

Scores = dict[str, float]


class Task(NamedTuple):
    """What the loop needs to know of a run's data."""

    cfg: RunConfig  # with the model that is trained
    tokenizer: AnyTokenizer
    load: Callable[[Mesh | None], dict] | None  # (mesh) → parameters to begin with; None: the run's own, or fresh
    sha256: str  # of what is read: a place in other data would mean nothing
    batches: Any  # an endless iterator with get_state and set_state
    held_out: Sequence[Examples]
    sample: Callable[[Model, dict, jax.Array], str]  # (model, params, key) → a text that shows what was learnt
    score: Callable[[Model, dict], Scores] = lambda model, params: {}  # of a fixed part of the validation split
    test: Callable[[Model, dict], Scores] = lambda model, params: {}  # of the whole test split, at the end


def open_task(cfg: RunConfig) -> Task:
    """The task that cfg.data describes.

    Raises:
        InputError: what is to be read is not there or will not do, or does not fit the model.
    """
    return (translation_task if cfg.data.objective == "translate" else text_task)(cfg)


def text_task(cfg: RunConfig) -> Task:
    """Texts, cut into crops."""
    text = load_text(cfg.data.path, cfg.data.corpus)
    cfg, tokenizer, load = open_start(cfg, text)
    train = cfg.train
    if train.sample_prompt is None:
        train = dataclasses.replace(train, sample_prompt="\n" if "\n" in text else text[0])
        cfg = dataclasses.replace(cfg, train=train)
    prompt = read_prompt(cfg, tokenizer)
    train_ids, valid_ids = split(tokenizer.encode(text), cfg.data.valid_fraction)
    shape = {"seq_len": cfg.data.seq_len, "batch_size": cfg.data.batch_size}

    def sample(model: Model, params: dict, key: jax.Array) -> str:
        room = min(train.sample_tokens, model.cfg.max_len - prompt.shape[1])
        new = generate(model, params, prompt, max_new_tokens=room, sampler=Sampler(temperature=0.8), key=key)
        ids = np.concatenate([prompt[0], np.asarray(new.tokens[0])])
        return tokenizer.decode(ids[ids < tokenizer.vocab_size])  # a table may be padded

    return Task(
        cfg, tokenizer, load, hashlib.sha256(text.encode()).hexdigest(),
        iter(train_batches(train_ids, **shape, seed=train.seed)), valid_batches(valid_ids, **shape), sample,
    )  # fmt: skip


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
    cfg, tokenizer, load = open_start(cfg, "\n".join(learnt.sources + learnt.targets), ("<s>", "</s>"))
    pairs, encoded = encode_pairs(pairs, tokenizer, cfg)
    parts = split_pairs(pairs, data.valid_fraction, data.test_fraction)
    index = {line: i for i, line in enumerate(pairs.lines)}
    train, valid = (
        {name: [ids[index[line]] for line in part.lines] for name, ids in encoded.items()} for part in parts[:2]
    )
    shape = {"seq_len": data.seq_len, "batch_size": data.batch_size, "start_id": tokenizer.bos_id}
    sources, references = by_source(parts[1])
    chosen = np.random.default_rng(0).permutation(len(sources))[: cfg.train.n_scored]
    fixed = [sources[i] for i in chosen], [references[i] for i in chosen]
    whole = by_source(parts[2])

    def sample(model: Model, params: dict, key: jax.Array) -> str:
        told = translate(model, params, tokenizer, fixed[0][:SHOWN], n_beams=1)
        rows = zip(fixed[0], fixed[1], told, strict=False)
        return "\n\n".join(f"{source}\n→ {best[0].text}\n  ({gold[0]})" for source, gold, best in rows)

    def score(texts: list[str], gold: list[list[str]], n_beams: int) -> Callable[[Model, dict], Scores]:
        def scores(model: Model, params: dict) -> Scores:
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
