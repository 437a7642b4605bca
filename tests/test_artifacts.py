"""The artifact store under kills, races, changed inputs and full disks.

Run as a script, this file is the other process: `python test_artifacts.py kill_everywhere DIR DAMAGED`,
`python test_artifacts.py build DIR LOCK STALE_S SECONDS`.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfcritique import artifacts
from selfcritique.artifacts import LEASE, Artifact, Journal, Store, artifact_key, write_json
from selfcritique.errors import UserError

N_BATCHES = 4


# ---- a pipeline of three stages: sample (journal) -> train (checkpoints in scratch) -> evaluate -----------


def sampled(batch: int) -> list[dict[str, Any]]:
    return [{"batch": batch, "sample": s, "text": f"2 + {batch} = {2 + batch}, 三"} for s in range(3)]


def all_rows(journal: Journal) -> list[Any]:
    return [row for rows in journal.load().values() for row in rows]


def sample_stage(out: Path, started: Callable[[str], None]) -> dict[str, Any]:
    journal = Journal(out / "scratch" / "journal.jsonl")
    done = journal.load()
    for batch in range(N_BATCHES):
        if f"b{batch}" not in done:
            started(f"b{batch}")
            journal.append(f"b{batch}", sampled(batch))
    rows = all_rows(journal)
    write_json(out / "rows.json", rows)
    return {"n": len(rows)}


def train_stage(out: Path, rows: Artifact, lam: float) -> dict[str, Any]:
    for step in range(2):
        write_json(out / "scratch" / f"optimizer-{step}.json", {"step": step})
    total = sum(len(row["text"]) for row in json.loads((rows.path / "rows.json").read_text()))
    (out / "model").mkdir()
    write_json(out / "model" / "weights.json", {"w": lam * total})
    return {"loss": 0.1 + 0.2}


def pipeline(root: Path, started: Callable[[str], None] = lambda _: None, lam: float = 0.5) -> list[Artifact]:
    store = Store(root)
    key = artifact_key("sample", 1, {"n": 3}, {})
    rows = store.build("sample", 1, key, {"n": 3}, {}, lambda out: sample_stage(out, started))
    config = {"lam": lam}
    key = artifact_key("train", 1, config, {"rows": rows.key})
    model = store.build("train", 1, key, config, {"rows": rows}, lambda out: train_stage(out, rows, lam))

    def evaluate(out: Path) -> dict[str, Any]:
        weight = json.loads((model.path / "model" / "weights.json").read_text())["w"]
        write_json(out / "eval.json", {"accuracy": weight})
        return {"accuracy": weight}

    key = artifact_key("evaluate", 1, {}, {"model": model.key})
    return [rows, model, store.build("evaluate", 1, key, {}, {"model": model}, evaluate)]


def state(root: Path) -> dict[str, str]:
    """Every file of the store but locks; manifests without what may differ between two runs."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and ".locks" not in path.parts:
            text = path.read_text()
            if path.name == "manifest.json":
                manifest = json.loads(text)
                text = json.dumps({k: v for k, v in manifest.items() if k not in ("wall_s", "created")})
            found[path.relative_to(root).as_posix()] = text
    return found


# ---- keys, hits and misses ------------------------------------------------------------------------------


def test_key_depends_on_values_alone() -> None:
    key = artifact_key("dpo", 1, {"lam": 0.1 + 0.2, "beta": 1.0, "x": None}, {"model": "a", "pairs": "b"})
    assert key == artifact_key(
        "dpo", 1, {"x": None, "beta": 1.0, "lam": 0.30000000000000004}, {"pairs": "b", "model": "a"}
    )
    assert len(key) == 16 and int(key, 16) >= 0
    others = [
        artifact_key("dpo", 1, {"lam": 0.3, "beta": 1.0, "x": None}, {"model": "a", "pairs": "b"}),
        artifact_key("dpo", 2, {"lam": 0.1 + 0.2, "beta": 1.0, "x": None}, {"model": "a", "pairs": "b"}),
        artifact_key("rft", 1, {"lam": 0.1 + 0.2, "beta": 1.0, "x": None}, {"model": "a", "pairs": "b"}),
        artifact_key("dpo", 1, {"lam": 0.1 + 0.2, "beta": 1.0, "x": None}, {"model": "b", "pairs": "a"}),
    ]
    assert len({key, *others}) == 5
    with pytest.raises(TypeError):
        artifact_key("dpo", 1, {"path": Path("/somewhere")}, {})


def test_second_run_reuses_everything_and_a_setting_reruns_only_what_follows(tmp_path: Path) -> None:
    started: list[str] = []
    first = pipeline(tmp_path, started.append)
    assert [a.cached for a in first] == [False, False, False]
    assert started == ["b0", "b1", "b2", "b3"]
    assert [a.cached for a in pipeline(tmp_path, started.append)] == [True, True, True]
    assert [a.cached for a in pipeline(tmp_path, started.append, lam=1.0)] == [True, False, False]
    assert [a.cached for a in pipeline(tmp_path, started.append)] == [True, True, True]
    assert len(started) == N_BATCHES
    assert first[2].metrics == {"accuracy": 0.5 * 12 * len("2 + 0 = 2, 三")}


def test_manifest_and_files(tmp_path: Path) -> None:
    _, model, evaluated = pipeline(tmp_path)
    manifest = evaluated.manifest
    assert manifest["inputs"] == {"model": {"stage": "train", "key": model.key, "digest": model.digest}}
    assert manifest["bytes"] == (evaluated.path / "eval.json").stat().st_size
    assert "polars" in manifest["libraries"] and manifest["code"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert not (model.path / "scratch").exists()
    assert [a.key for a in Store(tmp_path).completed("train")] == [model.key]


def chain(root: Path, text: str, ran: list[str]) -> tuple[Artifact, Artifact]:
    """a -> b, where a's content is `text` whatever its key."""

    def a(out: Path) -> dict[str, Any]:
        ran.append("a")
        (out / "a.txt").write_text(text)
        return {}

    store = Store(root)
    first = store.build("a", 1, "aa", {}, {}, a)

    def b(out: Path) -> dict[str, Any]:
        ran.append("b")
        (out / "b.txt").write_text((first.path / "a.txt").read_text() * 2)
        return {}

    return first, store.build("b", 1, "bb", {}, {"a": first}, b)


def test_deleted_artifact_is_rebuilt_and_its_dependents_only_if_its_content_changed(tmp_path: Path) -> None:
    ran: list[str] = []
    first, second = chain(tmp_path, "x", ran)
    for part in first.path.iterdir():
        part.unlink()
    assert chain(tmp_path, "x", ran)[1].cached
    assert ran == ["a", "b", "a"]

    (first.path / "a.txt").unlink()  # half deleted: the manifest alone is no hit
    changed = chain(tmp_path, "y", ran)
    assert ran == ["a", "b", "a", "a", "b"]
    assert (changed[1].path / "b.txt").read_text() == "yy"
    assert Store(tmp_path).find("b", "bb", {"a": first}) is None
    assert Store(tmp_path).find("b", "bb", {"a": changed[0]}) is not None
    assert second.digest != changed[1].digest
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["bb"]


def test_digest_knows_names_bytes_and_links(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_text("w")

    def digest(name: str, files: dict[str, str], link: bool = False) -> str:
        def write(out: Path) -> dict[str, Any]:
            for path, text in files.items():
                (out / path).parent.mkdir(exist_ok=True)
                (out / path).write_text(text)
            if link:
                (out / "model").symlink_to(weights)
            return {}

        return Store(tmp_path / "store").build("s", 1, name, {}, {}, write).digest

    assert digest("1", {"p/x": "a", "y": "b"}) == digest("2", {"y": "b", "p/x": "a"})
    assert digest("3", {"x": "a"}) != digest("4", {"y": "a"})
    assert digest("5", {"x": "ab", "y": ""}) != digest("6", {"x": "a", "y": "b"})
    assert digest("7", {}, link=True) == digest("8", {"model": "w"}) != digest("9", {"model": "v"})


def test_partial_work_for_other_inputs_is_not_continued(tmp_path: Path) -> None:
    """Killed with a journal, then the input changes: its batches belong to the old input."""
    store = Store(tmp_path)

    def source(text: str) -> Artifact:
        def write(out: Path) -> dict[str, Any]:
            (out / "x").write_text(text)
            return {}

        return store.build("a", 1, text, {}, {}, write)

    def interrupted(out: Path) -> dict[str, Any]:
        Journal(out / "scratch" / "j.jsonl").append("0", ["old"])
        (out / "junk").write_text("half an output")
        raise RuntimeError("killed")

    def finish(out: Path) -> dict[str, Any]:
        return {"rows": all_rows(Journal(out / "scratch" / "j.jsonl")), "files": os.listdir(out)}

    for name, then, rows in (("k1", "old", ["old"]), ("k2", "new", [])):
        with pytest.raises(RuntimeError):
            store.build("b", 1, name, {}, {"a": source("old")}, interrupted)
        made = store.build("b", 1, name, {}, {"a": source(then)}, finish)
        assert made.metrics == {"rows": rows, "files": ["scratch"]}


# ---- kills ----------------------------------------------------------------------------------------------


class KillAt:
    """SIGKILL at the nth open for writing, write, rename, removal or new directory; a write is torn."""

    def __init__(self, n: int, root: Path) -> None:
        self.left, self.root, self.write = n, str(root), os.write
        os.write = self.torn_write
        sys.addaudithook(self.hook)

    def count(self) -> bool:
        self.left -= 1
        return self.left == 0

    def torn_write(self, descriptor: int, data: bytes) -> int:
        if self.count():
            self.write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return self.write(descriptor, data)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts = arguments[2] & (os.O_WRONLY | os.O_RDWR) and self.root in str(arguments[0])
        else:
            counts = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if counts and self.count():
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of work done in a forked process, as waitpid gives it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def recorded(root: Path) -> set[str]:
    """Batches that stand whole in the journal, read without the code under test; all once it is done."""
    journals = [*root.glob("sample/*.partial/scratch/journal.jsonl")]
    if any((manifest.parent / "rows.json").exists() for manifest in root.glob("sample/*/manifest.json")):
        return {f"b{n}" for n in range(N_BATCHES)}
    lines = journals[0].read_bytes().split(b"\n")[:-1] if journals else []
    return {json.loads(line)["batch"] for line in lines}


def kill_everywhere(folder: Path, damaged: bool) -> dict[str, Any]:
    """The pipeline killed at every point in turn and rerun; what was wrong, and how often it was killed.

    damaged: it starts from a finished store whose samples lost a file, so that they are replaced.
    """
    os.fsync = lambda descriptor: None  # it guards against power cuts, which are not tested here
    pipeline(folder / "whole")
    expected = state(folder / "whole")
    wrong: list[str] = []
    for n in range(1, 1000):
        root = folder / str(n)
        if damaged:
            shutil.copytree(folder / "whole", root)
            next(root.glob("sample/*/rows.json")).unlink()

        def first_run(n: int = n, root: Path = root) -> None:
            KillAt(n, root)
            pipeline(root)

        status = in_child(first_run)
        if status == 0:
            return {"kills": n - 1, "wrong": wrong}
        if os.WTERMSIG(status) != signal.SIGKILL:
            wrong.append(f"{n}: ended with {status}")
        finished = [m.parent for m in root.glob("*/*/manifest.json") if m.parent.suffix == ""]
        wrong += [f"{n}: {p} has scratch" for p in finished if (p / "scratch").exists()]
        later = {p.parent.name for p in finished} & {"train", "evaluate"}
        if damaged and len(later) < 2:
            wrong.append(f"{n}: of the stages after the damaged one only {later} are left")
        before = recorded(root)
        started: list[str] = []
        pipeline(root, started.append)
        if set(started) & before or set(started) | before != {f"b{i}" for i in range(N_BATCHES)}:
            wrong.append(f"{n}: had {sorted(before)}, then sampled {started}")
        Store(root).gc({row["key"] for row in Store(root).ls()})  # what a kill left of something deleted
        if state(root) != expected:
            wrong.append(f"{n}: {sorted(set(state(root).items()) ^ set(expected.items()))}")
    raise AssertionError("the pipeline never ended")


def other_process(*arguments: object) -> subprocess.Popen[str]:
    source = str(Path(artifacts.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("damaged", "at_least"), [(0, 60), (1, 30)])
def test_killed_at_every_write_the_rerun_equals_an_uninterrupted_run(
    tmp_path: Path, damaged: int, at_least: int
) -> None:
    """Three stages, a torn write at each os.write, a kill before each other change of the file system."""
    output, _ = other_process("kill_everywhere", tmp_path, damaged).communicate(timeout=120)
    result = json.loads(output)
    assert result["wrong"] == []
    assert result["kills"] >= at_least


def test_resumed_wall_time_includes_the_attempt_that_was_cut_off(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def cut_off(out: Path) -> dict[str, Any]:
        time.sleep(0.2)
        Journal(out / "scratch" / "j.jsonl").append("0", [])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.build("s", 1, "k", {}, {}, cut_off)
    assert store.build("s", 1, "k", {}, {}, lambda out: {}).wall_s >= 0.19


# ---- several processes ----------------------------------------------------------------------------------


def shared(root: Path, lock: str, stale_s: float = 120.0) -> Store:
    """A store whose processes take turns by `lock`."""
    if lock == "lease":
        (root / LEASE).touch()
    return Store(root, stale_s)


def slow_build(root: Path, lock: str, stale_s: float, seconds: float) -> Artifact:
    """Each making of the artifact leaves a line in root/made."""

    def fn(out: Path) -> dict[str, Any]:
        with (root / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        journal = Journal(out / "scratch" / "j.jsonl")
        if not journal.load():
            journal.append("0", [os.getpid()])
        time.sleep(seconds)
        (out / "rows.json").write_text("same whoever makes it")
        return {"by": all_rows(journal)}

    return shared(root, lock, stale_s).build("s", 1, "k", {}, {}, fn)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize("lock", ["flock", "lease"])
def test_one_process_builds_the_others_wait_and_reuse(tmp_path: Path, lock: str) -> None:
    """The lease's owner works for twice the time after which silence counts as death: it must beat."""
    stale_s = 1.2
    others = [other_process("build", tmp_path, lock, stale_s, 2 * stale_s) for _ in range(2)]
    wait_for(tmp_path / "made")
    said: list[str] = []
    artifact = shared(tmp_path, lock, stale_s).build("s", 1, "k", {}, {}, lambda out: {}, waiting=said.append)
    results = [json.loads(p.communicate(timeout=60)[0]) for p in others]
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert artifact.cached and len(said) == 1
    assert sorted(r["cached"] for r in results) == [False, True]
    assert {r["digest"] for r in results} == {artifact.digest}


@pytest.mark.parametrize("lock", ["flock", "lease"])
def test_a_killed_owner_is_replaced_and_its_journal_continued(tmp_path: Path, lock: str) -> None:
    owner = other_process("build", tmp_path, lock, 0.6, 60)
    wait_for(tmp_path / "s" / "k.partial" / "scratch" / "j.jsonl")
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    artifact = slow_build(tmp_path, lock, 0.6, 0)
    assert not artifact.cached
    assert artifact.metrics == {"by": [owner.pid]}


def test_a_dead_lease_goes_to_one_of_many_waiters(tmp_path: Path) -> None:
    """All see the same dead owner at the same time; they must follow one another."""
    (tmp_path / "k.1").write_bytes(b"       3")
    inside, most, held = 0, 0, []
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with artifacts._Lease(tmp_path / "k", 0.3).hold(lambda _: None) as mine:
            assert mine is not None
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            held.append(mine())
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert held == [True] * 6 and most == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"k.{n}" for n in range(1, 8)]
    assert all((tmp_path / f"k.{n}").read_bytes() == b"released" for n in range(2, 8))


def test_who_lost_the_lease_does_not_publish(tmp_path: Path) -> None:
    def stalled(out: Path) -> dict[str, Any]:
        (tmp_path / ".locks" / "s-k.2").touch()  # as another process does after a long silence
        return {}

    with pytest.raises(UserError, match="took its work over"):
        shared(tmp_path, "lease").build("s", 1, "k", {}, {}, stalled)
    assert not (tmp_path / "s" / "k").exists()


# ---- journal and full disk ------------------------------------------------------------------------------


def test_journal_drops_a_torn_last_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append("a", [{"text": "line\nbreak \u2028 三 \ud800"}])
    journal.append("b", [[1, None, 0.1]])
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        path.write_bytes(whole[:cut])
        reopened = Journal(path)
        assert list(reopened.load()) == ["a"]
        reopened.append("b", [[1, None, 0.1]])
        assert path.read_bytes() == whole
    assert Journal(path).load() == {"a": [{"text": "line\nbreak \u2028 三 \ud800"}], "b": [[1, None, 0.1]]}
    path.write_bytes(b'{"batch": "x"\n' + whole)
    with pytest.raises(UserError, match="line 1"):
        Journal(path).load()


def test_journal_keeps_a_batch_once(tmp_path: Path) -> None:
    """Two owners for a moment (a stalled one woke): the first record of a batch counts."""
    first, second = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    first.append("a", [1])
    second.append("a", [2])
    second.append("b", [3])
    assert Journal(tmp_path / "j").load() == {"a": [1], "b": [3]}


class FullAfter:
    """os.write that takes so many bytes and then no more."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.room]
        self.room -= len(taken)
        return self.write(descriptor, taken)


def test_append_that_met_a_full_disk_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("a", [1])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk full"):
        patch.setattr(os, "write", FullAfter(7))
        journal.append("b", [2])
    assert journal.load() == {"a": [1]}
    journal.append("b", [2])
    assert Journal(tmp_path / "j").load() == {"a": [1], "b": [2]}


@pytest.mark.parametrize("room", [0, 100, 300, 600, 900, 1300])
def test_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """After room is made the rerun equals a run that never met the full disk; no finished batch is redone."""
    pipeline(tmp_path / "whole")
    root = tmp_path / "full"
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(os, "write", FullAfter(room))
        pipeline(root)
    assert "disk full while writing" in str(caught.value) and "store gc" in str(caught.value)
    assert "MiB free" in str(caught.value)
    before = recorded(root)
    started: list[str] = []
    pipeline(root, started.append)
    assert set(started).isdisjoint(before) and len(started) + len(before) == N_BATCHES
    assert state(root) == state(tmp_path / "whole")


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"summary\.json"):
        patch.setattr(os, "write", FullAfter(5))
        write_json(path, {"a": "longer than before"})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["summary.json"]
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})


def test_full_disk_inside_a_library_is_recognised(tmp_path: Path) -> None:
    """Polars raises its own error without an errno; other errors pass unchanged."""
    import polars as pl

    def writes(out: Path) -> dict[str, Any]:
        pl.DataFrame({"a": range(1000)}).write_parquet("/dev/full")
        return {}

    def fails(out: Path) -> dict[str, Any]:
        raise KeyError("a bug")

    with pytest.raises(UserError, match="disk full"):
        Store(tmp_path).build("s", 1, "k", {}, {}, writes)
    with pytest.raises(KeyError):
        Store(tmp_path).build("s", 1, "k", {}, {}, fails)


def test_a_store_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Store(tmp_path / "file").build("s", 1, "k", {}, {}, lambda out: {})


# ---- disk -----------------------------------------------------------------------------------------------


def hundred_bytes(out: Path) -> dict[str, Any]:
    (out / "x").write_bytes(b"x" * 100)
    return {}


def test_ls_gc_pin(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("kept", "pinned", "used", "old", "fresh"):
        store.build("s", 1, key, {}, {}, hundred_bytes)
    with pytest.raises(ZeroDivisionError):
        store.build("s", 1, "broken", {}, {}, lambda out: {"x": 1 // 0})
    for path in [*tmp_path.glob("s/*/manifest.json"), *tmp_path.glob("s/*/x"), *tmp_path.glob("s/*/*/*")]:
        if "fresh" not in path.parts:
            os.utime(path, (0, 0))
    store.build("s", 1, "used", {}, {}, hundred_bytes)  # a hit counts as use
    store.pin("pinned")
    with pytest.raises(UserError, match="store ls"):
        store.pin("nosuch")

    rows = {row["key"]: row for row in store.ls()}
    assert list(rows) == ["broken", "fresh", "kept", "old", "pinned", "used"]
    assert [k for k, row in rows.items() if row["partial"]] == ["broken"]
    assert [k for k, row in rows.items() if row["pinned"]] == ["pinned"]
    assert rows["old"]["bytes"] == 100 + (tmp_path / "s/old/manifest.json").stat().st_size
    assert rows["broken"]["created"] is None and rows["old"]["created"] is not None

    expected = rows["old"]["bytes"] + rows["broken"]["bytes"]
    assert store.gc({"kept"}, older_than_s=3600, dry_run=True) == expected
    assert len(store.ls()) == 6
    assert store.gc({"kept"}, older_than_s=3600) == expected
    assert [row["key"] for row in store.ls()] == ["fresh", "kept", "pinned", "used"]
    store.unpin("pinned")
    store.gc()
    assert store.ls() == []


def test_gc_deletes_what_it_counts(tmp_path: Path) -> None:
    """Finished work that was killed before it got its name, and what a kill left of something deleted."""
    store = Store(tmp_path)
    made = store.build("s", 1, "k", {}, {}, hundred_bytes)
    made.path.rename(made.path.with_name("k.partial"))
    (tmp_path / "s" / "l.trash").mkdir()
    hundred_bytes(tmp_path / "s" / "l.trash")
    size = sum(path.stat().st_size for path in tmp_path.glob("s/*/*"))
    assert store.gc(dry_run=True) == size
    assert store.gc() == size
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("lock", ["flock", "lease"])
def test_gc_leaves_what_is_being_built(tmp_path: Path, lock: str) -> None:
    def fn(out: Path) -> dict[str, Any]:
        (out / "x").write_text("half")
        assert shared(tmp_path, lock, 0.6).gc() == 0
        assert (out / "x").exists()
        return {}

    assert not shared(tmp_path, lock, 0.6).build("s", 1, "k", {}, {}, fn).cached
    assert shared(tmp_path, lock, 0.6).gc() > 0


if __name__ == "__main__":
    if sys.argv[1] == "kill_everywhere":
        print(json.dumps(kill_everywhere(Path(sys.argv[2]), bool(int(sys.argv[3])))))
    else:
        made = slow_build(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))
        print(json.dumps({"cached": made.cached, "digest": made.digest}))
