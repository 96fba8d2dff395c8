"""The figures of the README that need no run: `python -m tx_jax.inspect figures`."""

import sys
from pathlib import Path

from tx_jax.inspect.architecture import README, gallery

if __name__ == "__main__":
    path = Path(*sys.argv[1:], "architectures.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gallery(*README), encoding="utf-8")
