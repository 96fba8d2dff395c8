"""Greedy tokens of a GGUF model by llama-cpp-python, and the seconds that they took: a worker of benchmarks/decode.py.

    python benchmarks/llama_worker.py model.gguf THREADS

For each line {"tokens": [[…], …], "new": n} it reads, it writes {"first": s, "rest": s, "tokens": [[…], …]}: seconds to
the first token of all rows, and from there to the last. It needs llama-cpp-python and NumPy alone. Rows are sequences
of one llama_batch; the cache has llama.cpp's default type, float16.
"""

import ctypes
import functools
import json
import sys
import time

import llama_cpp as ll
import numpy as np


def main(path: str, threads: int) -> None:
    """Answer until there is no further line."""
    ll.llama_log_set(quiet, ctypes.c_void_p())
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    context = functools.cache(functools.partial(make_context, model, threads))
    print(json.dumps({"version": ll.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        rows, new = asked["tokens"], asked["new"]
        found = write(context(len(rows), len(rows[0]) + new), n_tokens(model), rows, new)
        print(json.dumps(found), flush=True)


@ll.llama_log_callback
def quiet(level, text, data):
    """Writes nothing."""


def n_tokens(model) -> int:
    """The size of the vocabulary."""
    return ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))


def make_context(model, threads: int, n_rows: int, n_slots: int):
    """A cache of n_slots tokens for each of n_rows sequences."""
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_seq_max = n_rows * n_slots, n_rows
    params.n_batch = n_rows * n_slots  # all prompts at once, in llama.cpp's own smaller parts
    params.n_threads = params.n_threads_batch = threads
    return ll.llama_init_from_model(model, params)


def write(context, vocab_size: int, rows: list[list[int]], new: int) -> dict:
    """`new` tokens after each of the prompts, which are of equal length."""
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    batch = ll.llama_batch_init(len(rows) * len(rows[0]), 0, 1)
    start = time.perf_counter()
    last = step(context, batch, vocab_size, rows, 0)
    first, told = time.perf_counter(), [last]
    for i in range(new - 1):
        last = step(context, batch, vocab_size, [[token] for token in last], len(rows[0]) + i)
        told.append(last)
    end = time.perf_counter()
    ll.llama_batch_free(batch)
    return {"first": first - start, "rest": end - first, "tokens": [list(row) for row in zip(*told, strict=True)]}


def step(context, batch, vocab_size: int, rows: list[list[int]], position: int) -> list[int]:
    """Read these tokens of each row, from `position` on; the likeliest next token of each."""
    T = len(rows[0])
    for i in range(len(rows) * T):
        row, t = divmod(i, T)
        batch.token[i], batch.pos[i] = rows[row][t], position + t
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        batch.logits[i] = t + 1 == T
    batch.n_tokens = len(rows) * T
    status = ll.llama_decode(context, batch)
    if status:
        raise RuntimeError(f"llama_decode gives {status}")
    shape, found = (vocab_size,), [ll.llama_get_logits_ith(context, T * row + T - 1) for row in range(len(rows))]
    return [int(np.ctypeslib.as_array(logits, shape).argmax()) for logits in found]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
