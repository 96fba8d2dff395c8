"""Everything a model or a run can be, as frozen values: hashable, equal by value, to JSON and back without loss.

A config is data. It says what a thing is, never how a call is made, and it checks itself when it is made.
"""

import dataclasses
from typing import Literal

from tx_jax.config_checks import check, divisors
from tx_jax.errors import require

Stack = Literal["decoder", "encoder", "encoder_decoder"]
PositionScheme = Literal["none", "sinusoidal", "sinusoidal_concat", "learned", "rotary", "rotary_pairs", "alibi", "t5"]
RotaryScaling = Literal["none", "linear", "ntk", "yarn", "llama3"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"]
Norm = Literal["layernorm", "rmsnorm", "rmsnorm_offset"]
NormOrder = Literal["pre", "post", "sandwich"]
Biases = Literal["none", "norm", "mlp", "qkv", "attention", "all"]
Init = Literal["normal", "xavier"]
DType = Literal["float32", "bfloat16"]
Schedule = Literal["constant", "cosine", "noam", "wsd"]
TokenizerKind = Literal["char", "byte", "bpe"]

# Fields of ModelConfig that a run says itself of a model that RunConfig.init gives it.
OF_THE_RUN = ("dropout_rate", "attention_dropout_rate", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary frequencies, and how they are stretched beyond the trained context."""

    base: float = 10_000.0  # θ of RoFormer §3.2.2; 500,000 in LLaMA 3
    window_base: float | None = (
        None  # θ, unscaled, of the layers that see a window; None: as the others (Gemma 3: 10,000)
    )
    fraction: float = 1.0  # part of each head that is turned, its beginning (GPT-NeoX: 0.25)
    scaling: RotaryScaling = "none"  # none | linear | ntk | yarn | llama3
    factor: float = 1.0  # how many times longer the new context is
    original_len: int = 8192  # tokens: the context before scaling (yarn, llama3)
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_len / this are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_len / this stay
    beta_fast: float = 32.0  # yarn: rotations within original_len above which a frequency stays
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by factor

    def __post_init__(self) -> None:
        check(self)
        for name in ("base", "window_base"):
            value = getattr(self, name)
            require(value is None or value > 1, f"{name}={value} must exceed 1; RoFormer uses 10000")
        require(0 < self.fraction <= 1, f"fraction={self.fraction} must be above 0 and at most 1, the whole head")
        require(self.factor >= 1, f"factor={self.factor} must be at least 1; it stretches the context")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high, f"low_freq_factor={low} must be positive and below high_freq_factor={high}")
        slow, fast = self.beta_slow, self.beta_fast
        require(0 < slow < fast, f"beta_slow={slow} must be positive and below beta_fast={fast}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Transformer. A family (GPT-2, LLaMA, T5, …) is a value of this class: see presets.py."""

    stack: Stack = "decoder"  # decoder | encoder | encoder_decoder
    vocab_size: int | None = None  # tokens; None until a tokenizer fills it in
    max_len: int = 1024  # tokens: the longest context; also the size of a learned position table
    d_model: int = 256  # width of the residual stream (D)
    n_layers: int = 6  # blocks (L); of the decoder in an encoder_decoder
    n_encoder_layers: int | None = None  # blocks of the encoder; None: n_layers
    n_heads: int = 8  # query heads (N)
    n_kv_heads: int | None = None  # key-value heads (K); None: n_heads; 1: multi-query
    d_head: int | None = None  # width of a head (H); None: d_model / n_heads
    d_mlp: int | None = None  # width inside the feed-forward (F); None: 4 · d_model

    tie_head: bool = True  # the output head is the token table (Press & Wolf 2017)
    tie_source: bool = True  # encoder and decoder share one token table (encoder_decoder)
    scale_embeddings: bool = False  # × √d_model after look-up (Vaswani et al. 2017, §3.4)
    scale_head: bool = False  # × 1/√d_model before the head (T5)
    head_bias: bool = False  # a bias on the logits (BART, BERT)
    head_transform: bool = False  # a map, the activation and a norm before the head (BERT)
    norm_embeddings: bool = False  # a norm after the embeddings (BERT)
    n_token_types: int = 0  # segment-type embeddings (BERT: 2); 0: none
    pooler: bool = False  # tanh projection of the first vector (BERT)

    positions: PositionScheme = "rotary"  # how order enters
    rotary: RotaryConfig = RotaryConfig()
    position_offset: int = 0  # learned: rows of the table before that of position 0 (BART: 2)
    n_buckets: int = 32  # t5: relative-position buckets
    max_distance: int = 128  # t5: tokens beyond which all distances share a bucket

    qk_norm: bool = False  # RMSNorm over H of q and k, before rotation
    attention_scale: float | None = None  # scores × this; None: 1/√d_head (T5: 1)
    attention_soft_cap: float | None = None  # scores → cap · tanh(scores / cap) (Gemma 2)
    window: int | None = None  # tokens a query sees, itself included; None: all
    window_pattern: str = "w"  # of layers, repeated: w sees the window, f all (Gemma 2: wf)
    biases: Biases = "none"  # none | norm | mlp (+ norm) | qkv (alone) | attention (qkv, out) | all
    head_soft_cap: float | None = None  # logits → cap · tanh(logits / cap) (Gemma 2)

    mlp: Activation = "gelu_tanh"
    norm: Norm = "layernorm"
    norm_order: NormOrder = "pre"  # pre: norm inside the residual branch; post: after the sum (2017); sandwich: both
    parallel: bool = False  # attention and feed-forward read the same vectors (GPT-NeoX)
    norm_eps: float = 1e-5

    dropout_rate: float = 0.0  # of embeddings and of each sub-layer's output
    attention_dropout_rate: float = 0.0  # of attention weights
    init: Init = "normal"  # normal: N(0, 0.02), residual outputs ÷ √(2L) (GPT-2); xavier (2017)
    dtype: DType = "float32"  # of computation; parameters that are trained are float32

    @property
    def K(self) -> int:  # noqa: N802
        """Key-value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def H(self) -> int:  # noqa: N802
        """Width of a head."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def F(self) -> int:  # noqa: N802
        """Width inside the feed-forward."""
        return self.d_mlp or 4 * self.d_model

    @property
    def reach(self) -> int | None:
        """Tokens back that the farthest-seeing layer sees; None: all."""
        return None if "f" in self.window_pattern else self.window

    def __post_init__(self) -> None:
        check(self)
        d, n, k, h = self.d_model, self.n_heads, self.K, self.H
        require(
            self.d_head is not None or d % n == 0,
            f"d_model={d} must be a multiple of n_heads={n}; use {divisors(d)} heads, or set d_head",
        )
        require(n % k == 0, f"n_heads={n} must be a multiple of n_kv_heads={k}; use {divisors(n)}")
        if self.positions.startswith("rotary"):
            turned = int(h * self.rotary.fraction)
            rule = f"d_head={h} × rotary.fraction={self.rotary.fraction} must be even and positive"
            require(turned and turned % 2 == 0, f"{rule} for positions={self.positions!r}, which turns pairs")
        if self.positions.startswith("sinusoidal"):
            require(d % 2 == 0, f"d_model={d} must be even for positions={self.positions!r}, sine and cosine in turn")
        if self.positions == "t5":
            buckets, far = self.n_buckets, self.max_distance
            require(buckets % 4 == 0, f"n_buckets={buckets} must be a multiple of 4: halves for sign, then for scale")
            require(far > buckets // 2, f"max_distance={far} must exceed n_buckets / 2 = {buckets // 2}")
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive; LayerNorm's usual value is 1e-5")
        for name in ("attention_soft_cap", "head_soft_cap", "attention_scale", "window"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive, or None for none")
        pattern = self.window_pattern
        require(
            pattern and not set(pattern) - set("wf"), f"window_pattern={pattern!r} must be letters w and f, such as wf"
        )
        require(self.position_offset >= 0, f"position_offset={self.position_offset} must not be negative")
        parallel = not self.parallel or self.norm_order == "pre"
        require(parallel, f"parallel=True needs norm_order='pre', not {self.norm_order!r}")
        both = self.stack == "encoder_decoder"
        require(
            both or self.n_encoder_layers is None, f"n_encoder_layers needs stack='encoder_decoder', not {self.stack!r}"
        )
        require(not self.pooler or self.stack == "encoder", f"pooler=True needs stack='encoder', not {self.stack!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut into batches."""

    corpus: Literal["tiny_shakespeare"] = "tiny_shakespeare"  # used when path is None
    path: str | None = None  # a UTF-8 text file, or a directory of *.txt, of your own
    tokenizer: TokenizerKind = "char"  # char | byte | bpe, learnt from the text
    vocab_size: int = 4096  # ids of a bpe tokenizer, at most
    seq_len: int = 64  # tokens (T)
    batch_size: int = 12  # sequences in a step, over all devices (B)
    valid_fraction: float = 0.1  # the last part of the text, held out

    def __post_init__(self) -> None:
        check(self)
        f = self.valid_fraction
        require(0 < f < 1, f"valid_fraction={f} must be between 0 and 1; 0.1 holds out a tenth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with clipping, and a learning rate that changes with the step."""

    schedule: Schedule = "cosine"  # constant | cosine | noam | wsd, each after a linear warm-up
    peak_lr: float = 1e-3  # the highest learning rate
    end_lr: float = 1e-4  # where cosine and wsd end
    warmup_steps: int = 100  # optimiser steps from 0 to peak_lr
    decay_steps: int | None = None  # wsd: length of the final decay; None: a fifth of the run
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices only: not of biases and norms
    clip_norm: float | None = 1.0  # of the global gradient; None: no clipping

    def __post_init__(self) -> None:
        check(self)
        require(self.peak_lr > 0, f"peak_lr={self.peak_lr} must be positive; try 1e-3")
        low, peak = self.end_lr, self.peak_lr
        require(0 <= low <= peak, f"end_lr={low} must be from 0 to peak_lr={peak}; lower --optim.end-lr, too")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must be in [0, 1)")
        require(self.eps > 0, f"eps={self.eps} must be positive; Adam's usual value is 1e-8")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        clip = self.clip_norm
        require(clip is None or clip > 0, f"clip_norm={clip} must be positive, or None for no clipping")
        require(self.schedule != "noam" or self.warmup_steps > 0, "schedule='noam' needs warmup_steps of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write down on the way. Every *_every is in optimiser steps; 0 means never."""

    n_steps: int = 2000  # optimiser steps
    label_smoothing_rate: float = 0.0  # ε of Szegedy et al. 2016 §7; 0.1 in Vaswani et al. 2017
    seed: int = 0  # of initialisation, dropout, data order and samples
    log_every: int = 50
    eval_every: int = 500  # the whole validation split
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2  # newest checkpoints kept
    sample_prompt: str | None = None  # None: a newline, or the first character of a text without one
    sample_tokens: int = 200  # tokens of each sample on the way

    def __post_init__(self) -> None:
        check(self)
        require(self.keep >= 1, f"keep={self.keep} must be at least 1, the newest checkpoint")
        require(
            self.sample_tokens >= 1,
            f"sample_tokens={self.sample_tokens} must be at least 1; sample_every=0 stops samples",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis. All None: every device for data, by pmap on one host."""

    data: int | None = None  # copies of the model, each on its part of the batch
    fsdp: int | None = None  # also parts of the batch, with parameters split among them
    tensor: int | None = None  # parts of each matrix

    def __post_init__(self) -> None:
        check(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value is None or value >= 1, f"mesh.{field.name}={value} must be at least 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank that are trained in place of the parameters. Source: Hu et al. 2021."""

    rank: int = 0  # of what is added to each matrix (r); 0: no adapters, all parameters are trained
    alpha: float = 16.0  # what is added counts alpha / rank times
    targets: str = r"attention/(q|v)/kernel$"  # matrices, by a pattern of their path; q and v as in §7.1 of the source

    def __post_init__(self) -> None:
        check(self)
        require(self.rank >= 0, f"lora.rank={self.rank} must not be negative; 0 trains all parameters")
        require(self.alpha > 0, f"lora.alpha={self.alpha} must be positive; twice the rank is usual")
        for field in dataclasses.fields(self) if not self.rank else ():
            value = getattr(self, field.name)
            rule = f"lora.{field.name}={value!r} has no effect with lora.rank=0, which trains all parameters"
            require(value == field.default, f"{rule}; give --lora.rank 8, or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run: `train.py` makes one, its run directory keeps it, `sample.py` reads it."""

    run_dir: str = "runs/run"  # where everything is written
    init: str | None = None  # what to begin with: smollm2, a Hugging Face directory, a GGUF file, a run, hf://ORG/NAME
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        check(self)
        long, room, given = self.data.seq_len, self.model.max_len, self.init is not None  # then the model is init's
        rule = f"data.seq_len={long} exceeds model.max_len={room}"
        require(given or long <= room, f"{rule}; raise model.max_len or shorten it")
        require(given or not self.lora.rank, f"lora.rank={self.lora.rank} needs a model to adapt; give --init")
        require(self.run_dir != "", "run_dir='' names no directory; use --run-dir runs/NAME")
        warm, total = self.optim.warmup_steps, self.train.n_steps
        require(
            warm <= total or self.optim.schedule == "constant",
            f"optim.warmup_steps={warm} exceeds train.n_steps={total}; shorten it by --optim.warmup-steps",
        )
        decay = self.optim.decay_steps
        require(
            decay is None or self.optim.schedule != "wsd" or 1 <= decay <= total - warm,
            f"optim.decay_steps={decay} must be 1 to {total - warm}: train.n_steps={total} without the warm-up",
        )
