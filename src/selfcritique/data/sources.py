"""Where problems come from: generated, GSM8K, or any JSONL. Each source yields (training, test) streams."""

import json
from collections.abc import Iterator
from pathlib import Path

from selfcritique.answers import extract
from selfcritique.config import Source, SourceConfig
from selfcritique.data import word_problems
from selfcritique.errors import UserError
from selfcritique.records import Problem

HUB = {Source.gsm8k: ("openai/gsm8k", "main")}


def streams(config: SourceConfig, seed: int) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Problems to train and develop on, and problems to test on.

    Where a source has no test file of its own the second stream is empty and the test split is cut from
    the first. Generated streams never end.
    """
    if config.source is Source.word_problems:
        return _generated(config, seed)
    if config.path:
        return _files(config)
    return _hub(config)


def _generated(config: SourceConfig, seed: int) -> tuple[Iterator[Problem], Iterator[Problem]]:
    families = tuple(config.families) or tuple(word_problems.FAMILIES)
    unknown = {*families, *config.test_families} - set(word_problems.FAMILIES)
    if unknown:
        raise UserError(
            f"data.mix: unknown families {sorted(unknown)}; there are {', '.join(word_problems.FAMILIES)}."
        )

    def stream(stream_seed: int, chosen: tuple[str, ...]) -> Iterator[Problem]:
        return word_problems.generate(
            stream_seed, chosen, tuple(config.registers), tuple(config.steps), config.limit
        )

    held_out = tuple(config.test_families)
    return stream(seed, families), stream(seed + 1_000_003, held_out) if held_out else iter(())


def _files(config: SourceConfig) -> tuple[Iterator[Problem], Iterator[Problem]]:
    path = Path(config.path).expanduser()
    if path.is_dir():
        return read_jsonl(path / "train.jsonl", config.source), read_jsonl(path / "test.jsonl", config.source)
    return read_jsonl(path, config.source), iter(())


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
    return (
        (_problem(dict(row), config.source, f"{name} row {i}") for i, row in enumerate(rows))
        for rows in (train, test)
    )  # type: ignore[return-value]


def read_jsonl(path: Path, source: Source) -> Iterator[Problem]:
    """Problems of one file: `question`, `reference` (GSM8K: `answer` is the solution), optional others."""
    if not path.is_file():
        raise UserError(
            f"data.mix: there is no file {path}; set data.mix[].path to a JSONL file or its folder."
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not valid JSON ({error.msg}); mend or delete the line."
                ) from None
            yield _problem(row, source, f"{path}:{number}")


def _problem(row: object, source: Source, where: str) -> Problem:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: expected an object with `question` and `reference`, found {type(row).__name__}."
        )
    if source is Source.gsm8k:
        row = {**row, "reference": row.get("answer"), "answer": None}
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
        difficulty=int(row.get("difficulty", 0)) if str(row.get("difficulty", 0)).isdigit() else 0,
    )
