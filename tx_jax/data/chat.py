"""Chats: the text that a template makes of messages, and its ids, in which no message can forge a special token.

A template comes with a model from the internet: it runs in Jinja's sandbox, in a process of its own with bounds on
time, memory and output (`chat_template.py`), so that the worst it can do is to be refused.
"""

import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int32

from tx_jax.data.libraries import package, row, split_at
from tx_jax.data.subwords import Subwords
from tx_jax.errors import InputError, require

Messages = Sequence[Mapping[str, object]]  # of texts; others are refused
MAX_TEMPLATE, MAX_OUTPUT = 100_000, 1_000_000  # characters; templates in use have up to 20,000
MAX_SECONDS, MAX_MEMORY = 1, 256 << 20  # a template in use needs 0.02 s and 40 MiB
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
    return _rendered(template, _given(_checked(messages), bos_token, eos_token, add_generation_prompt))[0]


def _checked(messages: Messages) -> list[dict[str, str]]:
    remedy = 'give [{"role": "user", "content": "text"}]'
    require(isinstance(messages, Sequence) and messages, f"messages={messages!r:.40} must be one or more; {remedy}")
    for i, message in enumerate(messages):
        ok = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        ok = ok and all(isinstance(text, str) for pair in message.items() for text in pair)
        require(ok, f"messages[{i}]={message!r:.60} must have texts as role and content; {remedy}")
    return [{key: str(value) for key, value in message.items()} for message in messages]


def _given(messages: list[dict[str, str]], bos: str, eos: str, prompt: bool) -> dict[str, object]:
    """What a template reads."""
    ends = {"bos_token": bos, "eos_token": eos}
    return {"messages": messages, "tools": None, "documents": None, **ends, "add_generation_prompt": prompt}


def _rendered(
    template: str, given: Mapping[str, Any], marks: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str | None]:
    """The text, and that of a chat of the same roles with other words; see `chat_template.reply`."""
    size = len(template)
    require(size <= MAX_TEMPLATE, f"the chat template has {size} characters, at most {MAX_TEMPLATE} are run; {REMEDY}")
    bounds = {"max_output": MAX_OUTPUT, "max_seconds": MAX_SECONDS, "max_memory": MAX_MEMORY}
    words = [{key: text if key == "role" else "x" for key, text in message.items()} for message in given["messages"]]
    request = {"template": template, "given": given, "neutral": {**given, "messages": words}, "marks": dict(marks)}
    reply = _asked({**request, **bounds})
    require("error" not in reply, f"the chat template fails ({reply.get('error')}); {REMEDY}")
    return reply["text"], reply["neutral"]


def _asked(request: Mapping[str, object]) -> Mapping[str, Any]:
    """The reply of a Python that has nothing but Jinja: quick to start, and with no secret in its environment."""
    libraries = {str(Path(package(name, "hf").__file__).parents[1]): None for name in ("jinja2", "markupsafe")}
    start = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
    script = str(Path(__file__).with_name("chat_template.py"))
    command = [sys.executable, "-I", "-S", "-c", start, script, *libraries]
    kept = {key: os.environ[key] for key in ("SYSTEMROOT", "LD_LIBRARY_PATH", "TZ") if key in os.environ}
    pipe, late = subprocess.PIPE, {"error": f"it takes more than {MAX_SECONDS} s"}
    try:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=kept)
    except OSError as error:
        raise InputError(f"sys.executable={sys.executable!r} does not start ({error.strerror}); run Python") from error
    with child:
        try:
            if child.stdout is not None:
                child.stdout.readline()  # it has begun, which takes long where disks are slow
            answer, _ = child.communicate(json.dumps(request).encode(), timeout=2 * MAX_SECONDS)
        except subprocess.TimeoutExpired:
            return late
        finally:
            child.kill()
    if child.returncode and -child.returncode == getattr(signal, "SIGXCPU", None):
        return late
    return json.loads(answer) if child.returncode == 0 else {"error": f"Python ends with status {child.returncode}"}


def encode_chat(
    tokenizer: Subwords, messages: Messages, *, add_generation_prompt: bool = True
) -> Int32[np.ndarray, " T"]:
    """The ids of the chat: special tokens of the template are ids, and what looks like one in a message is text.

    Where no message looks so, these are the ids of transformers' `apply_chat_template`.

    Raises:
        InputError: the tokenizer has no chat template, or see `render_chat`; or a message holds a special token that
            the template makes of parts.
    """
    template, names = tokenizer.chat_template, tokenizer.special_tokens
    require(template is not None, "chat_template=None, a chat needs one; use a tokenizer of a model made for chats")
    texts = _checked(messages)
    # A name in the template is marked by a character that no message has, so that none can forge it. A name that is a
    # word may be one of the template's code: it is text.
    names = {name: i for name, i in names.items() if not re.fullmatch(r"[\w-]*", name)}
    said = "".join(text for message in texts for pair in message.items() for text in pair)
    free, typed = _unused(f"{template}{said}"), dict.fromkeys(_named(said, names))
    marks, hidden = dict(zip(names, free, strict=False)), dict(zip(typed, free, strict=False))
    require(len(hidden) == len(typed), "the messages hold every private-use character; leave some out")
    texts = [
        {key: "".join(hidden.get(piece, piece) for piece in split_at(text, hidden)) for key, text in message.items()}
        for message in texts
    ]
    bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    eos = tokenizer.token(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
    given = _given(texts, marks.get(bos, bos), marks.get(eos, eos), add_generation_prompt)
    text, neutral = _rendered(str(template), given, marks)
    require(text, f"the chat template writes nothing; {REMEDY}")
    special = {mark: names[name] for name, mark in marks.items()}
    if composed := _named(neutral or "", names):  # by the template, such as by <|{{ role }}|>
        rule = f"the chat template makes {composed[0]} of parts, and more of it than of other messages"
        require(_named(text, names) == composed, f"{rule}; leave such parts out of the messages")
        special |= {name: names[name] for name in composed}
    back = str.maketrans({mark: name for name, mark in [*marks.items(), *hidden.items()]})
    pieces = [piece for piece in split_at(text, special) if piece]
    text, expected = text.translate(back), [special[piece] for piece in pieces if piece in special]
    if [names[name] for name in _named(text, names)] == expected:
        return tokenizer.encode(text, special=True)
    parts = [[special[piece]] if piece in special else tokenizer.encode(piece.translate(back)) for piece in pieces]
    return row(itertools.chain(*parts))


def _unused(text: str) -> Iterator[str]:
    """Private-use characters that the text does not hold, in an order that none can foresee."""
    start, size, held = secrets.randbelow(0xFFFE), 0xFFFE, set(text)
    private = (chr(0xF0000 + (start + i) % size) for i in range(size))
    return (letter for letter in private if letter not in held)


def _named(text: str, names: Iterable[str]) -> list[str]:
    return split_at(text, names)[1::2]
