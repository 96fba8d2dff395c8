"""What a model costs: `python -m tx_jax.complexity gpt2-small --seq-len 1024 --device H100`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from tx_jax.command_line import one_line_errors, parse
from tx_jax.complexity.costs import complexity
from tx_jax.complexity.measure import measure, plot, report
from tx_jax.complexity.table import table
from tx_jax.config import DType, ModelConfig
from tx_jax.convert.sources import find_source, is_known, open_source
from tx_jax.errors import InputError, nearest, require
from tx_jax.inspect.plots import check_picture
from tx_jax.presets import MODELS
from tx_jax.run_presets import RUNS
from tx_jax.training.peaks import PEAKS, Device, published, this_device


@dataclasses.dataclass(frozen=True)
class Args:
    """What a model costs, component by component, and how that grows."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]  # a preset, or what sample.py takes
    batch: int = 1  # rows
    seq_len: int | None = None  # tokens a row; None: the longest context
    source_len: int | None = None  # tokens of the source, of an encoder-decoder; None: seq_len
    dtype: DType = "bfloat16"  # of computation and of weights
    device: str = "here"  # whose least time is told: "TPU v5e", H100, … or here
    # time a block of its kind here (of float32 on a CPU), draw that to this .png or .svg, and tell its exponents
    measure: Path | None = None


@one_line_errors()
def main(argv: list[str]) -> None:
    """Print the table and, if asked to, measure. Nothing is asked for: list what can be."""
    if not argv:
        print(*MODELS, "", "Take one, or what sample.py takes: python -m tx_jax.complexity NAME", sep="\n")
        return
    args = parse(Args, argv, prog="python -m tx_jax.complexity")
    if args.measure is not None:
        check_picture(args.measure)
    cfg = dataclasses.replace(find_config(args.model), dtype=args.dtype)
    found = complexity(cfg, args.batch, args.seq_len, args.source_len)
    device = find_device(args.device)
    print(table(found, args.model, (args.device, device)))
    if args.measure is not None:
        curves = measure(cfg if jax.default_backend() != "cpu" else dataclasses.replace(cfg, dtype="float32"))
        print(report(curves))
        plot(curves, this_device()).savefig(args.measure, dpi=120)


def find_config(name: str) -> ModelConfig:
    """Of a preset, or of anything that sample.py takes."""
    if name in MODELS:
        return MODELS[name]()
    rule = f"model={name!r} is a preset of train.py; see python train.py {name} --dry-run"
    require(name not in RUNS or is_known(name), f"{rule}, or give one of {', '.join(MODELS)}")
    close = nearest(name, MODELS)
    require(not close or is_known(name), f"model={name!r} is no preset; did you mean {close!r}?")
    return open_source(find_source(name)).cfg


def find_device(name: str) -> Device:
    """What a device of this name can do."""
    found = this_device() if name == "here" else published(name)
    if found is None:
        close = nearest(name, PEAKS)
        hint = f"did you mean {close!r}? Or use" if close else "use"
        raise InputError(f"device={name!r} is not known; {hint} here, or one of {', '.join(PEAKS)}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
