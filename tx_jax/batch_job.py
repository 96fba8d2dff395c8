"""A file of prompts becomes a file of texts, in their order: objects of JSON, one a line, by `write_all`.

The same command again goes on after the last whole line of the output.
"""

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tx_jax.batch_input import Request, read_requests, read_rows
from tx_jax.batch_output import append, as_line, claim
from tx_jax.decoding.automaton import Automaton
from tx_jax.decoding.engine import Written, write_all
from tx_jax.errors import require
from tx_jax.writing import Writer, say, until

# Texts of each row in one call to the engine. A job goes on by repeating the call that it was stopped in: in another
# batch a text would be the same but for rounding, and not the same bytes. More is more to repeat; less leaves rows idle
# more often, while the last texts of a call are written.
ROUNDS = 32
FREE = ("input", "output", "batch_size")  # settings that may change when a job goes on; the prompts are held apart
QUIET = 30  # seconds between two lines of progress, where there is no terminal


def write_file(writer: Writer, load: Callable[[], dict], settings: Mapping[str, Any], *, chats: bool) -> None:
    """Write a line of settings["output"] for each of settings["input"], after those that are there.

    Args:
        load: the writer's parameters, when all else has been checked.
        settings: by name, all that has a say in the texts, and FREE.
        chats: whether a prompt is answered rather than gone on from.

    Raises:
        InputError: a line is no request, the output is another's or cannot be written, or another process writes it.
    """
    output, n_rows, system = Path(settings["output"]), settings["batch_size"], settings["system"]
    require(
        not writer.prefix_lm, "--input is not for a model of the objective prefix_lm; give it one --prompt at a time"
    )
    rows = read_rows(settings["input"])
    requests = read_requests(rows, writer, system if chats else None, chats)
    told = {name: value for name, value in settings.items() if name not in FREE}
    digest = hashlib.sha256(json.dumps([row for _, row in rows]).encode()).hexdigest()
    with claim(output, told | {"prompts": digest}, [row for _, row in rows]) as (file, n_done):
        if n_done == len(requests):
            say(f"{output} has all {n_done:,} texts; there is nothing to do")
            return
        writer, machine = writer._replace(params=load()), jax.device_get(writer.automaton)
        with progress(n_done, len(requests)) as tell:
            for one in texts(writer, requests, n_done, n_rows):
                if one.number >= n_done:
                    append(file, as_line(requests[one.number].fields | answer(writer, one, machine)), output)
                tell(one.number + 1, len(one.tokens))


def texts(writer: Writer, requests: Sequence[Request], first: int, n_rows: int) -> Iterator[Written]:
    """Texts in the order of their requests, from the beginning of the call to the engine that holds the first.

    One that ends early waits for its turn.
    """
    how = {"n_rows": n_rows, "sampler": writer.sampler, "key": writer.key, "eos_id": writer.ends}
    for start in range(first - first % (ROUNDS * n_rows), len(requests), ROUNDS * n_rows):
        part = requests[start : start + ROUNDS * n_rows]
        ids, limits = [one.ids.tolist() for one in part], [one.limit for one in part]
        more = {"max_new_tokens": limits, "automaton": writer.automaton, "first": start}
        waiting: dict[int, Written] = {}
        turn = start
        for one in write_all(writer.model, writer.params, ids, **how, **more):
            waiting[one.number] = one
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1


def answer(writer: Writer, one: Written, machine: Automaton | None) -> dict[str, Any]:
    """The fields that the output adds; the machine is the writer's, on the host."""
    ids, tokenizer = one.tokens.tolist(), writer.tokenizer
    ended = ids[-1] in writer.ends
    if machine is not None:
        state = functools.reduce(lambda state, id: machine.table[state, machine.classes[id]], ids, machine.start)
        ended = ended or bool(machine.final[state])
    text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i not in writer.ends])
    log_prob = float(one.log_probs.sum(dtype=np.float64))
    return {
        "text": "".join(until([text], writer.stops)),
        "n_tokens": len(ids),  # what ends the text included
        "finish": "stop" if ended else "length",
        "log_prob": round(log_prob, 4) if math.isfinite(log_prob) else None,  # of all tokens, in nats
    }


@contextlib.contextmanager
def progress(n_done: int, n_all: int) -> Iterator[Callable[[int, int], None]]:
    """A function that is told of each text: its number, and its tokens. Speeds are with compilation."""
    console = Console(stderr=True, force_jupyter=False)
    columns = ("text", MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, "ETA", TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    task = bar.add_task("compiling …", total=n_all, completed=n_done)
    start = said = time.perf_counter()
    n_texts, n_tokens = n_done, 0

    def speed() -> str:
        return f"{n_tokens / (time.perf_counter() - start):,.0f} tokens/s"

    def tell(number: int, n_more: int) -> None:
        nonlocal n_texts, n_tokens, said
        n_texts, n_tokens = max(n_texts, number), n_tokens + n_more
        bar.update(task, completed=n_texts, description=speed())
        if not console.is_terminal and time.perf_counter() - said > QUIET:
            said = time.perf_counter()
            say(f"text {n_texts:>5}/{n_all}  {speed()}")

    if n_done:
        say(f"continuing after text {n_done} of {n_all}")
    with bar:
        yield tell
    seconds = time.perf_counter() - start
    say(f"{n_texts - n_done:,} texts, {n_tokens:,} tokens in {seconds:.1f} s, with compilation: {speed()}")
