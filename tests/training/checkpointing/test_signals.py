import os
import signal
import threading

import pytest

from zsnr_diffusers.training.checkpointing import signals as stopping
from zsnr_diffusers.training.checkpointing.signals import StopSignals, ignore_stop_signals

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def _own_handlers():
    """What the caller had set, and must find again."""
    before = {number: signal.signal(number, lambda *_: None) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_the_first_is_noted(number, capfd):
    with StopSignals() as signals:
        assert not signals.received
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_one_process_speaks(capfd):
    with StopSignals(verbose=False) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received
    assert capfd.readouterr().err == ""


def test_handlers_are_put_back():
    before = handlers()
    with StopSignals():
        assert not set(handlers()) & set(before)
    assert handlers() == before


def test_an_echo_is_not_a_second_wish():
    with StopSignals() as signals:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.received == signal.SIGTERM


def test_the_second_ends_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "_ECHO_SECONDS", -1)
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_second_ends_a_process_as_if_nobody_listened(monkeypatch):
    sent, now = [], iter([10.0, 11.0, 11.1])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(now))
    with StopSignals() as signals:
        signals._handle_signal(signal.SIGTERM, None)
        monkeypatch.setattr(os, "kill", lambda *what: sent.append((*what, signal.getsignal(signal.SIGTERM))))
        signals._handle_signal(signal.SIGTERM, None)  # a second later it may still be an echo
        assert sent == []
        signals._handle_signal(signal.SIGTERM, None)
    assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


def test_other_threads_do_not_listen():
    before, seen = handlers(), []

    def listen():
        with StopSignals() as signals:
            seen.append((handlers(), signals.received))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_workers_do_not_hear():
    ignore_stop_signals(3)
    assert handlers() == [signal.SIG_IGN, signal.SIG_IGN]
