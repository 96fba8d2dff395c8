"""Chats: the text that a template makes of messages, and its ids, in which no message can forge a special token.

A template comes with a model from the internet: it runs in Jinja's sandbox, which it cannot leave, with bounds on its
loops and its output. Memory is not bounded: one that pads or replaces text on purpose can still take much of it.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import Int32

from tx_jax.data.libraries import package, row, split_at
from tx_jax.data.subwords import Subwords
from tx_jax.errors import InputError, require

Messages = Sequence[Mapping[str, object]]  # of texts; others are refused
MAX_TEMPLATE, MAX_OUTPUT = 100_000, 1_000_000  # characters; templates in use have up to 20,000
MAX_ROUNDS = 100_000  # of all loops together, as many as the sandbox allows one range
REMEDY = "use the template of the model's publisher"


def render_chat(
    template: str,
    messages: Messages,
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """The text that the template, in Jinja, makes of the messages.

    Args:
        template: as in `chat_template` of a tokenizer_config.json.
        messages: {"role": "system", "user" or "assistant", "content": text} each.
        bos_token: the text of the token that begins a text, for the template's use.
        eos_token: the text of the token that ends one, for the template's use.
        add_generation_prompt: end with what comes before an answer.

    >>> render_chat("{{ messages[0].role }}: {{ messages[0].content }}", [{"role": "user", "content": "hi"}])
    'user: hi'

    Raises:
        InputError: the messages are no such list, or the template fails, or leaves its sandbox or its bounds.
    """
    jinja2 = package("jinja2", "hf")
    given = {"messages": _checked(messages), "tools": None, "documents": None}
    size = len(template)
    require(size <= MAX_TEMPLATE, f"the chat template has {size} characters, at most {MAX_TEMPLATE} are run; {REMEDY}")
    given |= {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}
    environment, parts, length = _environment(), [], 0
    try:
        for part in environment.from_string(template).generate(given):
            length += len(part)
            require(length <= MAX_OUTPUT, f"it writes more than {MAX_OUTPUT} characters")
            parts.append(part)
    except (jinja2.TemplateError, *_FAULTS) as error:
        reason = f"{error!s:.120}".split("\n")[0] or type(error).__name__
        raise InputError(f"the chat template fails ({reason}); {REMEDY}") from error
    return "".join(parts)


# what an expression of a template can raise, as in any Python
_FAULTS = ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, SyntaxError


def _checked(messages: Messages) -> list[dict[str, str]]:
    remedy = 'give [{"role": "user", "content": "text"}]'
    require(isinstance(messages, Sequence) and messages, f"messages={messages!r:.40} must be one or more; {remedy}")
    for i, message in enumerate(messages):
        ok = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        ok = ok and all(isinstance(value, str) for value in message.values())
        require(ok, f"messages[{i}]={message!r:.60} must have texts as role and content; {remedy}")
    return [{key: str(value) for key, value in message.items()} for message in messages]


def _environment() -> Any:
    """Jinja as the templates of public models expect it. Source: transformers, utils/chat_template_utils.py.

    The bounds stop loops without end and huge products.
    """
    jinja2 = package("jinja2", "hf")
    rounds = iter(range(MAX_ROUNDS))

    def bounded(values: Iterable[object]) -> Iterator[object]:
        for value in values:
            if next(rounds, None) is None:
                raise jinja2.TemplateError(f"its loops take more than {MAX_ROUNDS} rounds")
            yield value

    class Generation(package("jinja2.ext", "hf").Extension):
        """`{% generation %}`, which marks an answer for training, changes no text."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Bounded(package("jinja2.sandbox", "hf").ImmutableSandboxedEnvironment):
        """The sandbox, in which every loop counts its rounds and a product is small."""

        intercepted_binops = frozenset({"*", "**"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(jinja2.nodes.For):
                count = jinja2.nodes.EnvironmentAttribute("bounded")
                loop.iter = jinja2.nodes.Call(count, [loop.iter], [], None, None, lineno=loop.lineno)
            return tree.set_environment(self)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if isinstance(value, str | list | tuple) else abs(value) for value in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > MAX_OUTPUT:
                raise jinja2.TemplateError(f"{operator} of {left!r:.20} and {right!r:.20} is too much")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.extend(bounded=bounded)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: f"{datetime.now():{form}}"}
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def encode_chat(
    tokenizer: Subwords, messages: Messages, *, add_generation_prompt: bool = True
) -> Int32[np.ndarray, " T"]:
    """The ids of the chat: special tokens of the template are ids, and what looks like one in a message is text.

    Where no message looks so, these are the ids of transformers' `apply_chat_template`.

    Raises:
        InputError: the tokenizer has no chat template, or see `render_chat`.
    """
    template, names = tokenizer.chat_template, tokenizer.special_tokens
    require(template is not None, "chat_template=None, a chat needs one; use a tokenizer of a model made for chats")
    texts = _checked(messages)
    given = "".join(value for message in texts for value in message.values())
    forged = dict.fromkeys(split_at(given, names)[1::2])
    free = (chr(i) for i in range(0xF0000, 0x10FFFE) if chr(i) not in given and chr(i) not in str(template))
    marks = dict(zip(forged, free, strict=False))  # a private-use character for each
    require(len(marks) == len(forged), "the messages hold every private-use character; leave some out")
    text = render_chat(
        str(template),
        [{key: _replaced(value, marks) for key, value in message.items()} for message in texts],
        bos_token="" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
        eos_token=tokenizer.token(tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
        add_generation_prompt=add_generation_prompt,
    )
    if not marks:
        return tokenizer.encode(text, special=True)
    back = {ord(mark): name for name, mark in marks.items()}
    pieces = [piece for piece in split_at(text, names) if piece]
    ids = [[names[piece]] if piece in names else tokenizer.encode(piece.translate(back)) for piece in pieces]
    return row(itertools.chain(*ids))


def _replaced(text: str, marks: Mapping[str, str]) -> str:
    return "".join(marks.get(piece, piece) for piece in split_at(text, marks))
