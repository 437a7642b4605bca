"""Every command of README.md, docs/ and experiments/*/run.sh runs, in order, at the size of a few seconds;
what wants a GPU, a server or a cluster is planned."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from runs import TINY, Finished, compose, read_json, run
from selfcritique.results import load_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "experiments/demo/run.sh",
    "docs/report.md",
    "docs/scaling.md",
    "docs/sweeps.md",
    "docs/your_model_and_data.md",
]
# What wants a GPU, a server or a cluster is planned; the rest runs.
PLANNED = {
    "trainer=gpu",
    "engine=openai",
    "engine=vllm",
    "engine=ray_vllm",
    "hydra/launcher=slurm_gpu",
    "experiment=lambda_beta",
}
ADDED = {"evaluate": ["max_tokens=8"], "critic-card": ["probes=2"], "tune": ["space=FOLDER/space.yaml"]}
MAKE = ("make demo", "make test", "make setup-vllm")  # the recipes are checked below
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def commands(path: Path) -> list[list[str]]:
    """The words of each `selfcritique` line of a script, or of a page's bash blocks, comments gone."""
    text = path.read_text()
    blocks = (
        re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if path.suffix == ".md" else [text]
    )
    lines = [line for block in blocks for line in block.splitlines() if line]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("selfcritique ")]
    if path.suffix == ".md":
        known = [line for line in lines if line.startswith(("selfcritique ", *MAKE))]
        assert known == lines, "a command that no test knows"
        assert len(found) == len(re.findall("^selfcritique ", text, re.MULTILINE)), (
            "one outside of a bash block"
        )
    return [words[1:] for words in found]


def small(word: str, places: dict[str, str]) -> list[str]:
    """A word of a command with the demo and the placeholders replaced."""
    if word in ("experiment=demo", "experiment=demo_shuffled"):
        by = ["rft.select.by=shuffled"] if word.endswith("shuffled") else []
        return [*TINY, f"name={word.partition('=')[2]}", *by]
    if word == "rft.select.threshold=9":  # which no critic of this size gives
        return ["rft.select.threshold=2"]
    if word == "trials=30":
        return ["trials=1"]
    for name, place in places.items():
        word = re.sub(rf"(?<![\w/]){name}(?!\w)", place, word)
    return [word]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, smoke: Finished) -> dict[str, str]:
    """What a placeholder stands for."""
    folder = tmp_path_factory.mktemp("user")
    rows = [
        {"question": f"Tom has {i} pens and buys 3 more. How many has he?", "reference": f"#### {i + 3}"}
        for i in range(1100)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "space.yaml").write_text("space:\n  dpo.loss.lam: {choices: [0.5, 1]}\n")
    mine = folder / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# @package _global_\ndefaults: [smoke, _self_]\nname: mine\nrounds: {n: 1}\n")
    return {
        "MODEL": str(smoke.artifact("base")),
        "problems.jsonl": str(folder / "problems.jsonl"),
        "GSM8K": str(GSM8K),
        "FOLDER": str(folder),
    }


def standing(folder: Path) -> dict[str, str]:
    """The last run of each experiment for outputs/NAME/TIME, and a response of the last run that sampled."""
    runs = sorted(folder.glob("outputs/*/*/lineage.json"), key=lambda path: path.stat().st_mtime)
    pool = [entry for path in runs if (entry := read_json(path).get("pool_rft"))][-1]
    rows = pl.read_parquet(folder / "store" / pool["stage"] / pool["key"] / "responses.parquet")
    found = {f"outputs/{path.parts[-3]}/TIME": str(path.parent.relative_to(folder)) for path in runs}
    return found | {"RESPONSE_ID": str(rows["response_id"][0])}


def mark(folder: Path, names: list[str]) -> None:
    """Two annotators who give the exported responses 4 and 7 in turn."""
    rows = list(csv.DictReader((folder / "sheet.csv").open(encoding="utf-8-sig", newline="")))
    for name in names:
        with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
            sheet = csv.DictWriter(file, rows[0])
            sheet.writeheader()
            sheet.writerows(row | {"score": 4 + 3 * (i % 2)} for i, row in enumerate(rows))


@pytest.fixture
def begun(started: Path, tmp_path: Path) -> Path:
    """A copy of the folder with the first runs: what a page adds is its own."""
    return shutil.copytree(started, tmp_path / "begun", symlinks=True)


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, places: dict[str, str], begun: Path) -> None:
    for words in commands(ROOT / page):
        if words[:2] == ["annotate", "import"]:
            mark(begun, ["anna.csv", "ben.csv"])
        words += ADDED.get(words[0], [])
        given = [part for word in words for part in small(word, places | standing(begun))]
        given += ["plan=true"] if PLANNED & set(words) else []
        finished = run(begun, *given)
        assert finished.code == 0, (words, finished.stderr[-2000:])
        if "plan=true" in given:
            assert "stages would run" in finished.stdout
        elif words[0] == "compare":
            assert "| base | " in finished.stdout and "difference, points" in finished.stdout
        elif words[0] == "evaluate":
            assert "| gsm8k | accuracy, % | " in finished.stdout
        elif words[:2] == ["annotate", "import"]:
            assert "| anna.csv – ben.csv | 8 | 1.000 | 1.000 | 1.000 | 0.000 |" in finished.stdout


def patched(page: str, folder: Path) -> dict[str, str]:
    """The environment of the sources with the page's changes; each hunk is found by its lines alone."""
    shutil.copytree(ROOT / "src", folder / "src")
    (folder / "conf").symlink_to(ROOT / "conf")
    (block,) = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for file, hunks in re.findall(r"^\+\+\+ b/(.*)\n((?:[@ +].*\n)+)", block, re.MULTILINE):
        text = (folder / file).read_text()
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            before, after = (
                "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] != sign)
                for sign in "+-"
            )
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        (folder / file).write_text(text)
    return os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_worked_example(places: dict[str, str], begun: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    environment = patched(page, tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (change,) = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(change.splitlines()) < 30
    subprocess.run([sys.executable, "-c", example], env=environment, check=True)
    for words in commands(ROOT / "docs" / "extending.md"):
        given = [part for word in words for part in small(word, places)]
        command = [sys.executable, "-m", "selfcritique", *given]
        subprocess.run(command, cwd=begun, env=environment, check=True, stdout=subprocess.DEVNULL)
    (selected,) = (load_run(path.parent, begun / "store").path("select", "selected.parquet")
                   for path in begun.glob("outputs/mine/*/lineage.json"))  # fmt: skip
    kept = pl.read_parquet(selected).filter("selected")
    assert kept.height and kept.select("problem_id", "n_tokens").is_unique().all()


def test_messages_of_the_troubleshooting_page_are_real() -> None:
    """… stands for what a message fills in."""
    known = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                known.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^> (.*)$", page, re.MULTILINE)
    assert len(quoted) > 15
    assert not [message for message in quoted if not any(message in text for text in known)]


def test_every_page_is_known() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with_commands = {str(page.relative_to(ROOT)) for page in pages if commands(page)}
    assert with_commands == {*PAGES, "docs/extending.md"} - {"experiments/demo/run.sh"}


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
