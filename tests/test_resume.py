"""A killed run goes on where it stopped: the rerun equals an uninterrupted run and repeats no work."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from runs import PATHS, SMOKE, TINY, Finished, Watch, completed, events, run, timeless

# How many faults of each kind; the kind is a pattern of the events that `Watch` notes.
FAULTS = {
    "journal": (r"write \S+/scratch/journal\.jsonl #\d+", 7),  # torn: half a batch's line
    "checkpoint": (r"rename \S+/scratch/state\.aside #\d+", 5),  # written aside, not yet in place
    "manifest": (r"write \S+\.partial/manifest\.json\.tmp #\d+", 2),  # torn
    "trained": (r"write (?:tiny_base|sft|dpo)/\S+\.partial/manifest\.json\.tmp #\d+", 2),  # all steps done
    "finished": (r"rename \S+\.partial/manifest\.json\.tmp #\d+", 1),  # whole, not yet in place
    "publish": (r"rename \S+\.partial #\d+", 3),  # the work is done, the directory not yet renamed
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The uninterrupted run, watched."""
    folder = tmp_path_factory.mktemp("whole")
    return completed(folder, *TINY, hook=Watch(folder / "store", folder / "log"))


def fault(whole: Finished, kind: str, number: int) -> str:
    """The event to die at: the kind's events, spread evenly over the run."""
    pattern, faults = FAULTS[kind]
    found = [e for e in events(whole.folder / "log", "write", "rename") if re.fullmatch(pattern, e)]
    assert len(found) >= faults
    return found[(2 * number + 1) * len(found) // (2 * faults)]


def test_the_watched_pipeline_trains_and_samples_in_several_steps(whole: Finished) -> None:
    log = whole.folder / "log"
    steps = Counter(line.split()[1] for line in events(log, "step"))
    assert len(steps) == 4 and all(n >= 2 for n in steps.values())  # base, critic, rft, dpo
    batches = [e for e in events(log, "write") if re.fullmatch(FAULTS["journal"][0], e)]
    assert len(batches) == len(events(log, "sample"))
    assert sum(not e.endswith("#1") for e in batches) >= 8


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, i) for kind, (_, faults) in FAULTS.items() for i in range(faults)]
)
def test_killed_there_the_rerun_equals_an_uninterrupted_run(
    whole: Finished, tmp_path: Path, kind: str, number: int
) -> None:
    killed, rerun = (Watch(tmp_path / "store", tmp_path / name) for name in ("killed", "rerun"))
    at = fault(whole, kind, number)
    died = run(tmp_path / "first", *TINY, f"store={killed.store}", hook=Watch(killed.store, killed.log, at))
    assert died.code == -signal.SIGKILL and events(killed.log, "write", "rename")[-1] == at
    again = completed(tmp_path / "second", *TINY, f"store={rerun.store}", hook=rerun)
    assert timeless(again.summary) == timeless(whole.summary)
    assert_nothing_twice(whole, killed.log, rerun.log, torn=kind == "journal", unsaved=kind == "checkpoint")


def assert_nothing_twice(whole: Finished, first: Path, second: Path, torn: bool, unsaved: bool) -> None:
    """Both processes together did the uninterrupted run's work and no more, but for the one batch or step
    that was done and not yet written when the first was killed."""
    for kind, repeated in (("sample", torn), ("step", unsaved)):
        done = Counter(events(first, kind)) + Counter(events(second, kind))
        expected = Counter(events(whole.folder / "log", kind))
        assert not expected - done
        extra = list((done - expected).elements())
        assert extra == (events(first, kind)[-1:] if repeated else [])


# ---- real processes ------------------------------------------------------------------------------------


def kill_when(folder: Path, pattern: str) -> str:
    """Start the real command, SIGKILL it as soon as its progress shows `pattern`; what it said."""
    paths = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "selfcritique", *SMOKE, "trainer.checkpoint_every_s=0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "said").open("w"),
    )
    while not list(folder.glob(pattern)):
        assert process.poll() is None, (folder / "said").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return (folder / "said").read_text()


def test_three_kills_of_the_real_command(smoke: Finished, tmp_path: Path) -> None:
    """In the middle of the base's training, of the critic's, and of the first scoring."""
    states = "store/{}/*.partial/scratch/state.safetensors"
    kill_when(tmp_path, states.format("tiny_base"))
    assert not list(tmp_path.glob("store/tiny_base/*/manifest.json"))
    assert "base: done" in kill_when(tmp_path, states.format("sft"))
    third = kill_when(tmp_path, "store/score/*.partial")
    assert "base: reused" in third and "critic: done" in third

    store = tmp_path / "store"
    watch = Watch(store, tmp_path / "log", algebra=True)  # as the run it is compared with
    again = completed(tmp_path / "last", *SMOKE, f"store={store}", hook=watch)
    assert timeless(again.summary) == timeless(smoke.summary)
    cached = [name for name, was in again.summary["cached"].items() if was]
    assert cached == [name for name in again.summary["cached"]][: len(cached)]
    assert cached[-1] == "gate_responses"
    batches = [int(n) for n in re.findall(r": (\d+)/\1 \(100 %\)", again.stderr)]
    trained = {line.split()[1] for line in events(watch.log, "step")}
    written = [e for e in events(watch.log, "write") if re.fullmatch(FAULTS["journal"][0], e)]
    assert len(trained) == 3  # rft, sft, dpo
    assert len(written) == len(events(watch.log, "sample")) <= sum(batches)
