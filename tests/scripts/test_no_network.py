"""Training, sampling and exporting without a network, and files that not everyone may write."""

import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = """
import os, sys
SAFE = ("socket.__new__", "socket.gethostname", "socket.bind", "socket.listen", "socket.accept")

def alarm(event, args):
    reaches = event.split(".")[0] in ("socket", "urllib", "http", "ftplib", "smtplib") and event not in SAFE
    if reaches or event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        with open(f"{here}/alarms", "a") as file:
            file.write(f"{event}{args}\\n")
        raise SystemExit(f"{event}{args}")

train_args, run, text, here = eval(sys.argv[1])
os.umask(0)
sys.addaudithook(alarm)
import sample, train
from tx_jax.convert import __main__ as convert
from tx_jax.data import prepare
train.main(train_args)
sample.main([run, "--max-new-tokens", "4", "--input", f"{here}/prompts.jsonl", "--output", f"{here}/texts.jsonl"])
convert.main([run, f"{here}/exported"])
prepare.main([f"{here}/tokens", "--path", text])
if len(sys.argv) > 2:
    import socket
    socket.create_connection(("127.0.0.1", 9))
"""


def start(*more):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", CHILD, *more], env=env, capture_output=True, text=True, timeout=200)


def test_nothing_reaches_for_the_network_or_is_left_for_all_to_write(tiny, text, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the"}\n')
    train_args = [*tiny, "--train.n-steps", "2", "--run-dir", str(tmp_path / "run")]
    args = repr((train_args, str(tmp_path / "run"), str(text), str(tmp_path)))
    assert start(args, "and then a connection").returncode == 1
    alarm, *others = (tmp_path / "alarms").read_text().splitlines()
    assert alarm.startswith("socket.getaddrinfo('127.0.0.1', 9")
    assert others == []
    made = [path for name in ("run", "exported", "tokens") for path in (tmp_path / name).rglob("*")]
    assert len(made) > 40
    open_to_all = [path for path in [*made, *tmp_path.iterdir()] if path.lstat().st_mode & stat.S_IWOTH]
    assert open_to_all == []
