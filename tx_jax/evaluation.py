"""How well a model predicts texts: bits per byte, and an adapter with which lm-eval runs its tasks (extra `[eval]`)."""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.token_bytes import token_bytes
from tx_jax.data.tokenizers import Ids
from tx_jax.decoding.engine import write_all
from tx_jax.decoding.generate import hidden_of, logits_of
from tx_jax.decoding.prompts import pad_prompts
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import InputError, require
from tx_jax.models import DecoderLM

BUCKET = 64  # tokens: lengths are padded to multiples, so that few programs are compiled


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """What a text costs, in a unit that does not depend on the tokenizer.

    Args:
        nats: of the whole text, as `Perplexity.nats_per_token` × `n_tokens`.
        n_bytes: of the part of it that was predicted, in UTF-8.

    >>> bits_per_byte(8 * math.log(2), 4)
    2.0
    """
    return nats / math.log(2) / n_bytes


def n_bytes(tokenizer: AnyTokenizer, ids: Ids) -> int:
    """The bytes that ids add to a text."""
    words = token_bytes(tokenizer)
    return sum(len(words[i]) for i in np.asarray(ids).tolist())


@functools.partial(jax.jit, static_argnums=0)
def _predicted(model: DecoderLM, params: dict, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each token but the first: its log-probability, and whether it is the likeliest."""
    x, _ = hidden_of(model, params, tokens[:, :-1], positions[:, :-1], None, None)
    logits, gold = logits_of(model, params, x).astype(jnp.float32), tokens[:, 1:]
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, gold[..., None], -1)[..., 0], logits.argmax(-1) == gold


class Evaluated:
    """A model as lm-eval asks it: three questions about lists of its requests, whose `args` hold the texts.

    Args:
        prefix_id: what comes before a text without context; None: the tokenizer's end of text, or its first id.
        batch_size: texts at a time.
    """

    def __init__(
        self,
        model: DecoderLM,
        params: dict,
        tokenizer: AnyTokenizer,
        *,
        end_ids: tuple[int, ...] = (),
        prefix_id: int | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 256,
    ):
        self.model, self.params, self.tokenizer, self.ends = model, params, tokenizer, end_ids
        self.prefix = [prefix_id if prefix_id is not None else next(iter(end_ids), 0)]
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none of an empty one."""
        return [int(i) for i in self.tokenizer.encode(text)] if text else []

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): nats of the continuation, negative, and whether greedy writes it."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each (text,): nats of all of it, negative, by windows that share one token; the last one is full."""
        totals = []
        for request in requests:
            ids = self.encode(request.args[0])
            totals.append(sum(nats for nats, _ in self._score(self._windows(ids))))
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each (context, {"until": texts, "max_gen_toks": n, …}): what greedy writes before the first of them."""
        texts = []
        for request in requests:
            context, how = request.args
            until, most = how.get("until") or [], how.get("max_gen_toks", self.max_new_tokens)
            heat = float(how.get("temperature", 0.0)) if how.get("do_sample", False) else 0.0
            require(heat == 0, f"temperature={heat} draws, which this adapter does not; give do_sample=False")
            room = self.model.cfg.max_len - most
            require(room >= 1, f"max_gen_toks={most} leaves no context of max_len={self.model.cfg.max_len}; lower it")
            ids = (self.encode(context) or self.prefix)[-room:]
            (found,) = write_all(
                self.model, self.params, [ids], max_new_tokens=most, n_rows=1, eos_id=self.ends, sampler=Sampler()
            )
            text = self.tokenizer.decode([i for i in found.tokens.tolist() if i not in self.ends])
            stops = [until] if isinstance(until, str) else until
            texts.append(text[: min((at for at in map(text.find, filter(None, stops)) if at >= 0), default=len(text))])
        return texts

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, and how many are the continuation's. Spaces that end a context begin what follows, as words do
        in a vocabulary."""
        kept = context.rstrip()
        before = self.encode(kept)
        after = self.encode(context + continuation)[len(before) :] if kept else self.encode(context + continuation)
        return (before or self.prefix) + after, len(after)

    def _windows(self, ids: list[int]) -> list[tuple[list[int], int]]:
        whole, size = self.prefix + ids, self.model.cfg.max_len
        ends = [*range(size, len(whole), size - 1), len(whole)]
        starts = [1, *ends[:-1]]
        return [
            (whole[max(end - size, 0) : end], end - start)
            for start, end in zip(starts, ends, strict=True)
            if end > start
        ]

    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each (ids, n): nats of the last n, negative, and whether each was the likeliest."""
        most, answers = self.model.cfg.max_len, []
        require(all(n < most for _, n in rows), f"a continuation does not fit max_len={most}; shorten it")
        for first in range(0, len(rows), self.batch_size):
            part = [(ids[-most:], n) for ids, n in rows[first : first + self.batch_size]]
            filled = [ids for ids, _ in part] + [self.prefix * 2] * (self.batch_size - len(part))
            width = min(-(-max(map(len, filled)) // BUCKET) * BUCKET, most)
            tokens, positions = pad_prompts(filled, width)
            found = _predicted(self.model, self.params, jnp.asarray(tokens), jnp.asarray(positions))
            nats, likeliest = (np.asarray(array) for array in found)
            for b, (ids, n) in enumerate(part):
                own = slice(len(ids) - 1 - n, len(ids) - 1)
                answers.append((float(nats[b, own].astype(np.float64).sum()), bool(likeliest[b, own].all())))
        return answers


def lm_eval_model(*args: Any, **how: Any) -> Any:
    """An `Evaluated` of the same arguments that lm-eval takes: `lm_eval.simple_evaluate(lm_eval_model(…), tasks=[…])`.

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("lm-eval is not installed; pip install 'tx_jax[eval]'") from error

    def init(self: Any) -> None:
        cast(Any, LM).__init__(self)
        Evaluated.__init__(self, *args, **how)

    made: Any = type("TxJaxLM", (Evaluated, LM), {"__init__": init})
    return made()
