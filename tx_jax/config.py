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

HAVE_SINKS = ("none", "rotary", "rotary_pairs", "alibi", "t5")  # position schemes that know distances alone
# Fields of ModelConfig that a run says itself of a model that RunConfig.init gives it.
OF_THE_RUN = ("dropout_rate", "attention_dropout_rate", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary frequencies, and how they are stretched beyond the trained context.

    Raises:
        InputError: a field is out of its bounds.
    Source: Su et al. 2021 (RoFormer), §3.2.2; linear: Chen et al. 2023; ntk: bloc97 2023; yarn: Peng et al. 2023, §3.2;
        llama3: Llama 3.1's model card and reference code.

    >>> rotary = RotaryConfig(scaling="yarn", factor=4.0)
    >>> rotary.original_len * rotary.factor  # tokens
    32768.0
    """

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
    """The shape of a Transformer. A family (GPT-2, LLaMA, T5, …) is a value of this class: see presets.py.

    Raises:
        InputError: a field is out of its bounds, or two do not fit together.

    >>> ModelConfig(d_model=64, n_heads=4).H  # the width of a head
    16
    """

    stack: Stack = "decoder"  # decoder | encoder | encoder_decoder
    vocab_size: int | None = None  # tokens; None until a tokenizer fills it in
    max_len: int = 1024  # tokens: the longest context; also the size of a learned position table
    d_model: int = 256  # width of the residual stream (D)
    n_layers: int = 6  # blocks (L); of the decoder in an encoder_decoder
    n_encoder_layers: int | None = None  # blocks of the encoder; None: n_layers
    n_heads: int = 8  # query heads (N)
    n_kv_heads: int | None = None  # key-value heads (K); None: n_heads; 1: multi-query
    d_head: int | None = None  # width of a head (H); None: d_model / n_heads
    d_value: int | None = None  # width of a head's values (Hv); None: d_head (Vaswani et al. 2017, Table 3 B)
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
    n_sinks: int = 0  # first tokens of a text that all see beside the window, as if just before it (StreamingLLM)
    window_pattern: str = "w"  # of layers, repeated: w sees the window, f all (Gemma 2: wf)
    biases: Biases = "none"  # none | norm | mlp (+ norm) | qkv (alone) | attention (qkv, out) | all
    head_soft_cap: float | None = None  # logits → cap · tanh(logits / cap) (Gemma 2)

    mlp: Activation = "gelu_tanh"
    n_experts: int | None = None  # feed-forwards of which each token chooses some (E); None: one for all
    n_experts_per_token: int = 2  # that it chooses (Jiang et al. 2024)
    capacity_factor: float | None = None  # in training an expert reads × its even share of a sequence; None: all
    norm: Norm = "layernorm"
    norm_order: NormOrder = "pre"  # pre: norm inside the residual branch; post: after the sum (2017); sandwich: both
    parallel: bool = False  # attention and feed-forward read the same vectors (GPT-NeoX)
    norm_eps: float = 1e-5

    dropout_rate: float = 0.0  # of embeddings and of each sub-layer's output
    attention_dropout_rate: float = 0.0  # of attention weights
    init: Init = "normal"  # normal: N(0, 0.02), residual outputs ÷ √(2L) (GPT-2); xavier (2017)
    mup_base_width: int | None = None  # d_model at which the learning rate was found (Yang et al. 2022); None: no muP
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
    def Hv(self) -> int:  # noqa: N802
        """Width of a head's values."""
        return self.d_value or self.H

    @property
    def F(self) -> int:  # noqa: N802
        """Width inside the feed-forward."""
        return self.d_mlp or 4 * self.d_model

    @property
    def E(self) -> int:  # noqa: N802
        """Experts."""
        return self.n_experts or 1

    @property
    def reach(self) -> int | None:
        """Tokens that the farthest-seeing layer sees; None: all."""
        return None if self.window is None or "f" in self.window_pattern else self.window + self.n_sinks

    @property
    def width_ratio(self) -> float:
        """How many times wider than its base this model is: what muP scales by; 1 without muP."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by: 1/√H, or muP's 8/H (Yang et al. 2022, table 8), the same at heads of 64."""
        standard = self.H**-0.5 if self.mup_base_width is None else 8 / self.H
        return standard if self.attention_scale is None else self.attention_scale

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
        fits = self.reach is not None and self.attention_soft_cap is None and self.positions in HAVE_SINKS
        needs = f"a window in every layer, no attention_soft_cap, and positions among {', '.join(HAVE_SINKS)}"
        require(not self.n_sinks or fits, f"n_sinks={self.n_sinks} needs {needs}")
        require(self.position_offset >= 0, f"position_offset={self.position_offset} must not be negative")
        parallel = not self.parallel or self.norm_order == "pre"
        require(parallel, f"parallel=True needs norm_order='pre', not {self.norm_order!r}")
        self._check_experts()
        base = self.mup_base_width
        require(base is None or base >= 1, f"mup_base_width={base} must be at least 1, or None for no muP")
        plain = self.init == "normal" and not (self.scale_embeddings or self.scale_head)
        rule = f"mup_base_width={base} has scales of its own"
        require(base is None or plain, f"{rule}; use init='normal', without scale_embeddings and scale_head")
        both = self.stack == "encoder_decoder"
        require(
            both or self.n_encoder_layers is None, f"n_encoder_layers needs stack='encoder_decoder', not {self.stack!r}"
        )
        require(not self.pooler or self.stack == "encoder", f"pooler=True needs stack='encoder', not {self.stack!r}")

    def _check_experts(self) -> None:
        n, k = self.n_experts, self.n_experts_per_token
        if n is None:
            return
        require(k <= n, f"n_experts_per_token={k} exceeds n_experts={n}; lower it")
        rule = f"biases={self.biases!r} has some in the feed-forward, and experts have none"
        require(self.biases not in ("mlp", "all"), f"{rule}; use none, norm, qkv or attention")
        rule = f"mup_base_width={self.mup_base_width} says nothing of n_experts={n}"
        require(self.mup_base_width is None, f"{rule}; leave one of them out")
        factor = self.capacity_factor
        fits = factor is None or factor > 0
        require(fits, f"capacity_factor={factor} must be positive; 1.25 is usual, and None drops no token")
