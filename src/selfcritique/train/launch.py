"""A fit in several processes of this machine, started apart: a process that Lightning launches again would
run the whole command once more.

The parent writes what to fit to SCRATCH/fit.pickle, the first process answers through SCRATCH/answer.json;
both are read by nobody else.
"""

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfcritique.artifacts import write_json
from selfcritique.errors import UserError

_POLL_S = 0.2


def in_processes(
    function: str,
    arguments: tuple[Any, ...],
    processes: int,
    scratch: Path,
    progress: Callable[[int, int, Mapping[str, float] | None], None],
) -> dict[str, Any]:
    """`function` of `train.fit` in each of `processes`; returns the first one's result."""
    scratch.mkdir(parents=True, exist_ok=True)
    answer, spec, log = scratch / "answer.json", scratch / "fit.pickle", scratch / "processes.log"
    answer.unlink(missing_ok=True)
    spec.write_bytes(pickle.dumps((function, arguments, scratch)))
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", __name__, spec]
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )
        try:
            while child.poll() is None:
                time.sleep(_POLL_S)
                said = _read(answer)
                if "progress" in said:
                    progress(*said["progress"])
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
    said = _read(answer)
    if "error" in said:
        raise UserError(said["error"])
    if "result" not in said:
        raise UserError(
            f"Training in {processes} processes ended with code {child.returncode}; see {log}. Run the same "
            "command again to go on from the last saved step."
        )
    return dict(said["result"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def _die_with_parent() -> None:
    """Linux: the launcher, and by it the processes, end when the run is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def main(spec: str) -> None:
    """One of the processes."""
    from selfcritique.train import fit

    function, arguments, scratch = pickle.loads(Path(spec).read_bytes())
    first = os.environ["RANK"] == "0"

    said_at = 0.0

    def say(what: str, value: Any) -> None:
        if first:
            write_json(scratch / "answer.json", {what: value})

    def progress(*state: Any) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > 1:
            said_at = time.monotonic()
            say("progress", state)

    try:
        result = getattr(fit, function)(*arguments, progress=progress)
    except UserError as error:
        say("error", str(error))
        sys.exit(1)
    say("result", result)


if __name__ == "__main__":
    main(sys.argv[1])
