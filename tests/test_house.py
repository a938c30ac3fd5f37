"""The house rules, run. A rule that nothing executes decays.

Each rule reads one syntax tree and yields (line, what is wrong). `RULES` are applied to the whole
package, and `BROKEN` shows for each of them a snippet that it must refuse.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src/trivet").rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in (
        "src/**/*",
        "tests/**/*",
        "benchmarks/**/*",
        "configs/**/*",
        "docs/**/*",
        ".ci/*",
        "*.*",
        "Makefile",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix not in (".pyc", ".png", ".gif", ".safetensors")
    if path.name != ".git"  # a file in a worktree, and not ours
)

FILE_SOFT, FILE_HARD = 400, 500
FUNCTION_SOFT, FUNCTION_HARD = 60, 80
LONG_FUNCTIONS: set[str] = set()  # "room/file.py:name", each with a reason

PROBES_ALLOWED: set[str] = set()  # "file.py:function", each with a reason
# Installed by extras only, or slow to import: never at the top of a file.
LAZY = {
    "matplotlib", "tensorboard", "pydantic_monty", "reasoning_gym", "math_verify", "llguidance", "jsonschema", "pyarrow",
    "verifiers", "ray", "httpx2",
}  # fmt: skip
READS_TEXT = {"rl/preference.py"}  # a reward model reads answers as people do; no policy is trained on its ids
MAKES_IDS = {"encode", "encode_text", "encode_batch", "tokenise", "tokenizer"}

Finding = tuple[int, str]


# ------------------------------------------------------------------------------------------ the rules
def no_probing(tree: ast.Module, file: str) -> Iterator[Finding]:
    """An attribute is there by its type. A setting that may be missing is a typed field with a default."""
    for scope, node in walk_with_scope(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and f"{file}:{scope}" not in PROBES_ALLOWED:
            literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            if node.func.id == "hasattr" or (node.func.id == "getattr" and literal):
                yield node.lineno, f"{node.func.id} probes an object for what it is"


def no_swallowing(tree: ast.Module, file: str) -> Iterator[Finding]:
    """Whoever catches everything looks at it (uses its name) or raises again."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            inside = [n for statement in node.body for n in ast.walk(statement)]
            raises = any(isinstance(n, ast.Raise) for n in inside)
            looks = node.name is not None and any(isinstance(n, ast.Name) and n.id == node.name for n in inside)
            if node.type is None:
                yield node.lineno, "bare except"
            elif catches_all(node.type) and not raises and not looks:
                yield node.lineno, "catches every exception and looks at none"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
            if any(catches_all(arg) for arg in node.args):
                yield node.lineno, "suppresses every exception"


def no_pickle(tree: ast.Module, file: str) -> Iterator[Finding]:
    """A file that someone sends can't run code: weights are safetensors, state is JSON beside them."""
    for node in ast.walk(tree):
        for module in imported(node):
            if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
                yield node.lineno, f"imports {module}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            yield node.lineno, f"{ast.unparse(node)} is pickle"


def no_transformers(tree: ast.Module, file: str) -> Iterator[Finding]:
    for node in ast.walk(tree):
        for module in imported(node):
            if module.split(".")[0] == "transformers":
                yield node.lineno, "imports transformers"


def lazy_extras(tree: ast.Module, file: str) -> Iterator[Finding]:
    """Extras are imported by the function that needs them, which can say what to install."""
    for scope, node in walk_with_scope(tree):
        for module in imported(node):
            if not scope and module.split(".")[0] in LAZY:
                yield node.lineno, f"imports {module} at the top"


def short_functions(tree: ast.Module, file: str) -> Iterator[Finding]:
    for node, lines in functions(tree):
        if lines > FUNCTION_HARD and f"{file}:{node.name}" not in LONG_FUNCTIONS:
            yield node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_HARD}"


def no_text_to_ids(tree: ast.Module, file: str) -> Iterator[Finding]:
    """What is trained on are ids that were seen and sampled: these rooms never make ids from text."""
    if file.split("/")[0] in ("rl", "agent") and file not in READS_TEXT:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            of_chat = node.attr == "render" and ast.unparse(node.value).split(".")[-1] == "chat"
            if of_chat or node.attr.lstrip("_") in MAKES_IDS:
                yield node.lineno, f"{ast.unparse(node)} makes ids from text"


RULES = (no_probing, no_swallowing, no_pickle, no_transformers, lazy_extras, short_functions, no_text_to_ids)
BROKEN: list[tuple[Callable[[ast.Module, str], Iterator[Finding]], str]] = [
    (no_probing, "width = getattr(config, 'width', 3)"),
    (no_probing, "def f(x):\n    return x.y if hasattr(x, 'y') else 0"),
    (no_swallowing, "try:\n    f()\nexcept:\n    raise"),
    (no_swallowing, "try:\n    f()\nexcept Exception:\n    pass"),
    (no_swallowing, "try:\n    f()\nexcept (ValueError, Exception) as e:\n    x = 0.0"),
    (no_swallowing, "with suppress(Exception):\n    f()"),
    (no_pickle, "import pickle"),
    (no_pickle, "state = torch.load(path)"),
    (no_transformers, "def f():\n    from transformers.models.llama import LlamaConfig"),
    (lazy_extras, "import matplotlib.pyplot as plt"),
    (lazy_extras, "try:\n    from math_verify import parse\nexcept ImportError:\n    parse = None"),
    (short_functions, "def f():\n" + "    x = 1\n" * FUNCTION_HARD),
    (no_text_to_ids, "ids = chat.encode_text(message.content)"),
    (no_text_to_ids, "ids = self.chat.render(episode.messages).ids"),
    (no_text_to_ids, "make = chat.tokenizer"),
]
FINE = [
    "def f(torch, name):\n    return getattr(torch, name)",
    "try:\n    f()\nexcept Exception as e:\n    print(e)",
    "try:\n    f()\nexcept BaseException:\n    g()\n    raise",
    "with suppress(FileNotFoundError):\n    f()",
    "def f():\n    import matplotlib",
    "ids = chat.render(messages).ids",
    "class A:\n    def load(self):\n        return self.torch_load()",
    "def f():\n" + "    x = 1\n" * (FUNCTION_HARD - 1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Callable[[ast.Module, str], Iterator[Finding]]) -> None:
    found = []
    for path in SOURCES:
        file = path.relative_to(ROOT / "src/trivet").as_posix()
        found += [f"src/trivet/{file}:{line}: {what}" for line, what in rule(ast.parse(path.read_text()), file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "source"), BROKEN, ids=lambda x: x.__name__ if callable(x) else "")
def test_rule_refuses(rule: Callable[[ast.Module, str], Iterator[Finding]], source: str) -> None:
    assert list(rule(ast.parse(source), "rl/x.py"))


@pytest.mark.parametrize("source", FINE)
def test_rules_let_pass(source: str) -> None:
    assert [finding for rule in RULES for finding in rule(ast.parse(source), "x.py")] == []


def test_exceptions_are_still_needed() -> None:
    """An allowance for what is no longer there goes."""
    there = {
        f"{path.relative_to(ROOT / 'src/trivet').as_posix()}:{node.name}"
        for path in SOURCES
        for node, _ in functions(ast.parse(path.read_text()))
    }
    assert PROBES_ALLOWED | LONG_FUNCTIONS <= there


# ----------------------------------------------------------------------------------------------- size
def test_files_and_functions_are_small() -> None:
    """Over the hard limit fails; over the soft one is a warning in the test's summary."""
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lengths) > 20  # the right folder
    for file, length in lengths.items():
        if length > FILE_SOFT:
            warnings.warn(f"soft limit: {file} has {length} lines, {FILE_SOFT} is plenty", stacklevel=1)
        for node, lines in functions(ast.parse((ROOT / file).read_text())):
            if lines > FUNCTION_SOFT:
                warnings.warn(f"soft limit: {file}: {node.name} has {lines} lines", stacklevel=1)
    assert {file: length for file, length in lengths.items() if length > FILE_HARD} == {}


# ---------------------------------------------------------------------------------- machines and paths
MACHINE = re.compile(
    r"(?<![\w.~/<:*-])/(?:home|Users|root|mnt|opt|work(?:space)?|scratch)/"  # someone's own disk
    r"|\bshared/(?!data\b)"  # beside the checkout, only data may be there
    r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b"  # a private network
    r"|(?:ghp|github_pat|hf|sk)_[A-Za-z0-9]{20,}",  # a credential
)


def test_no_machine_in_the_files() -> None:
    assert any(path.name == "pyproject.toml" for path in TEXTS)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in TEXTS
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["'/home/me/data'", "cd /work/x", "../shared/notes.md", "http://10.1.2.3:80", "hf_" + "a" * 30]
)
def test_machine_is_recognised(text: str) -> None:
    assert MACHINE.search(text)


@pytest.mark.parametrize(
    "text", ["../shared/data/gsm8k", "a/home/b", "x/work/y", "version 10.2", "http://127.0.0.1:8000/"]
)
def test_ordinary_text_is_not_a_machine(text: str) -> None:
    assert not MACHINE.search(text)


# -------------------------------------------------------------------------------------- what is loaded
def test_planning_talking_grading_and_acting_load_no_torch() -> None:
    """The import contracts see our own imports; this sees what libraries bring along."""
    rooms = "spec messages config disk chat tasks tools agent.loop hub measure.memory measure.activations measure.plan measure.plan_show measure.stats measure.trial rl.config rl.rewards rl.judge rl.endpoint cli".split()
    code = f"""
        import importlib, sys
        for room in {rooms}:
            importlib.import_module("trivet." + room)
            loaded = {{"torch", "transformers", *{sorted(LAZY)}}} & sys.modules.keys()
            assert not loaded, f"importing trivet.{{room}} loads {{loaded}}"
    """
    assert run_python(code) == ""


def test_help_loads_no_torch() -> None:
    out = run_python("""
        import sys
        from trivet.cli import main
        sys.argv = ["trivet", "--help"]
        try:
            main()
        except SystemExit as e:
            assert e.code in (0, None), e.code
        print("loads torch:", "torch" in sys.modules)
    """)
    assert "chat" in out
    assert out.endswith("loads torch: False\n")


def run_python(code: str) -> str:
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    program = "\n".join(line[indent:] for line in lines)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------- helpers
def walk_with_scope(tree: ast.AST, scope: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the function it stands in; "" at the top of a file or a class."""
    for node in ast.iter_child_nodes(tree):
        yield scope, node
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else scope
        yield from walk_with_scope(node, inner)


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module]
    return []


def catches_all(type_: ast.expr) -> bool:
    types = type_.elts if isinstance(type_, ast.Tuple) else [type_]
    return any(isinstance(t, ast.Name) and t.id in ("Exception", "BaseException") for t in types)
