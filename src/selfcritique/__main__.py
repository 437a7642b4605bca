"""The command line: a run (Hydra), or a look at runs or the store. Errors become one message here."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfcritique.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
HELP = """selfcritique: the Self-Critique pipeline for mathematical reasoning

  selfcritique experiment=demo               run an experiment (conf/experiment/)
  selfcritique experiment=demo plan=true     what it would do and cost; runs nothing
  selfcritique experiment=demo until=pairs   run up to a stage
  selfcritique experiment=demo dpo.loss.lam=0.5 seed=1     change any setting
  selfcritique -m experiment=demo seed=0,1,2               sweep; the points share their stages
  selfcritique tune experiment=demo trials=30              search λ, β and others (conf/tune.yaml) on dev
  selfcritique store ls|gc|pin KEY|unpin KEY [--store DIR] [--all] the artifacts and their disk
  selfcritique compare 'runs=[outputs/demo/*]' [metric=maj@4] [where=family=bus] [against=rft] [diffs=3]
  selfcritique critic-card critic=RUN [set=FOLDER]   a critic by itself: how good, how slow, how easily fooled
  selfcritique evaluate 'model=[FOLDER,...]' 'sets=[gsm8k,mmlu,...]'  checkpoints on evaluation sets
  selfcritique report [run=DIR|'runs=[...]'] [export=DIR]       report.html again; figures and tables as files
  selfcritique why RESPONSE_ID [run=DIR]     what became of a response, to the steps it trained
  selfcritique annotate export run=DIR out=sheet.csv [stage=gate_scores] [n=100]   a blind sheet to mark
  selfcritique annotate import run=DIR sheet=[a.csv,b.csv] [stage=] [out=annotations.csv]  agreement, marks
  selfcritique experiment=demo --cfg job     the composed settings

Results: outputs/EXPERIMENT/TIME/ (report.html, summary.json, metrics.jsonl, lineage.json).
Settings: conf/, documented in src/selfcritique/config.py. Groups: {groups}.
Experiments: {experiments}.
"""
_failed: list[str] = []  # points of this process that stopped with an error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits non-zero if anything failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _failed.clear()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # progress is ours
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_help())
        elif words[0] in _COMMANDS:
            _COMMANDS[words[0]](words[1:])
        else:
            _hydra(words)
    except UserError as error:
        _failed.append(_say(error))
    except KeyboardInterrupt:
        _failed.append("interrupted; the same command goes on from here")
        print(_failed[-1], file=sys.stderr)
    except Exception as error:
        message = _settings_error(error)
        if message is None:
            raise
        command = f"{words[0]}: " if words[0] in _COMMANDS else ""
        _failed.append(_say(command + message))
    sys.exit(1 if _failed else 0)


def _say(error: object) -> str:
    message = f"ERROR: {error}"
    print(message, file=sys.stderr, flush=True)
    return message


def _help() -> str:
    names: dict[str, list[str]] = {}
    for file in sorted(CONF.glob("*/*.yaml")):
        names.setdefault(file.parent.name, []).append(file.stem)
    experiments = ", ".join(names.pop("experiment"))
    groups = ", ".join(f"{group}={'|'.join(options)}" for group, options in names.items())
    return HELP.format(groups=groups, experiments=experiments)


def _hydra(words: list[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; what is printed is decided here
    import hydra

    from selfcritique.config import register

    register()
    with TemporaryDirectory() as nowhere:
        if "plan=true" in words:  # Hydra makes the output folders before it calls anyone
            words = [*words, f"hydra.run.dir={nowhere}", f"hydra.sweep.dir={nowhere}"]
        sys.argv = ["selfcritique", *words]
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(_point)()


def _settings_error(error: Exception) -> str | None:
    """A composition error with its cause and the names that would have been right; None for another error."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, YAMLError):  # names the file and the line
        return f"A settings file is no valid YAML: {error}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    lines = str(error).splitlines()
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "full_key", None) is None:
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        lines.append(f"{cause.full_key}: {str(cause).splitlines()[0]}")  # type: ignore[attr-defined]
        allowed = sorted(getattr(getattr(cause, "object_type", None), "__dataclass_fields__", {}))
        key = str(getattr(cause, "key", ""))
        if allowed and key not in allowed:
            close = get_close_matches(key, allowed, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            lines.append(f"{hint}There are: {', '.join(allowed)}.")
    noise = ("reference_type", "object_type", "full_key", "To append")
    kept = [line for line in lines if not line.strip().startswith(noise)]
    return "\n".join(dict.fromkeys(kept))


def _point(composed: Any) -> None:
    """A run, or a job of a sweep in a process of its own; what a sweep's jobs raise, the sweep reports."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from selfcritique.config import to_run_config

    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    if OmegaConf.is_missing(hydra_config.job, "num"):
        try:
            run = to_run_config(composed)
            _set_threads(run.threads)
            _run(run, out)
        except UserError as error:  # raised, it would get lines of Hydra's before it
            _failed.append(_say(error))
        return
    from selfcritique.sweep import SHARED

    job = SHARED if hydra_config.job.name == SHARED else out.name
    try:
        run = to_run_config(composed)
        if "RayLauncher" in hydra_config.launcher._target_:  # has made a process for it
            _set_threads(run.threads)
            _run(run, out, job)
        else:
            _run_apart(run, out, job, beside="BasicLauncher" in hydra_config.launcher._target_)
    except UserError as error:
        print(f"{out} stopped: {error}", file=sys.stderr, flush=True)
        raise


def _set_threads(threads: int) -> None:
    """For all that computes; torch reads the environment when it is imported, and may have been already."""
    os.environ["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _run_apart(run: Any, out: Path, job: str = "", beside: bool = False) -> None:
    """In a process of its own; UserError if it did not finish. beside: its report may be left to it."""
    from selfcritique.sweep import isolated

    def work(go_on: Callable[[], None]) -> None:
        _set_threads(run.threads)
        _run(run, out, job, go_on if beside else None)

    _set_threads(run.threads)
    _import_what_runs(run)
    isolated(work, out)


def _import_what_runs(run: Any) -> None:
    """Once, for all of a sweep's points that this process forks."""
    from selfcritique.artifacts import Store
    from selfcritique.pipeline import build, plan

    if all(row.hit for row in plan(build(run), Store(Path(run.store)), run.until)):
        return
    for name in ("engine.hf", "train.fit", "train.tiny", "report", "sections"):
        import_module(f"selfcritique.{name}")


def _run(run: Any, out: Path, job: str = "", reported: Callable[[], None] | None = None) -> None:
    """job: of a sweep, the point's folder; `shared` only makes artifacts that several points need.

    reported: called when all but report.html is there.
    """
    from omegaconf import OmegaConf
    from rich.console import Console

    from selfcritique.artifacts import Store, code_version, full_disk_is_user_error
    from selfcritique.pipeline import build, execute, plan
    from selfcritique.sweep import SHARED

    console = Console(width=max(100, Console().width))
    graph, store = build(run), Store(Path(run.store))
    if run.plan:
        from selfcritique import cost
        from selfcritique.report import show_plan

        show_plan(plan(graph, store, run.until), console)
        shape = cost.shape_of(run)
        if shape is not None:
            console.print(cost.describe(cost.estimate(graph, shape, run.until)))
        return
    if job == SHARED:
        with full_disk_is_user_error(out):
            execute(graph, store, run.until)
        return
    from selfcritique import report, results, sections
    from selfcritique.tracker import Tracking

    with full_disk_is_user_error(out):
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(run), out / "config.yaml")
        tracking = Tracking(run, out, job)
        start = time.monotonic()

        def finished(node: Any, artifact: Any) -> None:
            tracking.log(node.name, report.training_rows(node.name, artifact))

        done = execute(graph, store, run.until, finished)
        summary = report.summarise(run, graph, done, code_version(), time.monotonic() - start)
        report.write(out, summary, done)
        whole = results.load_run(out, run.store)
        tracking.finish(summary, results.sample_table(whole), done)
        report.show(summary, out, console)
        if reported:
            reported()
        sections.write_report([whole])


def _given(
    command: str, words: list[str], required: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """The values of a command's NAME=VALUE words."""
    given = dict(word.partition("=")[::2] for word in words)
    if not set(required) <= given.keys() <= {*required, *optional} or not all(given.values()):
        takes = [f"{name}=" for name in required] + [f"[{name}=]" for name in optional]
        raise UserError(f"{command} takes {', '.join(takes)}; found {' '.join(words) or 'nothing'}.")
    return given


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.strip("[]").split(",") if part.strip()]


def _compare(words: list[str]) -> None:
    given = _given("compare", words, ("runs",), ("metric", "where", "against", "diffs", "store"))
    if not given.get("diffs", "0").isdecimal():
        raise UserError(f"compare: diffs is how many problems to show; found {given['diffs']}.")
    from selfcritique.compare import AGAINST, changes, load_models, markdown

    models = load_models(_listed(given["runs"]), Path(given.get("store", "store")), given.get("where", ""))
    against = _listed(given["against"]) if "against" in given else AGAINST
    print(markdown(models, given.get("metric", "accuracy"), against))
    if "diffs" in given:
        print("", *changes(models, int(given["diffs"])), sep="\n")


def _annotate(words: list[str]) -> None:
    action = words[0] if words else ""
    if action == "export":
        given = _given("annotate export", words[1:], ("run", "out"), ("stage", "n", "seed", "store"))
    elif action == "import":
        given = _given("annotate import", words[1:], ("run", "sheet"), ("stage", "out", "store"))
    else:
        raise UserError(f"annotate wants export or import; found {action or 'nothing'}.")
    from selfcritique import sheets
    from selfcritique.results import load_run

    stage = given.get("stage", "gate_scores")
    scored = sheets.load_scored(load_run(given["run"], given.get("store", "")), stage)
    if action == "export":
        numbers = (given.get("n", "100"), given.get("seed", "0"))
        if not all(number.isdecimal() for number in numbers):
            found = "n={}, seed={}".format(*numbers)
            raise UserError(f"annotate export: n and seed are whole numbers; found {found}.")
        drawn = sheets.draw(scored, *map(int, numbers))
        sheets.write_sheet(drawn, Path(given["out"]))
        print(f"{drawn.height} responses to mark from 1 to 10: {given['out']}")
        return
    paths, out = [Path(path) for path in _listed(given["sheet"])], Path(given.get("out", "annotations.csv"))
    if out in paths:
        raise UserError(f"out={out} is a sheet; name another file.")
    marks = {str(path): sheets.read_sheet(path, scored) for path in paths}
    print(sheets.markdown(sheets.agreement(marks, scored)))
    print(f"{sheets.write_annotations(list(marks.values()), out)} marked responses of {stage}: {out}")


def _tune(words: list[str]) -> None:
    try:
        from selfcritique.tune import tune
    except ModuleNotFoundError as error:
        raise UserError(f"tune wants Optuna ({error}): pip install -r requirements-dev.txt.") from None
    tune(words, CONF, _run_apart)


def _critic_card(words: list[str]) -> None:
    from selfcritique.card import main as card

    card(words)


def _evaluate(words: list[str]) -> None:
    from omegaconf import OmegaConf

    from selfcritique.config import SuiteConfig

    given = OmegaConf.from_dotlist(words)
    for name in ("model", "sets"):  # one needs no brackets
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SuiteConfig), given))
    assert isinstance(config, SuiteConfig)
    from selfcritique import suite
    from selfcritique.artifacts import full_disk_is_user_error

    with full_disk_is_user_error(Path(config.out)):
        summary, values = suite.evaluate(config)
        folder = suite.write(summary, values, Path(config.out))
    print(suite.markdown(summary))
    print(f"evaluate.json and values.parquet: {folder}")


def _report(words: list[str]) -> None:
    given = _given("report", words, (), ("run", "runs", "store", "export"))
    from selfcritique.results import load_run, load_runs
    from selfcritique.sections import write_report

    store, runs = given.get("store", ""), _listed(given.get("runs", ""))
    chosen = load_runs(*runs, store=store) if runs else [load_run(given.get("run", ""), store)]
    print(write_report(chosen, Path(given["export"]) if "export" in given else None))


def _why(words: list[str]) -> None:
    ids = [word for word in words if "=" not in word]
    given = _given("why RESPONSE_ID", [word for word in words if "=" in word], (), ("run", "store"))
    if len(ids) != 1:
        raise UserError("why wants one response id, or the beginning of one: why RESPONSE_ID [run=DIR].")
    from selfcritique.results import load_run
    from selfcritique.why import explain

    print("\n".join(explain(load_run(given.get("run", ""), given.get("store", "")), ids[0])))


def _store(words: list[str]) -> None:
    import argparse

    from selfcritique.artifacts import Store

    parser = argparse.ArgumentParser(prog="selfcritique store", description="The artifacts and their disk.")
    parser.add_argument("action", choices=("ls", "gc", "pin", "unpin"))
    parser.add_argument("key", nargs="*", help="keys to pin or unpin; for gc, keys to keep")
    parser.add_argument("--store", default="store", help="folder of the store (default: store)")
    parser.add_argument(
        "--all", action="store_true", help="gc: delete; without it gc says what it would free"
    )
    options = parser.parse_args(words)
    root = Path(options.store)
    if not root.is_dir():
        raise UserError(f"There is no store at {root.absolute()}; name it with --store.")
    store = Store(root)
    if options.action in ("pin", "unpin") and not options.key:
        raise UserError(f"store {options.action} wants one or more keys; `selfcritique store ls` lists them.")
    if options.action == "gc":
        freed = store.gc(set(options.key), dry_run=not options.all)
        print(f"{freed / 2**20:.1f} MiB {'freed' if options.all else 'would be freed; add --all to delete'}")
    elif options.action == "ls":
        _list(store)
    else:
        for key in options.key:
            (store.pin if options.action == "pin" else store.unpin)(key)


def _list(store: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = store.ls()
    table = Table()
    for column in ("stage", "key", "MiB", "created", ""):
        table.add_column(column, no_wrap=True)
    for row in rows:
        state = " ".join(word for word in ("pinned", "partial") if row[word])
        size = f"{row['bytes'] / 2**20:.2f}"
        table.add_row(row["stage"], row["key"], size, row["created"] or "", state)
    Console().print(table)
    print(f"{len(rows)} artifacts, {sum(row['bytes'] for row in rows) / 2**20:.1f} MiB")


_COMMANDS = {
    "annotate": _annotate,
    "compare": _compare,
    "critic-card": _critic_card,
    "evaluate": _evaluate,
    "report": _report,
    "store": _store,
    "tune": _tune,
    "why": _why,
}

if __name__ == "__main__":
    main()
