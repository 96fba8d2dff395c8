"""English to Spanish: tx_jax beside torch.nn.Transformer of the same sizes, on the same batches, by the same schedule.

    python benchmarks/translate.py --n-steps 600 --seed 0       # in turns, on the CPU
    python benchmarks/translate.py --n-steps 600 --seed 0 --only torch

Each trains with the preset translate-en-es, cut to n_steps, and keeps the mean of its parameters at the last five of
save_every steps. torch's are copied into a model of ours (whose logits are held to torch's), so that one beam search
translates the test split for both. The sides take turns of `turn` steps, so that noise of the machine falls on both.
"""

import dataclasses
import json
import math
import os
import sys
import time
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import tyro
from torch import nn

import tx_jax as tx
from tx_jax.memory import keep_memory
from tx_jax.run_presets import translate_en_es
from tx_jax.training.tasks import open_task


@dataclasses.dataclass
class Args:
    n_steps: int | None = None  # None: the preset's
    seed: int = 0
    turn: int = 20  # steps of each before the other goes on
    only: str | None = None  # tx_jax | torch; None: both
    threads: int = os.cpu_count() or 1  # of torch; XLA takes all cores


class Peer(nn.Module):
    """torch.nn.Transformer with what it leaves to its user: one table for all, × √d, sinusoids, dropout after them."""

    def __init__(self, cfg: tx.ModelConfig):
        super().__init__()
        d = cfg.d_model
        self.tokens = nn.Embedding(cfg.vocab_size, d)
        angles = np.arange(cfg.max_len)[:, None] * 10_000.0 ** (-np.arange(0, d, 2) / d)
        table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(cfg.max_len, d)
        self.register_buffer("positions", torch.tensor(table, dtype=torch.float32))
        self.dropout = nn.Dropout(cfg.dropout_rate)
        self.stacks = nn.Transformer(
            d, cfg.n_heads, cfg.n_layers, cfg.n_layers, cfg.F, cfg.dropout_rate, batch_first=True,
            norm_first=cfg.norm_order == "pre", layer_norm_eps=cfg.norm_eps,
        )  # fmt: skip
        for p in self.stacks.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        nn.init.normal_(self.tokens.weight, std=d**-0.5)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) * math.sqrt(self.tokens.embedding_dim) + self.positions[: ids.shape[1]]
        return self.dropout(x)

    def forward(self, source, tokens, no_source, no_token) -> torch.Tensor:
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = self.stacks(
            self.embed(source), self.embed(tokens), tgt_mask=later, src_key_padding_mask=no_source,
            tgt_key_padding_mask=no_token, memory_key_padding_mask=no_source, tgt_is_causal=True,
        )  # fmt: skip
        return x @ self.tokens.weight.T


def as_params(weights: dict[str, np.ndarray], n_layers: int) -> dict:
    """The peer's weights as a parameter tree of ours: kernels are (out, in) on both sides."""

    def linear(name: str) -> dict:
        return {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def norm(name: str) -> dict:
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def heads(name: str) -> dict:
        kernels, biases = (np.split(weights[f"{name}.in_proj_{part}"], 3) for part in ("weight", "bias"))
        parts = {part: {"kernel": kernels[i], "bias": biases[i]} for i, part in enumerate("qkv")}
        return parts | {"out": linear(f"{name}.out_proj")}

    def block(name: str, cross: bool) -> dict:
        one = {
            "attention": heads(f"{name}.self_attn"), "attention_norm": norm(f"{name}.norm1"),
            "mlp": {"up": linear(f"{name}.linear1"), "down": linear(f"{name}.linear2")},
            "mlp_norm": norm(f"{name}.norm{3 if cross else 2}"),
        }  # fmt: skip
        if cross:
            one |= {"cross_attention": heads(f"{name}.multihead_attn"), "cross_norm": norm(f"{name}.norm2")}
        return one

    def stack(name: str, cross: bool) -> dict:
        blocks = {f"blocks_{i}": block(f"{name}.layers.{i}", cross) for i in range(n_layers)}
        return blocks | {"last_norm": norm(f"{name}.norm")}

    table = {"embed": {"table": weights["tokens.weight"]}}
    return table | {"encoder": stack("stacks.encoder", False), "decoder": stack("stacks.decoder", True)}


class Ours:
    """tx_jax: the step of train.py."""

    def __init__(self, run: tx.RunConfig):
        self.model, self.seed = tx.build(run.model), run.train.seed
        self.optimizer = tx.make_optimizer(run.optim, run.train.n_steps)
        step = tx.make_train_step(self.model, self.optimizer, label_smoothing=run.train.label_smoothing_rate)
        self.launch = tx.jit_step(step, self.begin())

    def begin(self) -> Any:
        self.state = tx.init_state(self.model, self.optimizer, jax.random.key(self.seed))
        return self.state

    def step(self, batch: tx.PairBatch, lr: float) -> Any:
        self.state, metrics = self.launch.step(self.state, self.launch.put_batch(batch))
        return metrics.loss

    def params(self) -> dict:
        return jax.tree.map(np.array, self.state.params)


class Theirs:
    """torch: eager, with its fused attention."""

    def __init__(self, run: tx.RunConfig):
        self.run, self.optim, self.smoothing = run, run.optim, run.train.label_smoothing_rate
        self.cfg = dataclasses.replace(run.model, biases="all")  # nn.Transformer has them everywhere
        self.model = tx.build(self.cfg)
        self.begin()

    def begin(self) -> None:
        torch.manual_seed(self.run.train.seed)
        self.peer = Peer(self.run.model)
        betas = (self.optim.beta1, self.optim.beta2)
        self.adam = torch.optim.AdamW(
            self.peer.parameters(), betas=betas, eps=self.optim.eps, weight_decay=self.optim.weight_decay
        )

    def step(self, batch: tx.PairBatch, lr: float) -> Any:
        for group in self.adam.param_groups:
            group["lr"] = lr
        targets, counted = torch.from_numpy(batch.targets).long(), torch.from_numpy(batch.weights) > 0
        logits = self.peer(*self.inputs(batch))
        loss = F.cross_entropy(logits[counted], targets[counted], label_smoothing=self.smoothing)
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.peer.parameters(), self.optim.clip_norm)
        self.adam.step()
        return loss.detach()

    @staticmethod
    def inputs(batch: tx.PairBatch) -> list[torch.Tensor]:
        ids = [torch.from_numpy(part).long() for part in (batch.source, batch.tokens)]
        none = [torch.from_numpy(part) < 0 for part in (batch.source_positions, batch.positions)]
        for part in none:
            part[:, 0] = False  # a row of padding alone would be NaN; it has no weight
        return ids + none

    def params(self) -> dict:
        weights = {name: p.detach().numpy().copy() for name, p in self.peer.named_parameters()}
        return as_params(weights, self.cfg.n_layers)

    def check(self, batch: tx.PairBatch) -> None:
        """The copied model computes what the peer does."""
        self.peer.eval()
        with torch.inference_mode():
            theirs = self.peer(*self.inputs(batch)).numpy()
        self.peer.train()
        ours, _ = self.model.apply({"params": self.params()}, **batch.inputs)
        worst = np.abs(theirs - np.asarray(ours))[batch.weights > 0].max()
        print(f"torch's logits and those of its copy differ by {worst:.1e}", flush=True)
        if worst > 1e-3:
            sys.exit("the copy of torch's weights is wrong")


SIDES = {"tx_jax": Ours, "torch": Theirs}


def main(args: Args) -> None:
    """Train, translate, print a table."""
    keep_memory()
    torch.set_num_threads(args.threads)
    run = translate_en_es("cpu")
    n_steps = args.n_steps or run.train.n_steps
    save_every = max(n_steps * run.train.save_every // run.train.n_steps, 1)
    train = dataclasses.replace(run.train, n_steps=n_steps, seed=args.seed, save_every=save_every)
    optim = dataclasses.replace(run.optim, warmup_steps=min(run.optim.warmup_steps, n_steps // 4))
    task = open_task(dataclasses.replace(run, train=train, optim=optim))
    run, held_out = task.cfg, task.held_out
    rates = np.asarray(jax.vmap(tx.make_schedule(run.optim, n_steps))(np.arange(n_steps)))
    names = [args.only] if args.only else list(SIDES)
    sides = {name: SIDES[name](run) for name in names}
    if "torch" in sides:
        sides["torch"].check(held_out[0])
    seconds, counts, sums = ({name: [] for name in names}, [], dict.fromkeys(names))
    source = iter(task.batches)
    at = source.get_state()
    shapes = {(b.source.shape, b.tokens.shape): b for b in (next(source) for _ in range(300))}
    source.set_state(at)
    for side in sides.values():  # compile every shape before the clock runs
        for batch in shapes.values():
            float(side.step(batch, 0.0))
        side.begin()
    for done in range(0, n_steps, args.turn):
        steps = range(done, min(done + args.turn, n_steps))
        batches = [next(source) for _ in steps]
        counts.append(sum(batch.n_tokens for batch in batches))
        losses = {}
        for name, side in sides.items():
            start, kept = time.perf_counter(), 0.0
            for i, batch in zip(steps, batches, strict=True):
                loss = side.step(batch, float(rates[i]))
                if (i + 1) % save_every == 0 and i + 1 > n_steps - run.train.n_averaged * save_every:
                    losses[name], pause = float(loss), time.perf_counter()
                    now = side.params()
                    sums[name] = now if sums[name] is None else jax.tree.map(np.add, sums[name], now)
                    kept += time.perf_counter() - pause
            losses[name] = float(loss)
            seconds[name].append(time.perf_counter() - start - kept)
        told = "   ".join(f"{name} {losses[name]:.3f} {seconds[name][-1]:5.1f} s" for name in names)
        print(f"step {steps[-1] + 1:>5}  {told}", flush=True)
    result = {"n_steps": n_steps, "seed": args.seed}
    evaluate = {name: jax.jit(tx.make_eval_step(side.model)) for name, side in sides.items()}
    for name, side in sides.items():
        mean = jax.tree.map(lambda leaf: leaf / run.train.n_averaged, sums[name])
        total, count = np.sum([jax.device_get(evaluate[name](mean, batch)) for batch in held_out], axis=0)
        speed = np.median(np.array(counts) / np.array(seconds[name]))
        scores = task.test(side.model, mean)
        result[name] = {"valid_loss": float(total / count), "tokens_per_second": speed, **scores}
        result[name]["minutes"] = sum(seconds[name]) / 60
        print(f"{name:>6}: " + ", ".join(f"{key} {value:.4g}" for key, value in result[name].items()), flush=True)
    if not args.only:
        ratio = np.median(np.array(seconds["torch"]) / np.array(seconds["tx_jax"]))
        result["ratio"] = float(ratio)
        print(f"median ratio of the turns, our tokens/s by torch's: {ratio:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
