"""How a run is asked to stop: by Ctrl-C, SIGTERM, or the notice of a batch system, a cluster or a spot machine."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator

ENDS = (signal.SIGINT, signal.SIGTERM)
NOTICES = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))
HEARD = b"stopping after this step, and saving; a second Ctrl-C or SIGTERM ends at once\n"
SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """Which signal asks, once one has."""

    number = 0

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that the signal has ended: 130 of Ctrl-C, 143 of SIGTERM, 138 of SIGUSR1."""
        return self.number and 128 + self.number


@contextlib.contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Tells `stop` of the first signal; a second SIGINT or SIGTERM does what it did before, at once.

    Clusters announce an end by SIGUSR1, SIGUSR2 or SIGHUP, perhaps beside SIGTERM: a notice is no second signal, and a
    SIGTERM after it is the first. What is ignored, as SIGHUP under `nohup`, remains so.
    Outside of the main thread, where Python lets nobody handle signals, nothing is told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*ENDS, *NOTICES)}
    left = (signal.SIG_IGN, None)  # None: of a library in C, which cannot be put back
    before = {number: handler for number, handler in before.items() if number in ENDS or handler not in left}

    def restore(numbers: Iterable[int]) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def heed(number: int, frame: object) -> None:
        first, stop.number = not stop.number, stop.number or number
        if number in ENDS:
            restore(ENDS)
        if not first:
            return
        with contextlib.suppress(OSError):  # who reads may have gone by the same Ctrl-C, as tee does
            os.write(2, HEARD)  # at once: in a signal handler, print may meet itself
            if sys.stdout is not None and sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR)  # which a progress bar hides

    for number in before:
        signal.signal(number, heed)
    try:
        yield
    finally:
        restore(before)
