"""Training runs that are known to work, as values: `python train.py NAME`. A preset is a function of the backend."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tx_jax.config import DType, ModelConfig, Stack
from tx_jax.presets import vaswani_base
from tx_jax.run_config import DataConfig, Objective, OptimConfig, RunConfig, TrainConfig


def _shakespeare(d_model: int, n_layers: int, n_heads: int, seq_len: int, **model: object) -> ModelConfig:
    return dataclasses.replace(
        ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads, max_len=seq_len, mlp="gelu", norm="layernorm"),
        **model,
    )  # fmt: skip


def nanogpt_shakespeare(backend: str) -> RunConfig:
    """nanoGPT's README for a CPU: 4 layers, d 128, context 64, 2,000 steps; it reports a validation loss of 1.88.

    Its learning rate of 1e-3 gives 1.91 over the whole split, here and in torch; three times that gives 1.79.
    """
    return RunConfig(
        run_dir="runs/nanogpt-shakespeare",
        model=_shakespeare(128, 4, 4, 64, positions="learned"),
        data=DataConfig(seq_len=64, batch_size=12),
        optim=OptimConfig(peak_lr=3e-3, end_lr=1e-4, warmup_steps=100, beta2=0.99),
        train=TrainConfig(n_steps=2000),
    )


def nanogpt_shakespeare_10m(backend: str) -> RunConfig:
    """nanoGPT's config/train_shakespeare_char.py, for an accelerator: it reports a validation loss of 1.4697."""
    model = _shakespeare(
        384, 6, 6, 256, positions="learned", dropout_rate=0.2, attention_dropout_rate=0.2, dtype=_fast_dtype(backend)
    )  # fmt: skip
    return RunConfig(
        run_dir="runs/nanogpt-shakespeare-10m",
        model=model,
        data=DataConfig(seq_len=256, batch_size=64),
        optim=OptimConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=100, beta2=0.99),
        train=TrainConfig(n_steps=5000),
    )


def gpt_shakespeare(backend: str) -> RunConfig:
    """The demo: nanoGPT's size (small on a CPU, 10M on an accelerator), with rotary positions and a window.

    The window is the context that it trains on, so that it writes on and on with a ring cache of that size.
    """
    run = nanogpt_shakespeare(backend) if backend == "cpu" else nanogpt_shakespeare_10m(backend)
    model = dataclasses.replace(run.model, positions="rotary", window=run.data.seq_len, max_len=8192)
    return dataclasses.replace(run, run_dir="runs/gpt-shakespeare", model=model)


def finetune(backend: str) -> RunConfig:
    """SmolLM2-135M-Instruct goes on with your text: --data.path FILE; --init for another model, --lora.rank for less.

    A small learning rate for a few hundred steps: more would rather forget than learn. Without decay, for the same
    reason. On two CPU cores a step takes seconds, on an accelerator a fraction of one.
    """
    seq_len, batch_size = (128, 4) if backend == "cpu" else (512, 16)
    return RunConfig(
        run_dir="runs/finetune",
        init="smollm2",
        model=ModelConfig(dtype=_fast_dtype(backend)),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size),
        optim=OptimConfig(peak_lr=5e-5, end_lr=5e-6, warmup_steps=20, beta2=0.95, weight_decay=0.0),
        train=TrainConfig(n_steps=300, log_every=10, eval_every=100, sample_every=100, save_every=100),
    )


def _translator(backend: str, **changes: Any) -> ModelConfig:
    """The model of 2017 with some things changed."""
    return dataclasses.replace(vaswani_base(), vocab_size=None, dtype=_fast_dtype(backend), **changes)


def translate_en_es(backend: str) -> RunConfig:
    """English to Spanish (Tatoeba): sized for half an hour on two CPU cores; the base model of 2017 on an accelerator.

    The small one has its norms first, which needs no long warm-up. Yours: --data.path TABLE.tsv, or --data.path SOURCES
    --data.target-path TARGETS, lines of UTF-8.
    """
    small = backend == "cpu"
    sizes = {"d_model": 256, "n_layers": 3, "n_heads": 4, "d_mlp": 1024, "norm_order": "pre"}
    return RunConfig(
        run_dir="runs/translate-en-es",
        model=_translator(backend, max_len=128, **sizes if small else {"dropout_rate": 0.3}),
        data=DataConfig(
            objective="translate", corpus="tatoeba_en_es", tokenizer="bpe", vocab_size=8000,
            seq_len=128, batch_size=16 if small else 64, valid_fraction=0.01, test_fraction=0.02,
        ),
        optim=OptimConfig(
            schedule="noam", peak_lr=2e-3 if small else 7e-4, end_lr=0.0, warmup_steps=500 if small else 4000,
            beta2=0.98, eps=1e-9, weight_decay=0.0,
        ),
        train=TrainConfig(
            n_steps=2500 if small else 30_000, label_smoothing_rate=0.1, log_every=100, eval_every=500,
            sample_every=500, save_every=100 if small else 1000, keep=5, n_averaged=5,
        ),
    )  # fmt: skip


def number_words(backend: str) -> RunConfig:
    """Numbers to English words, 123 → one hundred and twenty-three: minutes on a CPU, to an exact match."""
    sizes = {"d_model": 128, "n_layers": 2, "n_heads": 4, "d_mlp": 512}
    return RunConfig(
        run_dir="runs/number-words",
        model=_translator(backend, max_len=20, **sizes, norm_order="pre", dropout_rate=0.0),
        data=DataConfig(
            objective="translate", corpus="number_words", tokenizer="bpe", vocab_size=320,
            seq_len=20, batch_size=64, valid_fraction=0.02, test_fraction=0.05,
        ),
        optim=OptimConfig(schedule="cosine", peak_lr=3e-3, end_lr=1e-4, warmup_steps=100, beta2=0.98, weight_decay=0.0),
        train=TrainConfig(n_steps=1000, log_every=100, eval_every=250, sample_every=500, save_every=500),
    )  # fmt: skip


def _text_run(name: str, stack: Stack, objective: Objective, backend: str, **model: Any) -> RunConfig:
    """A small model of the other objectives, on tiny Shakespeare in subwords."""
    return RunConfig(
        run_dir=f"runs/{name}",
        model=ModelConfig(stack=stack, d_model=128, n_layers=4, n_heads=4, max_len=128, init="xavier", **model),
        data=DataConfig(objective=objective, tokenizer="bpe", vocab_size=1024, seq_len=64, batch_size=16),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=200, beta2=0.98),
        train=TrainConfig(n_steps=3000),
    )


def span_corruption(backend: str) -> RunConfig:
    """T5's objective on a small T5: spans of a text are hidden, and told one after the other."""
    model = {"positions": "t5", "norm": "rmsnorm", "scale_head": True, "attention_scale": 1.0}
    return _text_run("span-corruption", "encoder_decoder", "span_corruption", backend, **model)


def masked_lm(backend: str) -> RunConfig:
    """BERT's objective on a small encoder: a seventh of the tokens is hidden, and guessed from both sides."""
    return _text_run("masked-lm", "encoder", "masked_lm", backend, positions="learned")


def prefix_lm(backend: str) -> RunConfig:
    """A decoder whose prompt sees itself from both sides, as sample.py then reads it."""
    return _text_run("prefix-lm", "decoder", "prefix_lm", backend)


def _fast_dtype(backend: str) -> DType:
    return "float32" if backend == "cpu" else "bfloat16"  # bfloat16 trains at 0.4 of float32's speed on this CPU


RUNS: dict[str, Callable[[str], RunConfig]] = {  # by the backend that they will run on
    preset.__name__.replace("_", "-"): preset
    for preset in (
        gpt_shakespeare,
        nanogpt_shakespeare,
        nanogpt_shakespeare_10m,
        translate_en_es,
        number_words,
        span_corruption,
        masked_lm,
        prefix_lm,
        finetune,
    )
}
