"""The figures of the README and of CONTRIBUTING that need no run: `python -m tx_jax.inspect figures`."""

import sys
from pathlib import Path

from tx_jax.inspect.architecture import README, gallery
from tx_jax.inspect.journeys import journeys

if __name__ == "__main__":
    directory = Path(*sys.argv[1:])
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in {"architectures": gallery(*README), "journeys": journeys()}.items():
        (directory / f"{name}.svg").write_text(picture, encoding="utf-8")
