"""A model's costs as text: components, what they add up to, how they grow, and the least time on a device."""

from collections.abc import Callable

from tx_jax.complexity.costs import Complexity, Parts, Work, total
from tx_jax.modules.block import KEPT
from tx_jax.training.peaks import Device

REMAT = (
    "  full: what goes into a block; dots: that, and its products; names: that, and queries, keys, values and what",
    "  attention gives. The rest is computed again. An array counts where it is made.",
)
GROWTH = """
growth in tokens T and width d          time       compute        memory
  attention                            O(T²)      O(T²·d)         O(T²)   O(T) where scores are taken in blocks
  feed-forward                         O(T)       O(T·d²)         O(T·d)
  a layer                              O(T²)      O(T²·d + T·d²)  O(T² + T·d)
  the next token, with the cache       O(T)       O(T·d + d²)     O(T·d)
  the next token, without it           O(T²)      O(T²·d + T·d²)  O(T² + T·d)
  a window of w tokens has w in place of one T of attention
"""


def table(found: Complexity, name: str, device: tuple[str, Device] | None = None) -> str:
    """What `python -m tx_jax.complexity` prints.

    Args:
        device: its name and what it can do, for the least time of each pass.
    """
    of_source = f" from {found.source_len:,} of the source" if found.source_len else ""
    title = f"{name}: {found.batch} × {found.seq_len:,} tokens{of_source}, {found.cfg.dtype}"
    head = ("FLOPs", "parameters", "forward", "a byte", "backward", "next token", "a byte", "without cache")
    rows = [_row(found, part) for part in found.params]
    sums = ("in all", f"{sum(found.params.values()):,}", *_cells(found, total))
    lines = [title, "", *_columns([head, *rows, sums]), "", *_sums(found)]
    return "\n".join(lines + (_times(found, *device) if device else []) + [GROWTH])


def _row(found: Complexity, part: str) -> tuple[str, ...]:
    return (part, f"{found.params[part]:,}", *_cells(found, lambda parts: parts[part]))


def _cells(found: Complexity, of: Callable[[Parts], Work]) -> tuple[str, ...]:
    forward, backward = of(found.forward), of(found.backward)
    cells = (si(forward.flops), f"{forward.intensity:,.1f}", si(backward.flops))
    if found.decode is None or found.decode_again is None:
        return (*cells, "", "", "")
    token, again = of(found.decode), of(found.decode_again)
    return (*cells, si(token.flops), f"{token.intensity:,.1f}", si(again.flops))


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def _sums(found: Complexity) -> list[str]:
    sizes = {remat: found.activation_bytes(remat) for remat in KEPT}
    rows = [(name, *(of_bytes(size[name]) for size in sizes.values())) for name in found.params]
    sums = ("in all", *(of_bytes(sum(size.values())) for size in sizes.values()))
    kept = _columns([("kept for the backward pass, by remat:", *sizes), *rows, sums])
    slots = min(found.seq_len, found.cfg.reach or found.seq_len)
    ring = f" of the last {slots:,}" * (slots < found.seq_len)
    each = found.cache_bytes // (found.batch * slots)
    cache = f"{of_bytes(found.cache_bytes)}, {of_bytes(each)} a token{ring}" if found.decode else "none"
    memory = f"; of the source {of_bytes(found.memory_bytes)}" * bool(found.memory_bytes)
    return [*kept, *REMAT, "", f"key-value cache: {cache}{memory}"]


def _times(found: Complexity, name: str, device: Device) -> list[str]:
    """The roofline: components one after another, each as long as its computing or its memory takes."""

    def least(*passes: Parts) -> str:
        seconds = sum(work.seconds(device) for parts in passes for work in parts.values())
        return f"{si(seconds)}s"

    where, kind = ("this machine", "") if name == "here" else (name, " of 16 bits")
    peak = f"{si(device.flops)}FLOP/s{kind}, {si(device.bandwidth)}B/s"
    decode = f", the next token {least(found.decode)}" if found.decode else ""
    times = f"forward {least(found.forward)}, forward and backward {least(found.forward, found.backward)}{decode}"
    return [f"at least, on {where} ({peak}; {device.flops / device.bandwidth:,.0f} FLOPs a byte): {times}"]


def si(number: float | int) -> str:
    """Three figures and a prefix.

    >>> si(291_648_307_200), si(0.00042), si(0)
    ('292 G', '420 µ', '0 ')
    """
    if not number:
        return "0 "
    for factor, prefix in zip((1e15, 1e12, 1e9, 1e6, 1e3, 1, 1e-3, 1e-6, 1e-9), "PTGMk mµn", strict=True):
        if number >= 0.9995 * factor:
            digits = f"{number / factor:#.3g}".rstrip(".")
            return f"{digits} {prefix.strip()}"
    return f"{number:.2e} "


def of_bytes(number: float | int) -> str:
    """In KiB, MiB, GiB.

    >>> of_bytes(75_497_472)
    '72.0 MiB'
    """
    power = max(n for n in range(5) if n == 0 or number >= 1024**n)
    return f"{number / 1024**power:,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{number:,.0f} B"
