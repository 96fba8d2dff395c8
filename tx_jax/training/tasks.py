"""What a run trains on: an objective's data as batches, and what there is to see and to score on the way.

Text and pairs have a function each; both give a Task, and the loop asks no further.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.batches import (
    Objective,
    next_token,
    split,
    train_batches,
    valid_batches,
    valid_windows,
)
from tx_jax.data.buckets import train_pair_batches, valid_pair_batches
from tx_jax.data.corpora import load_text
from tx_jax.data.objectives import mask_tokens, pair_lengths, prefix_lm, span_corruption, span_lengths
from tx_jax.data.packing import cut, held_out_batches, packed_batches, split_documents
from tx_jax.data.pairs import Pairs, by_source, load_pairs, report_faults, split_pairs
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.data.token_files import is_token_files, open_token_files
from tx_jax.data.trained import train_tokenizer
from tx_jax.data.vocabulary_files import find_tokenizer
from tx_jax.errors import require
from tx_jax.evaluation import n_bytes
from tx_jax.run_config import DataConfig, RunConfig
from tx_jax.training.samples import SAMPLES, Sample, go_on
from tx_jax.training.start import open_start
from tx_jax.translate import score_texts, translate

if TYPE_CHECKING:
    import grain

Scores = dict[str, float]


class Task(NamedTuple):
    """What the loop needs to know of a run's data."""

    cfg: RunConfig  # with the model that is trained
    tokenizer: AnyTokenizer
    load: Callable[[Mesh | None], dict] | None  # (mesh) → parameters to begin with; None: the run's own, or fresh
    sha256: str  # of what is read: a place in other data would mean nothing
    batches: "grain.IterDataset"  # without end, the same in every process
    held_out: Any  # Examples, by their number from 0 to len(held_out)
    sample: Sample
    n_bytes: int | None = None  # of the text that is held out; None: loss and text are not of the same tokens
    score: Callable[[Any, dict], Scores] = lambda model, params: {}  # of a fixed part of the validation split
    test: Callable[[Any, dict], Scores] | None = None  # of the whole test split, at the end


def open_task(cfg: RunConfig, own: np.ndarray | None = None) -> Task:
    """The task that cfg.data describes.

    Args:
        own: rows of a batch that this process has. Of token files it reads no others; a text is in memory whole.

    Raises:
        InputError: what is to be read is not there or will not do, or does not fit the model.
    """
    if cfg.data.mixture is not None or is_token_files(cfg.data.path):
        return token_task(cfg, own)
    return (translation_task if cfg.data.objective == "translate" else text_task)(cfg)


def token_task(cfg: RunConfig, own: np.ndarray | None) -> Task:
    """Token files, whose documents are packed."""
    data, B = cfg.data, cfg.data.batch_size
    parts = [(str(data.path), 1.0)] if data.mixture is None else parse_mixture(data.mixture)
    rule = f"token files are for data.objective='next_token', not {data.objective!r}"
    require(data.objective == "next_token", f"{rule}; give a text")
    files = [open_token_files(path) for path, _ in parts]
    tokenizers = [find_tokenizer(part.directory / "tokenizer") for part in files]
    for part, tokenizer in zip(files, tokenizers, strict=True):
        fits = tokenizer is not None and tokenizer.vocab_size == part.vocab_size
        require(fits, f"{part.directory} does not hold the tokenizer of its {part.vocab_size} ids; prepare it again")
        rule = f"{part.directory} has another tokenizer than {files[0].directory}"
        require(tokenizer == tokenizers[0], f"{rule}; prepare it with that one")
    cfg, tokenizer, load = open_start(cfg, lambda: cast(AnyTokenizer, tokenizers[0]))
    own_name = f"run_dir={cfg.run_dir!r}" if cfg.init is None else f"init={cfg.init!r}"
    rule = f"{own_name} has another tokenizer than {files[0].directory}"
    require(tokenizer == tokenizers[0], f"{rule}; prepare it with --tokenizer {cfg.init or cfg.run_dir}")
    n_train = [split_documents(part, data.valid_fraction) for part in files]
    pieces = [cut(part, data.seq_len) for part in files]
    firsts = [part.of_documents(n) for part, n in zip(pieces, n_train, strict=True)]
    for part, n in zip(pieces, firsts, strict=True):
        rule = f"{part.files.directory} has {n} pieces of text to train on, and {part.n - n} held out"
        require(0 < n < part.n, f"{rule}; give more documents, or another --data.valid-fraction")
    sources = [(part, n, share) for part, n, (_, share) in zip(pieces, firsts, parts, strict=True)]
    held_out = held_out_batches([(part, n) for part, n, _ in sources], batch_size=B, own=own)
    if cfg.train.sample_prompt is None:
        ids = pieces[0].read(firsts[0])[:PROMPT]
        train = dataclasses.replace(cfg.train, sample_prompt=tokenizer.decode(ids) or "\n")
        cfg = dataclasses.replace(cfg, train=train)
    return Task(
        cfg, tokenizer, load, hashlib.sha256("".join(part.sha256 for part in files).encode()).hexdigest(),
        packed_batches(sources, batch_size=B, seed=cfg.train.seed, own=own), held_out, go_on(cfg, tokenizer),
        sum(int(part.lengths[n:, 1].sum()) for part, n in zip(files, n_train, strict=True)),
    )  # fmt: skip


def parse_mixture(mixture: str) -> list[tuple[str, float]]:
    """Directories with their shares.

    >>> parse_mixture("wiki=3,code=0.5")
    [('wiki', 3.0), ('code', 0.5)]

    Raises:
        InputError: it is not of this form, or a share is not above 0.
    """
    found = []
    for part in mixture.split(","):
        path, _, share = part.rpartition("=")
        ok = re.fullmatch(r"\d+(\.\d*)?|\.\d+", share) and float(share) > 0
        require(path and ok, f"mixture={mixture!r} has {part!r}, which is not DIRECTORY=SHARE; write wiki=3,code=1")
        found.append((path, float(share)))
    return found


def text_task(cfg: RunConfig) -> Task:
    """Texts, cut into crops."""
    text, special = load_text(cfg.data.path, cfg.data.corpus), special_tokens(cfg.data)
    cfg, tokenizer, load = open_start(cfg, make_tokenizer(cfg.data, text, special), special)
    check_objective(cfg)
    train = cfg.train
    if train.sample_prompt is None and cfg.model.stack == "decoder":
        train = dataclasses.replace(train, sample_prompt="\n" if "\n" in text else text[0])
        cfg = dataclasses.replace(cfg, train=train)
    train_ids, valid_ids = split(tokenizer.encode(text), cfg.data.valid_fraction)
    shape = {"seq_len": cfg.data.seq_len, "batch_size": cfg.data.batch_size}
    objective = make_objective(cfg.data.objective, tokenizer)
    size = None
    if objective is next_token:
        held_out, size = valid_batches(valid_ids, **shape), n_bytes(tokenizer, valid_ids[1:])
    else:
        held_out = valid_windows(valid_ids, objective, **shape)
    return Task(
        cfg, tokenizer, load, hashlib.sha256(text.encode()).hexdigest(),
        train_batches(train_ids, **shape, seed=train.seed, objective=objective), held_out,
        SAMPLES[cfg.model.stack](cfg, tokenizer, held_out[0]), size,
    )  # fmt: skip


def make_tokenizer(data: DataConfig, text: str, special_tokens: Sequence[str] = ()) -> Callable[[], AnyTokenizer]:
    """What makes the tokenizer of a text."""
    return lambda: train_tokenizer(data.tokenizer, text, data.vocab_size, special_tokens)


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


PROMPT = 8  # tokens of the text held out, where samples begin if nothing else is said
ENDS = ("<s>", "</s>")
SHOWN = 4  # translations of a sample on the way


def translation_task(cfg: RunConfig) -> Task:
    """Pairs, in buckets of like lengths; scored by BLEU, chrF and exact match against all targets of a source."""
    score_texts(["a"], [["a"]])  # finds a missing package before the training does
    data = cfg.data
    pairs = load_pairs(data.path, data.target_path, data.corpus, data.bad_lines)
    learnt = split_pairs(pairs, data.valid_fraction, data.test_fraction)[0]  # of which the tokenizer is made
    text = "\n".join(learnt.sources + learnt.targets)
    cfg, made, load = open_start(cfg, make_tokenizer(cfg.data, text, ENDS), ENDS)
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
        train_pair_batches(**train, **shape, seed=cfg.train.seed), valid_pair_batches(**valid, **shape),
        sample, score=score(*fixed, 1), test=score(*whole, 4),
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
