"""What sample.py is asked for: its flags, and which of them go together."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import require

OTHERS = {
    "decoder": "give it a --prompt TEXT",
    "encoder_decoder": "give it a --source TEXT",
    "encoder": "it writes nothing; tx.encode_text is what it is for",
}
OF_SOURCES = ("n_beams", "n_best", "length_penalty", "truncate", "show_attention")  # flags
OF_OTHERS = ("prompt", "interactive", "stream", "num_samples", "perplexity", "source")  # not for --input
OF_AUTOMATA = ("stop", "regex", "json_schema")


@dataclasses.dataclass(frozen=True)
class Args:
    """Write text with a model."""

    # a run directory of train.py, a Hugging Face directory, a GGUF file, smollm2, or hf://ORG/NAME
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    prompt: str | None = None  # text; @FILE reads a file, - reads standard input; None: the run's sample_prompt
    input: str | None = None  # a file of prompts, one a line: {"prompt": …, "max_new_tokens": …, what is to be kept: …}
    output: str | None = None  # the file for their texts, in their order; the same command again goes on with it
    batch_size: int = 16  # texts of --input that are written at a time
    source: str | None = None  # of an encoder-decoder: a line to translate; @FILE, or - for a stream of lines
    n_beams: int = 4  # of the search for a translation; --temperature 0 is greedy, more than 0 draws instead
    n_best: int = 1  # translations of a line; with their scores, if several
    length_penalty: float = 0.6  # α of GNMT: scores are divided by ((5 + length) / 6)^α
    truncate: bool = False  # cut sources that are longer than the model's positions; otherwise they are refused
    show_attention: str | None = None  # draw what the first translation attends to in its source, to this .png or .svg
    perplexity: str | None = None  # how likely the model finds a text: @FILE, - or the text itself
    raw: bool = False  # go on from the prompt; otherwise a public model with a chat template answers it
    system: str | None = None  # what a chat begins with
    interactive: bool = False  # a conversation: a message a line
    max_new_tokens: int | None = None  # None: 500, or what the context leaves
    # 0: always the likeliest token; None: 0.8, but 0 for one answer with no other rule
    temperature: float | None = None
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach p
    min_p: float | None = None  # keep tokens at least p times as likely as the likeliest
    typical_p: float | None = None  # keep the tokens of the most expected surprise that together reach p
    epsilon_cutoff: float | None = None  # keep tokens of at least this probability
    eta_cutoff: float | None = None  # the same, but less where the model is unsure
    repetition_penalty: float | None = None  # above 1: tokens of the text and its prompt become less likely
    presence_penalty: float | None = None  # is taken from the logits of tokens that were written
    frequency_penalty: float | None = None  # the same for each time
    no_repeat_ngram: int | None = None  # the text holds the same n tokens in a row once
    min_new_tokens: int | None = None  # before which no text ends
    stop: tuple[str, ...] = ()  # texts at which to stop; they are not shown
    regex: str | None = None  # whole texts that match it
    json_schema: str | None = None  # whole texts that are JSON of this schema: a file, or JSON as it stands
    seed: int = 0
    num_samples: int = 1
    stream: bool = False  # print each token as it comes; a chat does
    int8: bool = False  # read the weights in 8 bits: faster, in a quarter of the memory, and a little less exact
    step: int | Literal["best"] | None = None  # of a run's checkpoint; best: by validation loss; None: the newest

    def __post_init__(self) -> None:
        n, heat, new = self.num_samples, self.temperature, self.max_new_tokens
        require(n >= 1, f"num_samples={n} must be at least 1; leave it out for one")
        for flag in OF_SOURCES if self.source is None else ():
            given = getattr(self, flag) != getattr(type(self), flag)
            require(not given, f"--{flag.replace('_', '-')} is for a --source; give one, or leave it out")
        for flag in OF_OTHERS if self.input is not None else ():
            given = getattr(self, flag) != getattr(type(self), flag)
            require(not given, f"--{flag.replace('_', '-')} is not for --input; leave one out")
        rule = "--input and --output go together; give both, or leave both out"
        require((self.input is None) == (self.output is None), rule)
        sized = self.input is None and self.batch_size != 16
        require(not sized, "--batch-size is for --input; give one, or leave it out")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        rules = [f"--{name.replace('_', '-')}" for name in OF_AUTOMATA if getattr(self, name) not in (None, ())]
        require(len(rules) < 2, f"{' and '.join(rules)} cannot both say where a text ends; leave one out")
        require(self.regex != "", "regex='' matches no text; give a pattern, or leave it out")
        streams = "--interactive" * self.interactive or "--stream" * self.stream
        require(n == 1 or not streams, f"num_samples={n} cannot be streamed; leave out {streams}, or ask for one")
        rule = f"n_beams={self.n_beams} must be at least 1, which is greedy, and n_best={self.n_best} at least 1"
        require(self.n_beams >= 1 and self.n_best >= 1, rule)
        require(heat is None or heat >= 0, f"temperature={heat} must be 0, which is greedy, or more")
        require(new is None or new >= 1, f"max_new_tokens={new} must be at least 1")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be from 0 to 2³² − 1")
        require(
            not (self.interactive and self.prompt), "--interactive reads what you type, not --prompt; leave one out"
        )


def rules_of(args: Args) -> dict[str, Any]:
    """Those of a Sampler, by name."""
    return {name: getattr(args, name) for name in Sampler._fields if hasattr(args, name)}
