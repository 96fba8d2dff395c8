"""Keys of config.json against transformers: honoured means the same, and what is passed over changes no logit."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import public_models as public  # noqa: E402

from tx_jax.convert.fields import WITHOUT_EFFECT  # noqa: E402
from tx_jax.convert.pretrained import FAMILIES, read_family, resolved  # noqa: E402
from tx_jax.errors import InputError  # noqa: E402

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PARTIAL = {  # what a file may say: read as it stands, and as transformers writes it out
    "LlamaForCausalLM": [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"head_dim": 32}, {"mlp_bias": True},
        {"rope_theta": 1e6, "rope_scaling": YARN}, {"num_key_value_heads": 4, "attention_bias": True},
    ],
    "MistralForCausalLM": [{"sliding_window": None}, {"head_dim": 64}],
    "MixtralForCausalLM": [{"num_local_experts": 3}, {"num_experts_per_tok": 1}, {"rope_theta": 1e4}],
    "Qwen2ForCausalLM": [
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": n, "num_hidden_layers": 4}
        for n in (0, 1, 4, 9)
    ] + [{"use_sliding_window": False, "sliding_window": 9}, {"rope_scaling": YARN}],
    "Qwen3ForCausalLM": [
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, {"attention_bias": True},
    ],
    "GemmaForCausalLM": [{"attention_bias": True}, {"rope_theta": 5e3}],
    "Gemma2ForCausalLM": [{"num_hidden_layers": 3}, {"query_pre_attn_scalar": 144}, {"attn_logit_softcapping": None}],
    "Gemma3ForCausalLM": [
        {"sliding_window_pattern": 3}, {"rope_local_base_freq": 5e3}, {"rope_theta": 5e5}, {"num_hidden_layers": 3},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
    "Phi3ForCausalLM": [{"sliding_window": 7}, {"partial_rotary_factor": 0.5}],
    "GPTNeoXForCausalLM": [{"rotary_pct": 0.5}, {"rotary_emb_base": 5000}, {"attention_bias": False}],
    "Starcoder2ForCausalLM": [{"use_bias": False}, {"sliding_window": 7}],
    "T5ForConditionalGeneration": [
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {"num_layers": 3}, {"num_decoder_layers": 2},
    ],
    "BartForConditionalGeneration": [{"scale_embedding": True}, {"activation_function": "relu", "decoder_layers": 2}],
    "RobertaModel": [{"max_position_embeddings": 514, "pad_token_id": 1}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "partial"), [(name, one) for name, rows in PARTIAL.items() for one in rows], ids=str
)
def test_a_partial_config_means_what_transformers_makes_of_it(architecture, partial):
    named = {"architectures": [architecture]}
    full = getattr(hf, architecture).config_class(**copy.deepcopy(partial)).to_dict()
    ours = resolved(read_family(partial | named, "partial")[1])
    assert ours == resolved(read_family(full | named, "full")[1])
    assert ours != resolved(read_family(named, "empty")[1]) or partial.get("use_sliding_window", True) is not True


def logits(model):
    tokens = torch.tensor(np.random.default_rng(0).integers(3, public.V, (1, 9)))
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def other(value):
    """Another value of the type; None: there is no telling."""
    kinds = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 0.25}
    return kinds[type(value)]() if type(value) in kinds else None


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
                                  "phi3", "pythia", "starcoder2", "t5", "bart", "marian", "bert-mlm",
                                  "roberta"])  # fmt: skip
def test_what_is_passed_over_changes_no_logit_and_the_rest_is_honoured_or_refused(name):
    """Each key of transformers' own config is changed in turn: either we refuse it, or our config changes, or no logit
    of transformers does."""
    architecture, _ = public.ALL[name]
    model = public.make(name)
    config, wanted = model.config.to_dict(), logits(model)
    ours = resolved(read_family(config | {"architectures": [architecture]}, name)[1])
    kind, checked = type(model), 0
    for key, value in config.items():
        changed = other(value)
        if changed is None or key in ("output_hidden_states", "output_attentions", "return_dict"):
            continue
        values = config | {key: changed, "architectures": [architecture]}
        try:
            if resolved(read_family(values, name)[1]) != ours:
                continue
        except InputError:
            continue
        fields = {k: v for k, v in values.items() if k not in ("architectures", "model_type", "transformers_version")}
        twin = kind(kind.config_class(**fields)).eval()
        twin.load_state_dict(model.state_dict())
        np.testing.assert_allclose(logits(twin), wanted, rtol=0, atol=1e-5, err_msg=f"{key}={changed} is passed over")
        checked += 1
    assert checked >= 3
    assert not {"is_decoder", "tie_word_embeddings", "hidden_act"} & WITHOUT_EFFECT


def test_repeated_tensors_must_be_equal(tmp_path):
    from tx_jax.convert.files import open_safetensors, save_safetensors
    from tx_jax.convert.sources import load_pretrained

    twins = {"t5": "encoder.embed_tokens.weight", "bert-mlm": "cls.predictions.decoder.bias"}
    tables = {"t5": "shared.weight", "bert-mlm": "cls.predictions.bias"}
    for name, twin in twins.items():
        for more in (0.0, 0.5):
            directory = tmp_path / f"{name}{more}"
            public.make(name).save_pretrained(directory)
            tensors = dict(open_safetensors(directory).read())
            tensors[twin] = tensors[tables[name]] + np.float32(more)
            (directory / "model.safetensors").unlink()
            save_safetensors(directory, tensors.items())
            if more:
                with pytest.raises(InputError, match=f"{twin} is not {tables[name]} in .*; this architecture has one"):
                    load_pretrained(directory)
            else:
                load_pretrained(directory)


def test_every_family_is_in_the_tables():
    assert {family.architecture for family in FAMILIES} == {architecture for architecture, _ in public.ALL.values()}
