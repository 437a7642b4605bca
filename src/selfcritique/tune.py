"""`selfcritique tune`: a search for settings with Optuna, judged by accuracy on `dev`.

A trial is a run that ends with the evaluation of its last model, so trials share their stages through the
store. The study is a journal file: a killed search goes on with the same study and the trial it was at. Each
suggestion depends on the finished trials and their number alone, so it is the one that was being tried.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from optuna import Study, Trial, create_study, logging
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from selfcritique.compare import markdown_table
from selfcritique.config import RunConfig, check, key_part, register, to_run_config
from selfcritique.errors import UserError
from selfcritique.pipeline import build
from selfcritique.records import content_id

_REPEATS = 100  # suggestions of settings already tried before the space counts as exhausted


@dataclass
class Dimension:
    """Where a setting is searched: `choices`, or from `low` to `high`."""

    choices: list[Any] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def __post_init__(self) -> None:
        within = bool(self.choices) or (self.low < self.high and (self.low > 0 or not self.log))
        check(self, low=not within and "below high (above 0 if log), or choices given")

    def suggest(self, trial: Trial, name: str) -> str:
        if self.choices:
            return str(trial.suggest_categorical(name, self.choices))
        return f"{trial.suggest_float(name, self.low, self.high, log=self.log):.4g}"


@dataclass
class TuneConfig:
    """conf/tune.yaml."""

    trials: int = 30
    space: dict[str, Dimension] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, trials=self.trials < 1 and "at least 1", space=not self.space and "one or more settings")


def tune(words: Sequence[str], conf: Path, start: Callable[[RunConfig, Path], None]) -> None:
    """Run trials until the study has as many as asked for, and print the best.

    words: of the command line; trials=, space= and study= are the search's own, the others every run's.
    start: runs a trial into its folder, raising UserError if it does not finish.
    """
    given = dict(word.partition("=")[::2] for word in words)
    overrides = [word for word in words if word.partition("=")[0] not in ("trials", "space", "study")]
    space = Path(given.get("space") or conf / "tune.yaml")
    if not space.is_file():
        raise UserError(f"space: there is no file {space}; conf/tune.yaml is an example.")
    own = OmegaConf.from_dotlist([f"trials={given['trials']}"] if "trials" in given else [])
    merged = OmegaConf.merge(OmegaConf.structured(TuneConfig), OmegaConf.load(space), own)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, TuneConfig)
    register()
    with initialize_config_dir(str(conf), version_base="1.3"):
        base = _composed(overrides)
        study_file = Path(given.get("study") or f"outputs/{base.name}/tune/study.journal")
        about = content_id(json.dumps([key_part(base), key_part(config.space)], sort_keys=True))
        with _study(study_file, about) as study:
            while len(_tried(study)) < config.trials:
                _try(study, config.space, overrides, study_file.parent, start)
            print(_table(study, config.space))
            best = " ".join(_words(config.space, study.best_trial)) if _complete(study) else ""
    if not best:
        raise UserError(f"No trial finished; what stopped them is in {study_file.parent}, and above.")
    print(f"Best on dev, not yet seen on test: selfcritique {' '.join(overrides)} {best}")


def _composed(overrides: Sequence[str]) -> RunConfig:
    """Judged on dev, up to the last model's evaluation."""
    run = to_run_config(compose("config", [*overrides, "eval.split=dev"]))
    run.until = run.until or f"eval_{list(build(run).models)[-1]}"
    return run


@contextmanager
def _study(path: Path, about: str) -> Iterator[Study]:
    """The study in a file, new or taken up again, for this process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity(logging.WARNING)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another tune is at this study; name another one (study=FILE)."
            ) from None
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = create_study(storage=storage, study_name="tune", direction="maximize", load_if_exists=True)
        if study.user_attrs.setdefault("about", about) != about:
            raise UserError(
                f"{path} is a study of other settings or another space; name another file (study=FILE)."
            )
        study.set_user_attr("about", about)
        for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of a killed process
            study.tell(trial.number, state=TrialState.FAIL)
        yield study


def _try(
    study: Study, space: Mapping[str, Dimension], overrides: Sequence[str], folder: Path,
    start: Callable[[RunConfig, Path], None],
) -> None:  # fmt: skip
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    study.sampler = TPESampler(seed=len(ended))
    trial = study.ask()
    words = [f"{name}={dimension.suggest(trial, name)}" for name, dimension in space.items()]
    if any(_words(space, earlier) == words for earlier in ended):
        trial.set_user_attr("repeated", True)
        study.tell(trial, state=TrialState.PRUNED)
        if len(ended) - len(_tried(study)) >= _REPEATS:
            raise UserError(f"The space has no more to try than {len(_tried(study))} trials; widen it.")
        return
    out = folder / str(len(_tried(study)))
    print(f"trial {out.name}: {' '.join(words)}", flush=True)
    try:
        run = _composed([*overrides, *words])
        start(run, out)
        models = json.loads((out / "summary.json").read_text())["models"]
    except UserError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.PRUNED)
        print(f"trial {out.name} stopped: {error}", flush=True)
        return
    study.tell(trial, models[run.until.removeprefix("eval_")]["accuracy"]["value"])


def _tried(study: Study) -> list[FrozenTrial]:
    """Trials that ran to their end or to an error."""
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in ended if "repeated" not in trial.user_attrs]


def _complete(study: Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _words(space: Mapping[str, Dimension], trial: FrozenTrial) -> list[str]:
    shown = {name: str(v) if space[name].choices else f"{v:.4g}" for name, v in trial.params.items()}
    return [f"{name}={shown[name]}" for name in space]


def _table(study: Study, space: Mapping[str, Dimension], most: int = 10) -> str:
    best = sorted(_complete(study), key=lambda trial: -(trial.value or 0))[:most]
    rows = [[f"{100 * (t.value or 0):.1f}", *(w.partition("=")[2] for w in _words(space, t))] for t in best]
    return markdown_table(["accuracy on dev, %", *space], rows)
