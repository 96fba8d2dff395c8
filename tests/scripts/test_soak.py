"""Half an hour of training, evaluating, sampling and saving takes no more memory, and no more open files.

At a preset's own intervals: each save leaves some 30 KiB in tensorstore for each 20 arrays (benchmarks/RESULTS.md).
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from trials import FULL

from tx_jax.checkpoint import saved_steps

ROOT = Path(__file__).parents[2]
SECONDS, WARM = (1800, 300) if FULL else (4, 1)
ENDLESS = ["--train.n-steps", "10000000"]
OFTEN = "--train.log-every 20 --train.eval-every 20 --train.sample-every 20 --train.save-every 20"


def usage(pid):
    """Resident KiB, and open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    return resident, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_soak(tiny, tmp_path):
    run = ["gpt-shakespeare"] if FULL else [*tiny, *OFTEN.split()]
    command = [sys.executable, ROOT / "train.py", *run, *ENDLESS, "--run-dir", tmp_path / "run"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    while len(saved_steps(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(WARM)
    found, end = [], time.monotonic() + SECONDS
    while time.monotonic() < end:
        found.append(usage(process.pid))
        time.sleep(0.05 if not FULL else 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    tenth = len(found) // 10
    before, after = (statistics.median(memory for memory, _ in part) for part in (found[:tenth], found[-tenth:]))
    files, more = (min(n for _, n in part) for part in (found[: 3 * tenth], found[-3 * tenth :]))  # between two saves
    steps, found = saved_steps(tmp_path / "run")[-1], f"from {before / 1024:.0f} MiB to {after / 1024:.0f}"
    print(f"{steps} steps in {SECONDS} s: {found}, from {files} files to {more}")
    assert after <= before * (1.05 if FULL else 1.2)
    assert more <= files
