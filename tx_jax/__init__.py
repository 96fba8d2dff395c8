"""The Transformer in JAX: the encoder-decoder of 2017, GPT-2 and LLaMA as one set of parts, the KV cache as a value."""

from tx_jax import inspect, presets
from tx_jax.cache import Cache, LayerCache, init_cache, resize_cache
from tx_jax.complexity.costs import Complexity, complexity
from tx_jax.config import ModelConfig, RotaryConfig
from tx_jax.convert.pretrained import save_pretrained
from tx_jax.convert.sources import Pretrained, load_pretrained, load_tokenizer
from tx_jax.data.batches import Batch, PairBatch
from tx_jax.data.token_bytes import token_bytes
from tx_jax.decoding.automaton import Automaton, stop_at
from tx_jax.decoding.beam import Beams, beam_search
from tx_jax.decoding.engine import Written, write_all
from tx_jax.decoding.generate import Generation, decode, generate, prefill
from tx_jax.decoding.grammar import match_json, match_regex
from tx_jax.decoding.prompts import Prompt, pad_prompts, prepare
from tx_jax.decoding.samplers import Sampler, sample
from tx_jax.decoding.scoring import Perplexity, perplexity, score
from tx_jax.decoding.speculative import Speculation, speculate
from tx_jax.decoding.stream import stream
from tx_jax.errors import InputError
from tx_jax.fuse import fuse
from tx_jax.inspect.architecture import draw
from tx_jax.lora import init_lora, merge_lora
from tx_jax.models import DecoderLM, Encoder, EncoderDecoder, build, count_params, init_params
from tx_jax.ops.attention import attention
from tx_jax.ops.int8 import Int8, quantize
from tx_jax.ops.masks import Mask
from tx_jax.parallel import jit_step, make_mesh, pmap_step
from tx_jax.run_config import DataConfig, LoraConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from tx_jax.sentences import encode_text
from tx_jax.stacked import stack_layers, unstack_layers
from tx_jax.training.losses import chunked_cross_entropy, cross_entropy
from tx_jax.training.optim import make_optimizer, make_schedule
from tx_jax.training.step import Metrics, TrainState, init_state, make_eval_step, make_train_step
from tx_jax.translate import Translation, translate

__all__ = [
    "Automaton",
    "Batch",
    "Beams",
    "Cache",
    "Complexity",
    "DataConfig",
    "DecoderLM",
    "Encoder",
    "EncoderDecoder",
    "Generation",
    "InputError",
    "Int8",
    "LayerCache",
    "LoraConfig",
    "Mask",
    "MeshConfig",
    "Metrics",
    "ModelConfig",
    "OptimConfig",
    "PairBatch",
    "Perplexity",
    "Pretrained",
    "Prompt",
    "RotaryConfig",
    "RunConfig",
    "Sampler",
    "Speculation",
    "TrainConfig",
    "TrainState",
    "Translation",
    "Written",
    "attention",
    "beam_search",
    "build",
    "chunked_cross_entropy",
    "complexity",
    "count_params",
    "cross_entropy",
    "decode",
    "draw",
    "encode_text",
    "fuse",
    "generate",
    "init_cache",
    "init_lora",
    "init_params",
    "init_state",
    "inspect",
    "jit_step",
    "load_pretrained",
    "load_tokenizer",
    "make_eval_step",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "match_json",
    "match_regex",
    "merge_lora",
    "pad_prompts",
    "perplexity",
    "pmap_step",
    "prefill",
    "prepare",
    "presets",
    "quantize",
    "resize_cache",
    "sample",
    "save_pretrained",
    "score",
    "speculate",
    "stack_layers",
    "stop_at",
    "stream",
    "token_bytes",
    "translate",
    "unstack_layers",
    "write_all",
]
