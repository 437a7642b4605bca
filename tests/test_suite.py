"""`selfcritique evaluate` on scripted and tiny models: figures derived by hand, nothing asked twice."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import exp, log
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from scripted import EngineDied, ScriptedEngine
from selfcritique import set_stages, stages
from selfcritique.__main__ import main
from selfcritique.config import EvalSet, JudgeConfig, PromptStyle, ServerConfig, SuiteConfig, TinyConfig
from selfcritique.errors import UserError
from selfcritique.records import Message, Prompt
from selfcritique.retention import text_windows, window_losses
from selfcritique.stages import load_encoder
from selfcritique.stats import wilson
from selfcritique.suite import evaluate, labels, markdown, write
from selfcritique.train.model import load_model
from selfcritique.train.tiny import build_tokenizer, save_tiny
from servers import serve

TEXT = "the cat sat on the mat and the dog ran after the cat over the wall again and again "
Answer = Callable[[Prompt, int], str]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


class Cast:
    """Models by name: folders whose content is the name, answering by a function; `asked` counts prompts."""

    def __init__(self, root: Path, **models: Answer) -> None:
        self.models, self.asked = models, list[tuple[str, str]]()
        self.logp: Callable[[Prompt, str], float] = lambda prompt, text: -9.0
        self.folders = {name: str(root / "models" / name) for name in models}
        self.die_at: int | None = None
        for name, folder in self.folders.items():
            Path(folder).mkdir(parents=True)
            (Path(folder) / "config.json").write_text(json.dumps({"name": name}))

    @contextmanager
    def open(self, config: object, model: Path, out: Path) -> Iterator[ScriptedEngine]:
        name = json.loads((model / "config.json").read_text())["name"]

        def answer(prompt: Prompt, sample: int) -> str:
            self.asked.append((name, prompt.messages[-1].content))
            return self.models[name](prompt, sample)

        yield ScriptedEngine(answer, self.logp, batch_size=2, die_at=self.die_at)

    def count(self, name: str) -> int:
        return sum(who == name for who, _ in self.asked)


@pytest.fixture
def cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cast]:
    def make(**models: Answer) -> Cast:
        made = Cast(tmp_path, **models)
        for module in (stages, set_stages):
            monkeypatch.setattr(module, "open_engine", made.open)
        return made

    return make


def settings(cast: Cast, root: Path, models: list[str], sets: list[EvalSet], **more: Any) -> SuiteConfig:
    folders = [cast.folders[name] for name in models]
    return SuiteConfig(model=folders, sets=sets, store=str(root / "store"), **{"max_tokens": 50, **more})


def adds(right: set[int]) -> Answer:
    """Answers "What is n plus 1" rightly for these n."""

    def answer(prompt: Prompt, sample: int) -> str:
        n = int(prompt.messages[-1].content.split()[-3])
        return f"#### {n + 1}" if n in right else "#### 0"

    return answer


def test_checked_set_with_a_paired_comparison(cast: Callable[..., Cast], tmp_path: Path) -> None:
    """base is right on 1 of 4, better on the same and two more: 25 %, 75 %, +50 points; two discordant pairs
    fall the same way with probability 2 · (1/2)² = 0.5."""
    made = cast(base=adds({0}), better=adds({0, 1, 2}))
    path = written(
        tmp_path / "g.jsonl",
        [{"question": f"What is {n} plus 1", "answer": f"#### {n + 1}"} for n in range(4)],
    )
    config = settings(made, tmp_path, ["base", "better"], [EvalSet.gsm8k], paths={"gsm8k": path})
    summary, values = evaluate(config)
    base, better = summary["results"]
    assert (base["model"], base["value"], better["value"]) == ("base", 0.25, 0.75)
    interval = wilson(3, 4)
    assert (better["low"], better["high"], better["n"]) == (interval.low, interval.high, 4)
    (row,) = summary["comparisons"]
    assert (row["delta"], row["p_mcnemar"], row["a"], row["b"]) == (0.5, 0.5, "better", "base")
    assert row["low"] <= 0.5 <= row["high"] and row["mde"] > 0
    assert values.group_by("model").agg(pl.col("value").sum()).sort("model")["value"].to_list() == [1, 3]
    table = markdown(summary)
    assert "| gsm8k | accuracy, % | base | 25.0 [" in table and "| +50.0 [" in table

    assert len(made.asked) == 8
    again, _ = evaluate(config)
    assert len(made.asked) == 8 and again["results"] == summary["results"]
    evaluate(settings(made, tmp_path, ["better"], [EvalSet.gsm8k], paths={"gsm8k": path}))  # another call
    assert len(made.asked) == 8
    (Path(made.folders["better"]) / "model.safetensors").write_text("other weights")
    evaluate(config)
    assert len(made.asked) == 12 and made.count("better") == 8
    config.max_tokens = 40
    evaluate(config)
    assert len(made.asked) == 20  # other sampling, other answers


def test_a_killed_evaluation_goes_on_where_it_stopped(cast: Callable[..., Cast], tmp_path: Path) -> None:
    made = cast(base=adds({0}))
    path = written(
        tmp_path / "g.jsonl",
        [{"question": f"What is {n} plus 1", "answer": f"#### {n + 1}"} for n in range(6)],
    )
    config = settings(made, tmp_path, ["base"], [EvalSet.gsm8k], paths={"gsm8k": path})
    made.die_at = 2  # after two batches of two
    with pytest.raises(EngineDied):
        evaluate(config)
    made.die_at = None
    evaluate(config)
    assert len(made.asked) == 6


def problem(source: str, number: int, category: str, subject: str) -> dict[str, Any]:
    return {"source": source, "question_id": number, "question": f"题{number}", "reference": f"参考{number}",
            "category": category, "subcategory": subject}  # fmt: skip


MATHUSEREVAL = [
    problem("alignbench", 1, "初等数学", "algebra"),
    problem("matheval", 1, "初等数学", "algebra"),
    problem("matheval", 2, "初等数学", "geometry"),
    problem("matheval", 3, "高等数学", "calculus"),
    problem("matheval", 4, "高等数学", "calculus"),
    problem("matheval", 5, "交叉学科", "finance"),
]
VERDICTS = {  # of the judge by question
    "题1": "好。{'事实正确性': 8, '满足用户需求': 8, '逻辑连贯性': 8, '完备性': 8, '综合得分': 8}",
    "题2": '差。{"事实正确性":2,"满足用户需求":2,"逻辑连贯性":5,"完备性":5,"综合得分":2}',
    "题3": "看不出来。",
    "题4": "可。{'综合得分': 7.5}",
    "题5": "好。{'综合得分': 9}",
}


def verdict(prompt: Prompt, sample: int) -> str:
    return next(text for name, text in VERDICTS.items() if f"\n{name}\n" in prompt.messages[-1].content)


def test_mathusereval_by_judge_and_critic(cast: Callable[..., Cast], tmp_path: Path) -> None:
    """Scores 8, 8, 2, failed, 7.5: micro 25.5 / 4 = 6.375; macro over algebra 8, geometry 2, calculus 7.5
    = 35/6; three of four are at least 7. The published parser reads 8, 8, -1, -1, 7: mean 21/5. The critic
    says 9, 9, 1, 5, 6: both scored four answers and decide alike (at least 6) on all of them."""
    said = {"题1": 9, "题2": 1, "题3": 5, "题4": 6, "题5": 8}

    def critic(prompt: Prompt, sample: int) -> str:
        content = prompt.messages[-1].content
        assert "参考" in content
        return f"ok\nScore: {next(n for name, n in said.items() if name in content)}"

    made = cast(base=lambda prompt, _: f"答{prompt.messages[-1].content}", judge=verdict, critic=critic)
    judges = JudgeConfig(model=made.folders["judge"], critic=made.folders["critic"])
    paths = {"mathusereval": written(tmp_path / "m.jsonl", MATHUSEREVAL)}
    config = settings(made, tmp_path, ["base"], [EvalSet.mathusereval], paths=paths, judge=judges)
    summary, values = evaluate(config)
    judged, by_critic = summary["results"]
    details = judged["details"]
    assert (judged["metric"], judged["value"], judged["n"], judged["failed"]) == ("judge", 6.375, 4, 1)
    assert details["micro"]["value"] == 6.375 and details["macro"] == pytest.approx(35 / 6)
    assert details["hard"]["value"] == 0.75 and details["failed"] == 1
    assert details["parses"] == {"failed": 1, "ok": 3, "repaired": 1}
    assert details["published_parser"] == {"mean": 4.2, "unread": 2, "differs": 1}
    assert details["by_source"]["alignbench"]["value"] == 8
    assert details["by_family"]["高等数学"] == details["by_subject"]["calculus"]
    assert by_critic["metric"] == "critic" and by_critic["value"] == (9 + 9 + 1 + 5 + 6) / 5
    agreement = by_critic["details"]["agreement"]
    assert (agreement["n"], agreement["unscored"], agreement["kappa"]) == (4, 1, 1.0)
    # ranks 3.5 3.5 1 2 against 3.5 3.5 1 2
    assert agreement["spearman"] == pytest.approx(1.0)
    assert values.filter(metric="judge")["value"].null_count() == 1
    judge_asked = [text for who, text in made.asked if who == "judge"]
    assert len(judge_asked) == 5 and "参考答案：\n<<<\n参考2" in next(t for t in judge_asked if "题2" in t)
    table = markdown(summary)
    assert "| base | judge | 6.38 | 5.83 | 75.00 | 4.20 | 8.00 | – | 2.00 | – | 7.50 |" in table
    assert "| GLM-4 (published) | GPT-4-1106-Preview | 5.11 | 5.21 | – | 5.11 | 4.47 |" in table
    assert "Judge and critic on base: κ 1.00, Spearman 1.00, n 4." in table
    assert (write(summary, values, tmp_path / "out") / "evaluate.json").is_file()  # one score has no interval

    asked = len(made.asked)
    config.supplement = True
    (judged, _), asked = evaluate(config)[0]["results"], len(made.asked) - asked
    assert judged["value"] == (25.5 + 9) / 5
    prompt_file = tmp_path / "official.txt"
    prompt_file.write_text("问 {question} 参 {reference} 答 {answer} {{'综合得分': 分}}\n")
    config.judge.prompt_file, config.supplement = str(prompt_file), False
    made.models["judge"] = lambda prompt, _: "{'综合得分': 3}"
    before = made.count("base")
    (judged, _) = evaluate(config)[0]["results"]
    assert judged["value"] == 3 and made.count("base") == before  # the same answers, judged anew
    assert ("judge", "问 题2 参 参考2 答 答题2 {'综合得分': 分}\n") in made.asked


def test_a_judge_behind_a_server(cast: Callable[..., Cast], tmp_path: Path, monkeypatch: Any) -> None:
    """The scores of the judge above, with what they cost: 7 + 3 tokens each, at 1 and 10; two of the five
    questions are alike, answer included, and are judged once."""
    open_engine = set_stages.open_engine
    made = cast(base=lambda prompt, _: f"答{prompt.messages[-1].content}")
    monkeypatch.setattr(set_stages, "open_engine", lambda config, model, out:
                        (open_engine if config.server else made.open)(config, model, out))  # fmt: skip
    with serve(lambda text: verdict(Prompt((Message("user", text),)), 0)) as server:
        judges = JudgeConfig(
            server=ServerConfig(server.url, "j", price_prompt=1, price_completion=10, cache="")
        )
        paths = {"mathusereval": written(tmp_path / "m.jsonl", MATHUSEREVAL)}
        config = settings(made, tmp_path, ["base"], [EvalSet.mathusereval], paths=paths, judge=judges)
        summary, _ = evaluate(config)
        evaluate(config)
        assert server.answered.total() == 4 and {body["max_tokens"] for body in server.bodies} == {1024}
    (judged,) = summary["results"]
    assert (judged["metric"], judged["value"], judged["failed"]) == ("judge", 6.375, 1)
    (manifest,) = (tmp_path / "store" / "judge").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["metrics"]["server"]["cost"] == 4 * (7 + 3 * 10) / 1e6


def test_a_judge_that_says_nothing_leaves_nothing_to_compare(
    cast: Callable[..., Cast], tmp_path: Path
) -> None:
    made = cast(base=lambda *_: "a", other=lambda *_: "b", judge=lambda *_: "hm")
    paths = {"mathusereval": written(tmp_path / "m.jsonl", MATHUSEREVAL)}
    judges = JudgeConfig(model=made.folders["judge"])
    config = settings(made, tmp_path, ["base", "other"], [EvalSet.mathusereval], paths=paths, judge=judges)
    summary, _ = evaluate(config)
    assert [(r["value"], r["n"], r["failed"]) for r in summary["results"]] == [(None, 0, 5)] * 2
    assert summary["comparisons"] == [] and "| other | – | 0 | 5 |" in markdown(summary)


def test_mt_bench_speaks_two_turns(cast: Callable[..., Cast], tmp_path: Path) -> None:
    """The second turn follows the model's own first answer, and the judge sees both. Scores 6 and 9 of the
    one question, 4 and none of the other: 7.5 and 4."""
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["first81", "second81"]},
        {
            "question_id": 101,
            "category": "math",
            "turns": ["first101", "second101"],
            "reference": ["r1", "r2"],
        },
    ]
    talks = []

    def model(prompt: Prompt, sample: int) -> str:
        talks.append([m.content for m in prompt.messages])
        return f"answer to {prompt.messages[-1].content}"

    def judge(prompt: Prompt, sample: int) -> str:
        content = prompt.messages[-1].content
        named = {"answer to second81\n>>>": "{'Overall': 9}", "answer to first81\n>>>": "Rating: [[6]]",
                 "answer to first101\n>>>": '{"overall": 4}', "answer to second101\n>>>": "none"}  # fmt: skip
        return next(text for name, text in named.items() if name in content)

    made = cast(base=model, judge=judge)
    judges = JudgeConfig(model=made.folders["judge"])
    paths = {"mt_bench": written(tmp_path / "question.jsonl", rows)}
    summary, values = evaluate(
        settings(made, tmp_path, ["base"], [EvalSet.mt_bench], paths=paths, judge=judges)
    )
    assert ["first81", "answer to first81", "second81"] in talks and len(talks) == 4
    assert dict(values.select("problem_id", "value").rows()) == {"81": 7.5, "101": 4.0}
    asked = next(text for who, text in made.asked if who == "judge" and "answer to second101\n>>>" in text)
    assert "User: first101\n\nAssistant: answer to first101\n\nUser: second101\n>>>" in asked
    assert "Reference answer:\n<<<\nr1\n\nr2\n>>>" in asked
    (row,) = summary["results"]
    assert row["value"] == 5.75 and row["by"]["math"]["value"] == 4.0


def test_choices_by_log_likelihood(cast: Callable[..., Cast], tmp_path: Path) -> None:
    """D is likeliest, and C where there is no D: right in one of two. Of the whole answers' probability
    1 − e⁻¹ (D) − e⁻³ (C) − 2 e⁻³·⁵ (A, B) is missing."""
    made = cast(base=lambda prompt, _: "")
    made.logp = lambda prompt, text: {"D": -1.0}.get(text, -3.0) - (0.5 if text in "AB" else 0)
    rows = [
        {"question": "q0", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 3},
        {"question": "q1", "subject": "law", "choices": ["w", "x", "y"], "answer": 0},
        {"question": "q2", "subject": "college_mathematics", "choices": ["w", "x", "y", "z"], "answer": 3},
    ]
    paths = {"mmlu": written(tmp_path / "m.jsonl", rows)}
    summary, values = evaluate(settings(made, tmp_path, ["base"], [EvalSet.mmlu], paths=paths))
    (row,) = summary["results"]
    assert dict(values.select("problem_id", "value").rows()) == {"law/0": 1.0, "law/1": 0.0}
    assert (row["value"], row["n"]) == (0.5, 2)
    assert row["details"]["missing_mass"] == pytest.approx(1 - exp(-1) - exp(-3) - 2 * exp(-3.5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two random models with one tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer([TEXT, "A B C D"], [], 20)
    for seed in (0, 1):
        save_tiny(
            TinyConfig(hidden_size=32, intermediate_size=32, layers=1), tokenizer, seed, root / f"m{seed}"
        )
    return [str(root / "m0"), str(root / "m1")]


def test_losses_and_kl_from_whole_distributions(tiny: list[str]) -> None:
    """Against one window at a time and all logits at once; a model is no distance from itself."""
    base, model = map(Path, tiny)
    encoder = load_encoder(base)
    windows = text_windows(encoder, TEXT * 4, 10)
    ids = encoder.response_ids(TEXT * 4, eos=False)
    assert windows[1] == [encoder.bos_id, *ids[10:20]] and len(windows) == len(ids) // 10
    found = list(window_losses([model, base], windows, "cpu"))
    for window, (loss, kl) in zip(windows, found, strict=True):
        logps = []
        for folder in (model, base):
            with torch.no_grad():
                logits = load_model(folder)(torch.tensor([window])).logits[0, :-1]
            logps.append(logits.log_softmax(-1))
        expected = -sum(logps[0][i, token].item() for i, token in enumerate(window[1:])) / 10
        assert loss == pytest.approx(expected, abs=1e-5)
        assert kl == pytest.approx((logps[1].exp() * (logps[1] - logps[0])).sum().item() / 10, abs=1e-5)
        assert kl is not None and kl > 0
    assert all(kl == pytest.approx(0, abs=1e-6) for _, kl in window_losses([base, base], windows, "cpu"))
    assert [kl for _, kl in window_losses([base], windows, "cpu")] == [None] * len(windows)


def test_the_command(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real models: an untrained one is as surprised as chance, and a table stands beside both files."""
    gsm = written(tmp_path / "g.jsonl", [{"question": "the cat", "answer": f"#### {n}"} for n in range(3)])
    text = written(tmp_path / "t.jsonl", [{"text": TEXT * 4}, {"text": " "}])
    words = ["evaluate", f"model=[{tiny[0]},{tiny[1]}]", "sets=[gsm8k,text]", f"paths.gsm8k={gsm}",
             f"paths.text={text}", "window=10", "max_tokens=4", "prompts=terse", "limit=2",
             f"store={tmp_path}/store", f"out={tmp_path}/out"]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(words)
    shown = capsys.readouterr()
    assert end.value.code == 0, shown.err
    (folder,) = (tmp_path / "out").iterdir()
    summary = json.loads((folder / "evaluate.json").read_text())
    values = pl.read_parquet(folder / "values.parquet")
    rows = {(r["set"], r["metric"], r["model"]): r for r in summary["results"]}
    assert set(rows) == {("gsm8k", "accuracy", "m0"), ("gsm8k", "accuracy", "m1"), ("text", "nll", "m0"),
                         ("text", "nll", "m1"), ("text", "kl", "m1")}  # fmt: skip
    nll = rows["text", "nll", "m0"]
    assert nll["value"] == pytest.approx(values.filter(set="text", metric="nll", model="m0")["value"].mean())
    assert nll["value"] == pytest.approx(log(len(load_encoder(Path(tiny[0])).tokenizer)), rel=0.05)
    changes = {(c["set"], c["metric"]): c for c in summary["comparisons"]}
    assert set(changes) == {("gsm8k", "accuracy"), ("text", "nll")}
    assert changes["text", "nll"]["delta"] == pytest.approx(rows["text", "nll", "m1"]["value"] - nll["value"])
    assert f"| text | perplexity | m0 | {exp(nll['value']):.2f} [" in shown.out
    assert str(folder) in shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=x", "sets=gsm8"], "sets"),
        (["model=x", "sets=gsm8k", "limt=3"], "Did you mean limit"),
        (["sets=gsm8k"], "model=FOLDER or model="),
        (["model=x"], "some of gsm8k, math500"),
        (["model=x", "sets=[gsm8k,mt_bench]"], "judge.model=FOLDER or judge.server.model=NAME"),
        (["model=x", "sets=mt_bench", "judge.server.url=http://x"], "given as server.model=NAME"),
        (["model=x", "sets=mt_bench_zh", "judge.critic=y"], "judge.model=FOLDER"),
        (["model=x", "sets=gsm8k", "paths.gsm9k=f"], "by the names of sets"),
        (["model=x", "sets=mathusereval", "judge.model=y", "judge.prompt_file=none.txt"], "must be a file"),
        (["model=nowhere", "sets=gsm8k"], "There is no checkpoint at nowhere"),
    ],
)
def test_errors_name_the_remedy(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words, f"store={tmp_path}/s", f"out={tmp_path}/o"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("ERROR: ") and message in said, said


def test_names_of_models() -> None:
    assert labels(["store/sft/a", "store/dpo/b"]) == ["sft/a", "dpo/b"]
    assert labels(["store/sft/a"]) == ["a"]
    with pytest.raises(UserError, match="twice"):
        labels(["a/b", "a/../a/b"])
    assert SuiteConfig(model=["a"], sets=[EvalSet.text]).prompts is PromptStyle.instruct
