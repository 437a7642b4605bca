"""`selfcritique tune`: a study that a kill does not lose, judged on dev."""

import signal
from pathlib import Path

import pytest
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from runs import TINY, Watch, completed, read_json, run
from selfcritique.artifacts import Store
from test_sweep import KillSweep, made

WORDS = ("tune", *TINY, "trials=3", "space=space.yaml", "store=store", "study=study.journal")
SPACE = """
space:
  dpo.loss.beta: {low: 0.05, high: 2.0, log: true}
  dpo.loss.lam: {choices: [0.5, 1.0]}
"""


def test_a_killed_search_goes_on_with_the_trial_it_was_at(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (tmp_path / "space.yaml").write_text(SPACE)
    # the second policy: its evaluation of dev is sampled, its training is done
    hook = KillSweep(store, tmp_path / "log", path="/sample", nth=7)
    assert run(tmp_path, *WORDS, hook=hook).code == -signal.SIGKILL
    before = {f"{row['stage']}/{row['key']}" for row in Store(store).ls() if not row["partial"]}
    again = completed(tmp_path, *WORDS, hook=Watch(store, tmp_path / "log2"))

    file = JournalFileBackend(str(tmp_path / "study.journal"))
    study = load_study(study_name="tune", storage=JournalStorage(file))
    killed, *done = sorted(study.trials, key=lambda t: t.state is TrialState.COMPLETE)
    assert killed.state is TrialState.FAIL and [t.state for t in done] == 3 * [TrialState.COMPLETE]
    tried = [tuple(t.params.values()) for t in done]
    assert len(set(tried)) == 3 and tuple(killed.params.values()) == tried[1]
    assert not made(tmp_path / "log2").keys() & before
    assert len(list(Store(store).completed("dpo"))) == 3
    assert len(list(Store(store).completed("critic_data"))) == 1
    for number, trial in enumerate(done):
        accuracy = read_json(tmp_path / str(number) / "summary.json")["models"]["dpo"]["accuracy"]
        assert trial.value == accuracy["value"] and accuracy["n"] == 2  # data.splits.dev
    best = max(done, key=lambda t: t.value or 0)
    assert f"dpo.loss.lam={best.params['dpo.loss.lam']}" in again.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "space", "says"),
    [
        (("trials=0",), SPACE, "at least 1"),
        ((), "space: {dpo.loss.beta: {low: 2, high: 1}}", "below high"),
        ((), "space: {}", "one or more settings"),
        (("dpo.loss.bta=1",), SPACE, "Did you mean beta?"),
    ],
)
def test_what_cannot_be_searched_is_said(
    words: tuple[str, ...], space: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(space)
    assert says in run(tmp_path, *WORDS, *words).message
    assert not (tmp_path / "store").exists()
