"""Linter, formatter and type checker pass, and no text of a model is ever run as code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# Builtins by their bare name (model.eval() and re.compile() are others); the rest under any prefix.
RUNS_TEXT_BARE = {"eval", "exec", "compile", "__import__"}
RUNS_TEXT = {"parse_expr", "sympify", "parse_latex", "literal_eval", "run_module", "run_path"}
# train/launch.py hands a fit to its own child processes, which read what their parent wrote a moment before.
OWN = {"pickle.loads(Path(spec).read_bytes())"}
LOADS_OBJECTS = {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("joblib", "load")}


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "src", "tests", "benchmarks"),
        ("ruff", "format", "--check", "src", "tests", "benchmarks"),
        ("mypy",),
    ],
    ids=" ".join,
)
def test_tools_pass(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def forbidden(source: str) -> list[str]:
    """Calls that run text as code, load pickles, or trust a checkpoint's code by a constant."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Name(id=name):
                bad = name in RUNS_TEXT_BARE | RUNS_TEXT
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                bad = name in RUNS_TEXT or (module, name) in LOADS_OBJECTS or module == "builtins"
            case ast.Attribute(attr=name):
                bad = name in RUNS_TEXT
            case _:
                bad = False
        trusts = any(
            k.arg == "trust_remote_code" and isinstance(k.value, ast.Constant) and k.value.value is not False
            for k in call.keywords
        )
        shell = any(k.arg == "shell" for k in call.keywords)
        if bad or trusts or shell:
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT / "src").as_posix())
def test_no_text_is_run_as_code(path: Path) -> None:
    found = [line for line in forbidden(path.read_text()) if line.partition(": ")[2] not in OWN]
    assert found == []


def test_what_the_search_finds() -> None:
    bad = [
        "eval(x)",
        "exec(x)",
        "compile(x, '', 'eval')",
        "sympy.parse_expr(x)",
        "sympify(x)",
        "torch.load(f)",
    ]
    bad += ["a.b.parse_expr(x)", "builtins.eval(x)", "f(trust_remote_code=True)", "run(x, shell=True)"]
    assert all(len(forbidden(text)) == 1 for text in bad)
    good = [
        "model.eval()",
        "re.compile(x)",
        "f(trust_remote_code=False)",
        "f(trust_remote_code=config.trust)",
    ]
    assert all(forbidden(text) == [] for text in good)
