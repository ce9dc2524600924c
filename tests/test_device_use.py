"""One thread has the GPU alone only while no other thread uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ollama_forge.serving.engine.device_use import DeviceUse

SOON, LONG = 0.05, 20.0


def alone(use: DeviceUse, timeout: float = LONG, then: Callable[[], object] = bool) -> bool:
    with use.alone(timeout) as found:
        then()
        return found


def test_many_share_and_one_waits_for_them() -> None:
    use = DeviceUse()
    with ThreadPoolExecutor(3) as pool:
        release, begun = threading.Event(), threading.Barrier(3)

        def user() -> None:
            with use.shared(), use.shared():  # nested
                begun.wait(LONG)
                release.wait(LONG)

        users = [pool.submit(user) for _ in range(2)]
        begun.wait(LONG)
        assert alone(use, SOON) is False
        capture = pool.submit(alone, use)
        assert not capture.done()
        release.set()
        assert capture.result(LONG) is True
        assert all(done.result(LONG) is None for done in users)
    assert alone(use, 0.0) is True


def test_nobody_begins_beside_the_one_that_has_it_alone() -> None:
    use, happened = DeviceUse(), []
    with ThreadPoolExecutor(1) as pool:

        def user() -> None:
            with use.shared():
                happened.append("shared")

        with use.alone(LONG) as found:
            assert found
            later: Future[None] = pool.submit(user)
            assert not threading.Event().wait(SOON)
            happened.append("alone")
        later.result(LONG)
    assert happened == ["alone", "shared"]


def test_two_that_share_and_want_it_alone_take_turns() -> None:
    use, inside, most = DeviceUse(), 0, 0
    both = threading.Barrier(2)

    def capture() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(SOON)
        inside -= 1

    def user() -> bool:
        with use.shared():
            both.wait(LONG)
            found = alone(use, LONG, capture)
            assert use._shares
            return found

    with ThreadPoolExecutor(2) as pool:
        assert [each.result(LONG) for each in [pool.submit(user) for _ in range(2)]] == [True, True]
    assert most == 1
    assert alone(use, 0.0) is True
