"""What sample.py reads, and what it prints of a language model: whole texts with their speeds, a text as it comes, a
conversation.

Text goes to standard output, speeds to standard error.
"""

import functools
import io
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from tx_jax.cache import init_cache
from tx_jax.convert.sources import AnyTokenizer
from tx_jax.data.chat import encode_chat
from tx_jax.data.subwords import Subwords
from tx_jax.decoding import session
from tx_jax.decoding.automaton import Automaton
from tx_jax.decoding.generate import decode, prefill
from tx_jax.decoding.prompts import prepare
from tx_jax.decoding.samplers import Sampler, as_arrays
from tx_jax.decoding.stream import stream
from tx_jax.errors import InputError, require
from tx_jax.models import DecoderLM


class Writer(NamedTuple):
    """What is the same for all that is written."""

    model: DecoderLM
    params: dict
    tokenizer: AnyTokenizer
    ends: tuple[int, ...]  # tokens that end a text
    new: int | None  # at most so many tokens
    sampler: Sampler
    key: PRNGKeyArray
    stops: tuple[str, ...] = ()  # strings that end a text, and are not shown
    automaton: Automaton | None = None  # where a text stops, or what it must match
    prefix_lm: bool = False  # the prompt sees itself from both sides

    def room(self, n_tokens: int) -> int:
        """How many tokens may follow so many."""
        room = max(self.model.cfg.max_len - n_tokens, 1)
        return min(500, room) if self.new is None else self.new


def complete(writer: Writer, echo: str, ids: np.ndarray, n_samples: int) -> None:
    """Print every sample when all are there. The prompt is read once. Compiling is not counted in the speeds."""
    model, params, key = writer.model, writer.params, writer.key
    new, sampler = writer.room(len(ids)), as_arrays(writer.sampler, cast(int, model.cfg.vocab_size))
    padded, n_slots = prepare(model, ids[None], None, new, sampler, key, None)
    cache = init_cache(model.cfg, 1, n_slots)
    fill = jax.jit(functools.partial(prefill, prefix_lm=writer.prefix_lm), static_argnums=0, donate_argnums=3)
    fill = fill.lower(model, params, padded, cache).compile()
    start = time.perf_counter()
    logits, cache = jax.block_until_ready(fill(params, padded, cache))
    filling = time.perf_counter() - start
    logits, cache, padded = jax.tree.map(lambda leaf: jnp.repeat(leaf, n_samples, axis=0), (logits, cache, padded))
    loop = jax.jit(decode, static_argnums=(0, 4), donate_argnums=3)
    ends = np.array(writer.ends) if writer.ends else None
    rest = (sampler, key, ends, None, padded, writer.automaton)
    run = loop.lower(model, params, logits, cache, new, *rest).compile()
    start = time.perf_counter()
    out = run(params, logits, cache, *rest)
    rows, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    decoding = time.perf_counter() - start
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(rows) > 1:
            print(f"--- sample {i + 1}")
        text = writer.tokenizer.decode([i for i in row[:length] if i < writer.tokenizer.vocab_size])
        print(echo + "".join(until([text], writer.stops)))
        check_match(writer, row[:length].tolist())
    say(f"prefill {len(ids)} tokens", len(ids), filling)
    say(
        f"decode {lengths.sum()} tokens", int(lengths.sum()) - len(rows), decoding
    )  # each row's first came from the prefill


def tokens_of(writer: Writer, ids: np.ndarray) -> Iterator[int]:
    """New tokens as they come, up to one that ends the text."""
    more = {"max_new_tokens": writer.room(len(ids)), "sampler": writer.sampler, "key": writer.key}
    more |= {"eos_id": writer.ends, "automaton": writer.automaton}
    rows = stream(writer.model, writer.params, ids[None], prefix_lm=writer.prefix_lm, **more)
    return itertools.takewhile(lambda token: token not in writer.ends, (int(row[0]) for row in rows))


def show(writer: Writer, echo: str, tokens: Iterable[int]) -> str:
    """Print a text as its tokens come, and give it back. The first two compile, and are not counted in the speed."""
    times, ids, pieces = [time.perf_counter()], list[int](), list[str]()

    def clocked() -> Iterator[int]:
        for token in tokens:
            times.append(time.perf_counter())
            ids.append(token)
            if token < writer.tokenizer.vocab_size:  # a model's table may be longer, up to a round number
                yield token

    print(echo, end="", flush=True)
    for piece in until(writer.tokenizer.stream(clocked()), writer.stops):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    check_match(writer, ids)
    n = len(times) - 1
    say(f"first token after {times[min(1, n)] - times[0]:.2f} s")
    say(f"decode {n} tokens", n - 2, times[-1] - times[min(2, n)])
    return "".join(pieces)


def check_match(writer: Writer, ids: Sequence[int]) -> None:
    """Say so where a text that was to match something was cut by its limit."""
    if writer.automaton is None or writer.stops:
        return
    table, classes, final, state = jax.device_get(writer.automaton)
    for i in ids:
        state = state if i in writer.ends else table[state, classes[i]]
    may_end = any(table[state, classes[end]] >= 0 for end in writer.ends if end < len(classes))
    if not (final[state] or may_end):
        say(f"cut after {len(ids)} tokens, before it matches; give more --max-new-tokens")


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to the first of the stop strings; what may begin one is held back.

    >>> list(until(["one", " t", "wo", " three"], ["two", "e t"]))
    ['on', '']
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in map(held.find, stops) if at >= 0]
        if found:
            yield held[: min(found)]
            return
        begun = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held


def converse(writer: Writer, system: str | None) -> None:
    """Answer each line of standard input, with the cache of all that was said before."""
    model, params, said = writer.model, writer.params, list[str]()
    tokenizer = cast(Subwords, writer.tokenizer)
    held = session.start(model)

    def answer(ids: np.ndarray) -> Iterator[int]:
        nonlocal held
        logits, held = session.read(model, params, held, ids)
        more = {"max_new_tokens": writer.room(len(ids)), "sampler": writer.sampler, "eos_id": writer.ends}
        more["automaton"] = writer.automaton
        key = jax.random.fold_in(writer.key, len(said))
        for token, now in session.write(model, params, logits, held, key=key, **more):
            held = now
            if token in writer.ends:
                return
            yield token

    for line in messages_typed():
        said.append(line)
        while (n := len(ids := encode_chat(tokenizer, messages(system, *said)))) >= model.cfg.max_len and len(said) > 2:
            del said[:2]
            print("the conversation is too long: its oldest turn is forgotten", file=sys.stderr)
        if n >= model.cfg.max_len:
            print(f"the message has {n} tokens, max_len={model.cfg.max_len}; say it shorter", file=sys.stderr)
            said.clear()
            continue
        said.append(show(writer, "", answer(ids)))


def messages_typed() -> Iterator[str]:
    """The lines of standard input that are not empty; bytes that are no UTF-8 become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        print("> " * sys.stdin.isatty(), end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def say(what: str, n_tokens: int = 0, seconds: float = 0.0) -> None:
    """One line for the person, with the speed if there is one."""
    print(what + (f", {n_tokens / seconds:,.0f} tokens/s" if n_tokens > 0 else ""), file=sys.stderr)


def messages(system: str | None, *turns: str) -> list[dict[str, str]]:
    """A chat: the system's words, if any, then the user's and the assistant's in turn."""
    said = [{"role": "system", "content": system}] if system is not None else []
    roles = itertools.cycle(["user", "assistant"])
    return said + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def encode(tokenizer: AnyTokenizer, text: str, ends: tuple[int, ...]) -> np.ndarray:
    """The ids of a text, with what the model's own texts begin with, but not with their end."""
    ids = tokenizer.encode(text, add_special_tokens=True) if isinstance(tokenizer, Subwords) else tokenizer.encode(text)
    return ids[:-1] if len(ids) > 1 and int(ids[-1]) in ends else ids


def read_prompt(prompt: str, flag: str = "prompt") -> str:
    """The text that --prompt, or another flag, stands for."""
    try:
        if prompt == "-":
            data = sys.stdin.buffer.read()
        elif prompt.startswith("@"):
            data = Path(prompt[1:]).read_bytes()
        else:
            data = prompt.encode("utf-8", "surrogateescape")
        require(data, f"{flag}={prompt!r} is empty; give at least one character")
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{flag}={prompt!r} cannot be read ({error.strerror}); name a file after the @") from error
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(f"{flag}={prompt!r} is not UTF-8: {where}; convert it, such as by iconv") from error


CHUNK = 1024  # lines of a stream that are read before any is translated, so that like lengths go together


def read_lines(source: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that --source stands for, CHUNK at a time, one by one from a terminal; and the first one's number."""
    if source != "-":
        lines = read_prompt(source, "source").removeprefix("\ufeff").removesuffix("\n").split("\n")
        yield 1, [line.removesuffix("\r") for line in lines]
        return
    first, n = 1, 1 if sys.stdin.isatty() else CHUNK
    while lines := list(itertools.islice(sys.stdin.buffer, n)):
        for number, line in enumerate(lines, first):
            rule = f"line {number} of standard input is not UTF-8"
            require(line.decode("utf-8", "ignore").encode() == line, f"{rule}; convert it, such as by iconv")
        texts = [line.decode("utf-8").rstrip("\r\n") for line in lines]
        yield first, [text.removeprefix("\ufeff") if number == 1 else text for number, text in enumerate(texts, first)]
        first += len(lines)
