"""Whole runs of the command line for tests, each in a process of its own.

A fork server imports torch and the rest once; every run is forked from it and goes through `main` as the
command does. `Watch` writes down what a run did to its store and what it sampled and trained, and kills
the process at a chosen event.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import selfcritique
from selfcritique.config import RunConfig
from selfcritique.records import content_id

HEAVY = ["hydra", "polars", "rich.console", "matplotlib.backends.backend_svg", "selfcritique.engine.hf",
         "selfcritique.report", "selfcritique.sections", "selfcritique.stages", "selfcritique.train.fit",
         "selfcritique.train.tiny"]  # fmt: skip
PATHS = (Path(selfcritique.__file__).parents[1], Path(__file__).parent)
SMOKE = ("experiment=smoke", "threads=1")
# A few seconds: no arms, no samples of the test questions, the scores by logits and the choices by chance.
TINY = (
    *SMOKE,
    "arms=[]",
    "data.splits={base_train:48,critic_train:8,critic_dev:8,pool_rft:8,pool_dpo:8,dev:2,test:8}",
    "model.tiny={hidden_size:32,intermediate_size:32,layers:1}",
    "model.sft={lr:2e-2,epochs:10,batch_size:16}",
    "critic.ask={mode:logit,samples:1,temperature:0.0}",
    "critic.train={epochs:1,batch_size:8}",
    "rft.select={threshold:1,by:random}",
    "rft.train.batch_size=16",
    "pairs.build={threshold:5.5,by:random}",
    "dpo.train.batch_size=2",
    "eval.sampled_questions=0",
    "engine.max_batch_tokens=400",
    "trainer.checkpoint_every_s=0",
)


@dataclass(frozen=True)
class Finished:
    """A run that ended, however it did."""

    code: int  # of the exit; a killed process has the negative signal
    folder: Path  # where it ran
    stdout: str
    stderr: str

    @property
    def out(self) -> Path:
        """Its only output directory."""
        (found,) = self.folder.glob("outputs/*/*")
        return found

    @property
    def store(self) -> Path:
        """The default store of where it ran."""
        return self.folder / "store"

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.out / "summary.json")

    def artifact(self, name: str) -> Path:
        """Where the artifact of a stage of this run stands, by lineage.json alone."""
        entry = read_json(self.out / "lineage.json")[name]
        return self.store / entry["stage"] / entry["key"]

    @property
    def message(self) -> str:
        """The one error it ended with, which came without a traceback."""
        assert self.code == 1, self.stderr
        for noise in ("Traceback", "Error executing job"):  # Python's, Hydra's
            assert noise not in self.stderr + self.stdout
        _, *messages = self.stderr.split("ERROR: ")
        assert len(messages) == 1, self.stderr
        return messages[0].strip()


def run(
    folder: Path, *words: str, hook: Callable[[], object] | None = None, timeout_s: float = 900
) -> Finished:
    """`selfcritique WORDS` in `folder`; `hook` (picklable) is called in the new process before it."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    paths = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"):
        forkserver.ensure_running()
        environment = dict(os.environ)  # now, which may be another one than the fork server's
    process = context.Process(target=_main, args=(folder, words, environment, hook))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    texts = [(folder / name).read_text() if (folder / name).exists() else "" for name in ("stdout", "stderr")]
    return Finished(process.exitcode, folder, *texts)


def _main(
    folder: Path, words: Sequence[str], environment: dict[str, str], hook: Callable[[], object] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout, sys.stderr = Path("stdout").open("w"), Path("stderr").open("w")  # noqa: SIM115
    for number, file in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file.fileno(), number)
    from selfcritique.__main__ import main

    if hook is not None:
        hook()
    main(words)


def completed(folder: Path, *words: str, hook: Callable[[], object] | None = None) -> Finished:
    """A run that must succeed."""
    finished = run(folder, *words, hook=hook)
    assert finished.code == 0, finished.stderr[-3000:]
    return finished


def compose(*words: str) -> RunConfig:
    """The checked settings of a command line, in this process."""
    from hydra import compose, initialize_config_dir

    from selfcritique.__main__ import CONF
    from selfcritique.config import register, to_run_config

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_run_config(compose("config", list(words)))


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what may differ between a run and its repetition."""
    kept = {name: part for name, part in summary.items() if name not in ("wall_s", "cached", "commit")}
    cost = ("tokens_per_s", "peak_bytes", "matmul_fraction")
    kept["training"] = {
        stage: {name: value for name, value in figures.items() if name not in cost}
        for stage, figures in summary["training"].items()
    }
    return kept


def tree(root: Path) -> dict[str, int]:
    """Every file under a folder with the time of its last change, in ns; folders with 0."""
    return {str(p.relative_to(root)): p.stat().st_mtime_ns if p.is_file() else 0 for p in root.rglob("*")}


@dataclass(frozen=True)
class Watch:
    """As `hook`: notes events in `log`, one a line, and ends the process with SIGKILL at `kill_at`.

    write PATH #n, rename PATH #n    the nth such change under the store; a write is killed half done
    sample SEED                      a batch given to the model (its seed derives from the batch's id)
    step PATH n                      an optimiser step

    Without `algebra`, formulas among the answers are unsupported: SymPy's process takes longer than all else.
    """

    store: Path
    log: Path
    kill_at: str = ""
    algebra: bool = False

    def __call__(self) -> None:
        from selfcritique import answer_worker
        from selfcritique.answers import Verdict
        from selfcritique.engine.hf import HfEngine
        from selfcritique.train.fit import _State

        seen: Counter[str] = Counter()
        write, real_sample, real_score, real_keep = os.write, HfEngine._sample, HfEngine._score, _State.keep
        lines = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

        def note(line: str) -> None:
            write(lines, f"{line}\n".encode())

        def event(kind: str, path: str) -> bool:
            """Whether to die of it."""
            path = os.path.abspath(path)
            if not path.startswith(str(self.store)):
                return False
            name = f"{kind} {os.path.relpath(path, self.store)}"
            seen[name] += 1
            note(f"{name} #{seen[name]}")
            return f"{name} #{seen[name]}" == self.kill_at

        def torn_write(descriptor: int, data: bytes) -> int:
            if event("write", os.readlink(f"/proc/self/fd/{descriptor}")):
                write(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, data)

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            if name == "os.rename" and event("rename", os.fsdecode(arguments[0])):
                os.kill(os.getpid(), signal.SIGKILL)

        def sample(engine: Any, prompts: Any, params: Any, seed: int) -> Any:
            note(f"sample {seed}")
            return real_sample(engine, prompts, params, seed)

        def score(engine: Any, prompts: Any, candidates: Any) -> Any:
            note(f"sample {content_id(prompts)}")
            return real_score(engine, prompts, candidates)

        def keep(state: Any, *rest: Any) -> None:
            note(f"step {os.path.relpath(state.path, self.store)} {len(state.steps) + 1}")
            real_keep(state, *rest)

        os.write = torn_write
        if not self.algebra:
            answer_worker.grade = lambda pairs, *_: [Verdict.unsupported for _ in pairs]
        HfEngine._sample, HfEngine._score, _State.keep = sample, score, keep  # type: ignore[method-assign]
        sys.addaudithook(audit)


def events(log: Path, *kinds: str) -> list[str]:
    """The noted events of these kinds, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if line.partition(" ")[0] in kinds]


@dataclass(frozen=True)
class Patch:
    """As `hook`: a function of a module is replaced for this process."""

    target: str  # as for unittest.mock
    function: Callable[..., Any]

    def __call__(self) -> None:
        mock.patch(self.target, self.function).start()
