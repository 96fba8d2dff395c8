"""The real SmolLM2-135M-Instruct, from its GGUF: the logits, greedy tokens and perplexity of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.data.corpora import load_text

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time", "Water boils at")
T = 128  # tokens of a window of text


@pytest.fixture(scope="module")
def both(tmp_path_factory, fetched):
    """The model, its parameters, its tokenizer; and the same weights in transformers."""
    found, home = fetched(tx.load_pretrained, "smollm2"), tmp_path_factory.mktemp("smollm2")
    tx.save_pretrained(home, found.cfg, found.params, special_ids=found.special_ids, architecture=found.architecture)
    peer = hf.AutoModelForCausalLM.from_pretrained(home).eval()
    return tx.build(found.cfg), found.params, tx.load_tokenizer("smollm2"), peer


def test_logits_and_perplexity(both, fetched):
    model, params, tokenizer, peer = both
    ids = tokenizer.encode(fetched(load_text, None, "wikitext2_test")[:9000])[: 8 * T].reshape(8, T)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(ids))[0])
    with torch.inference_mode():
        theirs = peer(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    losses = [-np.take_along_axis(jax.nn.log_softmax(x[:, :-1]), ids[:, 1:, None], -1).mean() for x in (ours, theirs)]
    assert abs(np.expm1(losses[0] - losses[1])) < 1e-3
    assert 2 < losses[1] < 5  # nats a token: it knows English


def test_greedy_tokens(both):
    model, params, tokenizer, peer = both
    prompt = tx.pad_prompts([tokenizer.encode(text).tolist() for text in PROMPTS])
    ours = np.asarray(tx.generate(model, params, *prompt, max_new_tokens=32).tokens)
    for text, row in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor(tokenizer.encode(text))[None].long()
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32,
                                do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert row.tolist() == out[0, ids.shape[1] :].tolist()
