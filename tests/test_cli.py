"""The command line: every mistake of a user ends with one message that names it and how to mend it."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfcritique.__main__ import main
from selfcritique.artifacts import Store, artifact_key

Cli = Callable[..., tuple[int, str, str]]  # words -> exit code, stdout, stderr
RUN = ("experiment=smoke", "until=problems")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """The program in this process, in an empty folder; what it sets is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["selfcritique"])
    for name in ("OMP_NUM_THREADS", "HYDRA_FULL_ERROR", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    handlers, level = list(logging.root.handlers), logging.root.level

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def fails(cli: Cli, *words: str) -> str:
    """The one message of a run that ends with exit code 1."""
    code, _, errors = cli(*words)
    assert code == 1 and errors.count("ERROR: ") == 1 and "Traceback" not in errors
    return errors[errors.index("ERROR: ") :]


def says(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rft.select.treshold=4", ("rft.select.treshold", "Did you mean threshold?", "cap_per_question")),
        ("modle=tiny", ("modle", "Did you mean model?")),
        ("data.mix.0.pth=x", ("data.mix[0].pth", "Did you mean path?")),
        ("data.mix=[{source: jsonl, pth: x}]", ("data.mix", "Did you mean path?")),
        ("rft.select.dedup=equation", ("rft.select.dedup", "'equation'", "[equations, text, none]")),
        ("data.mix.0.source=gsm", ("data.mix[0].source", "[word_problems, gsm8k, math, jsonl]")),
        ("rft.select.threshold=high", ("rft.select.threshold", "'high'", "Float")),
        ("model=tinny", ("model/tinny", "local", "tiny")),
        ("experiment=smok", ("experiment/smok", "demo", "smoke")),
        ("rft.select.threshold=70", ("rft.select", "threshold=70.0", "from 1 to 10")),
        ("rft.train.lr=???", ("rft.train.lr", "no value", "experiment file")),
        ("until=pears", ("'pears'", "pairs", "dpo")),
        ("seed_from=pears", ("'pears'", "pairs", "dpo")),
        ("model.path=nowhere", ("nowhere", "config.json", "safetensors", "tokenizer")),
        ("critic.model=nowhere", ("nowhere", "config.json")),
        ("rft.select.threshold", ("rft.select.threshold", "EQUAL")),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(
    override: str, parts: tuple[str, ...], cli: Cli
) -> None:
    message = fails(cli, "experiment=smoke", "plan=true", override)
    says(message, *parts)
    assert "+rft" not in message  # Hydra's advice to append what the schema does not know
    assert not Path("store").exists()


def own_experiment(text: str, name: str = "mine") -> tuple[str, ...]:
    folder = Path("own/experiment")
    folder.mkdir(parents=True)
    (folder / f"{name}.yaml").write_text(f"# @package _global_\nname: mine\n{text}")
    return "--config-dir", "own", f"experiment={name}", "plan=true", "until=problems"


def test_experiments_of_ones_own_live_in_any_folder(cli: Cli) -> None:
    code, out, _ = cli(*own_experiment("data: {seed: 3}\n"))
    assert code == 0 and "problems" in out
    assert cli("--config-dir", "own", "experiment=mine", "--cfg", "job")[1].startswith("name: mine\n")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rft: {select: {treshold: 3}}\n", ("experiment/mine", "select.treshold", "mean threshold?")),
        ("rft: {select: {dedup: eq}}\n", ("experiment/mine", "select.dedup", "[equations, text, none]")),
        ("rtf: {mix: 0}\n", ("experiment/mine", "rtf", "Did you mean rft?")),
        ("data: {mix: [{sorce: gsm8k}]}\n", ("experiment/mine", "sorce", "Did you mean source?")),
        ("rft: {mix: -2}\n", ("rft", "mix=-2.0", "at least 0")),
        ("rft: {select: [\n", ("mine.yaml", "line", "YAML")),
    ],
)  # fmt: skip
def test_a_typo_in_an_experiment_file_names_the_file_and_the_key(
    text: str, parts: tuple[str, ...], cli: Cli
) -> None:
    says(fails(cli, *own_experiment(text)), *parts)


def test_one_run_that_failed_does_not_mark_the_next(cli: Cli) -> None:
    fails(cli, *RUN, "until=pears")
    assert cli(*RUN, "plan=true")[0] == 0


def test_a_failing_point_of_a_sweep_does_not_end_the_others(cli: Cli) -> None:
    code, out, errors = cli("-m", *RUN, "plan=true", "rft.select.threshold=70,7")
    assert (code, errors.count("ERROR: ")) == (1, 1) and "Plan" in out


# ---- problems ------------------------------------------------------------------------------------------

GOOD = {"question": "What is 1 + 1?", "reference": "1 + 1 = 2\n#### 2"}


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"question": "What is 2', ("not valid JSON", "mend or delete")),
        (b'{"question": "\xff"}', ("not valid JSON", "UTF-8")),
        (b'["a list"]', ("expected an object", "list")),
        (b'{"reference": "#### 1"}', ("`question`", "missing or empty")),
        (b'{"question": "Q?", "reference": "#### 1", "answer": ""}', ("no final", "non-empty `answer`")),
        (b'{"question": "What?", "reference": "I do not know."}', ("no final answer", "#### answer")),
        (b'{"question": "What?", "reference": 3, "answer": "3"}', ("`reference` must be text", "int")),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_by_file_and_number(line: bytes, parts: tuple[str, ...], cli: Cli) -> None:
    Path("mine.jsonl").write_bytes(b"\n".join([json.dumps(GOOD).encode(), b"", line, b""]))
    message = fails(cli, *RUN, "data.mix=[{source: jsonl, path: mine.jsonl}]")
    says(message, "mine.jsonl:3: ", *parts)


def test_missing_and_too_few_problems(cli: Cli) -> None:
    source = "data.mix=[{{source: {}, path: {}}}]"
    for plan in ("plan=true", "plan=false"):
        says(fails(cli, *RUN, plan, source.format("jsonl", "no.jsonl")), "no.jsonl", "data.mix[].path")
    Path("half").mkdir()
    Path("half/train.jsonl").write_text(json.dumps(GOOD))
    says(fails(cli, *RUN, source.format("gsm8k", "half")), "half/test.jsonl", "data.mix[].path")
    message = fails(cli, *RUN, source.format("jsonl", "half/train.jsonl"))
    says(message, "half/train.jsonl", "1 problems left for split test, which wants 60", "data.splits.test")
    says(fails(cli, "data=jsonl", "plan=true"), "data.mix.0", "path=''", "a JSONL file")
    words = ("annotator=file", "annotator.path=no.csv", "plan=true")
    says(fails(cli, *words), "annotator.path", "no.csv")


def test_the_content_of_a_file_is_part_of_the_key_and_its_place_is_not(cli: Cli) -> None:
    """Read as `plan` prints it: the key of `problems`."""

    def key(path: str) -> str:
        out = cli(*RUN, "plan=true", f"data.mix=[{{source: jsonl, path: {path}}}]")[1]
        return next(line.split("│")[2].strip() for line in out.splitlines() if "problems" in line)

    one, two = Path("one.jsonl"), Path("two.jsonl")
    one.write_text(json.dumps(GOOD))
    two.write_text(json.dumps(GOOD))
    first = key("one.jsonl")
    assert len(first) == 16 and key("two.jsonl") == first
    one.write_text(json.dumps(GOOD | {"answer": "3"}))
    assert key("one.jsonl") != first


# ---- the store -----------------------------------------------------------------------------------------


@pytest.fixture
def keys(cli: Cli) -> list[str]:
    """Two artifacts of 1 MiB in ./store."""
    store, made = Store(Path("store")), []
    for stage in ("sample", "score"):
        key = artifact_key(stage, 1, {}, {})

        def work(out: Path) -> dict[str, str]:
            (out / "data").write_bytes(bytes(2**20))
            return {}

        store.build(stage, 1, key, {}, {}, work)
        made.append(key)
    return made


def test_store_commands(cli: Cli, keys: list[str]) -> None:
    kept, other = keys
    code, out, _ = cli("store", "ls")
    assert code == 0 and all(f"{stage} " in out for stage in ("sample", "score", *keys))
    assert "2 artifacts, 2.0 MiB" in out and "pinned" not in out

    assert cli("store", "pin", kept)[0] == 0
    pinned = [line for line in cli("store", "ls")[1].splitlines() if "pinned" in line]
    assert len(pinned) == 1 and kept in pinned[0]

    assert "1.0 MiB would be freed; add --all to delete" in cli("store", "gc")[1]
    assert len(Store(Path("store")).ls()) == 2
    assert "0.0 MiB would be freed" in cli("store", "gc", other)[1]  # named: kept
    assert "1.0 MiB freed" in cli("store", "gc", "--all")[1]
    assert [row["key"] for row in Store(Path("store")).ls()] == [kept]

    assert cli("store", "unpin", kept)[0] == 0
    assert "1.0 MiB freed" in cli("store", "gc", "--all", "--store", "store")[1]
    assert Store(Path("store")).ls() == []


def test_store_mistakes(cli: Cli, keys: list[str]) -> None:
    says(fails(cli, "store", "pin", "nokey"), "'nokey'", "store ls")
    says(fails(cli, "store", "pin"), "wants one or more keys", "store ls")
    says(fails(cli, "store", "ls", "--store", "elsewhere"), "elsewhere", "--store")
    with pytest.raises(SystemExit) as ended:
        main(["store", "list"])
    assert ended.value.code == 2  # argparse: usage and choices


# ---- what is imported ----------------------------------------------------------------------------------

IMPORTED = """
import sys
from selfcritique.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print("exit", ended.code)
heavy = {"torch", "transformers", "lightning", "pytorch_lightning", "hydra"}
print("imported", *sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "said", "imported"),
    [(("--help",), "smoke", ""), (("experiment=smoke", "plan=true"), "40 of 40 stages would run", " hydra")],
)
def test_help_and_plan_import_nothing_heavy(
    words: tuple[str, ...], said: str, imported: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", IMPORTED, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"exit 0\nimported{imported}\n") and said in done.stdout, done


def test_the_module_is_the_program(tmp_path: Path) -> None:
    """As a process of its own: message on stderr, exit code 1."""
    command = [sys.executable, "-m", "selfcritique", "experiment=smok"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ERROR: ") and "smoke" in done.stderr and "Traceback" not in done.stderr
