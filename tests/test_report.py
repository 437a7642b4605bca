"""The report: its numbers follow from the per-example rows, and a real browser can use it."""

import base64
import csv
import gzip
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import polars as pl
import pytest

from runs import SMOKE, Finished, completed, read_json
from selfcritique import page, sections
from selfcritique.artifacts import Artifact, Store
from selfcritique.figures import Figure, Mark, _canvas, _style, dots
from selfcritique.page import pick
from selfcritique.results import load_run
from selfcritique.sections import flat, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ---- numbers -------------------------------------------------------------------------------------------


def table(html: str, name: str) -> list[dict[str, str]]:
    """A table of the page: column -> text of the cell."""
    (found,) = re.findall(rf'<table id="table-{name}">(.*?)</table>', html, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", found)]
    head, *rest = ([unescape(cell) for cell in row] for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rest]


def numbers(cell: str) -> list[float]:
    return [float(x.replace(",", "")) for x in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", cell)]


def wilson(hits: int, n: int) -> list[float]:
    """Percent: the share and the roots p of (share − p)² = z² p (1 − p) / n."""
    z2, share = 1.959964**2, hits / n
    a, b, c = 1 + z2 / n, -(2 * share + z2 / n), share**2
    root = math.sqrt(b * b - 4 * a * c)
    return [100 * share, 100 * (-b - root) / (2 * a), 100 * (-b + root) / (2 * a)]


def close(cell: str, *expected: float) -> None:
    assert numbers(cell) == [pytest.approx(x, rel=6e-4, abs=0.051) for x in expected], (cell, expected)


@pytest.fixture(scope="module")
def html(smoke: Finished) -> str:
    return (smoke.out / "report.html").read_text()


def rows(path: Path) -> list[dict[str, Any]]:
    return pl.read_parquet(path).to_dicts()


def test_accuracies_follow_from_the_answers(html: str, smoke: Finished) -> None:
    shown = {row["model"]: row for row in table(html, "models")}
    right: dict[str, dict[str, bool]] = {}
    for name, cells in shown.items():
        answers = rows(smoke.artifact(f"eval_{name}") / "eval.parquet")
        greedy = [a for a in answers if a["kind"] == "greedy"]
        right[name] = {a["problem_id"]: a["verdict"] == "correct" for a in greedy}
        close(cells["accuracy"], *wilson(sum(right[name].values()), len(greedy)))
        sampled = defaultdict(list)
        for a in answers:
            if a["kind"] == "sample":
                sampled[a["problem_id"]].append(a)
        passed = sum(any(a["verdict"] == "correct" for a in two) for two in sampled.values())
        best = [max(two, key=lambda a: (a["score"] or 0, -a["sample"])) for two in sampled.values()]
        close(cells["pass@2"], *wilson(passed, 20))
        close(cells["best@2"], *wilson(sum(a["verdict"] == "correct" for a in best), 20))
        for group in ("family", "register"):
            for row in table(html, f"by_{group}"):
                of = [a["verdict"] == "correct" for a in greedy if a[group] == row[group]]
                close(row[name], *wilson(sum(of), len(of)))
    assert list(shown) == ["base", "sft", "rft", "dpo"]
    for row in table(html, "comparisons"):
        a, b = row["comparison"].split(" − ")
        delta = 100 * fmean(right[a][p] - right[b][p] for p in right[a])
        assert numbers(row["points"])[0] == pytest.approx(delta, abs=0.051)


def test_the_critic_follows_from_its_card(html: str, smoke: Finished) -> None:
    for shown in table(html, "critic"):
        recall: dict[bool, list[bool]] = {True: [], False: []}
        for row in rows(smoke.artifact(shown["card"]) / "rows.parquet"):
            truth = row["verdict"] == "correct"
            recall[truth].append(row["score"] is not None and (row["score"] >= 6) == truth)
        balanced = 50 * (fmean(recall[True]) + fmean(recall[False]))
        assert numbers(shown["balanced accuracy, %"])[0] == pytest.approx(balanced, abs=0.051)
        assert numbers(shown["n"] + " " + shown["n correct"]) == [
            sum(map(len, recall.values())),
            len(recall[True]),
        ]


@pytest.mark.parametrize(("scores", "name"), [("scores_rft", "select"), ("scores_dpo", "pairs")])
def test_thresholds_follow_from_the_scores(html: str, smoke: Finished, scores: str, name: str) -> None:
    scored = rows(smoke.artifact(scores) / "scored.parquet")
    right = sum(row["verdict"] == "correct" for row in scored)
    shown = table(html, f"threshold_{name}")
    assert [float(row["threshold"]) for row in shown] == [1 + i / 2 for i in range(19)]
    for row in shown:
        kept = [s for s in scored if s["score"] is not None and s["score"] >= float(row["threshold"])]
        hits = sum(s["verdict"] == "correct" for s in kept)
        values = [hits / right, len(kept) / len(scored), len({s["problem_id"] for s in kept}) / 80]
        for column, value in zip(("recall", "yield"), values, strict=False):
            assert float(row[column]) == pytest.approx(value, rel=6e-4)
        assert (
            row["precision"] == "–"
            if not kept
            else float(row["precision"]) == pytest.approx(hits / len(kept), rel=6e-4)
        )


def test_decisions_and_lengths_follow_from_the_rows(html: str, smoke: Finished) -> None:
    reasons = rows(smoke.artifact("pairs") / "reasons.parquet")
    sides = Counter(r["reason"] if r["role"] == "none" else r["role"] for r in reasons)
    reasons = Counter(r["reason"] for r in rows(smoke.artifact("select") / "selected.parquet"))
    shown = {(r["pool"], r["decision"]): int(r["responses"]) for r in table(html, "decisions")}
    assert shown == {
        **{("pool_dpo", k): n for k, n in sides.items()},
        **{("pool_rft", k): n for k, n in reasons.items()},
    }
    for row in table(html, "lengths"):
        answers = rows(smoke.artifact(row["stage"]) / "responses.parquet")
        lists = {(a["problem_id"], a["equations_hash"]) for a in answers}
        assert float(row["tokens"]) == pytest.approx(fmean(a["n_tokens"] for a in answers), rel=6e-4)
        assert float(row["equation lists per response"]) == pytest.approx(len(lists) / len(answers), rel=6e-4)
    assert len(table(html, "lengths")) == 13 and len(table(html, "stages")) == 40


def test_samples_hold_what_was_decided(html: str, smoke: Finished) -> None:
    held = {(s["stage"], s["response_id"]): s for s in samples_of(html)}
    assert len(held) == sum(int(row["responses"]) for row in table(html, "lengths"))
    pairs = rows(smoke.artifact("pairs") / "pairs.parquet")
    for pair in pairs:
        chosen = held["pool_dpo", pair["chosen_id"]]
        assert (
            chosen["decision"] == "chosen" and held["pool_dpo", pair["rejected_id"]]["decision"] == "rejected"
        )
        assert {
            "partner": pair["rejected_id"],
            "score": pair["rejected_score"],
            "margin": pair["margin"],
        } in chosen["partners"]
    texts = {r["response_id"]: r["text"] for r in rows(smoke.artifact("pool_rft") / "responses.parquet")}
    critiques = defaultdict(list)
    for row in rows(smoke.artifact("scores_rft") / "critiques.parquet"):
        critiques[row["response_id"]].append((row["text"], row["score"]))
    for row in rows(smoke.artifact("select") / "selected.parquet"):
        sample = held["pool_rft", row["response_id"]]
        assert (sample["decision"], sample["score"]) == (row["reason"], row["score"])
        assert sample["response"] == texts[row["response_id"]]
        assert [(c["text"], c["score"]) for c in sample["critiques"]] == critiques[row["response_id"]]


@pytest.fixture(scope="module")
def beside(smoke: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke run whose critic and models were measured afterwards."""
    folder = tmp_path_factory.mktemp("beside")
    shutil.copytree(smoke.store, folder / "store", symlinks=True)
    shutil.copytree(smoke.out, folder / "outputs" / "smoke" / "run")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "Tom has 4 pens and buys 3 more. " * 60}) + "\n")
    models = ",".join(f"outputs/smoke/run/{name}" for name in ("base", "rft", "dpo"))
    completed(folder, "critic-card", "critic=outputs/smoke/run", "modes=[logit]", "probes=4")
    completed(folder, "evaluate", f"model=[{models}]", "sets=[text]", "paths.text=texts.jsonl", "window=32")
    completed(folder, "report", "run=outputs/smoke/run")
    return folder


def test_what_was_measured_afterwards_follows_from_its_rows(beside: Path) -> None:
    html = (beside / "outputs" / "smoke" / "run" / "report.html").read_text()
    (card,) = beside.glob("outputs/critic_card/*/scores.parquet")
    read = defaultdict(list)
    for row in rows(card):
        read[row["reading"]].append(row)
    (shown,) = (row for row in table(html, "readings") if row[""] == "balanced accuracy")
    assert list(shown)[1:] == list(read)
    for reading, answers in read.items():
        recall: dict[bool, list[bool]] = {True: [], False: []}
        for a in answers:
            truth = a["verdict"] == "correct"
            recall[truth].append(a["score"] is not None and (a["score"] >= 6) == truth)
        close(shown[reading], (fmean(recall[True]) + fmean(recall[False])) / 2)

    bounds = {row["probe"]: float(row["bound"]) for row in table(html, "probes")}
    found = []
    for path in [*beside.glob("store/score/*/scored.parquet"), *beside.glob("store/floor/*/scored.parquet")]:
        scored = pl.read_parquet(path)
        if "probe" in scored.columns:
            tried = {name: scored.filter(probe=name)["score"].to_list() for name in bounds}
            found.append([100 * fmean((s or 0) >= bounds[p] for s in tried[p]) for p in bounds])
    columns = [[numbers(row[reading])[0] for row in table(html, "probes")] for reading in read]
    assert not [column for column in columns if not any(column == pytest.approx(f, abs=0.051) for f in found)]

    (values,) = beside.glob("outputs/evaluate/*/values.parquet")
    nll = {(a["model"], a["problem_id"]): a["value"] for a in rows(values) if a["metric"] == "nll"}
    for row in table(html, "evaluations"):
        if row["metric"] == "perplexity":
            own = fmean(value for (model, _), value in nll.items() if model == row["model"])
            assert numbers(row["value"])[0] == pytest.approx(math.exp(own), rel=2e-2)
    windows = {window for _, window in nll}
    retained = {row["model"]: row for row in table(html, "retention_text")}
    assert list(retained) == ["rft", "dpo"]
    gained = {
        row["comparison"]: row["points"] for row in table(html, "comparisons") if row["metric"] == "accuracy"
    }
    for model, row in retained.items():
        delta = fmean(nll[model, w] - nll["base", w] for w in windows)
        (shown_delta,) = (cell for name, cell in row.items() if name.startswith("text"))
        assert numbers(shown_delta)[0] == pytest.approx(delta, rel=0.1, abs=1e-3)
        assert row["gained, points"] == gained[f"{model} − base"]


def test_a_sweep_ends_with_a_report(started: Path) -> None:
    (path,) = started.glob("outputs/grid/*/report.html")
    html = path.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", html)[:2] == ["λ × β", "Runs"]
    for row in table(html, "runs"):
        run = load_run(path.parent / row["run"], started / "store")
        right = [a["verdict"] == "correct" for a in rows(run.path("eval_dpo", "eval.parquet"))]
        close(row["dpo"], *wilson(sum(right), len(right)))
        assert float(row["β"]) == run.config["dpo"]["loss"]["beta"]
        assert (path.parent / row["run"] / "report.html").is_file()
    assert [row["run"] for row in table(html, "runs")] == ["0", "1"]


def test_a_run_that_stops_early_leaves_sections_out(smoke: Finished, tmp_path: Path) -> None:
    stopped = completed(tmp_path, *SMOKE, f"store={smoke.store}", "until=problems", "logger=none")
    html = (stopped.out / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Diagnosis", "Stages", "Samples"]
    assert 'id="samples" hidden' in html and samples_of(html) == []


# ---- synthetic runs ------------------------------------------------------------------------------------


def unpack(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def samples_of(html: str) -> list[dict[str, Any]]:
    chunks = re.findall(r'<script type="text/plain" class="chunk">(.*?)</script>', html)
    return [sample for chunk in chunks for sample in unpack(chunk)]


def synthetic(root: Path, n: int) -> Path:
    """A run with n responses of about a kilobyte, half of them in each pool, two to a question."""
    rng, store, done = Random(0), Store(root / "store"), dict[str, Artifact]()

    def text(words: int) -> str:
        return " ".join(f"w{rng.randrange(5000)}" for _ in range(words))

    def add(
        name: str, stage: str, config: dict[str, Any], tables: dict[str, list[Any]], **inputs: str
    ) -> None:
        def write(out: Path) -> dict[str, Any]:
            for file, rows in tables.items():
                pl.DataFrame(rows, infer_schema_length=None).write_parquet(out / f"{file}.parquet")
            return {}

        made_from = {role: done[source] for role, source in inputs.items()}
        done[name] = store.build(stage, 1, f"{len(done):016x}", config, made_from, write)

    families = ("share", "collect", "trade")
    same = {"reference": text(20), "source": "made", "register": "plain", "difficulty": 2}
    asked = [
        {"problem_id": f"{i:016x}", "question": text(20), "answer": str(i), "family": families[i % 3], **same}
        for i in range(n // 2)
    ]
    add("problems", "problems", {}, {"problems": asked})
    for pool in ("rft", "dpo"):
        mine = asked[: n // 4] if pool == "rft" else asked[n // 4 :]
        responses, scored, critiques = [], [], []
        for i in range(n // 2):
            score = None if i % 50 == 0 else float(rng.randint(1, 10))
            key = {"problem_id": mine[i // 2]["problem_id"], "response_id": f"{rng.randrange(16**16):016x}"}
            marks = {"n_tokens": 60, "truncated": False, "answer": "7", "equations_hash": f"{i % 7}",
                     "verdict": rng.choice(("correct", "incorrect"))}  # fmt: skip
            rare = " zebra" if i % 100 == 3 else ""
            responses.append(key | marks | {"text": f"<b>response</b> {text(40)}{rare}"})
            scored.append(key | marks | {"score": score, "parse": "ok" if score else "failed"})
            critiques.append(
                {**key, "sample": 0, "text": text(40), "score": score, "parse": scored[-1]["parse"]}
            )
        add(f"pool_{pool}", "sample", {}, {"responses": responses}, problems="problems")
        add(
            f"scores_{pool}",
            "score",
            {},
            {"critiques": critiques, "scored": scored},
            responses=f"pool_{pool}",
        )
        if pool == "rft":
            chosen = [{"response_id": s["response_id"], "reason": "unparsed" if s["score"] is None else
                       "selected" if s["score"] >= 6 else "below_threshold"} for s in scored]  # fmt: skip
            add("select", "select", {"select": {"threshold": 6}}, {"selected": chosen}, scored="scores_rft")
    pairs, reasons = [], []
    for one, two in zip(scored[::2], scored[1::2], strict=True):
        worst, best = sorted((one, two), key=lambda s: s["score"] or 0)
        apart = (best["score"] or 0) >= 6 > (worst["score"] or 9)
        for side, s in (("chosen", best), ("rejected", worst)):
            reason = "paired" if apart else "no_partner"
            reasons.append(
                {"response_id": s["response_id"], "role": side if apart else "none", "reason": reason}
            )
        if apart:
            pairs.append({"chosen_id": best["response_id"], "rejected_id": worst["response_id"],
                          "chosen_score": best["score"], "rejected_score": worst["score"],
                          "margin": best["score"] - worst["score"]})  # fmt: skip
    add(
        "pairs",
        "pairs",
        {"build": {"threshold": 6}},
        {"pairs": pairs, "reasons": reasons},
        scored="scores_dpo",
    )
    out = root / "outputs" / "synthetic" / "now"
    out.mkdir(parents=True)
    summary = {"experiment": "synthetic", "seed": 0, "seed_from": "", "commit": "none", "models": {},
               "wall_s": {"total": 1.0}, "cached": dict.fromkeys(done, False), "comparisons": [],
               "diagnosis": []}  # fmt: skip
    lineage = {name: {"stage": a.stage, "key": a.key} for name, a in done.items()}
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "lineage.json").write_text(json.dumps(lineage))
    (out / "config.yaml").write_text(f"store: {root / 'store'}\n")
    (out / "metrics.jsonl").touch()
    return out


def test_a_sample_is_in_proportion_and_leaves_no_stratum_out() -> None:
    """1,000 of which 900, 90, 9 and 1: a tenth is 90, 9, 1 and the one; nulls are a stratum too."""
    sizes = {"a": 900, "b": 90, None: 9, "c": 1}
    ids = iter(f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}" for i in range(1000))
    whole = pl.DataFrame(
        [
            {"stage": "s", "verdict": "v", "decision": d, "problem_id": "p", "response_id": next(ids)}
            for d, n in sizes.items()
            for _ in range(n)
        ]
    )
    found = pick(whole, 101)
    assert dict(found["decision"].value_counts().iter_rows()) == {"a": 90, "b": 9, None: 1, "c": 1}
    assert pick(whole.sample(1000, shuffle=True, seed=1), 101).equals(found)
    assert set(pick(whole, 4)["decision"]) == set(sizes)


def test_a_page_over_its_size_holds_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(synthetic(tmp_path, 2000))
    whole = write_report([run]).stat().st_size
    monkeypatch.setattr(page, "MOST_BYTES", whole // 3)
    html = write_report([run]).read_text()
    chunks = re.findall(r'class="chunk">(.*?)</script>', html)
    assert sum(map(len, chunks)) <= whole // 3 and 500 < len(samples_of(html)) < 800
    (index,) = re.findall(r'id="index">(.*?)</script>', html)
    assert unpack(index)["total"] == 2000


# ---- in a browser --------------------------------------------------------------------------------------


class Opened:
    """A page in Chromium; what it says and asks for is kept."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#list a", timeout=60_000)

    def count(self) -> int:
        return int(self.page.inner_text("#count").split()[0].replace(",", ""))

    def first(self) -> list[str]:
        """stage/id of the rows shown."""
        links = self.page.eval_on_selector_all("#list a", "all => all.map(a => a.hash)")
        return [re.findall(r"open=(\w+)%2F(\w+)", link)[0] for link in links]

    def open(self) -> str:
        return str(self.page.inner_text("#sample h3 >> nth=0"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


# From a change of a filter to the list that shows it, in ms.
FILTER = """async ([name, value]) => {
  const field = document.querySelector(`[name=${name}]`), before = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - before;
}"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; `make test` installs it on Debian")
@pytest.mark.parametrize("n", [1_000, 100_000])
def test_the_samples_in_a_browser(
    n: int, browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_report([load_run(synthetic(tmp_path, n))])
    html, url = path.read_text(), path.as_uri()
    held = samples_of(html)
    assert len(held) == min(n, 20_000) and path.stat().st_size < 25 * 2**20
    opened = Opened(browser, url, viewport={"width": 1280, "height": 900})
    view = opened.page
    first_ms = view.evaluate("performance.now()")
    stated = view.inner_text("#held")
    assert (
        stated == "All 1,000 responses of this run."
        if n == 1000
        else stated.startswith("20,000 of 100,000 responses: drawn")
    )
    view.wait_for_selector("body[data-ready]", timeout=60_000)

    def expect(wanted: list[dict[str, Any]]) -> None:
        assert opened.count() == len(wanted)
        assert opened.first() == [(s["stage"], s["response_id"]) for s in wanted[:50]]

    times = [view.evaluate(FILTER, ["stage", "pool_dpo"])]
    expect(wanted := [s for s in held if s["stage"] == "pool_dpo"])
    times.append(view.evaluate(FILTER, ["decision", "chosen"]))
    expect(wanted := [s for s in wanted if s["decision"] == "chosen"])
    times.append(view.evaluate(FILTER, ["low", "8"]))
    expect(wanted := [s for s in wanted if s["score"] is not None and s["score"] >= 8])
    times.append(view.evaluate(FILTER, ["family", "trade"]))
    expect(wanted := [s for s in wanted if s["family"] == "trade"])
    times.append(view.evaluate(FILTER, ["verdict", "correct"]))
    expect([s for s in wanted if s["verdict"] == "correct"])
    view.click("button[type=reset]")
    view.locator("#count", has_text=re.compile(f"^{len(held):,} of")).wait_for()
    times.append(view.evaluate(FILTER, ["q", " ZEBRA"]))
    expect(wanted := [s for s in held if "zebra" in s["response"]])
    assert len(wanted) > 1
    with capsys.disabled():
        size, shown = path.stat().st_size / 2**20, ", ".join(f"{t:.0f}" for t in times)
        print(f"\n{n:,} samples, {size:.1f} MiB: first view {first_ms:.0f} ms, filters {shown} ms")

    view.keyboard.press("Tab")  # from the body to the first link: all is reached without a mouse
    view.focus("#list a >> nth=1")
    view.keyboard.press("Enter")
    view.locator("#sample h3", has_text="/").wait_for()
    assert opened.open() == "{stage}/{response_id}".format(**wanted[1])
    view.keyboard.press("k")
    view.locator("#sample", has_text=wanted[0]["response_id"]).wait_for()
    assert view.locator("#list a[aria-current]").count() == 1
    view.keyboard.press("/")
    assert view.evaluate("document.activeElement.name") == "q"
    view.keyboard.type("k")  # is text here
    assert view.input_value("[name=q]") == " ZEBRAk" and wanted[0]["response_id"] in opened.open()

    pair = next(s for s in held if s["partners"])
    linked = Opened(browser, f"{url}#stage=pool_dpo&open=pool_dpo/{pair['response_id']}")
    linked.page.wait_for_selector("#sample h3")
    text = linked.page.inner_text("#sample")
    for part in (
        pair["question"],
        pair["response"],
        pair["critiques"][0]["text"],
        pair["partners"][0]["partner"],
    ):
        assert part in text
    assert linked.count() == sum(s["stage"] == "pool_dpo" for s in held)
    assert opened.said == linked.said == [] and opened.asked == [url]
    assert [request.partition("#")[0] for request in linked.asked] == [url]


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)" (WCAG 2)."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; `make test` installs it on Debian")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_legible(width: int, scheme: str, browser: Any, smoke: Finished) -> None:
    url = (smoke.out / "report.html").as_uri()
    opened = Opened(browser, url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    measure = "all => all.map((e) => [getComputedStyle(e).fill, e.getBoundingClientRect().height])"
    texts = opened.page.eval_on_selector_all("section:not(#stages) svg text", measure)  # those stand in boxes
    assert len(texts) > 100
    for ink, height in texts:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 7 and height >= 9
    assert opened.said == [] and opened.asked == [url]


# ---- files and several runs ------------------------------------------------------------------------------


def test_files_for_a_paper(smoke: Finished, html: str, tmp_path: Path) -> None:
    run = load_run(smoke.out, smoke.store)
    write_report([run], tmp_path)
    tables, figures = re.findall(r'id="table-(\w+)"', html), len(re.findall(r"<svg", html))
    assert {p.stem for p in tmp_path.glob("*.csv")} == {p.stem for p in tmp_path.glob("*.tex")} == set(tables)
    assert len(list(tmp_path.glob("*.svg"))) == len(list(tmp_path.glob("*.png"))) == figures > 15
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in tmp_path.glob("*.png"))
    found = list(csv.DictReader((tmp_path / "models.csv").open(newline="")))
    models = read_json(smoke.out / "summary.json")["models"]
    for row in found:
        accuracy = models[row["model"]]["accuracy"]
        values = [float(row[f"accuracy{suffix}"]) for suffix in ("", " low", " high")]
        assert values == [pytest.approx(100 * accuracy[key]) for key in ("value", "low", "high")]
    latex = (tmp_path / "comparisons.tex").read_text()
    assert latex.count(r"\\") == 7 and r"relative, \%" in latex and latex.startswith(r"\begin{tabular}{ll")


def point(root: Path, number: int, beta: float, seed: int, answers: str) -> Path:
    """A finished run of a sweep over β whose DPO model answers so: y right, x wrong."""
    out = root / "outputs" / "grid" / f"{number}"
    out.mkdir(parents=True)
    rows = [
        {
            "problem_id": str(i),
            "source": "s",
            "kind": "greedy",
            "verdict": "correct" if a == "y" else "incorrect",
        }
        for i, a in enumerate(answers)
    ]
    made = Store(root / "store").build(
        "evaluate",
        1,
        f"{number:016x}",
        {},
        {},
        lambda at: pl.DataFrame(rows).write_parquet(at / "eval.parquet") or {},
    )
    accuracy = {"value": answers.count("y") / len(answers), "low": 0.0, "high": 1.0, "n": len(answers)}
    summary = {"experiment": "grid", "seed": seed, "models": {"dpo": {"accuracy": accuracy}}, "cached": {},
               "comparisons": [], "diagnosis": [], "wall_s": {"total": 1.0}}  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "lineage.json").write_text(json.dumps({"eval_dpo": {"stage": "evaluate", "key": made.key}}))
    (out / "config.yaml").write_text(f"store: {root / 'store'}\ndpo: {{loss: {{lam: 1.0, beta: {beta}}}}}\n")
    return out


def test_cells_of_a_sweep_that_are_not_told_from_the_best(tmp_path: Path) -> None:
    """Of 100 problems and two seeds: β 1 is best with 81 %, β 0.5 differs in one problem of the other side
    (80.5 %), β 2 is wrong in 60 problems more (21 %)."""
    best, near, far = "y" * 81 + "x" * 19, "x" + "y" * 80 + "x" * 19, "y" * 21 + "x" * 79
    made = [
        (0.5, 0, near), (0.5, 1, best), (1.0, 0, best), (1.0, 1, best), (2.0, 0, far), (2.0, 1, far)
    ]  # fmt: skip
    runs = [load_run(point(tmp_path, i, *run)) for i, run in enumerate(made)]
    path = write_report(runs)
    assert path == tmp_path / "outputs" / "grid" / "report.html"
    cells = {row["β"]: row for row in table(path.read_text(), "lambda_beta")}
    assert {b: (c["accuracy, %"], c["seeds"], c["not told from the best"]) for b, c in cells.items()} == {
        "0.5": ("80.5", "2", "yes"), "1": ("81", "2", "yes"), "2": ("21", "2", "")
    }  # fmt: skip
    assert numbers(cells["2"]["− best, points"])[0] == -60
    assert [row["dpo"][:4] for row in table(path.read_text(), "runs")] == [
        "80.0",
        "81.0",
        "81.0",
        "81.0",
        "21.0",
        "21.0",
    ]


def test_settings_that_are_no_grid_are_drawn_by_their_distance_to_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third setting differs, so there is no heat map: the worse has 21 of 100 right, the best 81."""
    made = [point(tmp_path, i, beta, i % 2, "y" * n + "x" * (100 - n)) for i, (beta, n) in
            enumerate([(0.5, 81), (0.5, 81), (1.0, 21), (1.0, 21)])]  # fmt: skip
    for out, policy in zip(made, ("rft", "rft", "base", "base"), strict=True):
        with (out / "config.yaml").open("a") as config:
            config.write(f"pairs: {{policy: {policy}}}\n")
    drawn: dict[str, list[Mark]] = {}
    monkeypatch.setattr(sections, "dots", lambda x, marks: dots(x, drawn.setdefault(x, marks)))
    write_report([load_run(out) for out in made], tmp_path / "export")
    assert not (tmp_path / "export" / "lambda_beta.svg").exists()
    assert "0.5, rft" in (tmp_path / "export" / "settings.svg").read_text()
    best, worse = drawn["− best, points"]
    assert best == ("0.5, rft", "", 0, 0, 0)
    name, _, delta, low, high = worse
    assert name == "1.0, base" and delta == pytest.approx(-60)
    assert (
        low is not None and high is not None and -75 < low < -60 < high < -45
    )  # 4.9 points of error each way


@pytest.mark.parametrize("series", [2, 4, 5, 9])
def test_a_legend_has_room(series: int) -> None:
    """Above the axes, however many lines it has."""
    marks = [("row", f"model {i}", float(i), None, None) for i in range(series)]
    with _style("#000000"):
        canvas = _canvas(Figure("x", "", dots("percent", marks)))
        canvas.draw_without_rendering()
    (legend,) = (axes.get_legend() for axes in canvas.axes)
    assert legend.get_window_extent().y1 <= canvas.bbox.y1


def test_long_names_leave_room_for_the_axes() -> None:
    """A setting may be a list of anything: its name is cut, the axes keep two fifths of five inches."""
    marks = [("x" * n, "", 1.0, 0.5, 1.5) for n in (3, 300)]
    canvas = _canvas(Figure("x", "", dots("percent", marks)))
    (axes,) = canvas.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["xxx", "x" * 29 + "…"]
    assert axes.get_position().width > 0.35


def test_settings_in_a_list_have_names_of_their_own() -> None:
    settings = {"data": {"mix": [{"source": "a", "registers": ["plain"]}], "none": []}, "arms": ["sft"]}
    assert flat(settings) == {
        "data.mix.0.source": "a",
        "data.mix.0.registers": '["plain"]',
        "data.none": "[]",
        "arms": '["sft"]',
    }
