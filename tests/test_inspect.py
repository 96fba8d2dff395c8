"""Pictures: of an architecture, what the config says; of a run, the losses that it wrote."""

import dataclasses
import json
import re
import sys
import typing
import xml.etree.ElementTree as ET
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import config
from tx_jax.config import ModelConfig
from tx_jax.inspect.architecture import README, draw, gallery
from tx_jax.inspect.journeys import SAMPLING, TRAINING, journeys
from tx_jax.inspect.look import entropy, logit_lens, look
from tx_jax.inspect.page import browse
from tx_jax.inspect.plots import (
    MASKS,
    check_picture,
    plot_attention,
    plot_cache,
    plot_heads,
    plot_masks,
    plot_positions,
    save_metrics,
)
from tx_jax.presets import MODELS

SVG = "{http://www.w3.org/2000/svg}"
SMALL = ModelConfig(vocab_size=1013, d_model=56, n_layers=3, n_heads=7, d_mlp=94)


def texts(svg):
    """(text, x, y) of everything that is written, from the bottom up."""
    found = [(e.text, float(e.get("x")), float(e.get("y"))) for e in ET.fromstring(svg).iter(f"{SVG}text")]
    return sorted(found, key=lambda row: -row[2])


def words(svg):
    return [text for text, _, _ in texts(svg)]


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_is_drawn_inside_its_card(name):
    root = ET.fromstring(draw(dataclasses.replace(MODELS[name](), vocab_size=None), name))  # counting would take long
    left, top, width, height = map(float, root.get("viewBox").split())
    assert (width, height) == (float(root.get("width")), float(root.get("height")))
    for element in root.iter(f"{SVG}text"):
        assert left < float(element.get("x")) < left + width
        assert top < float(element.get("y")) < top + height


def test_the_numbers_of_the_config():
    said = words(draw(MODELS["llama3-8b"](), "Llama"))
    assert said == [
        "tokens", "128,256 × 4,096", "Embedding", "RMSNorm",
        "q, k turned by rotary", "8 key-value heads", "causal, 32 heads of 128", "Self-attention", "× 32", "RMSNorm",
        "4,096 → 14,336 → 4,096", "SwiGLU: gated by SiLU", "Feed-forward", "RMSNorm",
        "4,096 × 128,256, not tied", "Head", "logits", "D 4,096 · 8,030,261,248 parameters", "Llama",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tie_head": True}, "tied: the embedding's table"),
        ({"tie_head": False}, "56 × 1,013, not tied"),
        ({"n_kv_heads": 1}, "1 key-value head"),
        ({"d_value": 5}, "values of 5"),
        ({"window": 64}, "over the last 64 tokens"),
        ({"stack": "encoder"}, "sees all, 7 heads of 8"),
        ({"scale_embeddings": True}, "× √56"),
        ({"positions": "learned", "max_len": 2048}, "2,048 learned positions"),
        ({"positions": "sinusoidal"}, "sinusoids"),
        ({"positions": "alibi"}, "scores biased by ALiBi"),
        ({"positions": "t5"}, "scores biased by T5 buckets"),
        ({"mlp": "relu"}, "ReLU"),
        ({"n_experts": 8}, "2 of 8 experts a token"),
        ({"vocab_size": None}, "V × 56"),
        ({"stack": "encoder", "n_token_types": 2}, "+ 2 token types"),
    ],
)
def test_each_choice_is_said(change, line):
    assert line in words(draw(dataclasses.replace(SMALL, **change)))
    assert (line in words(draw(SMALL))) == ("tie_head" in change and change["tie_head"])


def test_where_norms_sit():
    """Pre: below each sub-layer, inside its branch, and one at the end. Post: above each sum."""
    parts = {"Self-attention", "Feed-forward", "LayerNorm", "Head"}
    for order, column in {
        "pre": ["LayerNorm", "Self-attention", "LayerNorm", "Feed-forward", "LayerNorm", "Head"],
        "post": ["Self-attention", "LayerNorm", "Feed-forward", "LayerNorm", "Head"],
    }.items():
        assert [text for text in words(draw(dataclasses.replace(SMALL, norm_order=order))) if text in parts] == column


def test_encoder_beside_decoder():
    cfg = dataclasses.replace(SMALL, stack="encoder_decoder", n_encoder_layers=5)
    rows = texts(draw(cfg))
    (source,), (target,) = ([x for text, x, _ in rows if text == f"{side} tokens"] for side in ("source", "target"))
    assert source < target
    assert [x for text, x, _ in rows if text == "Cross-attention"] == [target]
    assert sorted(x for text, x, _ in rows if text == "Self-attention") == [source, target]
    assert [text for text, x, _ in sorted(rows, key=lambda row: row[1]) if text.startswith("× ")] == ["× 5", "× 3"]
    assert "the decoder's table" in words(draw(cfg))
    assert "the decoder's table" not in words(draw(dataclasses.replace(cfg, tie_source=False)))


@pytest.mark.parametrize("field", ["positions", "mlp", "norm", "norm_order", "stack"])
def test_no_choice_is_forgotten(field):
    (choices,) = (typing.get_args(f.type) for f in dataclasses.fields(ModelConfig) if f.name == field)
    for choice in choices:
        ET.fromstring(draw(dataclasses.replace(SMALL, vocab_size=None, **{field: choice})))


@pytest.mark.parametrize("scheme", [scheme for scheme in typing.get_args(config.PositionScheme) if scheme != "none"])
def test_every_position_scheme_is_said(scheme):
    without, said = (words(draw(dataclasses.replace(SMALL, positions=name))) for name in ("none", scheme))
    assert len(said) == len(without) + 1


def test_title_is_escaped():
    assert words(draw(SMALL, "<a & b>"))[-1] == "<a & b>"


def test_the_figures_are_what_the_code_draws():
    figures, drawn = Path(config.__file__).parents[1] / "figures", {"architectures": gallery(*README)}
    for name, picture in {**drawn, "journeys": journeys()}.items():
        assert (figures / f"{name}.svg").read_text(encoding="utf-8") == picture
    assert set(README) < set(words(gallery(*README)))


@pytest.mark.parametrize("journey", [TRAINING, SAMPLING], ids=["training", "sampling"])
def test_the_files_of_a_journey_are_there(journey):
    for files in [station.files for station in journey.stations] + [f"decoding/{line}" for line in journey.other]:
        directory = Path(config.__file__).parent
        for name in re.findall(r"[\w/]+\.py", files):  # one without a directory is beside the one before, or above all
            beside = directory / name
            directory = (beside if beside.exists() else Path(config.__file__).parent / name).parent
            assert (directory / Path(name).name).exists()


def write_metrics(run_dir):
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"step": 2, "valid_loss": 2.25}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_losses_are_plotted(tmp_path):
    write_metrics(tmp_path)
    save_metrics(tmp_path)
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    write_metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save_metrics(tmp_path)
    assert not (tmp_path / "plots").exists()


def made(**changes):
    cfg = dataclasses.replace(SMALL, vocab_size=13, n_heads=4, **{"n_layers": 2} | changes)
    model = tx.build(cfg)
    shapes = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


SOURCE, POSITIONS = tx.pad_prompts([[1, 2, 3, 4], [5, 6]])
TOKENS = jnp.array([[7, 8, 9, 10], [1, 2, 3, 4]])
CHANGES = [
    {},
    {"n_kv_heads": 1, "qk_norm": True, "attention_soft_cap": 2.0, "attention_scale": 0.3},
    {"positions": "alibi", "norm_order": "post", "biases": "all"},
    {"positions": "t5", "norm": "rmsnorm", "norm_order": "sandwich"},
    {"window": 2, "window_pattern": "wf", "positions": "learned"},
]


def blocks_attention(model, params, weights, name, x, values):
    """The output of a block's attention from its weights (B, N, T, S), and the vectors that keys and values read."""
    cfg, part = model.cfg, params["blocks_0"][name]
    v = values @ part["v"]["kernel"].T + part["v"].get("bias", 0)
    v = jnp.repeat(v.reshape(*v.shape[:2], cfg.K, cfg.Hv), cfg.n_heads // cfg.K, axis=2)
    heads = jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(*x.shape[:2], -1)
    return heads @ part["out"]["kernel"].T + part["out"].get("bias", 0)


def captured(model, params, *inputs, module, **named):
    """What a module of the first block gives in a forward pass, by Flax's own means."""
    found = []

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if path.endswith(f"blocks_0/{module}") and context.method_name in ("__call__", "attend"):
            found.append((args[0], result[0] if isinstance(result, tuple) else result))
        return result

    with jax.disable_jit(), nn.intercept_methods(record):
        model.apply({"params": params}, *inputs, **named)
    return found[-1]


@pytest.mark.parametrize("change", CHANGES)
def test_self_attention_sums_to_1_and_gives_the_blocks_output(change):
    model, params = made(**change)
    seen = look(model, params, TOKENS)
    assert seen.attention.shape == (2, 2, 4, 4, 4)
    np.testing.assert_allclose(seen.attention.sum(-1), 1, rtol=1e-5)
    assert (seen.attention * ~jnp.tri(4, dtype=bool) == 0).all()
    assert seen.attention.std() > 0.01
    read, out = captured(model, params, TOKENS, module="attention")
    expected = blocks_attention(model, params["stack"], seen.attention[0], "attention", read, read)
    np.testing.assert_allclose(expected, out, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES[:4])
def test_cross_attention_is_over_the_source(change):
    model, params = made(stack="encoder_decoder", **change)
    seen = look(model, params, TOKENS, source=SOURCE, source_positions=POSITIONS)
    assert seen.cross.shape == (2, 2, 4, 4, 4)
    np.testing.assert_allclose(seen.cross.sum(-1), 1, rtol=1e-5)
    assert (seen.cross[:, 1, :, :, 2:] == 0).all()
    assert (seen.encoder_attention[:, 1, :, :, 2:] == 0).all()
    read, out = captured(model, params, SOURCE, TOKENS, POSITIONS, module="cross_attention")
    encoded, _ = model.apply(
        {"params": params}, SOURCE, POSITIONS, method=lambda m, x, at: (m.encoder(m.source_embed(x), at)[0], 0)
    )
    expected = blocks_attention(model, params["decoder"], seen.cross[0], "cross_attention", read, encoded)
    np.testing.assert_allclose(expected, out, atol=1e-4)


def test_what_is_seen_is_what_the_model_computes():
    """Logits, and hidden vectors: read by the last norm and the head, the last layer's are the logits."""
    for change in CHANGES:
        model, params = made(**change)
        seen, (logits, _) = look(model, params, TOKENS), model.apply({"params": params}, TOKENS)
        np.testing.assert_allclose(seen.logits, logits, atol=1e-5)
        lens = logit_lens(model, params, seen.hidden)
        assert lens.shape == (2, 2, 4, 13)
        np.testing.assert_allclose(lens[-1], logits, atol=1e-4)
        assert jnp.abs(lens[0] - logits).max() > 0.1


def test_a_cached_decode_attends_as_the_whole_does():
    model, params = made()
    whole, cache = look(model, params, TOKENS), tx.init_cache(model.cfg, 2, 8)
    first = look(model, params, TOKENS[:, :3], cache=cache)
    last = look(model, params, TOKENS[:, 3:], cache=first.cache)
    assert last.attention.shape == (2, 2, 4, 1, 8)
    np.testing.assert_allclose(last.attention[..., :4], whole.attention[..., 3:, :], atol=1e-5)
    assert (last.attention[..., 4:] == 0).all()


def test_a_cached_decode_attends_to_the_source_as_the_whole_does():
    model, params = made(stack="encoder_decoder")
    whole = look(model, params, TOKENS, source=SOURCE, source_positions=POSITIONS)
    memory = model.apply({"params": params}, SOURCE, POSITIONS, method="encode")
    first = look(model, params, TOKENS[:, :3], memory=memory, cache=tx.init_cache(model.cfg, 2, 8))
    last = look(model, params, TOKENS[:, 3:], memory=memory, cache=first.cache)
    np.testing.assert_allclose(last.cross, whole.cross[..., 3:, :], atol=1e-5)
    np.testing.assert_allclose(last.attention[..., :4], whole.attention[..., 3:, :], atol=1e-5)
    assert whole.encoder_attention is not None
    assert last.encoder_attention is None


def test_a_prefix_sees_all_of_itself():
    model, params = made()
    seen = look(model, params, TOKENS, prefix=jnp.array([3, 0])).attention
    assert (seen[:, 0, :, :3, :3] > 0).all()
    assert (seen[:, 1] * ~jnp.tri(4, dtype=bool) == 0).all()


def test_looking_changes_nothing_afterwards():
    model, params = made()
    before, _ = jax.jit(model.apply)({"params": params}, TOKENS)
    look(model, params, TOKENS)
    after = model.apply({"params": params}, TOKENS)
    assert len(after) == 2
    np.testing.assert_allclose(before, after[0], atol=1e-5)


def test_an_encoder_sees_all():
    model, params = made(stack="encoder")
    weights = look(model, params, TOKENS).attention
    assert (weights > 0).all()
    assert float(entropy(weights).max()) <= np.log(4) + 1e-5


def test_what_cannot_be_looked_at():
    model, params = made()
    with pytest.raises(tx.InputError, match=r"DecoderLM reads no source; leave source= out"):
        look(model, params, TOKENS, source=SOURCE)
    with pytest.raises(tx.InputError, match=r"^EncoderDecoder reads a source; give source=$"):
        look(tx.build(dataclasses.replace(model.cfg, stack="encoder_decoder")), params, TOKENS)
    both = tx.build(dataclasses.replace(model.cfg, stack="encoder_decoder"))
    with pytest.raises(tx.InputError, match=r"^source= and memory= are of the same; leave one out$"):
        look(both, params, TOKENS, source=SOURCE, memory=tx.init_cache(model.cfg, 2, 4))
    with pytest.raises(tx.InputError, match=r"^DecoderLM reads no source_positions, types; leave source_positions, t"):
        look(model, params, TOKENS, types=TOKENS, source_positions=POSITIONS)
    with pytest.raises(tx.InputError, match=r"the layers of stack are stacked; look at unstack_layers\(params\)"):
        look(model, tx.stack_layers(params), TOKENS)


def images(figure):
    """The arrays that are drawn."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.get_images()]


def test_attention_is_drawn_with_the_words_of_both(tmp_path):
    weights = np.random.default_rng(0).random((2, 3, 2))
    figure = plot_attention(weights, ["qué", "tal", "</s>"], ["how", "$are$"])
    np.testing.assert_array_equal(np.stack(images(figure)), weights)
    figure.savefig(tmp_path / "attention.svg")
    assert len(ET.parse(tmp_path / "attention.svg").getroot().findall(f".//{SVG}image")) == 2 + 1  # and the scale
    with pytest.raises(tx.InputError, match=r"x\.none is not a picture's name; end it with \.png or \.svg"):
        check_picture(tmp_path / "x.none")


def test_a_grid_has_a_picture_for_each_layer_and_head():
    weights = np.random.default_rng(0).random((2, 3, 4, 4))
    drawn = images(plot_heads(weights, list("abcd")))
    np.testing.assert_array_equal(np.stack(drawn).reshape(weights.shape), weights)


def test_all_heads_have_one_scale():
    weights = np.array([[[[0.2, 0.8], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]]])
    panels = plot_heads(weights, list("ab")).axes
    assert [axes.get_images()[0].get_clim() for axes in panels[:2]] == [(0, 0.8)] * 2
    assert panels[2].get_ylabel() == "weight"


def test_some_layers_of_many_are_drawn_by_their_numbers():
    weights = np.random.default_rng(0).random((9, 2, 4, 4))
    figure = plot_heads(weights, list("abcd"), layers=[3, 9])
    np.testing.assert_array_equal(np.stack(images(figure)), weights[[2, 2, 8, 8], [0, 1, 0, 1]])
    *titles, scale = [axes.get_title() for axes in figure.axes]
    assert not scale
    assert titles == ["layer 3, head 1", "layer 3, head 2", "layer 9, head 1", "layer 9, head 2"]
    for layers in ([], [0], [10]):
        with pytest.raises(tx.InputError, match=rf"layers=\{layers} must be one or more, from 1 to 9"):
            plot_heads(weights, list("abcd"), layers=layers)


@pytest.mark.parametrize("scheme", typing.get_args(config.PositionScheme))
def test_every_position_scheme_is_drawn(scheme):
    figure = plot_positions(dataclasses.replace(SMALL, positions=scheme), 16)
    shown = images(figure)[0]
    if scheme.startswith("sinusoidal"):
        np.testing.assert_allclose(shown[0, :2], [0, 1] if scheme == "sinusoidal" else [0, 0], atol=1e-6)
    if scheme.startswith("rotary"):
        np.testing.assert_allclose(shown[:, 0], np.cos(np.arange(16)), atol=1e-5)  # the fastest: a radian a token
    if scheme == "alibi":
        assert len(figure.axes[1].lines) == 7
        np.testing.assert_allclose(shown[-1], -np.arange(16)[::-1] / 4)  # of head 1, whose slope is that of 4 heads


def test_masks_are_drawn_as_they_are():
    drawn = images(plot_masks(12))
    assert len(drawn) == len(MASKS)
    assert drawn[0].tolist() == np.tri(12).astype(bool).tolist()


def test_a_ring_is_drawn_as_it_fills():
    (held,) = images(plot_cache(5, 3))
    assert np.nan_to_num(held, nan=-1).tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, 1, 2], [3, 4, 2]]


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (lambda: plot_cache(5, 4, 4), r"^n_sinks=4 must be from 0 to 3, less than n_slots$"),
        (lambda: plot_cache(0, 4), r"^n_tokens=0, n_slots=4 must be at least 1$"),
        (lambda: plot_positions(SMALL, 0), r"^n=0 positions must be at least 1$"),
        (lambda: gallery("gpt2-smal"), r"^'gpt2-smal' is no preset; did you mean 'gpt2-small'\?$"),
    ],
)
def test_what_cannot_be_drawn(picture, told):
    with pytest.raises(tx.InputError, match=told):
        picture()


def test_a_page_holds_words_and_weights_and_no_word_ends_it():
    weights = np.random.default_rng(0).random((2, 3, 2, 2))
    page = browse(weights, ["</script>", "b"])._repr_html_()
    (data,) = re.findall(r"= (\{.*\}), root", page)
    assert json.loads(data)["queries"] == ["</script>", "b"]
    np.testing.assert_allclose(json.loads(data)["weights"], weights, atol=1e-4)
    assert page.count("</script>") == 1
    with pytest.raises(tx.InputError, match=r"1 queries and 1 keys are not the \(2, 2\) of the weights"):
        browse(weights, ["a"])


@pytest.mark.parametrize("plot", [plot_heads, browse])
def test_words_are_held_to_the_weights(plot):
    with pytest.raises(tx.InputError, match=r"^1 queries and 1 keys are not the \(2, 2\) of the weights; give a word"):
        plot(np.ones((1, 1, 2, 2)), ["a"])
    with pytest.raises(tx.InputError, match=r"^weights have shape \(1, 1, 1, 2, 2\), not \(L, N, T, S\); take one row"):
        plot.__wrapped__(np.ones((1, 1, 1, 2, 2)), ["a", "b"])
