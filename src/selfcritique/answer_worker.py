"""Worker processes for answers that need algebra: started once, reused, killed at their limits.

    caller ── pipe ──► template process (imports algebra once) ── fork ──► grader (answers one line at a time)

The grader inherits the template's pipes and speaks with the caller directly: one JSON line in, one verdict
out. Before each item it sets its own limits: interval timers whose signals keep their default action, so
that the kernel ends the process at the limit even inside C code (big-integer arithmetic never returns to
Python's signal handlers), and a cap on its address space. The limit is of CPU time, so that a verdict does
not depend on what else the machine does; wall time is bounded too, more widely. When a grader dies, the
template answers in its place and forks the next one within milliseconds, so that one hostile item costs its
limit and nothing else. Both end when their standard input closes: no orphans, however the caller dies.

Plain pipes and `subprocess` rather than multiprocessing: it works from threads, event loops, daemonic
processes and data loaders, and never imports the caller's main module.
"""

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from selfcritique.errors import UserError

TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
START_S = 900.0  # for the imports, on an overloaded machine; a worker that ends is noticed at once
WALL = 10  # wall time allowed, as a multiple of the CPU time
GRACE_S = 60.0  # beyond that, before the caller gives a worker up as lost

_idle: list["_Worker"] = []
_lock = threading.Lock()


def grade(pairs: Sequence[tuple[str, str]], workers: int, limit_s: float, memory_mb: int) -> list[str]:
    """A verdict (text of `answers.Verdict`) for each (gold, predicted), in order."""
    if workers <= 1 or len(pairs) == 1:
        return [_ask(gold, predicted, limit_s, memory_mb) for gold, predicted in pairs]
    with ThreadPoolExecutor(min(workers, len(pairs))) as pool:
        return list(pool.map(lambda pair: _ask(pair[0], pair[1], limit_s, memory_mb), pairs))


def _ask(gold: str, predicted: str, limit_s: float, memory_mb: int) -> str:
    request = json.dumps([gold, predicted, limit_s, memory_mb]).encode() + b"\n"
    for _ in range(2):  # a worker lost between two items (killed from outside) is replaced once
        with _lock:
            worker = _idle.pop() if _idle else None
        worker = worker or _Worker()
        try:
            verdict = worker.ask(request, WALL * limit_s + GRACE_S)
        except BaseException:
            worker.kill()
            raise
        if verdict:
            with _lock:
                _idle.append(worker)
            return verdict
        worker.kill()
    return "unsupported"


class _Worker:
    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "selfcritique.answer_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # one group to kill; Ctrl-C is the caller's
        )
        if self._line(START_S) != "ready":
            self.kill()
            raise UserError(
                "No answer that needs algebra can be compared: the worker process ended, or was not ready "
                f"within {START_S:.0f} s. `python -m selfcritique.answer_worker` shows why, or says `ready`."
            )

    def ask(self, request: bytes, wait_s: float) -> str:
        """The verdict, or "" if the worker is lost."""
        stdin = self.process.stdin
        assert stdin is not None
        try:
            view = memoryview(request)
            while view:
                view = view[stdin.write(view) or 0 :]
        except OSError:
            return ""
        return self._line(wait_s)

    def _line(self, wait_s: float) -> str:
        stdout = self.process.stdout
        assert stdout is not None
        poll = select.poll()  # unlike select(), good for any file descriptor
        poll.register(stdout, select.POLLIN)
        deadline, received = time.monotonic() + wait_s, b""
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return ""
            chunk = os.read(stdout.fileno(), 4096)
            if not chunk:
                return ""
            received += chunk
        return received.decode().strip()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.forget()
        self.process.wait()

    def forget(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def shut_down() -> None:
    """End the idle workers; the next comparison that needs algebra starts new ones."""
    with _lock:
        workers, _idle[:] = list(_idle), []
    for worker in workers:
        worker.kill()


def _after_fork() -> None:
    """A forked child (a data loader) must not speak through its parent's pipes."""
    global _lock
    _lock = threading.Lock()
    for worker in _idle:
        worker.forget()
        worker.process.returncode = 0  # not this process's child to wait for
    _idle.clear()


atexit.register(shut_down)
os.register_at_fork(after_in_child=_after_fork)


def _template() -> None:
    """Import, warm up, then keep one grader alive until standard input closes."""
    from selfcritique import algebra

    algebra.warm_up()
    out = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.write(out, b"ready\n")
    for stream in (1, 2):  # a library that prints cannot speak in a verdict's place
        os.dup2(null, stream)
    while True:
        child = os.fork()
        if child == 0:
            _serve(out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in TIMERS.values()
        os.write(out, b"timeout\n" if late else b"unsupported\n")


def _serve(out: int) -> None:
    from selfcritique import algebra

    for late in TIMERS.values():
        signal.signal(late, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with os.fdopen(0, "rb", closefd=False) as requests:
        for line in requests:
            gold, predicted, limit_s, memory_mb = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            signal.setitimer(signal.ITIMER_REAL, WALL * limit_s)
            allowed = memory_mb << 20 if hard == resource.RLIM_INFINITY else min(memory_mb << 20, hard)
            resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
            try:
                verdict = algebra.verdict(gold, predicted)
            except MemoryError:
                os._exit(3)  # a fresh grader has its memory back
            for timer in TIMERS:
                signal.setitimer(timer, 0)
            os.write(out, verdict.encode() + b"\n")


if __name__ == "__main__":
    _template()
