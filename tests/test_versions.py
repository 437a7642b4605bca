"""A stage whose code changed has another version, or someone looked and says that its output did not change.

stage_hashes.json holds, per stage, its version and a hash of the code that computes its output: the stage's
function and every function, class and constant of the package that it reaches, one by one. Comments,
docstrings, types, layout and the texts of errors do not count. After a change

    python tests/test_versions.py

writes the record anew; the diff then shows which stages changed, with a new version or without.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
RECORD = Path(__file__).with_name("stage_hashes.json")
# What runs, waits, reports and stores is no part of what a stage computes; a config's values are in the key.
APART = {"artifacts", "config", "errors", "pipeline", "progress", "tracker"}
# Started by name in a process of its own: whoever uses the first depends on all of the second.
STARTS = {("answers", "compare_many"): "answer_worker", ("answers", "compare"): "answer_worker",
          ("engine.vllm", "VllmEngine"): "engine.vllm_process"}  # fmt: skip

Definition = tuple[str, str]  # module below selfcritique ("train.fit") and name


class _Bare(ast.NodeTransformer):
    """Code without what cannot change its result: docstrings, annotations, what an error says."""

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None) if isinstance(node, ast.AnnAssign) else None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.body = [s for s in node.body if not _is_text(s)] or [ast.Pass()]
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@cache
def _module(name: str) -> tuple[dict[str, ast.stmt], dict[str, Definition]]:
    """The module's definitions by name, and what its own imports of the package bind."""
    path = SRC / "selfcritique" / (name.replace(".", "/") + ".py")
    body = ast.parse(path.read_text()).body if path.is_file() else []
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = _Bare().visit(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in (n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                found[target.id] = _Bare().visit(statement)
    return found, _bound([s for s in body if isinstance(s, ast.ImportFrom)])


def _bound(nodes: list[ast.ImportFrom]) -> dict[str, Definition]:
    """Local name -> definition; a module as a whole has the name ''."""
    found = {}
    for node in nodes:
        if node.module and node.module.partition(".")[0] == "selfcritique":
            inside = node.module.removeprefix("selfcritique").removeprefix(".")
            for alias in node.names:
                submodule = f"{inside}.{alias.name}".strip(".")
                is_module = (SRC / "selfcritique" / (submodule.replace(".", "/") + ".py")).is_file()
                found[alias.asname or alias.name] = (submodule, "") if is_module else (inside, alias.name)
    return found


def _used(module: str, statement: ast.stmt) -> Iterator[Definition]:
    """The package's definitions that a statement names."""
    definitions, imports = _module(module)
    nodes = list(ast.walk(statement))
    imports = imports | _bound([n for n in nodes if isinstance(n, ast.ImportFrom)])
    own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in nodes if isinstance(n, ast.arg)}  # a local `pairs` is not the stage
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            source, name = imports.get(node.value.id, ("", "-"))
            if name == "":  # fit.fit_dpo
                yield source, node.attr
        elif isinstance(node, ast.Name) and node.id not in own:
            if node.id in imports:
                yield imports[node.id]
            elif node.id in definitions:
                yield module, node.id


def reached(start: Definition) -> list[Definition]:
    """The definition and all that it reaches, sorted."""
    found: set[Definition] = set()
    waiting = [start]
    while waiting:
        module, name = here = waiting.pop()
        definitions, imports = _module(module)
        if here in found or module in APART:
            continue
        if name in imports:  # handed on
            waiting.append(imports[name])
        if name in definitions:
            found.add(here)
            waiting += _used(module, definitions[name])
            worker = STARTS.get(here)
            waiting += [(worker, d) for d in _module(worker)[0]] if worker else []
    return sorted(found)


def code_hash(stage: Definition) -> str:
    parts = [f"{m}.{n} {ast.dump(_module(m)[0][n])}" for m, n in reached(stage)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def current() -> dict[str, dict[str, int | str]]:
    from selfcritique import pipeline, suite

    values = [v for module in (pipeline, suite) for v in vars(module).values()]
    stages = {v.name: v for v in values if isinstance(v, pipeline.Stage)}
    modules = {name: s.run.__module__.removeprefix("selfcritique.") for name, s in stages.items()}
    return {
        name: {"version": stages[name].version, "code": code_hash((modules[name], name))}
        for name in sorted(stages)
    }


def test_versions_follow_the_code() -> None:
    recorded, now = json.loads(RECORD.read_text()), current()
    unbumped = [
        name
        for name, entry in now.items()
        if name in recorded
        and entry["code"] != recorded[name]["code"]
        and entry["version"] == recorded[name]["version"]
    ]
    assert not unbumped, (
        f"The code behind {', '.join(unbumped)} changed. If what it computes may differ for any input, raise "
        "the version in pipeline.py or suite.py, so that no store serves what the old code made. Then, "
        "or if it cannot differ, run: python tests/test_versions.py"
    )
    assert now == recorded, "Versions or stages changed: run python tests/test_versions.py to record them."


@pytest.mark.parametrize(
    ("stage", "definitions"),
    [
        ("select", {("select", "select_responses"), ("select", "draw"), ("stages", "_pool")}),
        ("sample", {("engine.hf", "HfEngine"), ("prompts", "PromptEncoder"), ("prompts", "solve_prompt"),
                    ("answers", "compare_many"), ("algebra", "verdict"), ("records", "content_id")}),
        ("problems", {("data.word_problems", "_ages"), ("data.splits", "normalise"), ("answers", "extract")}),
        ("dpo", {("train.fit", "fit_dpo"), ("train.modules", "DpoModule"), ("stages", "token_pairs")}),
        ("critic_data", {("annotate", "balance"), ("annotate", "corrupt"), ("prompts", "critique_prompt")}),
        ("evaluate", {("evaluate", "accuracy"), ("stats", "wilson")}),
    ],
)  # fmt: skip
def test_what_a_stage_reaches(stage: str, definitions: set[Definition]) -> None:
    found = set(reached(("stages", stage)))
    assert definitions <= found, definitions - found
    assert not {module for module, _ in found} & APART


def test_what_judging_reaches() -> None:
    found = set(reached(("set_stages", "judge")))
    assert {("judge", "parse_rating"), ("prompts", "MATHUSEREVAL"), ("engine.hf", "HfEngine")} <= found


def test_neighbours_do_not_count() -> None:
    """Selection does not run again for a change of the engine, nor DPO for one of the annotator."""
    assert {module for module, _ in reached(("stages", "select"))} == {"stages", "select"}
    assert not {"annotate", "select", "evaluate"} & {module for module, _ in reached(("stages", "dpo"))}


CODE = """
def f(x: int, n: int = 2) -> int:
    'Doc.'
    if x < 0:
        raise UserError("a")
    y: int = x
    return y * n
"""
SAME = """
def f(x, n=2):  # why
    if x < 0:
        raise UserError(f"{x} is wrong")
    y: float = x

    return (y * n)
"""


def test_only_what_can_change_the_result_counts() -> None:
    """Comments, layout, docstrings, types and error texts do not; a constant, operator or default does."""

    def dump(text: str) -> str:
        return ast.dump(_Bare().visit(ast.parse(text)))

    assert dump(CODE) == dump(SAME)
    for old, new in (
        ("y * n", "y + n"),
        ("= 2)", "= 3)"),
        ("x < 0", "x <= 0"),
        ("raise UserError", "UserError"),
    ):
        assert CODE.count(old) == 1 and dump(CODE.replace(old, new)) != dump(CODE)


if __name__ == "__main__":
    sys.path.insert(0, str(SRC))
    RECORD.write_text(json.dumps(current(), indent=1) + "\n")
    print(f"wrote {RECORD}")
