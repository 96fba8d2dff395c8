"""The first signal is told, a notice never ends a run at once, and a second Ctrl-C or SIGTERM does."""

import os
import signal
import threading

import pytest

from tx_jax.training.stopping import ENDS, HEARD, NOTICES, Stop, stopping


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [*ENDS, *NOTICES])
def test_the_first_is_told_and_notices_after_it_change_nothing(capfd, number):
    stop = Stop()
    with stopping(stop):
        send(number, *NOTICES, *NOTICES)
    assert (stop.number, stop.exit_code) == (number, 128 + number)
    assert capfd.readouterr().err == HEARD.decode()


@pytest.mark.parametrize("number", NOTICES)
def test_a_sigterm_after_a_notice_is_the_first_and_what_follows_the_second(number):
    stop = Stop()
    with stopping(stop):
        send(number, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert stop.number == number


def test_under_nohup_a_hangup_stays_ignored():
    stop, before = Stop(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(stop):
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.number == 0


def test_all_is_as_before_afterwards_and_other_threads_are_let_be():
    before = [signal.getsignal(number) for number in (*ENDS, *NOTICES)]
    with stopping(Stop()):
        assert before != [signal.getsignal(number) for number in (*ENDS, *NOTICES)]
    assert before == [signal.getsignal(number) for number in (*ENDS, *NOTICES)]

    stop, untouched = Stop(), []

    def run():
        with stopping(stop):
            untouched.append([signal.getsignal(number) for number in (*ENDS, *NOTICES)] == before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert untouched == [True]
