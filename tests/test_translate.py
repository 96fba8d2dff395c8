"""Sentences to sentences: each as if it were alone, in the order that was asked for."""

import dataclasses

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.presets import vaswani_base
from tx_jax.translate import score_texts

TEXTS = ["the cat sat", "a", "a mat", "the cat sat on the mat and the mat sat on the cat", "the", "cat cat cat"]


@pytest.fixture(scope="module")
def translator():
    tokenizer = SubwordTokenizer.train(" ".join(TEXTS * 3), 280, ("<s>", "</s>"))
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_mlp": 32, "max_len": 40}
    model = tx.build(dataclasses.replace(vaswani_base(), **sizes))
    params = tx.init_params(model, jax.random.key(3))
    return model, jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 3 * leaf, params), tokenizer


def test_a_text_is_translated_as_if_it_were_alone(translator):
    more = {"n_best": 2, "max_new_tokens": 12}
    together = tx.translate(*translator, TEXTS, **more)
    assert [len(found) for found in together] == [2] * len(TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = tx.translate(*translator, [text], **more)
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_allclose(one.score, other.score, atol=1e-4)
            assert one.text == other.text
    assert len({found[0].text for found in together}) > 1
    by_two = tx.translate(*translator, TEXTS, batch_size=2, **more)
    assert [found[0].text for found in by_two] == [found[0].text for found in together]
    assert tx.translate(*translator, []) == []


def test_ids_are_those_of_beam_search_and_of_generate(translator):
    model, params, tokenizer = translator
    source, positions = tx.pad_prompts([tokenizer.encode(TEXTS[0], add_special_tokens=True).tolist()])
    assert source[0, -1] == tokenizer.eos_ids[0]
    memory = model.apply({"params": params}, source, positions, method="encode")
    start = np.full((1, 1), tokenizer.bos_id)
    more = {"max_new_tokens": 9, "memory": memory, "eos_id": tokenizer.eos_ids}
    best = tx.beam_search(model, params, start, length_penalty=1.5, **more)
    ((found,),) = tx.translate(model, params, tokenizer, TEXTS[:1], max_new_tokens=9, length_penalty=1.5)
    np.testing.assert_array_equal(found.ids, best.tokens[0, 0, : best.lengths[0, 0]])
    np.testing.assert_allclose(found.score, best.scores[0, 0], atol=1e-4)
    greedy = tx.generate(model, params, start, **more)
    ((found,),) = tx.translate(model, params, tokenizer, TEXTS[:1], max_new_tokens=9, n_beams=1)
    np.testing.assert_array_equal(found.ids, greedy.tokens[0, : greedy.lengths[0]])
    key, sampler = jax.random.key(1), tx.Sampler(temperature=2.0)
    (drawn,) = tx.translate(model, params, tokenizer, TEXTS[:1], max_new_tokens=9, sampler=sampler, key=key, n_best=3)
    assert len({tuple(one.ids) for one in drawn}) > 1
    assert np.isnan(drawn[0].score)


def test_special_tokens_are_text_unless_asked_for(translator):
    (one,), (other,) = (
        tx.translate(*translator, ["a</s>"], max_new_tokens=2, special=flag)[0] for flag in (False, True)
    )
    assert len(one.source_ids) > len(other.source_ids) == 3


ERRORS = {
    r"^text 2 has 61 tokens, more than the model's max_len=40; shorten it, or cut it by truncate=True": {
        "texts": ["a", "cat" + " cat" * 59]
    },
    r"^text 9 is empty; give at least one character": {"texts": ["a", ""], "numbers": [7, 9], "end_ids": (3,)},
    r"^batch_size=0 must be at least 1 text": {"batch_size": 0},
    r"^n_best=5 must be from 1 to n_beams=4": {"n_best": 5},
    r"^sampling needs key=": {"sampler": tx.Sampler(temperature=1.0)},
}


@pytest.mark.parametrize("says", ERRORS)
def test_errors(translator, says):
    model, params, tokenizer = translator
    if "empty" in says:  # by a tokenizer that puts no end to a source
        tokenizer = SubwordTokenizer.train(" ".join(TEXTS), 280, ("<s>",))
    with pytest.raises(tx.InputError, match=says):
        tx.translate(model, params, tokenizer, **{"texts": ["a"]} | ERRORS[says])


def test_a_tokenizer_without_ends_is_refused(translator):
    model, params, _ = translator
    plain = SubwordTokenizer.train(" ".join(TEXTS), 280)
    with pytest.raises(
        tx.InputError, match=r"^the tokenizer does not say what begins and ends a text; give start_id and"
    ):
        tx.translate(model, params, plain, ["a"])
    assert len(tx.translate(model, params, plain, ["a"], start_id=0, end_ids=(1, 2), max_new_tokens=3)[0]) == 1


def test_scores_are_of_the_best_reference():
    gold = [["the cat sat on the mat", "a cat was sitting there"], ["it is raining hard today"]]
    assert score_texts(["a cat was sitting there", "it is raining hard today"], gold) == pytest.approx(
        {"bleu": 100.0, "chrf": 100.0, "exact_match": 1.0}
    )
    worse = score_texts(["the cat sat on the mat", "it is raining"], gold)
    assert worse["exact_match"] == 0.5
    assert 50 < worse["bleu"] < 100
    assert score_texts(["x", "y"], gold)["bleu"] < 5


def test_what_cannot_be_translated_is_refused(translator):
    model, params, tokenizer = translator
    with pytest.raises(tx.InputError, match=r"^texts='a b' is one text; give a list of them$"):
        tx.translate(model, params, tokenizer, "a b")
    with pytest.raises(tx.InputError, match=r"^texts=\[\] have no score; give at least one$"):
        score_texts([], [])


def test_a_forced_beginning_and_forbidden_ids(translator):
    model, params, tokenizer = translator
    ((free,),) = tx.translate(model, params, tokenizer, ["a"], max_new_tokens=6)
    ((other,),) = tx.translate(model, params, tokenizer, ["a"], max_new_tokens=6, forbidden=(int(free.ids[0]),))
    assert free.ids[0] not in other.ids
    ((after,),) = tx.translate(model, params, tokenizer, ["a"], max_new_tokens=5, start_id=(tokenizer.bos_id, 7))
    source = jax.numpy.asarray(after.source_ids)[None]
    memory = model.apply({"params": params}, source, method="encode")
    prompt = np.array([[tokenizer.bos_id, 7]])
    best = tx.beam_search(model, params, prompt, max_new_tokens=5, eos_id=tokenizer.eos_ids, memory=memory)
    np.testing.assert_array_equal(after.ids, best.tokens[0, 0, : best.lengths[0, 0]])
