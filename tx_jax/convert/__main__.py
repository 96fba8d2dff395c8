"""Weights from one layout to the other: `python -m tx_jax.convert SRC DST`.

A run of train.py, or a GGUF file, becomes a Hugging Face directory, which transformers loads; a Hugging Face directory
becomes a run directory, which `tx_jax.checkpoint.restore_params` and sample.py read.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from tx_jax.command_line import one_line_errors, parse
from tx_jax.convert.pretrained import Source, find_family, save_pretrained
from tx_jax.convert.sources import (
    AnyTokenizer,
    end_ids,
    find_source,
    is_run,
    load_pretrained,
    open_source,
    open_tokenizer,
)
from tx_jax.data.subwords import Subwords
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from tx_jax.data.vocabularies import to_hugging_face
from tx_jax.errors import InputError, require
from tx_jax.models import EncoderDecoder, build, count_params
from tx_jax.run_config import DataConfig, RunConfig
from tx_jax.run_dir import claim_run_dir
from tx_jax.saver import Saver

Layout = Literal["hugging_face", "run"]


@dataclasses.dataclass(frozen=True)
class Args:
    """Weights from one layout to the other."""

    # a run directory, a Hugging Face directory, a GGUF file, a name, or hf://ORG/NAME
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]  # a directory that is not there yet
    to: Layout | None = None  # None: run for a Hugging Face directory, hugging_face for all else
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None: as they are
    architecture: str | None = None  # of transformers, where several fit; None: the source's, or the first that fits
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # compare logits with those of transformers


class Weights(NamedTuple):
    """What a run directory without training holds."""

    params: dict


@one_line_errors()
@jax.default_matmul_precision("highest")  # for --verify
def main(argv: list[str]) -> None:
    """Read, write, compare."""
    args = parse(Args, argv, prog="python -m tx_jax.convert")
    src, dst = find_source(args.src), Path(args.dst).expanduser()
    require(not dst.exists(), f"dst={args.dst!r} is there already; name a new directory")
    named = not Path(args.src).expanduser().is_dir()  # by a short name, or hf://
    to = args.to or ("run" if src.is_dir() and not named and not is_run(src) else "hugging_face")
    fits = to == "hugging_face" or args.dtype in (None, "float32")
    require(fits, f"dtype={args.dtype!r}: a run directory holds float32; leave it out, or write --to hugging_face")
    for name in ("transformers", "torch") if args.verify else ():
        _reference(name)  # refuses before anything is written
    fits = to == "hugging_face" or args.architecture is None
    require(fits, f"architecture={args.architecture!r} is of transformers, not of a run directory; leave it out")
    source = open_source(src)
    WRITERS[to](args, source, open_tokenizer(src), dst)
    print(f"{dst}: {count_params(source.cfg):,} parameters, written as {to}")
    if args.verify:
        print(verify(dst if to == "hugging_face" else src))


def _to_hugging_face(args: Args, source: Source, tokenizer: AnyTokenizer | None, dst: Path) -> None:
    architecture = args.architecture or source.architecture
    find_family(source.cfg, architecture)  # refuses before the weights are read
    own = {"bos_token_id": getattr(tokenizer, "bos_id", None), "eos_token_id": list(end_ids({}, tokenizer))}
    ids = {key: value for key, value in own.items() if value not in (None, [])} | source.special_ids
    # Converted before anything is written, as the package that it takes may be missing.
    theirs = to_hugging_face(tokenizer) if isinstance(tokenizer, CharTokenizer | ByteTokenizer) else tokenizer
    save_pretrained(dst, source.cfg, source.load(args.dtype, None), special_ids=ids, architecture=architecture)
    if theirs is not None:
        theirs.save(dst)


def _to_run(args: Args, source: Source, tokenizer: AnyTokenizer | None, dst: Path) -> None:
    data = DataConfig(seq_len=min(DataConfig().seq_len, source.cfg.max_len))
    if isinstance(tokenizer, Subwords):  # a run keeps no other record of what ends a text
        tokenizer = dataclasses.replace(tokenizer, eos_ids=end_ids(source.special_ids, tokenizer))
    weights = Weights(source.load("float32", None))  # what may be refused is, before anything is written
    claim_run_dir(dst, RunConfig(run_dir=str(dst), init=args.src, model=source.cfg, data=data))
    if tokenizer is not None:
        tokenizer.save(dst / "tokenizer")
    with Saver(dst, keep=1) as save:
        save(0, weights, {})


WRITERS = {"hugging_face": _to_hugging_face, "run": _to_run}


def verify(directory: Path) -> str:
    """How far the logits of a Hugging Face directory are from those of transformers, on two rows of random tokens.

    Raises:
        InputError: transformers is not there, or the logits differ by more than a thousandth of the largest.
    """
    hf, torch = _reference("transformers"), _reference("torch")
    cfg, params, special, architecture = load_pretrained(directory)
    architecture = str(architecture)
    model: Any = build(cfg)
    usual = np.setdiff1d(np.arange(cfg.vocab_size or 1), [special.get("pad_token_id", -1)])  # RoBERTa skips padding
    tokens = np.random.default_rng(0).choice(usual, size=(2, min(16, cfg.max_len)))
    rows = jnp.asarray(tokens, jnp.int32)
    theirs = getattr(hf, architecture).from_pretrained(directory, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.tensor(tokens)}
    if isinstance(model, EncoderDecoder):
        ours, _ = model.apply({"params": params}, rows, rows)
        inputs["decoder_input_ids"] = inputs["input_ids"]
    else:
        ours, _ = model.apply({"params": params}, rows, method=None if architecture[-5:] != "Model" else "hidden")
    with torch.no_grad():
        out = theirs(**inputs)
    wanted = (out.logits if "logits" in out else out.last_hidden_state).numpy()
    largest, apart = np.abs(wanted).max(), np.abs(wanted - np.asarray(ours)).max()
    says = f"largest difference to transformers' logits {apart:.2g}, of logits up to {largest:.3g}"
    require(apart <= 1e-3 * max(largest, 1.0), f"{directory}: {says}; please report this model")
    return f"{says}: equal, within 1e-3 of the largest"


def _reference(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--verify needs the package {name}; pip install {name}, or leave it out") from error


if __name__ == "__main__":
    main(sys.argv[1:])
