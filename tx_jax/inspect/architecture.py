"""The architecture that a config describes, drawn from the config itself, as SVG."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple
from xml.sax.saxutils import escape

from tx_jax.config import ModelConfig
from tx_jax.errors import nearest, require
from tx_jax.models import count_params
from tx_jax.presets import MODELS

Number = int | float  # pixels
IN_ATTENTION = {  # what positions do there
    "rotary": "q, k turned by rotary", "rotary_pairs": "q, k turned by rotary",
    "alibi": "scores biased by ALiBi", "t5": "scores biased by T5 buckets",
}  # fmt: skip
NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "rmsnorm_offset": "RMSNorm, 1 + scale"}
MLPS = {
    "relu": "ReLU", "gelu": "GELU", "gelu_tanh": "GELU, tanh form", "silu": "SiLU",
    "swiglu": "SwiGLU: gated by SiLU", "geglu": "GEGLU: gated by GELU", "geglu_tanh": "GEGLU, tanh form",
}  # fmt: skip
PAINT = {  # fill and outline of a box
    "table": ("#fbe3e6", "#cf7f8a"), "attention": ("#ffecd1", "#d9973f"), "mlp": ("#d9ecfb", "#5796c8"),
    "norm": ("#eff1cf", "#a9ab50"), "head": ("#e7e4f8", "#8479c4"),
}  # fmt: skip
BOX, GAP, ROW, COLUMN = 172, 16, 14, 276  # pixels: a box's width, the height between two, a line's height, a column
README = ("vaswani-base", "gpt2-small", "llama3-8b")  # the presets in its picture
FIRST = BOX / 2 + 26  # where the first column has its middle
STYLE = """<style>text{font:11px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#54606e}
text{text-anchor:middle}.l{text-anchor:start}.b{font-weight:600;font-size:12.5px;fill:#1d2733}.h{font-size:17px}.d{fill:#1d2733}
.w{fill:none;stroke:#5c6877;stroke-width:1.4}.g{stroke:#9aa5b1}</style>
<marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0.5L8 4L0 7.5z" fill="#5c6877"/></marker>"""


class Part(NamedTuple):
    """Of a column, from the bottom up: a box of PAINT, or name, fork, add, begin, end (of the repeated block)."""

    kind: str
    lines: tuple[str, ...] = ()


def draw(cfg: ModelConfig, title: str = "", height: Number = 0) -> str:
    """The architecture that cfg describes, as an SVG of at least `height` pixels.

    >>> draw(ModelConfig(vocab_size=7))[:4]
    '<svg'
    """
    both = cfg.stack == "encoder_decoder"
    columns = [_column(cfg, cfg.stack != "encoder", cross=both, name="target tokens" if both else "tokens")]
    if both:
        columns.insert(0, _column(cfg, False, cross=False, name="source tokens", head=False))
    drawn = [_drawn(parts, FIRST + COLUMN * i) for i, parts in enumerate(columns)]
    shapes = [shape for shapes, _, _ in drawn for shape in shapes]
    if both:  # the encoder's output, to the cross-attention of every block
        (_, end, _), (_, _, memory) = drawn
        down = 8 if memory > end - 42 else -8
        path = f"M{FIRST} {end}V{end - 26}q0 -8 8 -8H{COLUMN - 12}q8 0 8 {down}V{memory - down}"
        shapes.append(wire(f"{path}q0 {down} 8 {down}H{COLUMN + 25}"))
    top, width = min(*(end - 64 for _, end, _ in drawn), 20 - height), COLUMN * len(columns)
    n_params = "" if cfg.vocab_size is None else f" · {count_params(cfg):,} parameters"
    shapes += text((title or cfg.stack.replace("_", "-"),), width / 2, top + 28, "b h")
    shapes += text((f"D {cfg.d_model:,}{n_params}",), width / 2, top + 46)
    size = f'width="{width}" height="{20 - top}"'
    card = f'<rect y="{top}" {size} rx="12" fill="#fff"/>'
    box = f'viewBox="0 {top} {width} {20 - top}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}>{STYLE}{card}{"".join(shapes)}</svg>\n'


def _column(cfg: ModelConfig, causal: bool, cross: bool, name: str, head: bool = True) -> list[Part]:
    """From tokens at the bottom to logits at the top."""
    D, V = f"{cfg.d_model:,}", "V" if cfg.vocab_size is None else f"{cfg.vocab_size:,}"
    norm, order, heads = Part("norm", (NORMS[cfg.norm],)), cfg.norm_order, f"{cfg.n_heads} heads of {cfg.H}"
    values = f"values of {cfg.Hv}" if cfg.Hv != cfg.H else ""
    shared = f"{cfg.K} key-value head{'s' * (cfg.K > 1)}" if cfg.n_heads > cfg.K else ""
    some = "" if cfg.reach else ", in some layers"
    window = f"over the last {cfg.window:,} tokens{some}" if cfg.window else ""
    parallel = "reads what attention reads" if cfg.parallel else ""
    experts = f"{cfg.n_experts_per_token} of {cfg.E} experts a token" if cfg.n_experts else ""
    see = f"{'causal' if causal else 'sees all'}, {heads}"
    layers = [
        _part("attention", "Self-attention", see, values, shared, window, IN_ATTENTION.get(cfg.positions)),
        _part("attention", "Cross-attention", "k, v from the encoder", heads, values, shared),
        _part("mlp", "Feed-forward", MLPS[cfg.mlp], f"{D} → {cfg.F:,} → {D}", experts, parallel),
    ]
    fork, add = Part("fork"), Part("add")
    layers = layers if cross else layers[::2]
    orders = {"pre": [norm, None, add], "post": [None, add, norm], "sandwich": [norm, None, norm, add]}  # None: a layer
    block = [part for x in layers for part in (fork, *(part or x for part in orders[order]))]
    learned = f"{cfg.max_len:,} learned positions"
    added = {"sinusoidal": "sinusoids", "sinusoidal_concat": "sinusoids", "learned": learned}.get(cfg.positions)
    types = f"+ {cfg.n_token_types} token types" if cfg.n_token_types else ""
    depth = cfg.n_layers if head else cfg.n_encoder_layers or cfg.n_layers
    tied = "tied: the embedding's table" if cfg.tie_head else f"{D} × {V}, not tied"
    table = f"{V} × {D}" if head or not cfg.tie_source else "the decoder's table"
    return [
        Part("name", (name,)),
        _part("table", "Embedding", table, f"× √{D}" if cfg.scale_embeddings else "", types),
        *([Part("add", (added,))] if added else []),
        *([norm] if cfg.norm_embeddings else []),
        *[Part("begin", (f"× {depth}",)), *block, Part("end")],
        *([norm] if order != "post" else []),
        *([_part("head", "Head", tied), Part("name", ("logits",))] if head else []),
    ]


def _part(kind: str, *lines: str | None) -> Part:
    return Part(kind, tuple(filter(None, lines)))


def _drawn(parts: list[Part], x: Number) -> tuple[list[str], Number, Number]:
    """The shapes of a column around x, its top, and the height of its cross-attention."""
    shapes, y, tip, fork, begin, memory = [], 0.0, 0.0, 0.0, (0.0, ""), 0.0
    left, right = x - BOX / 2, x + BOX / 2
    for kind, lines in parts:
        if kind == "fork":
            fork = y = y - 6
        elif kind == "begin":
            y, begin = y - 8, (y - 8, lines[0])
        elif kind == "end":
            y, (low, label) = y - 8, begin
            size = f'width="{BOX + 40}" height="{low - y}" rx="9"'
            shapes.insert(0, f'<rect x="{left - 12}" y="{y}" {size} fill="#f2f4f7"/>')
            shapes.append(f'<path class="w g" d="M{right + 33} {y + 4}h5V{low - 4}h-5"/>')
            shapes += text((label,), right + 44, (y + low) / 2 + 4, "b l")
        elif kind == "name" and not shapes:
            shapes += text(lines, x, -2, "b")
            y = tip = -16
        else:
            shapes.append(wire(f"M{x} {tip}V{y - GAP}"))
            high = {"add": 16, "name": 20}.get(kind, ROW * len(lines) + 11)
            middle, y = y - GAP - high / 2, y - GAP - high
            tip = y
            if kind == "add":
                shapes.append(f'<circle class="w" cx="{x}" cy="{middle}" r="8"/>')
                shapes.append(f'<path class="w" d="M{x - 4} {middle}h8m-4 -4v8"/>')
                side = right + 14
                residual = wire(f"M{x} {fork}H{side - 8}q8 0 8 -8V{middle + 8}q0 -8 -8 -8H{x + 9}")
                shapes += text(lines, x + 16, middle + 4, "l") if lines else [residual]
            elif kind == "name":
                shapes += text(lines, x, y + 16, "b")
            else:
                fill, edge = PAINT[kind]
                box = f'x="{left}" y="{y}" width="{BOX}" height="{high}" rx="7" fill="{fill}" stroke="{edge}"'
                shapes += [f"<rect {box}/>", *text(lines[:1], x, y + 17, "b"), *text(lines[1:], x, y + 17 + ROW)]
                memory = middle if lines[0] == "Cross-attention" else memory
    return shapes, tip, memory


def wire(path: str) -> str:
    """An arrow along a path."""
    return f'<path class="w" d="{path}" marker-end="url(#to)"/>'


def text(lines: Iterable[str], x: Number, y: Number, kind: str = "") -> list[str]:
    """Lines around x, the first on y; kind: classes of STYLE."""
    return [f'<text class="{kind}" x="{x}" y="{y + ROW * i}">{escape(line)}</text>' for i, line in enumerate(lines)]


def gallery(*names: str) -> str:
    """Presets side by side, as one SVG.

    >>> gallery("gpt2-small")[:4]
    '<svg'

    Raises:
        InputError: there is no preset of this name.
    """
    for name in names:
        require(name in MODELS, f"{name!r} is no preset; did you mean {nearest(name, MODELS) or next(iter(MODELS))!r}?")
    uncounted = [draw(dataclasses.replace(MODELS[name](), vocab_size=None)) for name in names]  # quick, and as tall
    tall = max(float(picture.split('height="')[1].split('"')[0]) for picture in uncounted)
    pictures = [draw(MODELS[name](), name, tall) for name in names]
    widths = [float(picture.split('width="')[1].split('"')[0]) for picture in pictures]
    inner = "".join(p.replace("<svg", f'<svg x="{sum(widths[:i])}"', 1) for i, p in enumerate(pictures))
    size = f'viewBox="0 0 {sum(widths)} {tall}"'
    card = f'<rect width="{sum(widths)}" height="{tall}" rx="12" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{card}{inner}</svg>\n'
