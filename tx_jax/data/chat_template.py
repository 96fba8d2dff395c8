"""A chat template rendered by a program of its own: a request in JSON on standard input, a reply on standard output.

A template comes from the internet. Jinja's sandbox keeps it from the machine; a process of its own, with bounds on time
and memory, keeps it from the process that asked. It is run by its path, and imports nothing of this package.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def reply(request: Mapping[str, Any]) -> dict[str, object]:
    """{"text": …, "neutral": …}, or {"error": why there is no text}.

    `marks` stand for the names of special tokens in the template's own text, and for nothing that a message says.
    `neutral` is the text of the same chat with other words, or None where the template fails on them.
    """
    try:
        environment = _environment()
        tree = environment.parse(request["template"])
        _mark(tree, request["marks"])
        template = environment.from_string(tree)
        text = _written(template, request["given"], request["max_output"])
    except MemoryError:
        return {"error": f"it takes more than {request['max_memory'] >> 20} MiB"}
    except Exception as error:  # an expression of a template can raise anything
        return {"error": next(iter(f"{error!s:.120}".splitlines()), "") or type(error).__name__}
    neutral = None
    if any(name in text for name in request["marks"]):
        with contextlib.suppress(Exception):
            neutral = _written(template, request["neutral"], request["max_output"])
    return {"text": text, "neutral": neutral}


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as the templates of public models expect it. Source: transformers, utils/chat_template_utils.py."""
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


class _Generation(Extension):
    """`{% generation %}`, which marks an answer for training, changes no text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _written(template: jinja2.Template, given: Mapping[str, object], max_output: int) -> str:
    parts, length = [], 0
    for part in template.generate(given):
        length += len(part)
        if length > max_output:
            raise jinja2.TemplateError(f"it writes more than {max_output} characters")
        parts.append(part)
    return "".join(parts)


def _mark(tree: nodes.Template, marks: Mapping[str, str]) -> None:
    """Put marks for names in the text of the template and in the strings of its expressions, not in its code."""
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        key = "data" if isinstance(node, nodes.TemplateData) else "value"
        text = getattr(node, key)
        here = [name for name in marks if name in text] if isinstance(text, str) else ()
        if here:
            setattr(node, key, "".join(marks.get(piece, piece) for piece in _cut(text, here)))


def _cut(text: str, tokens: Iterable[str]) -> list[str]:
    found = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.split(f"({found})", text) if found else [text]


def _bound(max_seconds: int, max_memory: int) -> None:
    try:
        import resource
    except ImportError:  # on Windows, where the time that the caller waits is the only bound
        return
    seconds = round(time.process_time()) + max_seconds
    limits = {resource.RLIMIT_AS: max_memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS has no bound on memory
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    print(flush=True)  # ready: the caller's clock starts
    asked = json.loads(sys.stdin.buffer.read())
    _bound(asked["max_seconds"], asked["max_memory"])
    print(json.dumps(reply(asked)))
