"""What the files of the repository say of the package and of each other: versions, licence, targets, tests."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import camopd
from camopd.card import PAPER
from camopd.cli import COMMANDS


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


def test_editable_install_is_a_path_of_which_setuptools_does_not_warn():
    """Without a `package-dir` for the root it installs a finder, and prints a BuildBackendWarning of it."""
    setuptools = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"": "."}  # what `_select_strategy` of its editable_wheel asks for


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
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in ("__init__.py", "*.yaml")
        for path in ROOT.glob(f"camopd/**/{name}")
    }
    assert set(setuptools["packages"]) == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of an unpacked wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "camopd", folder / "camopd", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / "out" / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def camopd_of(wheel, tmp_path):
    """Run the wheel's `camopd` outside the clone, beside the libraries of this environment."""

    def run(*words, code="from camopd.cli import main; main()"):
        return subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)},
            capture_output=True, text=True, encoding="utf-8", check=False,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_wheel_has_all_that_the_command_names(camopd_of, wheel, tmp_path):
    packed = {path.relative_to(wheel / "camopd") for path in (wheel / "camopd").rglob("*") if path.is_file()}
    where = camopd_of(code="import camopd; print(camopd.__file__)")  # which leaves files beside the others
    assert Path(where.stdout.strip()).is_relative_to(wheel)
    here = {path.relative_to(ROOT / "camopd") for path in (ROOT / "camopd").rglob("*") if path.is_file()}
    assert packed == {path for path in here if "__pycache__" not in path.parts}
    assert not (wheel / "tests").exists() and not (wheel / "configs").exists()
    said = camopd_of("--help")
    assert said.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} ", said.stdout, re.MULTILINE), command
        found = camopd_of(command, "--help")
        assert found.returncode == 0 and f"camopd {command}" in found.stdout, found.stderr
    found = camopd_of("train", "--method", "list")
    assert set(re.findall(r"^(\w+)  ", found.stdout, re.MULTILINE)) == {
        path.stem for path in (ROOT / "camopd" / "methods").glob("*.yaml")
    }
    (tmp_path / "run.yaml").write_text("model_name_or_path: a/b\nscale: 7\n")
    found = camopd_of("train", "run.yaml", "--method", "vanilla_mopd", "--nosuch", "1")
    assert found.returncode == 2 and found.stderr.startswith("camopd: 'nosuch' in 'run.yaml' or on the command line")
    read = "from camopd.demo_data import load_prompts; print(len(load_prompts('general', 'train')))"
    assert int(camopd_of(code=read).stdout) > 100


def test_ci_runs_every_python_that_the_package_says_it_supports():
    (job,) = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"].values()
    said = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    assert job["strategy"]["matrix"]["python"] == said
    assert SpecifierSet(PROJECT["requires-python"]).contains(said[0])
    assert not SpecifierSet(PROJECT["requires-python"]).contains(f"3.{int(said[0].partition('.')[2]) - 1}")


def test_make_lets_python_keep_what_it_compiles():
    """Where it may not, each of a thousand processes compiles torch, transformers and trl anew."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--file", str(ROOT / "Makefile"), "--eval", "probe: ; @env", "probe"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "MALLOC_MMAP_MAX_=0" in found and not any(line.startswith("PYTHONDONTWRITEBYTECODE") for line in found)


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
