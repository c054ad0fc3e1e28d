"""Launches in order, by a thread that nothing keeps from going on."""

import itertools
import subprocess
import sys
import threading

import pytest

from qserve_jax.runtime.launches import Launcher


@pytest.mark.parametrize("in_thread", [False, True])
def test_launches_are_in_order(in_thread):
    launcher, order = Launcher(in_thread), []
    launched = [launcher.launch(lambda i=i: order.append(i) or i) for i in range(5)]
    assert [x.result() for x in launched] == order == list(range(5))


def test_a_launch_does_not_wait_for_what_it_launches():
    launcher, go_on = Launcher(in_thread=True), threading.Event()
    waits = launcher.launch(lambda: go_on.wait(30))
    behind = launcher.launch(threading.get_ident)
    go_on.set()
    assert waits.result() and behind.result() != threading.get_ident()


def test_an_error_is_for_whoever_asks():
    launcher = Launcher(in_thread=True)
    fails = launcher.launch(lambda: 1 // 0)
    assert launcher.launch(lambda: 7).result() == 7
    assert isinstance(fails.exception(), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        fails.result()
    with pytest.raises(ZeroDivisionError):
        Launcher(in_thread=False).launch(lambda: 1 // 0)


def test_what_has_not_begun_can_be_cancelled():
    launcher, go_on, ran = Launcher(in_thread=True), threading.Event(), []
    launcher.launch(lambda: go_on.wait(30))
    launcher.launch(lambda: ran.append(1)).cancel()
    go_on.set()
    launcher.launch(lambda: None).result()
    assert not ran


def test_the_thread_ends_with_its_launcher():
    launcher = Launcher(in_thread=True)
    thread = launcher.launch(threading.current_thread).result()
    assert thread.is_alive()
    del launcher
    thread.join(30)
    assert not thread.is_alive()


def test_a_ctrl_c_at_any_instruction_keeps_nobody_from_going_on():
    launcher = Launcher(in_thread=True)
    sys._getframe().f_trace_opcodes = True  # or Python 3.12 begins with the second run
    for at in itertools.count():
        left = iter(range(at, -1, -1))

        def interrupt(frame, event, _, left=left):
            frame.f_trace_opcodes = True
            if event == "opcode" and next(left, 1) == 0:
                raise KeyboardInterrupt
            return interrupt

        before, interrupted = sys.gettrace(), True
        sys.settrace(interrupt)
        try:
            launcher.launch(lambda: 1).result()
            interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        then = launcher.launch(lambda at=at: at)
        assert then._pending.acquire(timeout=10), f"stuck after instruction {at}"
        assert then._brought == [at]
        if not interrupted:
            break
    assert at > 40


def test_the_end_of_a_process_waits_for_what_runs_and_drops_the_rest():
    code = (
        "import time; from qserve_jax.runtime.launches import Launcher\n"
        "launcher = Launcher(in_thread=True)\n"
        "launcher.launch(lambda: (time.sleep(1), print('done')))\n"
        "launcher.launch(lambda: print('never'))\n"
        "time.sleep(0.2)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
