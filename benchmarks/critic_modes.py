"""Logit against generate mode on one critic: seconds per response, with the AUROC of both beside the ratio.

The critic is that of the run in CRITIC_RUN, else of `experiment=demo until=gate`, which is run here (minutes)
or found in ./store. The ratio is of responses that come one at a time; in full batches, named beside it too,
both modes mostly read their prompts.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import polars as pl
from run import Measured, speed_ratio

from selfcritique.card import card_config
from selfcritique.critique import SCORES, expected_score, parse_score
from selfcritique.engine.base import Engine, SamplingParams
from selfcritique.engine.hf import HfEngine
from selfcritique.prompts import SCORE_PREFIX, critique_prompt
from selfcritique.records import Prompt
from selfcritique.stages import load_problems
from selfcritique.stats import auroc

ALONE, FULL = 10, 200  # responses of a round, one at a time and in batches


def by_text(engine: Engine, prompts: Sequence[Prompt], max_tokens: int) -> list[float]:
    params = SamplingParams(n=1, temperature=0.0, max_tokens=max_tokens, seed=0)
    found = {c.prompt_index: c for batch in engine.generate(prompts, params) for c in batch.completions}
    scores = (parse_score(found[i].text, found[i].truncated)[0] for i in range(len(prompts)))
    return [0.0 if score is None else score for score in scores]  # unread: below all others


def by_logits(engine: Engine, prompts: Sequence[Prompt]) -> list[float]:
    batches = engine.continuation_logprobs(prompts, SCORES, SCORE_PREFIX)
    found = {s.prompt_index: s.logps for batch in batches for s in batch.scores}
    return [expected_score(found[i]) for i in range(len(prompts))]


def measure() -> Measured:
    run = os.environ.get("CRITIC_RUN")
    if not run:
        run = "outputs/critic_modes/*"
        words = ("experiment=demo", "name=critic_modes", "until=gate", "logger=none")
        subprocess.run([sys.executable, "-m", "selfcritique", *words], check=True)
    config, ready = card_config([f"critic={run}"])
    by_id = {p.id: p for p in load_problems(ready["problems"])}
    table = pl.read_parquet(ready["gate_responses"].path / "responses.parquet")
    truth = (table["verdict"] == "correct").to_numpy()
    written, scored = (
        [
            critique_prompt(config.prompts, by_id[p], text, config.ask.reference, score_only)
            for p, text in table.select("problem_id", "text").iter_rows()
        ]
        for score_only in (False, True)
    )
    with HfEngine(ready["critic"].path, config.engine.max_batch_tokens) as engine:
        generate = partial(by_text, engine, max_tokens=config.ask.max_tokens)
        logit = partial(by_logits, engine)
        aurocs = [auroc(truth, scores) for scores in (logit(scored), generate(written))]
        full = speed_ratio(lambda: logit(scored[:FULL]), lambda: generate(written[:FULL]), "")
        about = "one at a time; AUROC {:.3f} against {:.3f}; {:.1f} times in batches".format(
            *aurocs, full.ratio
        )
        return speed_ratio(
            lambda: [logit([prompt]) for prompt in scored[:ALONE]],
            lambda: [generate([prompt]) for prompt in written[:ALONE]],
            f"generate mode, {about}",
        )
