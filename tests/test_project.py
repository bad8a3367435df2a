"""What the files of the repository say of the package and of each other: versions, licence, targets, tests."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import camopd
from camopd.card import PAPER


ROOT = Path(camopd.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOT_OLDEST = {
    "camopd",
    "vllm",
    "ruff",
    "mypy",
    "pre-commit",
}  # itself, in an environment of its own, not run by a test


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def steps_of(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def requirements() -> dict[str, Requirement]:
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    return {found.name: found for found in map(Requirement, texts) if found.name not in NOT_OLDEST}


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["title"], citation["version"]) == ("camopd", camopd.__version__)
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    paper = citation["preferred-citation"]
    assert paper["title"] == PAPER["title"] and paper["url"].endswith(PAPER["id"])
    people = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert f"author  = {{{people}}}" in PAPER["citation"]


def test_oldest_versions_are_the_lower_bounds_of_pyproject():
    pins = dict(line.split("==") for line in read("constraints-oldest.txt").splitlines() if "==" in line)
    lowest = {
        name: next(part.version for part in wanted.specifier if part.operator == ">=")
        for name, wanted in requirements().items()
    }
    assert set(pins) == set(lowest)
    for name, pin in pins.items():
        padded = lowest[name] + ".0" * (pin.count(".") - lowest[name].count("."))
        assert padded == pin, name


def test_tested_versions_are_in_the_ranges_of_pyproject():
    pins = dict(line.split("==") for line in read("constraints.txt").splitlines() if "==" in line)
    for name, wanted in requirements().items():
        if name in pins:
            assert wanted.specifier.contains(pins[name]), name


def test_wheel_has_all_packages():
    setuptools = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    found = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("camopd/**/__init__.py")}
    assert set(setuptools["packages"]) == found


def test_ci_runs_every_python_that_the_package_says_it_supports():
    (job,) = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"].values()
    said = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    assert job["strategy"]["matrix"]["python"] == said
    assert SpecifierSet(PROJECT["requires-python"]).contains(said[0])
    assert not SpecifierSet(PROJECT["requires-python"]).contains(f"3.{int(said[0].partition('.')[2]) - 1}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_calls_targets_of_the_makefile(path):
    workflow = yaml.safe_load(read(path))
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    called = {word for step in steps_of(workflow) for word in re.findall(r"^make ([a-z-]+)$", step.get("run", ""))}
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        called |= {*matrix.get("target", ()), *(one["target"] for one in matrix.get("include", ()))}
    assert called and called <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_may_do_little_and_holds_no_secret(path):
    workflow = yaml.safe_load(read(path))
    assert workflow["permissions"] in ({}, {"contents": "read"})
    granted = [job.get("permissions", workflow["permissions"]) for job in workflow["jobs"].values()]
    assert [one for one in granted if "write" in one.values()] == (
        [{"id-token": "write"}, {"contents": "write"}] if path.name == "release.yml" else []
    )
    assert "secrets." not in read(path)
    for step in steps_of(workflow):
        assert "uses" not in step or re.search(r"@v\d+\.\d+\.\d+$", step["uses"]), step
        assert "actions/checkout" not in step.get("uses", "") or step["with"] == {"persist-credentials": False}
        assert "${{" not in step.get("run", "")  # what others write (a branch's name) would run as part of the script
