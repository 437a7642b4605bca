"""Where problems come from: generated, GSM8K, or any JSONL. Each source yields (training, test) streams."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfcritique.answers import extract
from selfcritique.config import Source, SourceConfig
from selfcritique.data import word_problems
from selfcritique.errors import UserError
from selfcritique.records import Problem

HUB = {Source.gsm8k: ("openai/gsm8k", "main"), Source.math: ("DigitalLearningGmbH/MATH-lighteval", "default")}


def streams(config: SourceConfig, seed: int) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Problems to train and develop on, and problems to test on.

    Where a source has no test file of its own the second stream is empty and the test split is cut from
    the first. Generated streams never end.
    """
    if config.source is Source.word_problems:
        return _generated(config, seed)
    if not config.path:
        return _hub(config)
    train, *test = (read_jsonl(path, config.source) for path in files(config))
    return train, test[0] if test else iter(())


def _generated(config: SourceConfig, seed: int) -> tuple[Iterator[Problem], Iterator[Problem]]:
    families = tuple(config.families) or tuple(word_problems.FAMILIES)
    steps = tuple(range(word_problems.MIN_STEPS, word_problems.MAX_STEPS + 1))
    settings: tuple[tuple[str, Sequence[object], Sequence[object]], ...] = (
        ("families", [*families, *config.test_families], tuple(word_problems.FAMILIES)),
        ("registers", [*config.registers, *config.test_registers], word_problems.REGISTERS),
        ("steps", config.steps, steps),
    )
    faults = []
    for name, given, allowed in settings:
        unknown = sorted(set(given) - set(allowed), key=str)
        if unknown or not given:
            there = ", ".join(map(str, allowed))
            faults.append(f"no {name} {unknown or 'given'}; there are {there}")
    if faults:
        raise UserError("data.mix: " + ". ".join(faults) + ".")

    registers, told = tuple(config.registers), (tuple(config.steps), config.limit)
    train = word_problems.generate(seed, families, registers, *told)
    if not (config.test_families or config.test_registers):
        return train, iter(())
    unlike = tuple(config.test_families) or families, tuple(config.test_registers) or registers
    return train, word_problems.generate(seed + 1_000_003, *unlike, *told)


def files(config: SourceConfig) -> list[Path]:
    """The files that a source is read from: none, one, or those to train on and to test on."""
    if not config.path or config.source is Source.word_problems:
        return []
    path = Path(config.path).expanduser()
    found = [path / "train.jsonl", path / "test.jsonl"] if path.is_dir() else [path]
    for file in found:
        if not file.is_file():
            raise UserError(
                f"data.mix: there is no file {file}; set data.mix[].path to a JSONL file or to a folder with "
                "train.jsonl and test.jsonl."
            )
    return found


def _hub(config: SourceConfig) -> tuple[Iterator[Problem], Iterator[Problem]]:
    from datasets import load_dataset

    name, subset = HUB[config.source]
    try:
        train, test = (load_dataset(name, subset, split=split) for split in ("train", "test"))
    except Exception as error:
        raise UserError(
            f"data.mix: {name} could not be loaded from the hub ({type(error).__name__}); "
            "give data.mix[].path, a folder with train.jsonl and test.jsonl."
        ) from error

    def read(rows: Iterable[Any]) -> Iterator[Problem]:
        return (problem_of(dict(row), config.source, f"{name} row {i}") for i, row in enumerate(rows))

    return read(train), read(test)


def read_jsonl(path: Path, source: Source) -> Iterator[Problem]:
    """Problems of one file: `question`, `reference` (GSM8K: `answer` is the solution), optional others."""
    return (problem_of(row, source, where) for where, row in json_rows(path))


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line that is not empty."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                cause = f"not valid JSON ({getattr(error, 'msg', 'not UTF-8')})"
                raise UserError(f"{path}:{number}: {cause}; mend or delete the line.") from None
            yield f"{path}:{number}", row


def problem_of(row: object, source: Source, where: str) -> Problem:
    """A row of a problem file; `where` names it in errors."""
    if not isinstance(row, dict):
        found = type(row).__name__
        raise UserError(f"{where}: expected an object with `question` and `reference`, found {found}.")
    if source is Source.gsm8k:
        row = {**row, "reference": row.get("answer"), "answer": None}
    if source is Source.math:
        level = str(row.get("level", "")).removeprefix("Level ")
        names = {"question": "problem", "reference": "solution", "subject": "type"}
        row = {**{name: row.get(theirs) for name, theirs in names.items()}, "difficulty": level}
    difficulty = str(row.get("difficulty", 0))
    question, reference = row.get("question"), row.get("reference") or ""
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: `question` is missing or empty.")
    if not isinstance(reference, str):
        raise UserError(f"{where}: `reference` must be text, found {type(reference).__name__}.")
    answer = row.get("answer")
    answer = str(answer).strip() if answer is not None else extract(reference, last_number=True) or ""
    if not answer:
        raise UserError(
            f"{where}: no final answer; add a non-empty `answer`, or end `reference` with '#### answer' "
            "or \\boxed{}."
        )
    return Problem(
        question=question.strip(),
        reference=reference.strip(),
        answer=answer,
        source=source.value if source is not Source.jsonl else str(row.get("source", "jsonl")),
        subject=str(row.get("subject", "")),
        difficulty=int(difficulty) if difficulty.isdigit() else 0,
    )
