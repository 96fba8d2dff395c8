"""Decoding speed of tx_jax beside Hugging Face transformers (torch), same shape, random weights, interleaved.

    python benchmarks/decode.py            # SmolLM2-135M's shape, batch 1, 128 + 128 tokens, float32

Prints the median tokens/s of each, the ratio, and what XLA's memory analysis says of the compiled decode loop.
"""

import dataclasses
import os
import statistics
import time

import jax
import jax.numpy as jnp
import tyro

import tx_jax as tx
from tx_jax import presets


@dataclasses.dataclass
class Args:
    batch_size: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 128
    rounds: int = 5  # of both, in turn
    threads: int = os.cpu_count() or 1  # of torch; XLA takes all cores
    peer: bool = True  # also run transformers (needs torch: the `bench` extra)


def ours(args: Args):
    """A function that decodes once and gives (prefill seconds, decode seconds), and the decode loop's memory."""
    model = tx.build(presets.smollm2_135m())
    params = tx.init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (args.batch_size, args.prompt_len), 0, model.cfg.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(args.prompt_len), tokens.shape)
    cache = tx.init_cache(model.cfg, args.batch_size, args.prompt_len + args.new_tokens)
    prefill = jax.jit(tx.prefill, static_argnums=0)
    logits, filled = prefill(model, params, tx.Prompt(tokens, positions), cache)
    loop = jax.jit(tx.decode, static_argnums=(0, 4), donate_argnums=3)
    compiled = loop.lower(model, params, logits, filled, args.new_tokens).compile()

    def once() -> tuple[float, float]:
        t0 = time.perf_counter()
        logits, filled = jax.block_until_ready(prefill(model, params, tx.Prompt(tokens, positions), cache))
        t1 = time.perf_counter()
        jax.block_until_ready(compiled(params, logits, filled).tokens)
        return t1 - t0, time.perf_counter() - t1

    return once, compiled.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def theirs(args: Args):
    """The same in transformers: LlamaForCausalLM.generate with its default cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    cfg = presets.smollm2_135m()
    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.F, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.K, max_position_embeddings=cfg.max_len,
        rope_theta=cfg.rotary.base, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, config.vocab_size, (args.batch_size, args.prompt_len))

    def generate(new: int) -> float:
        t0 = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        assert out.shape[1] == args.prompt_len + new
        return time.perf_counter() - t0

    def once() -> tuple[float, float]:
        first = generate(1)
        return first, generate(args.new_tokens) - first

    return once


def main(args: Args) -> None:
    """Measure both in turn and print a table."""
    once, memory, cache_bytes = ours(args)
    runs = {"tx_jax": once} | ({"transformers": theirs(args)} if args.peer else {})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            result = run()
            if i:  # the first round warms up
                times[name].append(result)
    speeds = {}
    for name, pairs in times.items():
        first, rest = (statistics.median(column) for column in zip(*pairs, strict=True))
        prompt = args.batch_size * args.prompt_len / first
        speeds[name] = args.batch_size * (args.new_tokens - 1) / rest
        print(f"{name:>13}: prefill {prompt:7.0f} tokens/s, decode {speeds[name]:6.1f} tokens/s")
    if args.peer:
        print(f"        ratio: decode {speeds['tx_jax'] / speeds['transformers']:.2f}")
    print(
        f"       memory: cache {cache_bytes / 2**20:.2f} MiB, temporaries {memory.temp_size_in_bytes / 2**20:.2f} MiB,"
    )
    print(f"               arguments aliased to results {memory.alias_size_in_bytes / 2**20:.2f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
