"""The plain torch peer of the training benchmarks: a GPT with fused attention and q, k and v in one, as nanoGPT has."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tx_jax import ModelConfig


class TorchBlock(nn.Module):
    def __init__(self, d: int, n_heads: int, biases: bool, approximate: str):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d, bias=biases), nn.LayerNorm(d, bias=biases)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=biases), nn.Linear(d, d, bias=biases)
        self.up, self.down = nn.Linear(d, 4 * d, bias=biases), nn.Linear(4 * d, d, bias=biases)
        self.n_heads, self.approximate = n_heads, approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate=self.approximate))


class TorchGPT(nn.Module):
    """A decoder of learned positions, without dropout."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        biases, approximate = cfg.biases == "all", {"gelu": "none", "gelu_tanh": "tanh"}[cfg.mlp]
        self.tokens, self.positions = nn.Embedding(cfg.vocab_size, cfg.d_model), nn.Embedding(cfg.max_len, cfg.d_model)
        self.blocks = nn.ModuleList(
            [TorchBlock(cfg.d_model, cfg.n_heads, biases, approximate) for _ in range(cfg.n_layers)]
        )
        self.norm = nn.LayerNorm(cfg.d_model, bias=biases)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T

    def copy(self, params: dict) -> "TorchGPT":
        """Itself with our parameters: kernels are (out, in) on both sides."""
        stack = params["stack"]
        parts = {
            "tokens": {"kernel": params["embed"]["table"]},
            "positions": {"kernel": stack["positions"]["table"]},
            "norm": stack["last_norm"],
        }
        for i in range(len(self.blocks)):
            block, a = stack[f"blocks_{i}"], stack[f"blocks_{i}"]["attention"]
            own = {
                "ln1": block["attention_norm"], "ln2": block["mlp_norm"], "out": a["out"], "up": block["mlp"]["up"],
                "down": block["mlp"]["down"],
                "qkv": {name: np.concatenate([a[part][name] for part in "qkv"]) for name in a["q"]},
            }  # fmt: skip
            parts |= {f"blocks.{i}.{name}": part for name, part in own.items()}
        theirs = {"kernel": "weight", "scale": "weight", "bias": "bias"}
        weights = {f"{at}.{theirs[own]}": leaf for at, part in parts.items() for own, leaf in part.items()}
        self.load_state_dict({name: torch.tensor(np.array(leaf)) for name, leaf in weights.items()})
        return self


def adamw_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Its parameters, of which only matrices decay."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == big] for big in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
