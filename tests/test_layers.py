"""Which file may import which: arrows go down only, those that only types need included."""

import ast
import re
from pathlib import Path

import pytest

import camopd


ROOT = Path(camopd.__file__).parent


def modules() -> dict[str, Path]:
    """Dotted name, without the package's own, of each file that is not an `__init__` without imports."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        if name:  # the package's own `__init__` only names what users import
            found[name] = path
    return found


# Modules without a test file of their own, and why.
UNTESTED = {
    "callbacks.guards": "applies guards.py in a run: test_guards.py",
    "commands.check_run": "what `camopd check` says of the run: test_commands_check.py",
    "commands.demo_words": "the words of `camopd demo`: test_commands_demo.py",
    "commands.demo_stages": "the stages of `camopd demo`: test_commands_demo.py",
    "exit_codes": "constants",
    "precision": "shows only under the launchers: test_distributed.py",
    "token_rules.base": "what every rule must give, with the table of them: test_token_rules.py",
    "unreadable": "what is said of files: test_files.py",
    "version": "one text",
}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere: at its top, in functions, and for types."""
    package = ["camopd", *name.split(".")]
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *((node.module or "").split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
    return {full.removeprefix("camopd.") for full in found} & set(known) - {name}


KNOWN = modules()
GRAPH = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


def below(name: str, above: tuple[str, ...] = ()) -> set[str]:
    """All modules that a module needs, and those need."""
    assert name not in above, "a circle: " + " -> ".join((*above[above.index(name) :], name))
    return GRAPH[name].union(*(below(other, (*above, name)) for other in GRAPH[name]))


def test_imports_make_no_circle():
    assert len(GRAPH) > 60 and sum(map(len, GRAPH.values())) > 200  # they are found
    for name in GRAPH:
        below(name)


@pytest.mark.parametrize(
    ("names", "never"),
    [
        ("objective schedule version errors balance", ".*"),
        ("samples logprobs forward", "config|step|trainer|setup|scoring|callbacks.*"),
        ("token_rules", "config|step|trainer|setup|scoring|selection|batching|callbacks.*"),
        ("config", "step|trainer|setup|scoring|selection|batching|checkpoints|callbacks.*"),
        ("scoring selection batching rollouts checkpoints", "trainer|setup|evaluation|callbacks.*"),
        ("callbacks", "trainer|setup"),
        ("loss ahead evaluation record rollout_servers", "trainer|setup|run|callbacks.*|commands.*"),
        ("teachers", "config|step|trainer|setup|scoring|selection|batching|rollouts|callbacks.*"),
        (
            "report data results verdict measured",
            "trainer|setup|run|step|forward|rollouts|scoring|selection|batching|config|logprobs|loss|ahead|evaluation|metrics"
            r"|checkpoints|token_rules.*|callbacks.*|commands.*|teachers\.(local|adapters|check|resolve|vllm).*",
        ),
        ("eval", "trainer|setup|step|rollouts|scoring|selection|batching|loss|ahead|callbacks.*|commands.*"),
        ("trainer", "commands.*|cli|run"),
        ("commands", "cli"),
    ],
)
def test_module_needs_nothing_that_stands_above_it(names, never):
    for wanted in names.split():
        found = [name for name in GRAPH if name == wanted or name.startswith(f"{wanted}.")]
        assert found, wanted
        for name in found:
            others = {other for other in below(name) if not other.startswith(f"{wanted}.")}
            assert not [other for other in others if re.fullmatch(never, other)], name


def test_table_of_the_layers_has_every_module_and_arrows_that_go_down_only():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table, _, behind = text.partition("| level | files |\n")[2].partition("\n\n")
    levels = {}
    for number, line in enumerate(table.splitlines()[1:]):
        levels |= dict.fromkeys(re.findall(r"`([a-z_]+)/?`", line), number)
    beside = set(re.findall(r"`([a-z_]+)/?`", behind.partition("\n\n")[0]))
    assert len(levels) > 50 and not beside & levels.keys()
    whole = {name.partition(".")[0] for name in GRAPH} - {"demo_data"}
    assert whole <= levels.keys() | beside
    for name, others in GRAPH.items():
        mine = levels.get(name.partition(".")[0])
        for other in others:
            below = levels.get(other.partition(".")[0])
            assert mine is None or below is None or mine <= below, f"{name} imports {other}, which stands above it"


def test_measures_can_be_taken_out():
    """Only the function that lists the callbacks knows of them."""
    assert {name for name in GRAPH if any(other.startswith("callbacks.") for other in GRAPH[name])} == {"setup"}


def test_files_and_functions_stay_short_enough_to_read():
    """At most 450 lines a file, and 60 a function."""
    for name, path in KNOWN.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def has_code(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body)


def test_modules_have_a_test_file_named_after_them():
    """`teachers.vllm.plan` is tested in test_plan.py, test_vllm_plan.py or test_teachers_vllm_plan.py."""
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    whole = {name.replace(".", "_") for name in KNOWN}
    for name, path in KNOWN.items():
        parts = name.split(".")
        names = ["_".join(parts[start:]) for start in range(len(parts))]
        found = [each for each in names if each in files and (each == names[0] or each not in whole)]
        if name in UNTESTED:
            assert not found, f"{name} has test_{found[0]}.py and need not stand in UNTESTED"
        elif path.name != "__init__.py" or has_code(path):
            assert found, f"no test_{names[-1]}.py for {name}: see UNTESTED"


def test_helpers_of_tests_stand_in_files_without_tests():
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (name or "").startswith("test_"), f"{path.name} imports from {name}.py"
