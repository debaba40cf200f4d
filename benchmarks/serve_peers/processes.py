"""A server under test as a process of its own: started, asked until it answers, weighed, ended. Linux: reads /proc.

Every server is started with a mark in its environment, so whatever it spawns is found by it, also in a session of its
own (BentoML, Ray) and once its parent is gone.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve_peers.payloads import Payload

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
POLL_S = 0.01
KILLED_LIMIT_S = 10.0
MARK = "FETTLE_BENCH_SERVER"


class ServerFailed(Exception):
    """A server that ended or did not answer; the message holds the last words of its log."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started: `{port}` in the command stands for the port it is to listen on.

    ready_path: what answers 200 to GET once the server says it is ready.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/ready"


@dataclass(frozen=True, slots=True)
class Ending:
    """What SIGTERM did. code: of the first process, None where it had to be killed; left: other processes, killed."""

    code: int | None
    left: int


class Server:
    """One running server. From its start it took `ready_s` to say it is ready, and `first_s` to its first answer."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.port = free_port()
        self.ready_s = self.first_s = float("nan")
        self._ready_path = launch.ready_path
        self._log = log
        command = [part.replace("{port}", str(self.port)) for part in launch.command]
        self.mark = uuid.uuid4().hex
        self._started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.environment, MARK: self.mark},
                start_new_session=True,
            )

    def wait_ready(self, payload: Payload, *, limit_s: float) -> None:
        """Ask until it says it is ready, then until an answer is good.

        Raises ServerFailed where the process ends or the time is over.
        """
        self.ready_s = self._ask_until(limit_s, "GET", self._ready_path, b"", {})
        self.first_s = self._ask_until(limit_s, "POST", payload.path, payload.bodies[0], payload.headers)

    def settle(self, payload: Payload, *, limit_s: float) -> None:
        """Wait until a request is answered: what earlier load has left in a queue is not the next load's fault."""
        self._answers("POST", payload.path, payload.bodies[0], payload.headers, timeout_s=limit_s)

    def _ask_until(self, limit_s: float, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> float:
        """Seconds from the start to the first 200."""
        end = self._started + limit_s
        while not self._answers(method, path, body, headers, timeout_s=max(0.1, end - time.perf_counter())):
            if self._process.poll() is not None:
                raise ServerFailed(f"it ended with code {self._process.returncode}: {self._last_words()}")
            if time.perf_counter() > end:
                raise ServerFailed(f"no good answer within {limit_s:g} s: {self._last_words()}")
            time.sleep(POLL_S)
        return time.perf_counter() - self._started

    def _answers(self, method: str, path: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers))
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "its log is empty"

    def cpu_s(self) -> float:
        """Seconds of CPU time that its living processes have used."""
        return sum(cpu_s_of(pid) for pid in processes_with(self.mark))

    def memory_bytes(self) -> int:
        """Resident memory of all its processes, shared pages counted once."""
        return sum(memory_bytes_of(pid) for pid in processes_with(self.mark))

    def stop(self, *, grace_s: float = 5.0, orphan_grace_s: float = 1.0) -> Ending:
        """SIGTERM to the first process, and time for it to end, and for the others after it; then what lives is killed.

        Nothing outlives this call.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        wait_until(lambda: self._process.poll() is not None, limit_s=grace_s)
        wait_until(lambda: not processes_with(self.mark), limit_s=orphan_grace_s)
        code = self._process.poll()
        left = [pid for pid in processes_with(self.mark) if pid != self._process.pid]
        self._kill_all()
        return Ending(code=code, left=len(left))

    def _kill_all(self) -> None:
        def gone() -> bool:
            for pid in processes_with(self.mark):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return self._process.poll() is not None and not processes_with(self.mark)

        if not wait_until(gone, limit_s=KILLED_LIMIT_S):
            raise ServerFailed(f"processes survive SIGKILL: {processes_with(self.mark)}")


def wait_until(condition: Callable[[], bool], *, limit_s: float) -> bool:
    """Ask until it is true; False where the time is over first."""
    end = time.perf_counter() + limit_s
    while not condition():
        if time.perf_counter() > end:
            return False
        time.sleep(POLL_S)
    return True


def free_port() -> int:
    """A port of the loopback that nobody listens on: what an earlier server left behind cannot answer there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_with(mark: str) -> list[int]:
    """Processes that were started with this mark and are not dead; those that wait to be reaped are."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            marked = wanted in (folder / "environ").read_bytes()
        except OSError:  # gone, or somebody else's
            continue
        state = stat_of(int(folder.name))[:1]
        if marked and state and state[0] not in "ZX":
            found.append(int(folder.name))
    return found


def stat_of(pid: int) -> list[str]:
    """`/proc/PID/stat` after the command's name: state, parent, group, session, ...; [] where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def cpu_s_of(pid: int) -> float:
    """User and system time of all threads, seconds; 0 where it is gone."""
    fields = stat_of(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0


def memory_bytes_of(pid: int) -> int:
    """Proportional set size: each page divided by the processes that share it; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def busy_s(cores: set[int]) -> float:
    """Seconds that these cores have worked since boot, for anyone: `/proc/stat` without idle and iowait."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            # user nice system idle iowait irq softirq steal; guest time is contained in user time.
            total += sum(int(fields[index]) for index in (0, 1, 2, 5, 6))
    return total / TICKS_PER_S
