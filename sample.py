"""Write text with a model: `python sample.py runs/gpt-shakespeare --prompt "ROMEO:"`, `python sample.py smollm2
--interactive`, or with the directory or GGUF file of a published model.

Text goes to standard output, speeds to standard error.
"""

import dataclasses
import io
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import jax
import numpy as np
import tyro
from jaxtyping import PRNGKeyArray

import tx_jax as tx
from tx_jax.checkpoint import latest_step, read_config
from tx_jax.command_line import keep_compiled, one_line_errors, parse
from tx_jax.convert.sources import AnyTokenizer, end_ids, find_source, is_run, open_source, open_tokenizer
from tx_jax.data.chat import encode_chat
from tx_jax.data.subwords import Subwords
from tx_jax.decoding import session
from tx_jax.decoding.generate import prepare
from tx_jax.decoding.samplers import check_sampler
from tx_jax.errors import InputError, require


@dataclasses.dataclass(frozen=True)
class Args:
    """Write text with a model."""

    # a run directory of train.py, a Hugging Face directory, a GGUF file, smollm2, or hf://ORG/NAME
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    prompt: str | None = None  # text; @FILE reads a file, - reads standard input; None: the run's sample_prompt
    raw: bool = False  # go on from the prompt; otherwise a public model with a chat template answers it
    system: str | None = None  # what a chat begins with
    interactive: bool = False  # a conversation: a message a line
    max_new_tokens: int | None = None  # None: 500, or what the context leaves
    temperature: float | None = (
        None  # 0: always the likeliest token; None: 0.8, but 0 for one answer with no other rule
    )
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach p
    min_p: float | None = None  # keep tokens at least p times as likely as the likeliest
    seed: int = 0
    num_samples: int = 1
    stream: bool = False  # print each token as it comes; a chat does
    step: int | None = None  # of a run's checkpoint; None: the newest

    def __post_init__(self) -> None:
        n, heat, new = self.num_samples, self.temperature, self.max_new_tokens
        require(n >= 1, f"num_samples={n} must be at least 1; leave it out for one")
        streams = "--interactive" * self.interactive or "--stream" * self.stream
        require(n == 1 or not streams, f"num_samples={n} cannot be streamed; leave out {streams}, or ask for one")
        require(heat is None or heat >= 0, f"temperature={heat} must be 0, which is greedy, or more")
        require(new is None or new >= 1, f"max_new_tokens={new} must be at least 1")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be from 0 to 2³² − 1")
        require(
            not (self.interactive and self.prompt), "--interactive reads what you type, not --prompt; leave one out"
        )


class Writer(NamedTuple):
    """What is the same for all that is written."""

    model: tx.DecoderLM
    params: dict
    tokenizer: AnyTokenizer
    ends: tuple[int, ...]  # tokens that end a text
    new: int | None  # at most so many tokens
    sampler: tx.Sampler
    key: PRNGKeyArray

    def room(self, n_tokens: int) -> int:
        """How many tokens may follow so many."""
        room = max(self.model.cfg.max_len - n_tokens, 1)
        return min(500, room) if self.new is None else self.new


DEFAULT_TEMPERATURE = {False: 0.8, True: 0.0}  # of a text that goes on, and of an answer: greedy, as in transformers


@one_line_errors()
def main(argv: list[str]) -> None:
    """Check all that is asked for, load, generate, print."""
    args = parse(Args, argv, prog="sample.py")
    keep_compiled()
    said = None if args.prompt is None else read_prompt(args.prompt)
    path = find_source(args.model)
    source, run = open_source(path, args.step), is_run(path)
    writer, chats = prepare_writer(args, path, source.cfg, source.special_ids)
    own = read_config(path).train.sample_prompt if run else None  # of training: a text to go on from, no message
    asked = args.interactive or said is not None or own is not None
    require(asked, f"{args.model} has no prompt of its own; give --prompt TEXT")
    ids, echo = np.zeros(0, np.int32), ""
    if chats and said is not None:
        ids = encode_chat(cast(Subwords, writer.tokenizer), messages(args.system, said))
    elif not args.interactive:
        echo = cast(str, own) if said is None else said
        ids = encode(writer.tokenizer, echo, writer.ends)
        chats = False
    if not args.interactive:
        prepare(writer.model, ids[None], None, writer.room(len(ids)), writer.sampler, writer.key, None)  # refuses now
    writer = writer._replace(params=source.load(None if run else writer.model.cfg.dtype, None))
    if args.interactive:
        converse(writer, args.system)
    elif args.stream or (chats and args.num_samples == 1):
        show(writer, echo, tokens_of(writer, ids))
    else:
        complete(writer, echo, np.tile(ids, (args.num_samples, 1)))


def prepare_writer(args: Args, path: Path, cfg: tx.ModelConfig, special_ids: dict) -> tuple[Writer, bool]:
    """What writes, but for its parameters; and whether it answers rather than goes on."""
    run, tokenizer = is_run(path), open_tokenizer(path)
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # bfloat16 is slow on a CPU
    model = tx.build(dataclasses.replace(cfg, dtype=cfg.dtype if run and fast == "bfloat16" else fast))
    if not isinstance(model, tx.DecoderLM):
        raise InputError(f"model={args.model!r} is an {cfg.stack}, which does not write on; give a decoder")
    if tokenizer is None:
        raise InputError(f"model={args.model!r} has no tokenizer; put its tokenizer.json beside the weights")
    chats = isinstance(tokenizer, Subwords) and tokenizer.chat_template is not None and not args.raw
    if run and latest_step(path) and not (args.interactive or args.system):
        chats = False  # it was trained to go on from running text
    for flag in ("interactive", "system"):
        require(chats or not getattr(args, flag), f"--{flag} is for a model with a chat template, without --raw")
    drawn = args.num_samples > 1 or any(rule is not None for rule in (args.top_k, args.top_p, args.min_p))
    heat = DEFAULT_TEMPERATURE[chats and not drawn] if args.temperature is None else args.temperature
    sampler = tx.Sampler(heat or None, args.top_k, args.top_p, args.min_p)
    check_sampler(sampler)
    new, key = args.max_new_tokens, jax.random.key(args.seed)
    return Writer(model, {}, tokenizer, end_ids(special_ids, tokenizer), new, sampler, key), chats


def encode(tokenizer: AnyTokenizer, text: str, ends: tuple[int, ...]) -> np.ndarray:
    """The ids of a text, with what the model's own texts begin with, but not with their end."""
    ids = tokenizer.encode(text, add_special_tokens=True) if isinstance(tokenizer, Subwords) else tokenizer.encode(text)
    return ids[:-1] if len(ids) > 1 and int(ids[-1]) in ends else ids


def messages(system: str | None, *turns: str) -> list[dict[str, str]]:
    """A chat: the system's words, if any, then the user's and the assistant's in turn."""
    said = [{"role": "system", "content": system}] if system is not None else []
    roles = itertools.cycle(["user", "assistant"])
    return said + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for."""
    try:
        if prompt == "-":
            data = sys.stdin.buffer.read()
        elif prompt.startswith("@"):
            data = Path(prompt[1:]).read_bytes()
        else:
            data = prompt.encode("utf-8", "surrogateescape")
        require(data, f"prompt={prompt!r} is empty; give at least one character")
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"prompt={prompt!r} cannot be read ({error.strerror}); name a file after the @") from error
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(f"prompt={prompt!r} is not UTF-8: {where}; convert it, such as by iconv") from error


def complete(writer: Writer, echo: str, tokens: np.ndarray) -> None:
    """Print every sample when all are there. Compiling is not counted in the speeds."""
    model, params, sampler, key = writer.model, writer.params, writer.sampler, writer.key
    new = writer.room(tokens.shape[1])
    padded, n_slots = prepare(model, tokens, None, new, sampler, key, None)
    cache = tx.init_cache(model.cfg, len(tokens), n_slots)
    fill = jax.jit(tx.prefill, static_argnums=0, donate_argnums=3).lower(model, params, padded, cache).compile()
    start = time.perf_counter()
    logits, cache = jax.block_until_ready(fill(params, padded, cache))
    filling = time.perf_counter() - start
    loop = jax.jit(tx.decode, static_argnums=(0, 4), donate_argnums=3)
    ends = np.array(writer.ends) if writer.ends else None
    run = loop.lower(model, params, logits, cache, new, sampler, key, ends).compile()
    start = time.perf_counter()
    out = run(params, logits, cache, sampler, key, ends)
    rows, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    decoding = time.perf_counter() - start
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(rows) > 1:
            print(f"--- sample {i + 1}")
        print(echo + writer.tokenizer.decode([i for i in row[:length] if i < writer.tokenizer.vocab_size]))
    say(f"prefill {tokens.size} tokens", tokens.size, filling)
    say(f"decode {lengths.sum()} tokens", lengths.sum() - len(rows), decoding)  # each row's first came from the prefill


def tokens_of(writer: Writer, ids: np.ndarray) -> Iterator[int]:
    """New tokens as they come, up to one that ends the text."""
    more = {"max_new_tokens": writer.room(len(ids)), "sampler": writer.sampler, "key": writer.key}
    rows = tx.stream(writer.model, writer.params, ids[None], **more)
    return itertools.takewhile(lambda token: token not in writer.ends, (int(row[0]) for row in rows))


def show(writer: Writer, echo: str, tokens: Iterable[int]) -> str:
    """Print a text as its tokens come, and give it back. The first two compile, and are not counted in the speed."""
    times, pieces = [time.perf_counter()], []

    def clocked() -> Iterator[int]:
        for token in tokens:
            times.append(time.perf_counter())
            if token < writer.tokenizer.vocab_size:  # a model's table may be longer, up to a round number
                yield token

    print(echo, end="", flush=True)
    for piece in writer.tokenizer.stream(clocked()):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    n = len(times) - 1
    say(f"first token after {times[min(1, n)] - times[0]:.2f} s", 0, 0)
    say(f"decode {n} tokens", n - 2, times[-1] - times[min(2, n)])
    return "".join(pieces)


def converse(writer: Writer, system: str | None) -> None:
    """Answer each line of standard input, with the cache of all that was said before."""
    model, params, said = writer.model, writer.params, list[str]()
    tokenizer = cast(Subwords, writer.tokenizer)
    held = session.start(model)

    def answer(ids: np.ndarray) -> Iterator[int]:
        nonlocal held
        logits, held = session.read(model, params, held, ids)
        more = {"max_new_tokens": writer.room(len(ids)), "sampler": writer.sampler}
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


def say(what: str, n_tokens: int, seconds: float) -> None:
    """One line for the person, with the speed if there is one."""
    print(what + (f", {n_tokens / seconds:,.0f} tokens/s" if n_tokens > 0 else ""), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
