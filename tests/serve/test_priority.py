"""Who runs first: what is asked of the system, and that nothing but the order depends on its answer."""

import os
import platform
import subprocess
import sys

import pytest

from fettle.serve import priority

LINUX = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


def in_another_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(not LINUX, reason="asked of Linux only")
def test_the_front_keeps_its_niceness_and_a_worker_comes_behind_it():
    code = (
        "import os; from fettle.serve import priority as p; now = lambda: os.getpriority(os.PRIO_PROCESS, 0); "
        "start = now(); p.Promptness().refused(0.0); front = now(); p.come_second(); "
        "print(front - start, now() - start)"
    )
    niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19) - os.getpriority(os.PRIO_PROCESS, 0)
    assert in_another_process(code) == f"0 {niceness}"


@pytest.mark.skipif(not LINUX, reason="asked of Linux only")
def test_the_slice_is_taken():
    found = in_another_process("from fettle.serve import priority as p; print(p._ask_slice(100_000), p._ask_slice(0))")
    if found == "False False":
        pytest.skip("this system refuses sched_setattr")
    assert found == "True True"


def test_the_front_is_prompt_while_it_refuses_and_a_second_longer(monkeypatch):
    asked = []
    monkeypatch.setattr(priority, "_ask_slice", asked.append)
    prompt = priority.Promptness()
    prompt.look(5.0)
    assert asked == []
    prompt.refused(10.0)
    prompt.refused(10.5)
    prompt.look(11.4)
    assert asked == [100_000]
    prompt.look(11.6)
    prompt.look(20.0)
    assert asked == [100_000, 0]
    prompt.refused(30.0)
    assert asked == [100_000, 0, 100_000]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="asked of Linux only")
def test_a_process_that_gives_way_stays_so():
    """What a worker asks for itself later must not bring it back among those who count."""
    code = (
        "import os; from fettle.serve import priority as p; p.give_way(os.getpid()); p.come_second(); "
        "print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.getpriority(os.PRIO_PROCESS, 0))"
    )
    assert in_another_process(code) == "True 19"


def test_a_process_that_has_ended_is_no_error(caplog):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    priority.give_way(child.pid)
    assert "keeps its priority" in caplog.text


@pytest.mark.parametrize(("machine", "system"), [("riscv64", "Linux"), ("x86_64", "Darwin")])
def test_elsewhere_nothing_is_asked(monkeypatch, machine, system):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert priority._ask_slice(100_000) is False
