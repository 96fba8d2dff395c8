"""tx_jax: the Transformer in JAX. The encoder-decoder of 2017, GPT-2 and LLaMA as one set of parts."""

from tx_jax.cache import Cache, LayerCache, init_cache
from tx_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RotaryConfig, RunConfig, TrainConfig
from tx_jax.decoding.generate import Generation, Prompt, decode, generate, pad_prompts, prefill, stream
from tx_jax.decoding.samplers import Sampler, sample
from tx_jax.errors import InputError
from tx_jax.models import DecoderLM, Encoder, EncoderDecoder, build, count_params, init_params
