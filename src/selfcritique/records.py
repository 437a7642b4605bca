"""The data that flows between stages, as it stands in journals, prompts and reports.

Inside a stage's Parquet files the same fields are columns; selection, pairing and reporting work on
those tables (ids, scores, hashes), never on these objects.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

GROUPS = ("source", "family", "register", "difficulty")  # columns that results are broken down by


def content_id(*parts: object) -> str:
    """16 hex digits that depend on the parts' text alone."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


class Split(StrEnum):
    """Disjoint by normalised question text (`data.splits`)."""

    base_train = "base_train"
    critic_train = "critic_train"
    critic_dev = "critic_dev"
    pool_rft = "pool_rft"
    pool_dpo = "pool_dpo"
    dev = "dev"
    test = "test"


class Parse(StrEnum):
    """How a critique's score was read; only `ok` and `repaired` carry one."""

    ok = "ok"
    repaired = "repaired"
    failed = "failed"
    truncated = "truncated"


@dataclass(frozen=True)
class Problem:
    """A question with its reference solution and final answer.

    `reference` may be empty where a source has answers only; `answer` never is.
    """

    question: str
    reference: str
    answer: str
    source: str
    subject: str = ""
    family: str = ""
    register: str = ""
    difficulty: int = 0  # number of solution steps, 0 where unknown

    @property
    def id(self) -> str:
        return content_id("problem", self.source, self.question, self.answer)


@dataclass(frozen=True)
class Response:
    """One sampled answer to a problem."""

    problem_id: str
    sample: int  # 0-based index among the problem's samples
    text: str
    n_tokens: int  # EOS included
    truncated: bool  # stopped by the token limit

    @property
    def id(self) -> str:
        return content_id("response", self.problem_id, self.sample, self.text)


@dataclass(frozen=True)
class Critique:
    """One critic reading of one response. A failed parse is not a score: `score` is then None."""

    response_id: str
    sample: int
    text: str
    score: float | None  # 1 to 10
    parse: Parse


@dataclass(frozen=True)
class Message:
    role: str  # system | user | assistant
    content: str


@dataclass(frozen=True)
class Prompt:
    """Chat messages that end with the user's turn. Contents are data: control tokens in them are text."""

    messages: tuple[Message, ...]
