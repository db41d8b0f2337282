"""Signals that wait, and who takes them afterwards."""

import os
import signal
import threading

import pytest

from buddy.signals import deferred, handled


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        interrupt()
        done.append("the rest")
    assert done == ["the rest"]
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_interrupt_is_not_lost_where_the_block_fails():
    with pytest.raises(KeyboardInterrupt) as raised, deferred():  # noqa: PT012
        interrupt()
        raise KeyError("of a library")
    assert isinstance(raised.value.__context__, KeyError)


def test_without_an_interrupt_nothing_happens():
    before = signal.getsignal(signal.SIGINT)
    with deferred():
        pass
    with pytest.raises(KeyError, match="wrong"), deferred():
        raise KeyError("wrong")
    assert signal.getsignal(signal.SIGINT) is before


def test_whoever_took_the_signal_before_takes_it_afterwards():
    taken = []
    with handled(signal.SIGINT, lambda number, frame: taken.append(number)):
        with deferred():
            interrupt()
            assert taken == []
        assert taken == [signal.SIGINT]
        with handled(signal.SIGINT, signal.SIG_IGN), deferred():
            interrupt()
    assert taken == [signal.SIGINT]


def test_in_another_thread_nothing_changes():
    found = []

    def look() -> None:
        before = signal.getsignal(signal.SIGINT)
        with deferred():
            found.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True]


def test_a_handler_outside_python_stays(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with handled(signal.SIGINT, signal.SIG_IGN), deferred():
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) is before
