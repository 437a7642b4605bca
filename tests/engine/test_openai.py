"""The client against a server that fails in every way: each answer is got once, each error explained."""

import os
import signal
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import polars as pl
import pytest

from runs import TINY, completed, compose, read_json
from selfcritique.artifacts import Store
from selfcritique.config import ServerConfig
from selfcritique.engine import openai
from selfcritique.engine.base import BatchResult, SamplingParams
from selfcritique.engine.hf import HfEngine
from selfcritique.engine.openai import OpenAIEngine, Pace
from selfcritique.errors import UserError
from selfcritique.pipeline import build, execute
from selfcritique.prompts import PLAIN_TEMPLATE
from selfcritique.records import Message, Prompt
from selfcritique.stages import complete
from servers import RETRY_AFTER_S, FakeServer, serve, serve_vllm

GREEDY = SamplingParams(n=1, temperature=0, max_tokens=8, seed=0)
SAMPLED = SamplingParams(n=3, temperature=1, max_tokens=8, seed=0)
FAULTS = ("429", "500", "503", "hang", "cut", "broken", "html", "empty")


def user(content: str) -> Prompt:
    return Prompt((Message("user", content),))


PROMPTS = [user(f"question {i}") for i in range(len(FAULTS))]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_WAITS_S", (0.01, 0.01))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def client(server: FakeServer, cache: Path | str = "", **settings: Any) -> OpenAIEngine:
    settings = {"model": "m", "concurrency": 4, **settings}
    return OpenAIEngine(ServerConfig(server.url, cache=str(cache), **settings))


def texts(batches: list[BatchResult]) -> dict[tuple[int, int], str]:
    """Texts by (prompt, sample); none may come twice."""
    found = [c for b in batches for c in b.completions]
    assert len({(c.prompt_index, c.sample) for c in found}) == len(found)
    return {(c.prompt_index, c.sample): c.text for c in found}


def test_after_every_fault_each_answer_is_got_exactly_once() -> None:
    """Prompt k meets the faults k, k+1, ... k+3 (round about), then success."""

    def faults(text: str, tries: int) -> str:
        return FAULTS[(int(text.split()[1]) + tries) % len(FAULTS)] if tries < 4 else ""

    with serve(str.upper, faults) as server, client(server, timeout_s=2, retries=20, price_prompt=1,
                                                    price_completion=10) as engine:  # fmt: skip
        batches = list(engine.generate(PROMPTS, GREEDY))
        assert texts(batches) == {(i, 0): f"QUESTION {i}" for i in range(8)}
        assert server.answered == Counter({f"question {i}": 1 for i in range(8)})
        assert {len(times) for times in server.seen.values()} == {5}
        completion = batches[0].completions[0]
        assert (completion.n_tokens, completion.truncated) == (3, False)
        cost = (8 * 7 * 1 + 8 * 3 * 10) / 1e6
        assert engine.usage() == {
            "requests": 8, "cached": 0, "prompt_tokens": 56, "completion_tokens": 24, "cost": cost,
        }  # fmt: skip
        assert 1 < server.busiest <= 4
        assert server.keys == {"none"}


def test_nobody_asks_before_the_server_said() -> None:
    with serve(str.upper, lambda text, tries: "429" if tries == 0 else "") as server:
        with client(server) as engine:
            list(engine.generate(PROMPTS[:3], GREEDY))
        for first, second in server.seen.values():
            assert second - first >= RETRY_AFTER_S


def test_what_fails_for_good_is_told_and_the_rest_is_kept() -> None:
    bad = {"question 5"}
    with serve(str.upper, lambda text, tries: "500" if text in bad else "") as server:
        with client(server, retries=2) as engine:
            got, stream = [], engine.generate(PROMPTS, GREEDY)
            with pytest.raises(UserError, match=r"any of 3 attempts \(server.retries=2\).*500") as error:
                got.extend(stream)
        assert server.url in str(error.value) and len(server.seen["question 5"]) == 3
        assert (5, 0) not in texts(got)
        bad.clear()
        with client(server) as engine:
            rest = list(engine.generate(PROMPTS, GREEDY, done={b.batch_id for b in got}))
        assert texts(got) | texts(rest) == {(i, 0): f"QUESTION {i}" for i in range(8)}
        assert len(texts(got)) + len(texts(rest)) == 8
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        ("401", ("MY_KEY (server.key_env): the key in it is refused", "[key]")),
        ("403", ("MY_KEY (server.key_env)",)),
        ("404", ("serves no model 'm'", "server.model", "server.url")),
        ("400", ("refuses the request", "server.body")),
    ],
)
def test_refusals_are_not_repeated(status: str, parts: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serve(str.upper, lambda text, tries: status) as server:
        with client(server, key_env="MY_KEY") as engine, pytest.raises(UserError) as error:
            list(engine.generate(PROMPTS[:1], GREEDY))
        said = str(error.value)
        assert server.url in said and all(part in said for part in parts), said
        assert "sk-secret" not in said and server.keys == {"sk-secret"}
        assert len(server.seen["question 0"]) == 1


def test_a_key_that_is_not_set_and_a_host_that_is_not_there() -> None:
    with (
        serve(str.upper, lambda text, tries: "401") as server,
        client(server) as engine,
        pytest.raises(UserError, match=r"OPENAI_API_KEY .*: it is not set"),
    ):
        list(engine.generate(PROMPTS[:1], GREEDY))
    with client(server) as engine, pytest.raises(UserError, match=r"cannot be reached \(server.url; 1 "):
        list(engine.generate(PROMPTS, GREEDY))
    with serve(str.upper, lambda text, tries: "hang") as server, client(server, timeout_s=0.3) as engine:
        engine.server.retries = 1
        with pytest.raises(UserError, match=r"did not answer within 0.3 s \(server.timeout_s\), 2 times"):
            list(engine.generate(PROMPTS[:1], GREEDY))


def test_a_request_is_paid_once(tmp_path: Path) -> None:
    """Greedy prompts that are alike share a request within a stage and between stages; samples never do,
    not even where the seed that tells them apart is left out."""
    twice = [*PROMPTS[:3], PROMPTS[0]]
    with serve(str.upper) as server:
        with client(server, tmp_path / "requests.sqlite") as engine:
            assert texts(list(engine.generate(twice, GREEDY)))[3, 0] == "QUESTION 0"
            assert server.answered.total() == 3
        with client(server, tmp_path / "requests.sqlite", price_prompt=1e6) as engine:
            first = list(engine.generate(twice, GREEDY))
            assert server.answered.total() == 3 and len(texts(first)) == 4
            assert engine.usage()["cost"] == 21 and engine.usage()["cached"] == 3
            list(engine.generate(twice, GREEDY, done={b.batch_id for b in first}))
            assert engine.usage()["cost"] == 42  # a resumed stage counts what it had, too
        with client(server, tmp_path / "requests.sqlite", body={"seed": None, "user": "x"}) as engine:
            assert len(texts(list(engine.generate(twice, SAMPLED)))) == 12
        assert server.answered.total() == 3 + 12
        assert "seed" not in server.bodies[-1] and server.bodies[-1]["user"] == "x"


def test_control_tokens_reach_the_server_as_text() -> None:
    text = "a <|im_end|> b </s> c [INST] d < 3 [x] <b>"
    with serve(str.upper) as server, client(server) as engine:
        list(engine.generate([user(text)], GREEDY))
        (body,) = server.bodies
        assert body["messages"][0]["content"] == "a < |im_end|> b < /s> c [ INST] d < 3 [x] <b>"


def test_scores_want_a_tokenizer_and_vllm(tmp_path: Path) -> None:
    with serve(str.upper) as server, client(server) as engine, pytest.raises(UserError) as error:
        list(engine.continuation_logprobs(PROMPTS, ["1", "2"]))
    assert "critic.ask.mode=generate" in str(error.value)


def test_pace_leaves_room_for_requests_and_tokens() -> None:
    """120 a minute: one each half second. 600 tokens a minute: 10 a second, so that 15 take 1.5 s."""
    pace = Pace(120, 0)
    assert [pace.wait(100.0, 10**6) for _ in range(3)] == [0, 0.5, 1.0]
    assert pace.wait(200.0, 1) == 0  # idle time is not saved up
    pace = Pace(120, 600)
    assert [pace.wait(0.0, tokens) for tokens in (15, 1, 1)] == [0, 1.5, 2.0]
    pace.hold(9.0)
    assert pace.wait(2.5, 1) == 6.5
    assert Pace(0, 0).wait(5.0, 10**9) == 0


# ---- vLLM's server ---------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here: make setup-vllm")
def test_a_killed_server_is_told_and_a_rerun_asks_for_the_rest(tiny_dir: Path, tmp_path: Path) -> None:
    """First a chat with the real server, whose greedy texts are those of the hf engine."""
    model, prompts = tmp_path / "model", [user("a b c 1"), user("x </s> y"), user("d e 三")]
    copytree(tiny_dir, model)
    (model / "chat_template.jinja").write_text("{{ bos_token }}" + PLAIN_TEMPLATE)
    params = SamplingParams(n=20, temperature=1, max_tokens=40, seed=0)
    out, n = tmp_path / "stage", len(prompts) * params.n
    (out / "scratch").mkdir(parents=True)
    with serve_vllm(model, tmp_path / "server.log") as (url, group):
        settings = ServerConfig(url, str(model), retries=1, concurrency=4, cache="")
        with OpenAIEngine(settings) as engine, HfEngine(model, 1000) as hf:
            assert texts(list(engine.generate(prompts, GREEDY))) == texts(list(hf.generate(prompts, GREEDY)))

        def kill(done: int, total: int) -> None:
            if done == 10:
                os.killpg(group, signal.SIGKILL)

        with OpenAIEngine(settings) as engine, pytest.raises(UserError, match="cannot be reached") as error:
            complete(engine, prompts, params, out, kill)  # type: ignore[arg-type]
        assert url in str(error.value)
    had = (out / "scratch" / "journal.jsonl").read_text().count("\n")
    assert 10 <= had < n
    with serve(str.upper) as server, OpenAIEngine(replace(settings, url=server.url)) as engine:
        rows = complete(engine, prompts, params, out, lambda *_: None)  # type: ignore[arg-type]
        assert [row[:2] for row in rows] == [(i, s) for i in range(3) for s in range(20)]
        assert server.answered.total() == n - had


# ---- in a run ------------------------------------------------------------------------------------------


def test_a_teacher_marks_what_the_critic_learns_and_the_key_stands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth question that the teacher sees gets an unreadable answer: counted and left out."""
    monkeypatch.setenv("TEACHER_KEY", "sk-0123456789")
    order: dict[str, int] = {}

    def teach(text: str) -> str:
        assert "Reference (solution):" in text
        return "no idea" if order.setdefault(text, len(order)) % 4 == 3 else "1 ok\nScore: 7"

    with serve(teach, lambda text, tries: "500" if tries == 0 else "") as server:
        words = (*TINY, "until=critic_data", "logger=wandb", "annotator=openai", "annotator.server.model=t",
                 f"annotator.server.url={server.url}", "annotator.server.key_env=TEACHER_KEY",
                 "critic.data.balance={}", "critic.data.corruptions=0", "critic.data.answers_only=0",
                 "annotator.server.price_completion=2")  # fmt: skip
        run = completed(tmp_path, *words)
        assert server.keys == {"sk-0123456789"} and set(server.answered.values()) == {1}
        metrics = read_json(run.artifact("critic_data") / "manifest.json")["metrics"]
        n = len(server.answered)
        assert metrics["server"]["requests"] == n
        assert metrics["server"]["cost"] == n * 3 * 2 / 1e6
        unreadable = sum(place % 4 == 3 for place in order.values())
        assert metrics["teacher_failures"] >= unreadable > 0
        candidates = pl.read_parquet(run.artifact("critic_pool") / "responses.parquet").filter(
            ~pl.col("truncated")
        )
        assert metrics["marked"] == candidates.height - metrics["teacher_failures"]
        assert metrics["by_score"] == {"7": metrics["marked"]}
    held = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("wandb" in p.parts for p in held) and (tmp_path / "store/requests.sqlite") in held
    assert not [p for p in held if b"sk-0123456789" in p.read_bytes()]
    assert "TEACHER_KEY" in (run.out / "config.yaml").read_text()


def test_one_named_model_is_not_asked_for_another() -> None:
    """Of the base's critic data on, this run would ask the critic, too."""
    graph = build(compose(*TINY, "engine=openai", "engine.server.model=m"))
    with pytest.raises(UserError, match="this run asks base, critic, dpo, rft: leave it empty"):
        execute(graph, Store(Path("nowhere")), "", lambda *_: None)
