"""`camopd report` (camopd/commands/report.py)."""

import re
import subprocess
import sys

import pytest
from runs import GAP, make_run

from camopd import cli


def test_report_prints_the_answer_and_where_the_page_is(tmp_path, capsys):
    for name in ("one", "two"):
        make_run(tmp_path / name, 8, **GAP)
    cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("one: Whether the model recovered is not known: no held-out prompts were measured.")
    assert said[1].startswith("one: Training gaps: This run is too short to tell")
    assert [line.split(":")[0] for line in said[2:4]] == ["two", "two"]
    assert said[4] == f"{tmp_path / 'one' / 'report' / 'report.html'}, and the same in report.md"
    assert (tmp_path / "one" / "report" / "report.html").is_file()


def test_report_into_a_file_is_refused(tmp_path, capsys):
    path = make_run(tmp_path / "run", 8, **GAP)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(path), "--out", str(path)])
    assert stopped.value.code == 2
    assert re.search(
        r"where the report is to go, is a file, not a folder\. Give another --out", capsys.readouterr().err
    )


def test_report_without_matplotlib_shows_the_command_to_type(tmp_path):
    path = make_run(tmp_path, 8, **GAP)
    code = "import sys; sys.modules['matplotlib'] = None; from camopd.cli import main; main(sys.argv[1:])"
    found = subprocess.run(
        [sys.executable, "-c", code, "report", str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 2
    assert re.search(r"camopd: figures need 'matplotlib.*': pip install -e '\.\[report\]'", found.stderr)


def test_folder_without_a_run_is_said_before_figures_are_imported(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from camopd.cli import main; main(sys.argv[1:])"
    found = subprocess.run(
        [sys.executable, "-c", code, "report", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 2 and "which training writes into its output_dir" in found.stderr


def test_report_imports_no_torch(tmp_path):
    path = make_run(tmp_path, 8, **GAP)
    code = (
        "import sys; from camopd.cli import main; main(sys.argv[1:])\n"
        "print(sorted({'torch', 'transformers', 'trl', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, "report", str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"
