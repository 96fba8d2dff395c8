"""What lm-eval is told of a text is what whole forwards say of it."""

import importlib.util
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError
from tx_jax.data.tokenizers import CharTokenizer
from tx_jax.evaluation import Evaluated, bits_per_byte, lm_eval_model, n_bytes

TOKENIZER = CharTokenizer("\n abcdé")
CFG = tx.ModelConfig(vocab_size=7, d_model=16, n_heads=2, n_layers=1, max_len=16)
MODEL = tx.build(CFG)
PARAMS = jax.tree.map(
    lambda leaf: leaf if leaf.ndim < 2 else 20 * leaf, jax.jit(lambda: tx.init_params(MODEL, jax.random.key(0)))()
)
LM = Evaluated(MODEL, PARAMS, TOKENIZER, prefix_id=0, batch_size=2)
forward = jax.jit(lambda tokens: jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, tokens)[0][0]))


def request(*args):
    return SimpleNamespace(args=args)


def log_probs(ids, n):
    """Of the last n ids, and whether each is the likeliest."""
    rows = np.asarray(forward(jnp.zeros((1, 16), int).at[0, : len(ids)].set(jnp.array(ids))))
    at = range(len(ids) - n, len(ids))
    return sum(float(rows[i - 1, ids[i]]) for i in at), all(rows[i - 1].argmax() == ids[i] for i in at)


def test_a_continuation_is_scored_after_its_context():
    pairs = [("ab", " cd"), ("ab ", "cd"), ("", "da"), ("abcdabcdabcdabcdabcd", "dé"), ("c", "b")]
    found = LM.loglikelihood([request(*pair) for pair in pairs])
    for (context, rest), (nats, greedy) in zip(pairs, found, strict=True):
        n = len(rest) + len(context) - len(context.rstrip())
        ids = ([0] * (not context) + TOKENIZER.encode(context + rest).tolist())[-16:]
        expected = log_probs(ids, n)
        np.testing.assert_allclose(nats, expected[0], rtol=1e-4)
        assert greedy == expected[1]
    best = TOKENIZER.decode([int(forward(jnp.full((1, 16), 3))[0].argmax())])
    assert LM.loglikelihood([request(TOKENIZER.decode([3]), best)])[0][1]


@pytest.mark.parametrize("length", [1, 15, 16, 31, 40])
def test_a_long_text_is_scored_once_by_full_windows(length):
    text = "".join("abcd é"[i] for i in np.random.default_rng(length).integers(6, size=length))
    ids, total = [0, *TOKENIZER.encode(text).tolist()], 0.0
    end, read = min(16, len(ids)), 1
    while read < len(ids):
        total += log_probs(ids[max(end - 16, 0) : end], end - read)[0]
        read, end = end, min(end + 15, len(ids))
    np.testing.assert_allclose(LM.loglikelihood_rolling([request(text)]), [total], rtol=1e-4)


def test_generation_ends_before_a_stop():
    ids = TOKENIZER.encode("abc")
    written = tx.generate(MODEL, PARAMS, jnp.asarray(ids)[None], max_new_tokens=9).tokens[0]
    text = TOKENIZER.decode(np.asarray(written))
    how = {"max_gen_toks": 9, "until": []}
    assert LM.generate_until([request("abc", how)]) == [text]
    stop = text[4:6]
    assert LM.generate_until([request("abc", how | {"until": ["zz", stop]})]) == [text[: text.find(stop)]]
    with pytest.raises(InputError, match=r"^temperature=1\.0 draws, which this adapter does not; give do_sample=False"):
        LM.generate_until([request("abc", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(InputError, match=r"^max_gen_toks=16 leaves no context of max_len=16; lower it"):
        LM.generate_until([request("abc", {"max_gen_toks": 16})])
    with pytest.raises(InputError, match=r"^a continuation does not fit max_len=16; shorten it"):
        LM.loglikelihood([request("a", "b" * 16)])


def test_bits_per_byte():
    assert bits_per_byte(6 * math.log(2), 3) == pytest.approx(2)
    assert n_bytes(TOKENIZER, TOKENIZER.encode("aé")) == 3


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_it_is_asked_for():
    with pytest.raises(InputError, match="^" + re.escape("lm-eval is not installed; pip install 'tx_jax[eval]'")):
        lm_eval_model(MODEL, PARAMS, TOKENIZER)
