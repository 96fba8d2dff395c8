"""Pictures: of an architecture, what the config says; of a run, the losses that it wrote."""

import dataclasses
import json
import sys
import typing
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import config
from tx_jax.config import ModelConfig
from tx_jax.inspect import README, cross_attention, draw, gallery, plot_attention, plot_metrics
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


def test_the_figure_of_the_readme_is_what_the_code_draws():
    figure = Path(config.__file__).parents[1] / "figures" / "architectures.svg"
    assert figure.read_text(encoding="utf-8") == gallery(*README)
    assert set(README) < set(words(gallery(*README)))


def write_metrics(run_dir):
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"step": 2, "valid_loss": 2.25}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_losses_are_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path)
    path = plot_metrics(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    write_metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_metrics(tmp_path) is None
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "change", [{}, {"n_kv_heads": 1, "qk_norm": True, "attention_soft_cap": 2.0, "attention_scale": 0.3}]
)
def test_cross_attention_is_the_softmax_over_the_source(change):
    cfg = dataclasses.replace(SMALL, vocab_size=13, stack="encoder_decoder", n_layers=2, n_heads=4, **change)
    model = tx.build(cfg)
    shapes = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    source, positions = tx.pad_prompts([[1, 2, 3, 4], [5, 6]])
    tokens = jnp.array([[7, 8, 9], [1, 2, 3]])
    weights = cross_attention(model, params, source, tokens, positions)
    assert weights.shape == (2, 2, 4, 3, 4)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[:, 1, :, :, 2:] == 0).all()
    assert weights.std() > 0.01
    # The first layer's heads, put together with the values, are what its cross-attention gives.
    memory = model.apply({"params": params}, source, positions, method="encode")
    v = jnp.repeat(memory.layers[0].v, 4 // cfg.K, axis=1)
    heads = jnp.einsum("BNTS,BNSH->BTNH", weights[0], v).reshape(2, 3, -1)
    out = heads @ params["decoder"]["blocks_0"]["cross_attention"]["out"]["kernel"].T
    jax.clear_caches()  # blocks are traced once, whatever is then asked of them
    _, found = model.apply(
        {"params": params}, tokens, memory=memory, method="hidden", mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "out" and module.parent.name == "cross_attention",
    )  # fmt: skip
    (expected,) = found["intermediates"]["decoder"]["blocks_0"]["cross_attention"]["out"]["__call__"]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_attention_is_drawn_with_the_words_of_both(tmp_path):
    path = tmp_path / "attention.svg"
    plot_attention(np.full((2, 3, 2), 0.5), ["how", "$are$"], ["qué", "tal", "</s>"], path)
    assert len(ET.parse(path).getroot().findall(f".//{SVG}image")) == 2
    with pytest.raises(tx.InputError, match=r"x\.none is not a picture's name; end it with \.png or \.svg"):
        plot_attention(np.ones((1, 1, 1)), ["a"], ["b"], tmp_path / "x.none")
