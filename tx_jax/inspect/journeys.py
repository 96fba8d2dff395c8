"""The two journeys of a token, training and sampling, drawn as SVG: stations, their files, and what flows between."""

from typing import NamedTuple

from tx_jax.inspect.architecture import PAINT, ROW, STYLE, Number, text, wire

BOX, HIGH, GAP, TOP = 264, 2 * ROW + 11, 36, 62  # pixels: a box's width and height, the height between two, the first's
SIDE, PAD, COLUMN = 44, 8, 400  # of a loop's card beside and above its boxes; from one journey to the next


class Station(NamedTuple):
    """A box of PAINT, and the value that flows after it."""

    kind: str
    title: str
    files: str
    value: str = ""


class Journey(NamedTuple):
    """Stations from the top down, of which those from loop[0] to loop[1] come again, and how."""

    title: str
    stations: tuple[Station, ...]
    loop: tuple[int, int]
    again: str
    other: tuple[str, ...] = ()  # files with what is there in place of the loop


TRAINING = Journey(
    "Training",
    (
        Station("norm", "text → ids", "data/tokenizers.py · corpora.py · pairs.py", "ids of each document, or pairs"),
        Station("norm", "ids → batches", "data/batches.py · buckets.py · packing.py", "Batch, each field (B, T)"),
        Station("norm", "batch → devices", "parallel.py · processes.py", "sharded on B, or on B and T"),
        Station("table", "tokens → vectors", "modules/embed.py · positions.py", "(B, T, D)"),
        Station("attention", "who sees whom", "ops/masks.py", "Mask, for all layers"),
        Station("attention", "L blocks", "modules/block.py · attention.py · mlp.py", "(B, T, D)"),
        Station("head", "vectors → loss", "models.py · training/losses.py", "sum in nats, count in tokens"),
        Station("mlp", "gradient, update", "training/step.py · optim.py", "TrainState, Metrics"),
        Station("norm", "log, evaluate, sample, save", "training/loop.py · report.py · samples.py", "run directory"),
        Station("norm", "stop, go on", "training/stopping.py · resume.py"),
    ),
    loop=(2, 7),
    again="every step, with the last one's TrainState",
)
SAMPLING = Journey(
    "Sampling",
    (
        Station("norm", "text → ids", "data/vocabularies.py · chat.py", "ids of each prompt"),
        Station("norm", "ids → one batch", "decoding/prompts.py", "Prompt, (B, T); −1: no token"),
        Station("mlp", "an empty cache", "cache.py", "Cache, S slots a row"),
        Station("attention", "prefill: all of the prompt", "decoding/generate.py · models.py", "logits (B, V), Cache"),
        Station("head", "what may be drawn", "decoding/rules.py · automaton.py", "logits (B, V)"),
        Station("head", "the draw", "decoding/samplers.py", "a token a row, (B,)"),
        Station("attention", "decode: that token", "decoding/generate.py · models.py", "Generation"),
        Station("norm", "ids → text", "writing.py · translate.py"),
    ),
    loop=(4, 6),
    again="every token, with the Cache",
    other=(
        "beam.py: several candidates of each",
        "speculative.py: several tokens a pass",
        "engine.py: rows that are filled anew",
        "stream.py: tokens as they come",
    ),
)


def journeys() -> str:
    """Both, side by side.

    >>> journeys()[:4]
    '<svg'
    """
    drawn = [_drawn(journey, COLUMN * (i + 0.5)) for i, journey in enumerate((TRAINING, SAMPLING))]
    width, height = COLUMN * len(drawn), max(end for _, end in drawn) + 22
    card = f'<rect width="{width}" height="{height}" rx="12" fill="#fff"/>'
    inner = "".join(shape for shapes, _ in drawn for shape in shapes)
    box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{STYLE}{card}{inner}</svg>\n'


def _drawn(journey: Journey, x: Number) -> tuple[list[str], Number]:
    """The shapes of a journey around x, and where it ends."""
    left, tops = x - BOX / 2, [TOP + i * (HIGH + GAP) for i in range(len(journey.stations))]
    first, last = (tops[i] for i in journey.loop)
    size = f'width="{BOX + 2 * SIDE}" height="{last - first + HIGH + 2 * PAD}"'
    up, down = first + HIGH / 2, last + HIGH / 2
    shapes = [
        *text((journey.title,), x, 34, "b h"),
        f'<rect x="{left - SIDE}" y="{first - PAD}" {size} rx="9" fill="#f2f4f7"/>',
        wire(f"M{left} {down}h-10q-8 0 -8 -8V{up + 8}q0 -8 8 -8h9"),
        f'<g transform="translate({left - 25} {(up + down) / 2}) rotate(-90)">',
        *text((journey.again,), 0, 0),
        "</g>",
    ]
    for y, (kind, title, files, value) in zip(tops, journey.stations, strict=True):
        fill, edge = PAINT[kind]
        box = f'x="{left}" y="{y}" width="{BOX}" height="{HIGH}" rx="7" fill="{fill}" stroke="{edge}"'
        shapes += [f"<rect {box}/>", *text((title,), x, y + 17, "b"), *text((files,), x, y + 17 + ROW)]
        if value:
            shapes += [wire(f"M{x} {y + HIGH}v{GAP}"), *text((value,), x + 12, y + HIGH + GAP / 2 + 4, "l d")]
    end = tops[-1] + HIGH
    if journey.other:
        y, end = end + GAP, end + GAP + ROW * len(journey.other) + 32
        box = f'x="{left}" y="{y}" width="{BOX}" height="{end - y}" rx="7" stroke-dasharray="4 3"'
        shapes += [f'<rect class="w g" {box}/>', *text(("in place of this loop, in decoding/",), x, y + 19, "b")]
        shapes += text(journey.other, x, y + 38)
    return shapes, end
