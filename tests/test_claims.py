"""Every claim stands on its page word for word and names what it comes from; where the run's result is in
git, its numbers are computed anew."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLAIMS: list[dict[str, Any]] = yaml.safe_load((ROOT / "experiments" / "claims.yaml").read_text())
FIELDS = {"page", "sentence", "experiment", "commit", "artifact", "figures"}


def entry(result: Any, path: str) -> float:
    """At a dotted path of a summary.json or sweep.json; in a list a number picks an item, `A-B` a
    comparison of accuracies."""
    found = result
    for name in path.split("."):
        if isinstance(found, list) and not name.isdecimal():
            a, b = name.split("-")
            (found,) = (r for r in found if (r["a"], r["b"], r["metric"]) == (a, b, "accuracy"))
        else:
            found = found[int(name) if isinstance(found, list) else name]
    return float(found)


def printed(value: float, like: str) -> str:
    """A number as `like` is: its decimals, and its sign or commas where it has them."""
    flags = "+" * like.startswith(("+", "-")) + "," * ("," in like)
    return f"{value:{flags}.{len(like.partition('.')[2])}f}"


def faults(claim: dict[str, Any], root: Path) -> list[str]:
    """What is wrong with a claim."""
    found = []
    if not FIELDS <= claim.keys() <= FIELDS | {"scale", "result"}:
        return [f"fields {sorted(claim)}"]
    if " ".join(claim["sentence"].split()) not in " ".join((root / claim["page"]).read_text().split()):
        found.append("the page has no such sentence")
    if not (root / "conf" / "experiment" / f"{claim['experiment']}.yaml").is_file():
        found.append("no such experiment")
    if not re.fullmatch(r"[0-9a-f]{7,40}", str(claim["commit"])):
        found.append("no commit")
    if not re.fullmatch(r"[a-z_]+/[0-9a-f]{16}", claim["artifact"]):
        found.append("no artifact")
    found += [f"{n} is not in the sentence" for n in claim["figures"].values() if n not in claim["sentence"]]
    if "result" in claim:
        result = json.loads((root / claim["result"]).read_text())
        for path, number in claim["figures"].items():
            now = printed(claim.get("scale", 100) * entry(result, path), number)
            found += [f"{path} is {now}, not {number}"] if now != number else []
    return found


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c['experiment']} {' '.join(c['figures'])}"[:60])
def test_a_claim(claim: dict[str, Any]) -> None:
    assert faults(claim, ROOT) == []


def test_every_number_of_the_readmes_table_is_claimed() -> None:
    page = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"^\| model \| accuracy.*?\n\n", page, re.MULTILINE | re.DOTALL)
    rows = table.strip().splitlines()[2:]
    sentences = [claim["sentence"] for claim in CLAIMS if claim["page"] == "README.md"]
    assert len(rows) == 4 and all(any(row.startswith(s) for s in sentences) for row in rows)


def test_what_a_wrong_claim_is_told(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "x.yaml").touch()
    (tmp_path / "page.md").write_text("RFT gains\n+11.1 points, from 1,304 responses.")
    summary = {"comparisons": [{"a": "rft", "b": "base", "metric": "accuracy", "delta": 0.11149}],
               "settings": [{"best": None}, {"best": {"delta": -0.02}}]}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    claim = {
        "page": "page.md", "sentence": "RFT gains +11.1 points", "experiment": "x", "commit": "370fbce",
        "artifact": f"evaluate/{'0' * 16}", "figures": {"comparisons.rft-base.delta": "+11.1"},
        "result": "summary.json",
    }  # fmt: skip
    assert faults(claim, tmp_path) == []
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sentence": "RFT gains +11.1 point."}, "no such sentence"),
        ({"experiment": "y"}, "no such experiment"),
        ({"artifact": "store/evaluate"}, "no artifact"),
        ({"commit": "today"}, "no commit"),
        ({"figures": {"comparisons.rft-base.delta": "+11.2"}}, "+11.2 is not in the sentence"),
        ({"figures": {"settings.1.best.delta": "+11.1"}}, "settings.1.best.delta is -2.0, not +11.1"),
        ({"scale": 1}, "is +0.1, not +11.1"),
        ({"seed": 0}, "fields"),
    ]
    for change, said in wrong:
        assert said in "; ".join(faults(claim | change, tmp_path)), change
    assert [printed(4304, "4,304"), printed(-0.0149, "-0.01"), printed(0.5, "50.0")] == [
        "4,304",
        "-0.01",
        "0.5",
    ]
