"""Sentences to sentences, by an EncoderDecoder and its tokenizer, in batches of like lengths."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from tx_jax.cache import Cache
from tx_jax.data.libraries import package
from tx_jax.data.subwords import Subwords
from tx_jax.decoding.beam import beam_search
from tx_jax.decoding.generate import generate
from tx_jax.decoding.prompts import Prompt, pad_prompts
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import InputError, require
from tx_jax.models import EncoderDecoder

BUCKET = 16  # sources are padded to a multiple of this many tokens, so that few lengths are compiled
LONGER = 50  # tokens that a translation may have more than its source (Vaswani et al. 2017, §6.1)


Rows = list[tuple[np.ndarray, int, float]]  # of one text: ids, their number, score


class Translation(NamedTuple):
    """One of the translations of a text.

    >>> best = Translation("low", -0.5, source_ids=np.array([8, 1]), ids=np.array([9, 1]))
    >>> best.text, len(best.ids)
    ('low', 2)
    """

    text: str
    score: float  # log-probability, in nats, divided by the length penalty; of a sampled one: NaN
    source_ids: Int[np.ndarray, " S"]
    ids: Int[np.ndarray, " T"]  # with what ends it


def translate(
    model: EncoderDecoder,
    params: dict,
    tokenizer: Subwords,
    texts: Sequence[str],
    *,
    n_beams: int = 4,
    n_best: int = 1,
    length_penalty: float = 0.6,
    sampler: Sampler | None = None,
    key: PRNGKeyArray | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    truncate: bool = False,
    special: bool = False,
    start_id: int | tuple[int, ...] | None = None,
    end_ids: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
) -> list[list[Translation]]:
    """The n_best translations of each text, the best first.

    Args:
        n_beams, length_penalty: of `beam_search`; 1 is greedy.
        sampler: draw n_best translations with `key` instead of searching.
        max_new_tokens: of a translation; None: 50 more than its source has, rounded up to a bucket.
        batch_size: texts at a time, at most. Like lengths go together.
        truncate: cut a source that is longer than model.cfg.max_len; otherwise it is refused.
        special: names of special tokens in a text are those tokens, such as T5's `<extra_id_0>`.
        start_id, end_ids: what begins and ends a translation; by default the tokenizer's own.
        forbidden: ids that no translation has which was searched for, such as that of padding.
        numbers: by which errors name the texts, such as those of their lines; None: 1, 2, 3, …

    >>> from tx_jax import ModelConfig, build, init_params
    >>> from tx_jax.data.subwords import SubwordTokenizer
    >>> tokenizer = SubwordTokenizer.train("low lower lowest", 260, ("<s>", "</s>"))
    >>> model = build(ModelConfig(stack="encoder_decoder", vocab_size=260, d_model=8, n_heads=2, n_layers=1))
    >>> params = init_params(model, jax.random.key(0))
    >>> len(translate(model, params, tokenizer, ["low", "slower"], max_new_tokens=2))
    2

    Raises:
        InputError: a text is too long or has no token, there is nothing to begin or to end with, the model is no
            EncoderDecoder, batch_size is below 1, or as `beam_search` and `generate`.
    Source: Vaswani et al. 2017, §6.1: 4 beams, a length penalty of 0.6, 50 tokens more than the source.
    """
    require(isinstance(model, EncoderDecoder), f"model is a {type(model).__name__}; an EncoderDecoder translates")
    require(not isinstance(texts, str), f"texts={texts!r:.40} is one text; give a list of them")
    start, ends = tokenizer.bos_id if start_id is None else start_id, end_ids or tokenizer.eos_ids
    if start is None or not ends:
        raise InputError("the tokenizer does not say what begins and ends a text; give start_id and end_ids")
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1 text")
    sources = [tokenizer.encode(text, special=special, add_special_tokens=True) for text in texts]
    named = zip(numbers or range(1, len(texts) + 1), sources, strict=True)
    sources = [_fit(ids, number, model.cfg.max_len, truncate, tokenizer.eos_ids) for number, ids in named]
    found: list[list[Translation]] = [[] for _ in texts]
    for number, members in enumerate(_batches([len(ids) for ids in sources], batch_size)):
        source = _padded([sources[i] for i in members], batch_size, model.cfg.max_len)
        room = min(source.tokens.shape[1] + LONGER, model.cfg.max_len - 1)
        more = {"max_new_tokens": room if max_new_tokens is None else max_new_tokens, "eos_id": ends}
        more["memory"] = _encode(model, params, source)
        begin = jnp.tile(jnp.asarray(start, jnp.int32).reshape(1, -1), (len(source.tokens), 1))
        if sampler is None:
            how = {"n_beams": n_beams, "n_best": n_best, "length_penalty": length_penalty, "forbidden": forbidden}
            rows = _search(model, params, begin, **how, **more)
        else:
            keys = [None if key is None else jax.random.fold_in(key, number * n_best + i) for i in range(n_best)]
            rows = _draw(model, params, begin, sampler, keys, more)
        for i, row in zip(members, rows, strict=False):
            for ids, length, score in row:
                shown = [int(t) for t in ids[:length] if t not in ends and t < tokenizer.vocab_size]
                text = tokenizer.decode(shown, special=special)
                found[i] += [Translation(text, score, sources[i], ids[:length])] * bool(length)
    return found


def _search(model, params, begin, **how) -> list[Rows]:
    out = beam_search(model, params, begin, **how)
    return _rows(out.tokens, out.lengths, out.scores)


def _draw(model, params, begin, sampler, keys, more) -> list[Rows]:
    drawn = [generate(model, params, begin, sampler=sampler, key=key, **more) for key in keys]
    tokens, lengths = jnp.stack([out.tokens for out in drawn], 1), jnp.stack([out.lengths for out in drawn], 1)
    return _rows(tokens, lengths, jnp.full(lengths.shape, jnp.nan))


def _rows(tokens, lengths, scores) -> list[Rows]:
    parts = zip(np.asarray(tokens), np.asarray(lengths).tolist(), np.asarray(scores).tolist(), strict=True)
    return [list(zip(*part, strict=True)) for part in parts]


def _fit(ids: np.ndarray, number: int, max_len: int, truncate: bool, ends: tuple[int, ...]) -> np.ndarray:
    """The ids of a source, cut to max_len, its end apart, if that is asked for."""
    rule = f"text {number} has {len(ids)} tokens, more than the model's max_len={max_len}"
    require(len(ids), f"text {number} is empty; give at least one character")
    require(len(ids) <= max_len or truncate, f"{rule}; shorten it, or cut it by truncate=True (--truncate)")
    if len(ids) <= max_len:
        return ids
    return np.append(ids[: max_len - 1], ids[-1]) if ids[-1] in ends else ids[:max_len]


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of texts, those of one bucket of lengths together, batch_size at a time."""
    buckets: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        buckets.setdefault(-(-lengths[i] // BUCKET), []).append(i)
    return [rows[i : i + batch_size] for rows in buckets.values() for i in range(0, len(rows), batch_size)]


def _padded(rows: list[np.ndarray], batch_size: int, max_len: int) -> Prompt:
    """The rows as one batch of a few shapes: a bucket wide, and a power of two high or batch_size."""
    n_rows = min(1 << (len(rows) - 1).bit_length(), batch_size)
    width = min(-(-max(map(len, rows)) // BUCKET) * BUCKET, max_len)
    full = [ids.tolist() for ids in rows] + [rows[-1].tolist()] * (n_rows - len(rows))
    return pad_prompts(full, width)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: EncoderDecoder, params: dict, source: Prompt) -> Cache:
    return cast(Cache, model.apply({"params": params}, *source, method="encode"))


def score_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and chrF of texts against all their references, 0 to 100, and the share that is just one of them.

    Source: sacrebleu with its defaults (Post 2018): BLEU (Papineni et al. 2002), tokens of 13a; chrF2 (Popović 2015).

    Raises:
        InputError: sacrebleu is not installed.
    """
    sacrebleu = package("sacrebleu", "translate")
    require(len(texts), "texts=[] have no score; give at least one")
    most = max(map(len, references))
    streams = [[one[i] if i < len(one) else None for one in references] for i in range(most)]
    exact = sum(text in one for text, one in zip(texts, references, strict=True)) / len(texts)
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), streams).score,
        "chrf": sacrebleu.corpus_chrf(list(texts), streams).score,
        "exact_match": exact,
    }
