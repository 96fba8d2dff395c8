"""Step time of beam search beside greedy decoding: an encoder-decoder of random weights whose end never comes.

    python benchmarks/beam.py              # 3 + 3 layers, d 256, V 8,000, batch 32 and 1, 64 steps

Prints, for each batch size, source length and number of beams, the time of one step (of all rows), its ratio to greedy,
and the bytes of memory that a step reads: an encoder's keys and values, once a sentence whatever the number of beams.
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import tx_jax as tx

END = 2


@dataclasses.dataclass
class Args:
    batch_sizes: tuple[int, ...] = (32, 1)
    source_lens: tuple[int, ...] = (16, 64, 256, 1024)  # tokens
    beams: tuple[int, ...] = (4,)
    new_tokens: int = 64
    rounds: int = 5  # of all in turn
    d_model: int = 256
    n_layers: int = 3  # of the encoder and of the decoder
    vocab_size: int = 8000


def make(args: Args):
    """The model and its parameters; the logit of END is far below all others."""
    cfg = tx.ModelConfig(
        stack="encoder_decoder", vocab_size=args.vocab_size, d_model=args.d_model, n_layers=args.n_layers,
        n_heads=args.d_model // 64, max_len=2048, positions="sinusoidal", head_bias=True,
    )  # fmt: skip
    model = tx.build(cfg)
    params = tx.init_params(model, jax.random.key(0))
    params["head"]["bias"] = params["head"]["bias"].at[END].set(-1e9)
    return model, params


def searches(args: Args, model, params, memory, batch_size: int) -> dict:
    """By number of beams (0: greedy), a function of the tokens to write that does so."""
    prompts = np.ones((batch_size, 1), np.int32)
    call = {"eos_id": END, "memory": memory}
    greedy = functools.partial(tx.generate, model, params, prompts, **call)
    beam = functools.partial(tx.beam_search, model, params, prompts, **call)
    return {0: greedy} | {n: functools.partial(beam, n_beams=n) for n in args.beams}


def step_times(args: Args, runs: dict) -> dict:
    """The median seconds of one step: of all steps but the first, which follows the prefill."""
    times: dict = {name: {1: [], args.new_tokens: []} for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            for new in (1, args.new_tokens):
                t0 = time.perf_counter()
                out = jax.block_until_ready(run(max_new_tokens=new))
                if i:  # the first round compiles
                    times[name][new].append(time.perf_counter() - t0)
                assert int(jnp.min(out.lengths)) == new
    medians = {name: [statistics.median(column) for column in by_new.values()] for name, by_new in times.items()}
    return {name: (long - short) / (args.new_tokens - 1) for name, (short, long) in medians.items()}


def main(args: Args) -> None:
    """Measure in turn and print a table."""
    model, params = make(args)
    encode = jax.jit(lambda source: model.apply({"params": params}, source, method="encode"))
    print("batch  source  memory, MiB  " + "  ".join(["greedy, ms", *(f"beam {n}, ms  ratio" for n in args.beams)]))
    for batch_size in args.batch_sizes:
        for source_len in args.source_lens:
            source = jax.random.randint(jax.random.key(1), (batch_size, source_len), 3, args.vocab_size)
            memory = jax.block_until_ready(encode(source))
            n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(memory.layers))
            found = step_times(args, searches(args, model, params, memory, batch_size))
            cells = "  ".join(f"{found[n] * 1e3:10.2f}  {found[n] / found[0]:5.2f}" for n in args.beams)
            first = f"{batch_size:5}  {source_len:6}  {n_bytes / 2**20:11.2f}  {found[0] * 1e3:10.2f}"
            print(f"{first}  {cells}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
