"""Sweeps through launchers: processes of this machine, and a real SLURM of one node."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from runs import TINY, Finished, completed, read_json, run
from selfcritique.artifacts import Store

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
GRID = ("-m", *TINY, "dpo.loss.lam=0.5,1", "dpo.loss.beta=0.5,1", "until=eval_dpo")

# ---- SLURM ---------------------------------------------------------------------------------------------

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmctldPort={ctld}
SlurmdPort={slurmd}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# Without accounting SLURM's own sacct is empty, and submitit would not hear of a job that was killed.
SACCT = r"""#!/bin/sh
echo 'JobID|State|NodeList'
scontrol -o show job | sed -nE 's/^JobId=([0-9]+) .*JobState=([A-Z_]+) .* NodeList=([^ ]*) .*/\1|\2|\3/p' |
    while IFS='|' read -r id state node; do
        task=$(scontrol -o show job "$id" | sed -nE 's/.*ArrayJobId=([0-9]+) ArrayTaskId=([0-9]+) .*/\1_\2/p')
        echo "${task:-$id}|$state|$node"
    done
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """slurmctld, slurmd and munged of this test's own; the environment of a user of theirs."""
    if os.geteuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        pytest.skip("no SLURM here, or not root to start one: `make slurm` installs it")
    root = tmp_path_factory.mktemp("slurm")
    for folder in (root, *root.parents[:-1]):  # munged trusts no socket below a private folder
        folder.chmod(folder.stat().st_mode | 0o055)
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    (root / "slurm.conf").write_text(CONF.format(host=host, root=root, ctld=free_port(), slurmd=free_port()))
    for name in ("state", "spool", "bin"):
        (root / name).mkdir()
    (root / "bin" / "sacct").write_text(SACCT)
    (root / "bin" / "sacct").chmod(0o755)
    names = {"key": "munge.key", "socket": "munge.socket", "pid": "munge.pid", "log": "munge.log",
             "seed": "munge.seed"}  # fmt: skip
    munge = [f"--{what}{'' if what == 'socket' else '-file'}={root / name}" for what, name in names.items()]
    environment = {"SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{root / 'bin'}:{os.environ['PATH']}"}
    with mock.patch.dict(os.environ, environment):
        daemons = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for command in (["munged", "-F", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D"])
        ]
        try:
            deadline = time.monotonic() + 120
            while "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout:
                assert time.monotonic() < deadline, (root / "slurmctld.log").read_text()[-2000:]
                time.sleep(0.5)
            yield root
        finally:
            subprocess.run(["scancel", "--user=root"], check=False)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


def check_shared_once(swept: Finished) -> None:
    """Four points: their DPO stages four times, everything else once, and no job had to wait for another."""
    assert "4 of 4 points finished" in swept.stdout
    count: dict[str, int] = {}
    for row in Store(swept.store).ls():
        assert not row["partial"]
        count[row["stage"]] = count.get(row["stage"], 0) + 1
    assert count["dpo"] == count["evaluate"] == 4
    assert count["reference_logps"] == count["tiny_base"] == count["pairs"] == count["critic_data"] == 1
    logs = swept.stderr + "".join(p.read_text() for p in swept.out.glob(".submitit/*/*.err"))
    assert "dpo: done" in logs and "waiting for it" not in logs


def test_a_sweep_through_slurm(slurm: Path, tmp_path: Path) -> None:
    swept = completed(tmp_path, *GRID, "hydra/launcher=submitit_slurm")
    check_shared_once(swept)
    log = (slurm / "slurmctld.log").read_text()
    assert (
        log.count("_slurm_rpc_submit_batch_job: JobId=") == 2
    )  # the shared job, and the points as one array


# ---- this machine --------------------------------------------------------------------------------------


def test_a_job_killed_under_submitit_is_noticed(tmp_path: Path) -> None:
    """The last job that starts is killed at its root, as by an administrator; the shared one came before."""
    words = ("-m", *TINY, "hydra/launcher=submitit_local", "seed=0,1", "until=base")
    with ThreadPoolExecutor() as pool:
        sweep = pool.submit(run, tmp_path, *words)
        while len(jobs := list(tmp_path.glob("outputs/*/*/.submitit/[0-9]*/*_log.err"))) < 3:
            assert not sweep.done(), sweep.result().stderr
            time.sleep(0.05)
        last = max(jobs, key=lambda path: path.stat().st_ctime_ns).parent.name
        for pid in (last, *Path(f"/proc/{last}/task/{last}/children").read_text().split()):
            os.kill(int(pid), signal.SIGKILL)
        swept = sweep.result()
    assert "1 of 2 points did not finish" in swept.message
    errors = [bool(p["error"]) for p in read_json(swept.out / "sweep.json")["points"]]
    assert sorted(errors) == [False, True]
    finished = [p.parent.name for p in swept.out.glob("*/summary.json")]
    assert finished == [str(errors.index(False))]


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_a_sweep_through_joblib_and_ray(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip(launcher)
    swept = completed(tmp_path, *GRID, f"hydra/launcher={launcher}")
    check_shared_once(swept)
