"""A model, or its tokenizer, by what a user calls it: a short name, a path, or `hf://org/name`.

What can be opened is a table of kinds, each with a test, a reader of the model and one of its tokenizer.
"""

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tx_jax.checkpoint import (
    CheckpointError,
    latest_step,
    restore_base,
    restore_params,
    saved_data,
    step_dir,
    stored_params,
)
from tx_jax.config import ModelConfig
from tx_jax.config_json import read_object
from tx_jax.convert.files import INDEX, WEIGHTS, check_no_pickle
from tx_jax.convert.gguf import is_gguf, open_gguf
from tx_jax.convert.named import NAMED, fetch_model
from tx_jax.convert.pretrained import DTYPES, Source, open_directory, open_gguf_model
from tx_jax.data.vocabularies import from_gguf
from tx_jax.data.vocabulary_files import FILES, AnyTokenizer, find_tokenizer, fingerprint
from tx_jax.errors import InputError, nearest, require
from tx_jax.lora import as_adapters, merge_lora
from tx_jax.models import build, init_params
from tx_jax.parallel import placed
from tx_jax.run_dir import read_config

HUB = re.compile(r"hf://(?P<repo_id>[^/@\s]+/[^/@\s]+?)(@(?P<revision>\S+))?")
HUB_FILES = ("model*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")  # no code, no other weights
POSSIBLE = (
    f"a name ({', '.join(NAMED)}), a directory in Hugging Face's layout, a GGUF file, a run directory of train.py, "
    "or hf://ORG/NAME[@REVISION]"
)
Name = str | os.PathLike[str]


class Pretrained(NamedTuple):
    """A model with its weights.

    >>> cfg, params, special_ids, architecture = Pretrained(ModelConfig(), {}, {"eos_token_id": 2}, "LlamaForCausalLM")
    >>> special_ids["eos_token_id"]
    2
    """

    cfg: ModelConfig
    params: dict
    special_ids: dict[str, Any]  # bos_token_id, eos_token_id, …, as far as they are known
    architecture: str | None  # of transformers; None: of a run of train.py


def load_pretrained(
    name: Name, *, dtype: str | None = "float32", mesh: Mesh | None = None, step: int | None = None
) -> Pretrained:
    """The model that `name` stands for, tensor by tensor. The network is used for a short name's first use and hf://.

    Args:
        name: one of POSSIBLE.
        dtype: of the parameters: float32, bfloat16, float16; None: as they are stored.
        mesh: place each parameter by its sharding on this mesh; None: the first device.
        step: of a run directory's checkpoint; None: the newest.

    >>> import tempfile, tx_jax as tx
    >>> cfg = ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1, mlp="swiglu", norm="rmsnorm")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = tx.save_pretrained(directory, cfg, tx.init_params(tx.build(cfg), jax.random.key(0)))
    ...     load_pretrained(directory).params["embed"]["table"].shape
    (7, 8)

    Raises:
        InputError: there is no such model, or it cannot be read: its architecture or an option of its config is not
            honoured, or its tensors are not those of its config. Or dtype is unknown, or step is not of a run.
    """
    require(dtype in DTYPES, f"dtype={dtype!r} is not one of float32, bfloat16, float16, or None, as stored")
    cfg, special_ids, architecture, load = open_source(find_source(name), step)
    return Pretrained(cfg, load(dtype, mesh), special_ids, architecture)


def load_tokenizer(name: Name) -> AnyTokenizer:
    """The tokenizer that `name` brings.

    >>> import tempfile
    >>> from tx_jax.data.tokenizers import CharTokenizer
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     CharTokenizer("ab").save(directory)
    ...     load_tokenizer(directory).encode("ba").tolist()
    [1, 0]

    Raises:
        InputError: there is no such model, or it has no tokenizer that can be read.
    """
    path = find_source(name)
    tokenizer = open_tokenizer(path)
    if tokenizer is None:
        raise InputError(f"{path} holds no tokenizer; give a model with one of {FILES}")
    return tokenizer


def open_source(path: Path, step: int | None = None) -> Source:
    """What `find_source` found, before its weights are read. Raises as `load_pretrained` does."""
    kind = _kind(path)
    require(step is None or kind.has_steps, f"step={step} is of a run directory of train.py, and {path} is none")
    return kind.open(path, step)


def open_tokenizer(path: Path) -> AnyTokenizer | None:
    """The tokenizer of what `find_source` found; None: it has none."""
    return _kind(path).tokenizer(path)


def end_ids(special_ids: Mapping[str, Any], tokenizer: AnyTokenizer | None) -> tuple[int, ...]:
    """The ids that end a text, by the model's config and by its tokenizer."""
    ends = special_ids.get("eos_token_id", [])
    return tuple(sorted({*(ends if isinstance(ends, list) else [ends]), *getattr(tokenizer, "eos_ids", ())}))


def is_known(name: str) -> bool:
    """Whether `find_source` has something to look at, rather than a name that nothing has."""
    return name in NAMED or bool(HUB.fullmatch(name)) or os.path.exists(os.path.expanduser(name))


def find_source(name: Name) -> Path:
    """The file or directory that `name` stands for; it is fetched if need be.

    Raises:
        InputError: there is none.
    """
    if isinstance(name, str) and name in NAMED:  # Path("./minilm") is Path("minilm")
        rule = f"model {name!r} is a short name, and also a path here"
        require(not os.path.lexists(name), f"{rule}; write ./{name} for the path, or rename it")
        return fetch_model(name)
    name = os.fspath(name)
    if hub := HUB.fullmatch(name):
        return _fetch_from_hub(hub["repo_id"], hub["revision"])
    path = check_no_pickle(Path(os.path.expanduser(name)))
    require(name and os.path.exists(path), f"model {name!r} does not exist; {_hint(name)} {POSSIBLE}")
    path = path.parent if path.name in (WEIGHTS, INDEX) else path
    require(path.is_dir() or is_gguf(path), f"{path} is no model; give {POSSIBLE}")
    return path


def _hint(name: str) -> str:
    """The short name, or the run in runs/, that was meant."""
    known = {other: other for other in NAMED if other != name}
    for path in Path("runs").glob("*/config.json"):
        known |= dict.fromkeys((path.parent.name, str(path.parent)), str(path.parent))
    close = nearest(name, known)
    return f"did you mean {known[close]}? Or give" if close else "give"


def _fetch_from_hub(repo_id: str, revision: str | None) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise InputError(f"hf://{repo_id} needs the package huggingface_hub; pip install 'tx_jax[hf]'") from error
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:  # of the network, of the hub, of a name that is none
        why = str(error).strip().split("\n")[0]
        raise InputError(f"cannot fetch hf://{repo_id} ({why:.120}); check its name and the network") from error


def is_run(path: Path) -> bool:
    """Whether its config.json is one of ours: Hugging Face's has no such keys."""
    config = path / "config.json"
    return config.is_file() and {"run_dir", "model"} <= read_object(config).keys()


def _open_run(path: Path, step: int | None) -> Source:
    run = read_config(path)
    cfg, lora = run.model, run.lora
    mean: Any = {"part": "ema" if run.keeps_mean else "params", "n_averaged": run.train.n_averaged}
    step_dir(path, step)  # is there

    def load(dtype: str | None, mesh: Mesh | None) -> dict:
        place = (lambda shapes: shapes) if mesh is None else functools.partial(placed, mesh=mesh)
        shapes = jax.eval_shape(lambda key: init_params(build(cfg), key), jax.random.key(0))
        if lora.rank:
            adapters = as_adapters(stored_params(path, step))  # lora.targets, an expression of anyone's, is not run
            base = restore_base(path, place(shapes))
            params = merge_lora(base, restore_params(path, place(adapters), step, **mean), lora.alpha)
        else:
            params = restore_params(path, place(shapes), step, **mean)
        return params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params)

    return Source(cfg, {}, None, load)


def _run_tokenizer(path: Path) -> AnyTokenizer | None:
    found, saved = find_tokenizer(path / "tokenizer"), {}
    with contextlib.suppress(CheckpointError):  # which is told where it is asked for
        saved = saved_data(path) if latest_step(path) else {}
    same = found is None or saved.get("tokenizer_sha256") in (None, fingerprint(found))
    require(same, f"{path}/tokenizer is not the one of its checkpoints; bring it back")
    return found


def _gguf_tokenizer(path: Path) -> AnyTokenizer | None:
    metadata, _ = open_gguf(path)
    return from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None


class _Kind(NamedTuple):
    fits: Callable[[Path], bool]
    open: Callable[[Path, int | None], Source]
    tokenizer: Callable[[Path], AnyTokenizer | None]
    has_steps: bool = False


_KINDS = (  # the first that fits
    _Kind(is_gguf, lambda path, step: open_gguf_model(path), _gguf_tokenizer),
    _Kind(is_run, _open_run, _run_tokenizer, has_steps=True),
    _Kind(lambda path: True, lambda path, step: open_directory(path), find_tokenizer),
)


def _kind(path: Path) -> _Kind:
    return next(kind for kind in _KINDS if kind.fits(path))
