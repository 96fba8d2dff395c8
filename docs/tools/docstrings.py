"""How the site reads docstrings: a field's comment is its docstring, an example is code, and `a, b: …` is of each."""

import itertools
import re
from typing import Any

from griffe import Docstring, Extension, Visitor

SHARED = re.compile(r"^    (\w+(?:, \w+)+):(.*(?:\n {5,}.*)*)", re.MULTILINE)  # several arguments in one line
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


class Docstrings(Extension):
    """For mkdocstrings, before it renders them."""

    def on_instance(self, *, obj: Any, agent: Any, **_: Any) -> None:
        if obj.docstring is None and obj.is_attribute and obj.parent.is_class and isinstance(agent, Visitor):
            if said := comment(agent.code.splitlines(), obj.lineno, obj.endlineno):
                obj.docstring = Docstring(said, lineno=obj.lineno, parent=obj)
        elif obj.docstring:
            text = EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
            obj.docstring.value = SHARED.sub(of_each, text)


def of_each(found: re.Match[str]) -> str:
    """What is said of several arguments, once for each."""
    return "\n".join(f"    {name}:{found[2]}" for name in found[1].split(", "))


def comment(lines: list[str], first: int, last: int) -> str:
    """What is said beside the lines from first to last, counted from 1, or else in whole lines above them."""
    beside = [line.partition("  # ")[2] for line in lines[first - 1 : last] if "  # " in line]
    above = itertools.takewhile(lambda line: line.lstrip().startswith("# "), reversed(lines[: first - 1]))
    return " ".join(beside or [line.strip()[2:] for line in above][::-1])
