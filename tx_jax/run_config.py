"""A training run as a frozen value that checks itself: what is read, how it is optimised, how long, on what."""

import dataclasses
import re
from typing import Literal

from tx_jax.config import DType, ModelConfig
from tx_jax.config_checks import check, divisors
from tx_jax.errors import nearest, require

OptimizerName = Literal["adamw", "lion", "adafactor", "muon", "schedule-free"]
Schedule = Literal["constant", "cosine", "noam", "wsd"]
TokenizerKind = Literal["char", "byte", "bpe"]
Corpus = Literal["tiny_shakespeare", "tatoeba_en_es", "number_words"]
Remat = Literal["none", "full", "dots", "names"]
LogTo = Literal["none", "tensorboard", "wandb"]
Objective = Literal["next_token", "prefix_lm", "masked_lm", "span_corruption", "translate"]
OF_PAIRS = (("data", "bad_lines"), ("data", "test_fraction"), ("train", "n_scored"))  # what text has no use for
OF_SAMPLES = (("train", "sample_prompt"), ("train", "sample_tokens"))  # and what does not go on from a prompt
# What a run may be told to change (--change) when it goes on: it alters what is learnt, and not what is trained.
CHANGEABLE = re.compile(r"(optim|train|data)\.(?!tokenizer$|vocab_size$|objective$)\w+|model\.dropout_rate")
STACKS = {  # that an objective trains
    "next_token": "decoder",
    "prefix_lm": "decoder",
    "masked_lm": "encoder",
    "span_corruption": "encoder_decoder",
    "translate": "encoder_decoder",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut into batches.

    Example:
        >>> assert DataConfig(seq_len=32).batch_size == 12  # seq_len=0 would raise InputError
    """

    objective: Objective = "next_token"  # next_token | prefix_lm | masked_lm | span_corruption: of text; translate
    corpus: Corpus = "tiny_shakespeare"  # used when path is None
    path: str | None = None  # a UTF-8 text, a directory of *.txt, or token files; translate: a TSV, or sources
    mixture: str | None = None  # token files, with their shares of the tokens: wiki=3,code=1
    target_path: str | None = None  # translate: the targets, where path has a source a line
    bad_lines: Literal["refuse", "skip"] = "refuse"  # translate: what is done with lines that are no pair, or too long
    tokenizer: TokenizerKind = "char"  # char | byte | bpe, learnt from the text
    vocab_size: int = 4096  # ids of a bpe tokenizer, at most
    seq_len: int = 64  # tokens (T); translate: of the longest side of a pair, with its end
    batch_size: int = 12  # sequences in a step, over all devices (B); translate: as many more as they are shorter
    valid_fraction: float = 0.1  # held out: the last part of the text, or so many of the sources
    test_fraction: float = 0.02  # translate: of the sources, for the scores at the end

    def __post_init__(self) -> None:
        check(self)
        f, test = self.valid_fraction, self.test_fraction
        require(0 < f < 1, f"valid_fraction={f} must be between 0 and 1; 0.1 holds out a tenth")
        pairs = self.objective == "translate"
        rule = f"test_fraction={test} must be between 0 and {1 - f:g}, what valid_fraction leaves"
        require(0 < test < 1 - f or not pairs, rule)
        makes = self.corpus != "tiny_shakespeare"  # pairs
        rule = f"corpus={self.corpus!r} is not for objective={self.objective!r}; give --data.path, or another corpus"
        require(self.path is not None or pairs == makes, rule)
        mixture = f"mixture={self.mixture!r}"
        require(self.mixture is None or self.path is None, f"{mixture} and path={self.path!r} are two texts; give one")
        fits = self.mixture is None or self.objective == "next_token"
        require(fits, f"{mixture} is for objective='next_token', not {self.objective!r}; leave out one of them")
        files = self.target_path is None or (pairs and self.path is not None)
        rule = f"target_path={self.target_path!r} goes with objective='translate' and a path of sources"
        require(files, f"{rule}; give both, or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimiser with clipping, and a learning rate that changes with the step.

    Example:
        >>> assert OptimConfig(peak_lr=3e-4).schedule == "cosine"  # peak_lr=0 would raise InputError
    """

    name: OptimizerName = "adamw"  # adamw | lion | adafactor | muon (of matrices, AdamW of the rest) | schedule-free
    schedule: Schedule = "cosine"  # constant | cosine | noam | wsd, each after a linear warm-up
    peak_lr: float = 1e-3  # the highest learning rate; adafactor: in parts of a parameter's own size (usual: 1e-2)
    end_lr: float = 1e-4  # where cosine and wsd end
    warmup_steps: int = 100  # optimiser steps from 0 to peak_lr
    decay_steps: int | None = None  # wsd: length of the final decay; None: a fifth of the run
    layer_lr_decay: float = 1.0  # of the learning rate, for each block that is farther from the head; 1: none
    beta1: float = 0.9  # adamw, lion: of the first moment; schedule-free: the mean's share of where gradients are taken
    beta2: float = 0.99  # of the second moment; lion: of the momentum
    eps: float = 1e-8  # adamw, muon's rest, schedule-free
    moment_dtype: DType = "float32"  # of the first moment: bfloat16 halves it (adamw, lion, muon)
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
        decay, free = self.layer_lr_decay, self.name == "schedule-free"
        require(0 < decay <= 1, f"layer_lr_decay={decay} must be above 0 and at most 1, which is none; 0.9 is usual")
        rule = f"moment_dtype={self.moment_dtype!r} has no effect with name={self.name!r}, which keeps no first moment"
        kept = self.name not in ("adafactor", "schedule-free")
        require(kept or self.moment_dtype == "float32", f"{rule}; leave it out")
        rule = f"schedule={self.schedule!r} does not go with name='schedule-free'"
        require(not free or self.schedule == "constant", f"{rule}; give --optim.schedule constant")
        require(not free or self.beta1 > 0, "beta1=0 is no mean for name='schedule-free'; 0.9 is usual")
        require(self.eps > 0, f"eps={self.eps} must be positive; Adam's usual value is 1e-8")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        clip = self.clip_norm
        require(clip is None or clip > 0, f"clip_norm={clip} must be positive, or None for no clipping")
        require(self.schedule != "noam" or self.warmup_steps > 0, "schedule='noam' needs warmup_steps of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write down on the way. Every *_every is in optimiser steps; 0 means never.

    Example:
        >>> assert TrainConfig(n_steps=100).save_every == 500  # n_steps=0 would raise InputError
    """

    n_steps: int = 2000  # optimiser steps
    label_smoothing_rate: float = 0.0  # ε of Szegedy et al. 2016 §7; 0.1 in Vaswani et al. 2017
    balance_rate: float = 0.01  # of a mixture: for using all experts alike (Fedus et al. 2022, §2.2)
    router_z_rate: float = 0.001  # of a mixture: keeps its router's logits from drifting (Zoph et al. 2022, §3.2)
    z_loss_rate: float = 0.0  # of (log Σ exp logits)², added to the loss: 1e-4 keeps logits from drifting
    accumulate_steps: int = 1  # parts of a batch whose gradients are summed in turn: the same update in less memory
    remat: Remat = "none"  # none | full | dots | names: what a block computes again for its gradient, to save memory
    scan_layers: bool = False  # one compiled block for all layers: deep models compile as quickly as shallow ones
    seed: int = 0  # of initialisation, dropout, data order and samples
    log_every: int = 50
    eval_every: int = 500  # the whole validation split; translate: and the scores of n_scored translations
    sample_every: int = 500
    save_every: int = 500
    max_skipped: int = 10  # steps in a row that are not finite, and change nothing, before the run gives up
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # those of multiples of so many steps stay, too; 0: none
    keep_best: bool = False  # also save whenever the validation loss is the least so far, and keep that one
    n_averaged: int = 1  # newest checkpoints whose mean is tested at the end, and what sample.py takes (§6.1 of 2017)
    ema_rate: float = 0.0  # of the mean of all parameters so far that is evaluated, and sampled; 0: the parameters
    n_scored: int = 200  # translate: sentences of the validation split that are scored on the way
    sample_prompt: str | None = None  # None: a newline, or the first character of a text without one
    sample_tokens: int = 200  # tokens of each sample on the way

    def __post_init__(self) -> None:
        check(self)
        n = self.accumulate_steps
        require(n >= 1, f"accumulate_steps={n} must be at least 1, the whole batch at once")
        most = self.max_skipped
        require(most >= 1, f"max_skipped={most} must be at least 1, to give up at the first step that is not finite")
        require(self.keep >= 1, f"keep={self.keep} must be at least 1, the newest checkpoint")
        rule = "keep_best needs a validation loss, which eval_every=0 never takes"
        require(self.eval_every or not self.keep_best, f"{rule}; give --train.eval-every 500, or leave it out")
        mean, keep = self.n_averaged, self.keep
        require(mean <= keep, f"n_averaged={mean} exceeds keep={keep}, the checkpoints there are; raise --train.keep")
        rule = f"n_averaged={mean} and ema_rate={self.ema_rate} are two means"
        require(mean == 1 or not self.ema_rate, f"{rule}; use one")
        rule = f"sample_tokens={self.sample_tokens} must be at least 1"
        require(self.sample_tokens >= 1, f"{rule}; sample_every=0 stops samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis. All None: every device for data, by pmap on one host.

    Example:
        >>> assert MeshConfig(fsdp=4, tensor=2).data is None  # fsdp=0 would raise InputError
    """

    data: int | None = None  # copies of the model, each on its part of the batch
    fsdp: int | None = None  # also parts of the batch, with parameters split among them
    expert: int | None = None  # also parts of the batch, with the experts of a mixture split among them
    sequence: int | None = None  # parts of each sequence, for contexts that do not fit one device
    tensor: int | None = None  # parts of each matrix, and of the heads

    def __post_init__(self) -> None:
        check(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value is None or value >= 1, f"mesh.{field.name}={value} must be at least 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank that are trained in place of the parameters. Source: Hu et al. 2021.

    Example:
        >>> assert LoraConfig(rank=8).alpha == 16  # rank=-1 would raise InputError
    """

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
    """A whole training run: `train.py` makes one, its run directory keeps it, `sample.py` reads it.

    Example:
        >>> assert RunConfig(train=TrainConfig(ema_rate=0.99)).keeps_mean  # run_dir="" would raise InputError
    """

    run_dir: str = "runs/run"  # where everything is written
    init: str | None = None  # what to begin with: smollm2, a Hugging Face directory, a GGUF file, a run, hf://ORG/NAME
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    lora: LoraConfig = LoraConfig()
    resume: str = "auto"  # auto: after the newest whole checkpoint | never | must | a step, later ones set aside
    change: str | None = None  # fields that may differ from those of the run that goes on: optim.peak-lr,train.n-steps
    profile: bool = False  # write a trace of five steps to run_dir/profile
    log_to: LogTo = "none"  # none | tensorboard | wandb: where the numbers of metrics.jsonl go, too

    @property
    def changes(self) -> frozenset[str]:
        """The names that --change gives."""
        return frozenset(filter(None, (self.change or "").replace("-", "_").replace(" ", "").split(",")))

    @property
    def is_free(self) -> bool:
        """Whether the optimiser keeps a mean of the parameters itself."""
        return self.optim.name == "schedule-free"

    @property
    def keeps_mean(self) -> bool:
        """Whether what is evaluated and sampled is a mean of the parameters, which a state keeps as its `ema`."""
        return self.train.ema_rate > 0 or self.is_free

    def __post_init__(self) -> None:
        check(self)
        long, room, given = self.data.seq_len, self.model.max_len, self.init is not None  # then the model is init's
        rule = f"data.seq_len={long} exceeds model.max_len={room}"
        require(given or long <= room, f"{rule}; raise model.max_len or shorten it")
        require(given or not self.lora.rank, f"lora.rank={self.lora.rank} needs a model to adapt; give --init")
        rule = f"train.scan_layers=True stacks whole layers, and lora.rank={self.lora.rank} adapts parts of some"
        require(not (self.train.scan_layers and self.lora.rank), f"{rule}; leave out --train.scan-layers")
        rows, parts = self.data.batch_size, self.train.accumulate_steps
        rule = f"data.batch_size={rows} must be a multiple of train.accumulate_steps={parts}"
        require(rows % parts == 0, f"{rule}; use {divisors(rows)} of them")
        means = {"train.ema_rate": self.train.ema_rate, "train.n_averaged": self.train.n_averaged - 1}
        given_mean = next((name for name, value in means.items() if value), None) if self.is_free else None
        rule = f"{given_mean} and optim.name='schedule-free' are two means"
        require(given_mean is None, f"{rule}; leave {given_mean} out")
        name, base = self.optim.name, self.model.mup_base_width
        fits = base is None or name in ("adamw", "lion", "schedule-free")
        rule = f"model.mup_base_width={base} has learning rates of adamw, lion and schedule-free"
        require(fits, f"{rule}, not of optim.name={name!r}; use one of them")
        objective = self.data.objective
        goes_on, pairs = STACKS[objective] == "decoder", objective == "translate"
        for part, name in (() if pairs else OF_PAIRS) + (() if goes_on else OF_SAMPLES):
            value, default = (getattr(of, name) for of in (getattr(self, part), type(getattr(self, part))()))
            rule = f"{part}.{name}={value!r} has no effect with data.objective={objective!r}; leave it out"
            require(value == default, rule)
        stack, needs = self.model.stack, STACKS[objective]
        rule = f"data.objective={objective!r} trains model.stack={needs!r}, not {stack!r}"
        require(given or stack == needs, f"{rule}; change the one or the other")
        for name in sorted(self.changes):
            rule = f"change={self.change!r} names {name}, which is no field"
            close = nearest(name, FIELDS)
            hint = f"did you mean {close}?" if close else "name one such as optim.peak_lr"
            require(name in FIELDS, f"{rule}; {hint}")
            may = "optim.*, train.*, model.dropout-rate and, but for tokenizer, vocab-size and objective, data.*"
            require(CHANGEABLE.fullmatch(name), f"{rule} that a run may change; those are {may}")
        how = self.resume
        known = how in ("auto", "never", "must") or (how.isascii() and how.isdecimal())
        require(known, f"resume={how!r} is none of auto, never, must, nor the step of a checkpoint")
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


FIELDS = [  # that --change may be given, as RunConfig has them
    f"{part}.{field.name}"
    for part, kind in (("model", ModelConfig), ("data", DataConfig), ("optim", OptimConfig), ("train", TrainConfig))
    for field in dataclasses.fields(kind)
]
