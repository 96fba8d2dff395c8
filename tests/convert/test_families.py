"""Every family: the logits of transformers, in and out, with padding, a cache, and 64 greedy tokens."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
import public_models as public  # noqa: E402
import transformers as hf  # noqa: E402

import tx_jax as tx  # noqa: E402
from tx_jax.convert.files import open_safetensors  # noqa: E402
from tx_jax.convert.pretrained import read_family, resolved, save_pretrained  # noqa: E402
from tx_jax.convert.sources import load_pretrained  # noqa: E402

T, LENGTHS, ENDS = 11, (11, 7), tuple(range(2, public.V, 2))
TOKENS = np.random.default_rng(0).integers(3, public.V, (2, T)).astype(np.int32)
POSITIONS = np.where(np.arange(T) < np.array(LENGTHS)[:, None], np.arange(T), -1).astype(np.int32)
REAL = POSITIONS >= 0
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile, which is nearly all of the time


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The model and parameters that load_pretrained gives, by the name of a public model."""
    known = {}

    def load(name):
        if name not in known:
            directory = tmp_path_factory.mktemp(name)
            public.make(name).save_pretrained(directory)
            known[name] = directory, load_pretrained(directory)
        return known[name]

    return load


def theirs(name, model=None):
    """Logits of transformers on the padded batch; of an encoder alone, hidden vectors."""
    model = public.make(name) if model is None else model
    inputs = {"input_ids": torch.tensor(TOKENS).long(), "attention_mask": torch.tensor(REAL).long()}
    if name in public.TRANSLATORS:
        inputs["decoder_input_ids"] = torch.tensor(TOKENS).long().flip(1)
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


@functools.partial(jax.jit, static_argnums=0, static_argnames="method", compiler_options=QUICK)
def apply(model, params, *inputs, method=None, **more):
    return model.apply({"params": params}, *inputs, method=method, **more)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def advance(model, params, token, cache, blocked, source):
    """The greedy token after one token, and the cache."""
    hidden, cache = model.apply({"params": params}, token, cache=cache, method="hidden", **source)
    logits = model.apply({"params": params}, hidden[:, -1], method="logits")
    return logits.at[:, blocked].set(-jnp.inf).argmax(-1)[:, None].astype(jnp.int32), cache


def ours(name, found):
    model, tokens, positions = tx.build(found.cfg), jnp.asarray(TOKENS), jnp.asarray(POSITIONS)
    if name in public.TRANSLATORS:
        return np.asarray(apply(model, found.params, tokens, tokens[:, ::-1], positions)[0])
    bare = public.ALL[name][0].endswith("Model") and name in public.ENCODERS
    return np.asarray(apply(model, found.params, tokens, positions, method="hidden" if bare else None)[0])


def compare(name, got, wanted):
    rows = slice(None) if name in public.TRANSLATORS else REAL
    np.testing.assert_allclose(got[rows], wanted[rows], rtol=0, atol=1e-4)
    assert np.abs(wanted[rows]).max() > 0.1, "logits too small to tell anything"


@pytest.mark.parametrize("name", public.ALL)
def test_logits(name, loaded):
    compare(name, ours(name, loaded(name)[1]), theirs(name))


@pytest.mark.parametrize("name", public.DECODERS)
def test_prefill_and_decode(name, loaded):
    found = loaded(name)[1]
    model = tx.build(found.cfg)
    cache, got = tx.init_cache(found.cfg, 2, 20), []
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        tokens, positions = (jnp.asarray(rows[:, start:stop]) for rows in (TOKENS, POSITIONS))
        out, cache = apply(model, found.params, tokens, positions, cache=cache)
        got.append(out)
    compare(name, np.concatenate(got, axis=1), theirs(name))


@pytest.mark.parametrize("name", public.DECODERS | public.TRANSLATORS)
def test_64_greedy_tokens(name, loaded):
    found, reference = loaded(name)[1], public.make(name)
    model, row = tx.build(found.cfg), jnp.asarray(TOKENS[:1])
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    if name in public.TRANSLATORS:  # without a cache: that of transformers needs stacks of one depth
        options |= {"decoder_start_token_id": 0, "use_cache": False}
    wanted = reference.generate(torch.tensor(TOKENS[:1]).long(), **options)[0, -64:]
    blocked = jnp.array([reference.generation_config.eos_token_id or 2])
    start, source = [*row[0]], {}
    if name in public.TRANSLATORS:
        start, source = [0], {"memory": apply(model, found.params, row, method="encode")}
    got, cache = [], tx.init_cache(found.cfg, 1, 90)
    for i in range(len(start) + 63):  # one shape: the prompt too is read token by token
        token = jnp.array([[start[i]]], jnp.int32) if i < len(start) else token
        token, cache = advance(model, found.params, token, cache, blocked, source)
        got.append(int(token[0, 0]))
    got = got[len(start) - 1 :]
    assert got == wanted.tolist()


@pytest.mark.parametrize("name", public.ALL)
def test_export(name, loaded, tmp_path):
    directory, found = loaded(name)
    written = save_pretrained(
        tmp_path, found.cfg, found.params, special_ids=found.special_ids, architecture=found.architecture
    )
    assert written == public.ALL[name][0]
    back, notes = getattr(hf, written).from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] | notes["unexpected_keys"]
    compare(name, theirs(name, back.eval()), theirs(name))
    again = load_pretrained(tmp_path)
    assert (again.cfg, again.special_ids) == (found.cfg, found.special_ids)
    files = [dict(open_safetensors(path).read()) for path in (directory, tmp_path)]
    assert files[0].keys() == files[1].keys()
    assert all(tensor.tobytes() == files[1][path].tobytes() for path, tensor in files[0].items())


@pytest.mark.parametrize("name", public.ALL)
def test_what_a_config_leaves_out(name):
    """A file with nothing but its architecture says what transformers' own defaults, written out, say."""
    architecture = public.ALL[name][0]
    full = getattr(hf, architecture).config_class().to_dict() | {"architectures": [architecture]}
    short = {"architectures": [architecture]}
    assert resolved(read_family(full, "full")[1]) == resolved(read_family(short, "short")[1])


@pytest.mark.parametrize("name", public.TRANSLATORS)
def test_beam_search_finds_what_transformers_finds(name, loaded):
    """Three beams, the best three, scores divided by the length: translations of random weights, which end anywhere."""
    model = public.make(name)
    rule = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_new_tokens": 8,
    }
    ids, mask = (torch.tensor(part).long() for part in (TOKENS, REAL))
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, use_cache=False, eos_token_id=list(ENDS), pad_token_id=0,
            decoder_start_token_id=0,
            return_dict_in_generate=True, output_scores=True, **rule,
        )  # fmt: skip
    _, found = loaded(name)
    model = tx.build(found.cfg)
    memory = apply(model, found.params, TOKENS, POSITIONS, method="encode")
    got = tx.beam_search(
        model, found.params, jnp.zeros((2, 1), int), max_new_tokens=8, eos_id=ENDS, memory=memory,
        n_beams=3, n_best=3, length_penalty=1.0, penalty="plain", early_stopping=True,
    )  # fmt: skip
    rows = out.sequences.numpy()[:, 1:].reshape(2, 3, -1)
    for theirs, ours, length in zip(rows.reshape(6, -1), got.tokens.reshape(6, 8), got.lengths.ravel(), strict=True):
        np.testing.assert_array_equal(ours[:length], theirs[:length])
    np.testing.assert_allclose(got.scores.ravel(), out.sequences_scores.numpy(), atol=1e-4)
    assert len({*map(int, got.lengths.ravel())}) > 1, "all are of one length: other ENDS would tell more"
