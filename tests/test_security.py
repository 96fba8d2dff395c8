"""Nothing that is read is ever run: over the text of all code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for pattern in ("*.py", "tx_jax/**/*.py", "benchmarks/**/*.py") for path in ROOT.glob(pattern))
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "codeop", "runpy", "pty"}
NETWORK = {"ftplib", "http", "httpx", "requests", "smtplib", "socketserver", "ssl", "urllib", "urllib3", "xmlrpc"}
ONLY_THERE = {  # why a file imports what others may not
    "subprocess": {
        "tx_jax/data/wheels.py": "pip fetches a model or a text that was asked for by name",
        "tx_jax/data/chat.py": "a template is rendered in a process with bounds",
        "benchmarks/products.py": "both sides of a comparison",
        "benchmarks/smollm2.py": "starts sample.py",
        "benchmarks/peers.py": "starts llama.cpp",
    },
    "socket": {"tx_jax/run_dir.py": "the name of the host in a lock"},
    "ctypes": {"tx_jax/memory.py": "mallopt of glibc", "benchmarks/llama_worker.py": "llama.cpp"},
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}  # builtins
METHODS = {"os": ("system", "popen", "exec", "spawn", "posix_spawn"), "torch": ("load",), "yaml": ("load", "unsafe")}


def faults(text, name):
    """What a file has that could run what it reads, or reach the network."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [part.name for part in node.names]
            for module in {module.split(".")[0] for module in modules}:
                allowed = name in ONLY_THERE[module] if module in ONLY_THERE else module not in NEVER | NETWORK
                if not allowed:
                    yield f"imports {module}"
        elif isinstance(node, ast.Call):
            keywords = {part.arg: ast.unparse(part.value) for part in node.keywords}
            called = ast.unparse(node.func)
            first, _, method = called.rpartition(".")
            if called in CALLS or method.startswith(METHODS.get(first, ("\0",))):
                yield f"calls {called}"
            for flag in ("shell", "allow_pickle", "trust_remote_code"):
                if keywords.get(flag, "False") != "False":
                    yield f"{called}({flag}={keywords[flag]})"
            if called in ("np.load", "numpy.load", "jnp.load") and keywords.get("allow_pickle") != "False":
                yield f"{called} without allow_pickle=False"
            if first == "subprocess" and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
                yield f"{called} of a line for a shell"


def test_nothing_runs_what_it_reads():
    assert len(FILES) > 100
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    assert {name: told for name, text in found.items() if (told := list(faults(text, name)))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import urllib.request", "from http import client",
        "import socket", "import subprocess", "eval(x)", "exec(x)", "compile(x, '', 'eval')", "__import__(x)",
        "os.system(x)", "os.popen(x)", "os.execv(x, y)", "os.spawnl(x)", "torch.load(x)", "yaml.load(x)",
        "yaml.unsafe_load(x)",
        "np.load(x)", "np.load(x, allow_pickle=True)", "f(x, trust_remote_code=True)", "subprocess.run(x, shell=True)",
        "subprocess.run('ls')", "subprocess.run(f'ls {x}')", "f(**{}, shell=y)",
    ],
)  # fmt: skip
def test_each_of_these_is_found(line):
    assert list(faults(line, "tx_jax/models.py"))


def test_the_table_is_not_longer_than_it_must_be():
    for module, reasons in ONLY_THERE.items():
        for path in reasons:
            assert f"import {module}" in (ROOT / path).read_text(encoding="utf-8")
