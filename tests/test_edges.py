"""The laws of edges.py, in a process where annotations are not checked, as users have none."""

import os
import subprocess
import sys
from pathlib import Path


def test_edges():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("edges.py")]
    done = subprocess.run(command, env=os.environ | {"ANNOTATIONS": "unchecked"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
