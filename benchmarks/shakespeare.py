"""nanoGPT's small CPU run on tiny Shakespeare, whole: tx_jax beside the same model in plain torch, in turn.

    python benchmarks/shakespeare.py       # 4 layers, d 128, context 64, batch 12, 2,000 steps, float32

Both start from the same weights and read the same batches in the same order; they take turns of `turn` steps, so that
noise of the machine falls on both. Prints training seconds (compilation apart) and the loss over the whole
validation split.
"""

import dataclasses
import os
import time

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import tyro
from torch_gpt import TorchGPT, adamw_groups

import tx_jax as tx
from tx_jax.data.batches import split, train_batches, valid_batches
from tx_jax.data.corpora import load_text
from tx_jax.data.tokenizers import CharTokenizer
from tx_jax.memory import keep_memory
from tx_jax.run_presets import nanogpt_shakespeare


@dataclasses.dataclass
class Args:
    turn: int = 100  # steps of each before the other goes on
    seed: int = 0
    threads: int = os.cpu_count() or 1  # of torch; XLA takes all cores


def main(args: Args) -> None:
    """Train both in turn and print a table."""
    keep_memory()  # as train.py does; torch runs in the same process
    run = nanogpt_shakespeare("cpu")
    text = load_text(None)
    tokenizer = CharTokenizer.train(text)
    train_ids, valid_ids = split(tokenizer.encode(text), run.data.valid_fraction)
    shape = {"seq_len": run.data.seq_len, "batch_size": run.data.batch_size}
    held_out = valid_batches(valid_ids, **shape)
    cfg = dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size)
    model, optimizer = tx.build(cfg), tx.make_optimizer(run.optim, run.train.n_steps)
    state = tx.init_state(model, optimizer, jax.random.key(args.seed))

    torch.set_num_threads(args.threads)
    peer = TorchGPT(cfg)
    peer.copy(jax.device_get(state.params))
    groups = adamw_groups(peer, run.optim.weight_decay)
    adamw = torch.optim.AdamW(groups, betas=(run.optim.beta1, run.optim.beta2), eps=run.optim.eps)
    schedule = tx.make_schedule(run.optim, run.train.n_steps)
    rates = np.asarray(jax.vmap(schedule)(np.arange(run.train.n_steps)))

    launch = tx.jit_step(tx.make_train_step(model, optimizer), state)
    state = launch.put_state(state)
    mine = iter(train_batches(train_ids, **shape, seed=args.seed))
    other = iter(train_batches(train_ids, **shape, seed=args.seed))
    start = time.perf_counter()
    step = launch.lower(state, launch.put_batch(held_out[0])).compile()
    compile_seconds = time.perf_counter() - start

    seconds = {"tx_jax": [], "torch": []}
    for done in range(0, run.train.n_steps, args.turn):
        start = time.perf_counter()
        for _ in range(args.turn):
            state, metrics = step(state, launch.put_batch(next(mine)))
        loss = float(metrics.loss)
        seconds["tx_jax"].append(time.perf_counter() - start)

        start = time.perf_counter()
        for i in range(done, done + args.turn):
            batch = next(other)
            for group in adamw.param_groups:
                group["lr"] = float(rates[i])
            logits = peer(torch.from_numpy(np.ascontiguousarray(batch.tokens)).long())
            theirs = F.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(np.ascontiguousarray(batch.targets)).long().flatten()
            )
            adamw.zero_grad()
            theirs.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), run.optim.clip_norm)
            adamw.step()
        seconds["torch"].append(time.perf_counter() - start)
        print(
            f"step {done + args.turn:>5}  tx_jax {loss:.4f} {seconds['tx_jax'][-1]:5.1f} s"
            f"   torch {theirs.item():.4f} {seconds['torch'][-1]:5.1f} s",
            flush=True,
        )

    evaluate = jax.jit(tx.make_eval_step(model))
    total, count = np.sum([jax.device_get(evaluate(state.params, batch)) for batch in held_out], axis=0)
    with torch.inference_mode():
        peer_total = 0.0
        for batch in held_out:
            nats = F.cross_entropy(
                peer(torch.from_numpy(batch.tokens).long()).flatten(0, 1),
                torch.from_numpy(batch.targets).long().flatten(),
                reduction="none",
            )
            peer_total += float((nats.numpy() * batch.weights.ravel()).sum())
    print(
        f"tx_jax: {sum(seconds['tx_jax']):.0f} s of training + {compile_seconds:.1f} s of compilation, "
        f"validation loss {total / count:.4f}"
    )
    print(f" torch: {sum(seconds['torch']):.0f} s of training, validation loss {peer_total / count:.4f}")
    ratio = np.median(np.array(seconds["torch"]) / np.array(seconds["tx_jax"]))
    print(f"median ratio of the turns, torch's seconds by ours: {ratio:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
