"""Every command of README.md and of experiments/*/run.sh runs, in order, at the size of a few seconds."""

import csv
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from runs import TINY, Finished, compose, run

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def commands(path: Path) -> list[list[str]]:
    """The words of each `selfcritique` line, comments gone."""
    lines = re.findall(r"^selfcritique (.*)$", path.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def small(word: str, places: dict[str, str]) -> list[str]:
    """A word of a command with the demo and the placeholders replaced."""
    if word in ("experiment=demo", "experiment=demo_shuffled"):
        by = ["rft.select.by=shuffled"] if word.endswith("shuffled") else []
        return [*TINY, f"name={word.partition('=')[2]}", *by]
    if word == "rft.select.threshold=9":  # which no critic of this size gives
        return ["rft.select.threshold=2"]
    name, equals, value = word.rpartition("=")
    return [f"{name}{equals}{places.get(value, value)}"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, smoke: Finished) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("user")
    rows = [
        {"question": f"Tom has {i} pens and buys 3 more. How many has he?", "reference": f"#### {i + 3}"}
        for i in range(1100)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = folder / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# @package _global_\ndefaults: [smoke, _self_]\nname: mine\nrounds: {n: 1}\n")
    return {
        "MODEL": str(smoke.artifact("base")),
        "problems.jsonl": str(folder / "problems.jsonl"),
        "GSM8K": str(GSM8K),
        "FOLDER": str(folder),
    }


def mark(folder: Path, names: list[str]) -> None:
    """Two annotators who give the exported responses 4 and 7 in turn."""
    rows = list(csv.DictReader((folder / "sheet.csv").open(encoding="utf-8-sig", newline="")))
    for name in names:
        with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
            sheet = csv.DictWriter(file, rows[0])
            sheet.writeheader()
            sheet.writerows(row | {"score": 4 + 3 * (i % 2)} for i, row in enumerate(rows))


@pytest.mark.parametrize("page", ["README.md", "experiments/demo/run.sh"])
def test_commands(page: str, places: dict[str, str], tmp_path: Path) -> None:
    found = commands(ROOT / page)
    assert len(found) >= 5
    for words in found:
        if words[:2] == ["annotate", "import"]:
            mark(tmp_path, ["anna.csv", "ben.csv"])
        done = ["", *sorted(str(path.parent) for path in tmp_path.glob("outputs/demo/*/lineage.json"))]
        named = places | {"outputs/demo/TIME": done[-1]}
        given = [part for word in words for part in small(word, named)]
        if words[0] == "evaluate":  # the tiny model's context holds no long answers
            given += ["max_tokens=8"]
        finished = run(tmp_path, *given)
        assert finished.code == 0, (words, finished.stderr[-2000:])
        if "plan=true" in words:
            assert "stages would run" in finished.stdout
        elif words[0] == "compare":
            assert "| base | " in finished.stdout and "difference, points" in finished.stdout
        elif words[0] == "evaluate":
            assert "| gsm8k | accuracy, % | " in finished.stdout
        elif words[:2] == ["annotate", "import"]:
            assert "| anna.csv – ben.csv | 8 | 1.000 | 1.000 | 1.000 | 0.000 |" in finished.stdout


def test_make_runs_what_the_readme_says() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def recipe(target: str) -> str:  # as typed in a shell, also when these tests run under make
        command = ["make", "-n", target]
        return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True).stdout

    assert recipe("demo").splitlines()[-1] == ".venv/bin/selfcritique experiment=demo"
    assert recipe("test").splitlines()[-1] == ".venv/bin/python -m pytest"


def test_longer_base_of_the_demo_is_a_quarter_longer() -> None:
    (longer,) = (w for w in commands(ROOT / "experiments/demo/run.sh") if "name=demo_longer" in w)
    (epochs,) = (w for w in longer if w.startswith("model.sft.epochs="))
    sft = compose("experiment=demo").model.sft
    assert sft is not None and float(epochs.partition("=")[2]) == 1.25 * sft.epochs
