"""How a run is asked to stop: by Ctrl-C, or by the SIGTERM of a batch system, a cluster or a spot machine's notice."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

HEARD = b"stopping after this step, and saving; a second signal ends at once\n"
SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """Which signal asks, once one has."""

    number = 0

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that the signal has ended: 130 of Ctrl-C, 143 of SIGTERM."""
        return self.number and 128 + self.number


@contextlib.contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Tells `stop` of the first SIGINT or SIGTERM; the second does what it did before, at once.

    Outside of the main thread, where Python lets nobody handle signals, nothing is told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def heed(number: int, frame: object) -> None:
        stop.number = number
        restore()
        with contextlib.suppress(OSError):  # who reads may have gone by the same Ctrl-C, as tee does
            os.write(2, HEARD)  # at once: in a signal handler, print may meet itself
        if sys.stdout is not None and sys.stdout.isatty():
            os.write(sys.stdout.fileno(), SHOW_CURSOR)  # which a progress bar hides

    for number in before:
        signal.signal(number, heed)
    try:
        yield
    finally:
        restore()
