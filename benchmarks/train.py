"""Training speed of tx_jax beside torch, in turn: transformers' GPT-2, and a plain one with fused attention.

    python benchmarks/train.py             # 6 layers, d 384, context 256, batch 16, float32
    python benchmarks/train.py --n-layers 12 --d-model 768 --n-heads 12 --vocab-size 50257 --seq-len 512 --batch-size 2
                                           # GPT-2 small

The peers start from our weights, so the first losses must agree; all take AdamW steps on the same random tokens.
Prints the median tokens/s of each, the ratios, and where XLA's cost and memory analysis puts our step.
"""

import dataclasses
import os
import statistics
import time

import jax
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.config import ModelConfig
from tx_jax.data.batches import Batch
from tx_jax.memory import keep_memory
from tx_jax.parallel import jit_step
from tx_jax.run_config import OptimConfig
from tx_jax.training.optim import make_optimizer
from tx_jax.training.step import init_state, make_train_step


@dataclasses.dataclass
class Args:
    n_layers: int = 6
    d_model: int = 384
    n_heads: int = 6
    vocab_size: int = 65
    seq_len: int = 256
    batch_size: int = 16
    steps: int = 3  # in a round
    rounds: int = 5  # of each, in turn
    threads: int = os.cpu_count() or 1  # of torch; XLA takes all cores
    attention: str = "eager"  # of transformers: eager | sdpa
    peers: tuple[str, ...] = ("transformers", "plain torch")  # which need the `bench` extra


OPTIM = OptimConfig(schedule="constant", warmup_steps=0, peak_lr=1e-3, beta2=0.99, weight_decay=0.1, clip_norm=1.0)


def ours(args: Args, tokens: np.ndarray):
    """A function that takes `steps` steps and gives (seconds, last loss); the config, first parameters and program."""
    cfg = ModelConfig(
        vocab_size=args.vocab_size, max_len=args.seq_len, d_model=args.d_model, n_layers=args.n_layers,
        n_heads=args.n_heads, positions="learned", biases="all", mlp="gelu_tanh",
    )  # fmt: skip
    model, optimizer = tx.build(cfg), make_optimizer(OPTIM, 1)
    state = init_state(model, optimizer, jax.random.key(0))
    params = jax.tree.map(np.array, state.params)  # before the buffers are donated
    launch = jit_step(make_train_step(model, optimizer), state)
    T = args.seq_len
    batch = launch.put_batch(Batch(tokens[:, :T], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32)))
    state = launch.put_state(state)
    compiled = launch.lower(state, batch).compile()

    def once() -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = compiled(state, batch)
        loss = float(metrics.loss)
        return time.perf_counter() - start, loss

    return once, cfg, params, compiled


def transformers_model(args: Args, cfg: ModelConfig, params: dict):
    """A GPT-2 of the same weights, and how to ask it for logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=args.vocab_size, n_positions=args.seq_len, n_embd=args.d_model, n_layer=args.n_layers,
        n_head=args.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=args.attention,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    copy_gpt2(model, params)
    return model, lambda ids: model(ids).logits


def plain_model(args: Args, cfg: ModelConfig, params: dict):
    """The same in plain torch."""
    from torch_gpt import TorchGPT

    model = TorchGPT(cfg).copy(params)
    return model, model


PEERS = {"transformers": transformers_model, "plain torch": plain_model}


def theirs(name: str, args: Args, tokens: np.ndarray, cfg: ModelConfig, params: dict):
    """A function like `ours`, of a peer."""
    import torch
    from torch_gpt import adamw_groups

    torch.set_num_threads(args.threads)
    model, logits_of = PEERS[name](args, cfg, params)
    groups = adamw_groups(model, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.peak_lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    inputs, targets = torch.tensor(tokens[:, :-1]).long(), torch.tensor(tokens[:, 1:]).long()

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(args.steps):
            loss = torch.nn.functional.cross_entropy(logits_of(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
            optimizer.step()
            last = loss.item()
        return time.perf_counter() - start, last

    return once


def copy_gpt2(model, params: dict) -> None:
    """Give a transformers GPT-2 our parameters (its kernels are (in, out), with q, k and v in one)."""
    import torch

    stack = params["stack"]
    weights = {
        "transformer.wte.weight": params["embed"]["table"],
        "transformer.wpe.weight": stack["positions"]["table"],
    }
    weights |= norm("transformer.ln_f", stack["last_norm"])
    for i in range(model.config.n_layer):
        block, name = stack[f"blocks_{i}"], f"transformer.h.{i}"
        a = block["attention"]
        weights[f"{name}.attn.c_attn.weight"] = np.concatenate([a[part]["kernel"].T for part in "qkv"], axis=1)
        weights[f"{name}.attn.c_attn.bias"] = np.concatenate([a[part]["bias"] for part in "qkv"])
        for theirs, mine in (
            ("attn.c_proj", a["out"]),
            ("mlp.c_fc", block["mlp"]["up"]),
            ("mlp.c_proj", block["mlp"]["down"]),
        ):
            weights |= {f"{name}.{theirs}.weight": mine["kernel"].T, f"{name}.{theirs}.bias": mine["bias"]}
        weights |= norm(f"{name}.ln_1", block["attention_norm"]) | norm(f"{name}.ln_2", block["mlp_norm"])
    tensors = {name: torch.tensor(np.array(value)) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected


def norm(name: str, ours: dict) -> dict:
    return {f"{name}.weight": ours["scale"], f"{name}.bias": ours["bias"]}


def main(args: Args) -> None:
    """Measure both in turn and print a table."""
    keep_memory()  # as train.py does; torch runs in the same process
    tokens = np.random.default_rng(0).integers(
        args.vocab_size, size=(args.batch_size, args.seq_len + 1), dtype=np.int32
    )
    once, cfg, params, compiled = ours(args, tokens)
    runs = {"tx_jax": once} | {name: theirs(name, args, tokens, cfg, params) for name in args.peers}
    times: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            seconds, loss = run()
            losses[name].append(loss)
            if i:  # the first round warms up
                times[name].append(seconds / args.steps)
    speeds = {name: args.batch_size * args.seq_len / statistics.median(column) for name, column in times.items()}
    for name, speed in speeds.items():
        print(f"{name:>13}: {speed:7.0f} tokens/s, loss after {args.steps} steps {losses[name][0]:.5f}")
    for name in args.peers:
        by_round = [theirs / ours for theirs, ours in zip(times[name], times["tx_jax"], strict=True)]
        ratio, wide = speeds["tx_jax"] / speeds[name], f"{min(by_round):.2f}–{max(by_round):.2f} by round"
        print(f"of the speed of {name}: {ratio:.2f} ({wide})")
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    print(
        f"       memory: temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB, {cost['flops'] / 1e9:.0f} GFLOP/step"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
