"""Waiting for futures: the same answers as without a limit, and Ctrl-C seen at once (test_bundle.py has that too, with real processes)."""

import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tuner.waiting import answer, as_they_end


def test_answers_and_errors_are_those_of_the_future():
    with ThreadPoolExecutor(2) as pool:
        assert answer(pool.submit(lambda: time.sleep(0.5) or 3)) == 3
        with pytest.raises(ZeroDivisionError):
            answer(pool.submit(lambda: 1 // 0))
        slow, quick = pool.submit(time.sleep, 0.5), pool.submit(int, "7")
        assert [future is quick for future in as_they_end([slow, quick])] == [True, False]
    assert list(as_they_end([])) == []


@pytest.mark.parametrize("wait", [answer, lambda future: list(as_they_end([future]))])
def test_an_interrupt_is_seen_where_system_calls_are_restarted(wait, request):
    signal.siginterrupt(signal.SIGINT, False)
    request.addfinalizer(lambda: signal.siginterrupt(signal.SIGINT, True))
    main, start = threading.main_thread().ident, time.monotonic()
    never: Future[int] = Future()
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    end = threading.Timer(20.0, never.cancel)
    end.start()
    request.addfinalizer(end.cancel)
    with pytest.raises(KeyboardInterrupt):
        wait(never)
    assert time.monotonic() - start < 10
