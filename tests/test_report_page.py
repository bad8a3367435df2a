"""The page of a report (camopd/report/page.py)."""

import html
import json
import re

import pytest
from eval_items import items
from hypothesis import given
from hypothesis import strategies as st
from runs import ALWAYS, GAP, MEASURED, make_run

from camopd.eval.compare import compare
from camopd.eval.page import write as write_evaluation
from camopd.eval.tasks import TASKS
from camopd.report.charts import CHARTS
from camopd.report.page import quote, table, to_html, write_report
from camopd.report.signs import DIAGNOSTICS


@pytest.fixture(autouse=True)
def _without_images(monkeypatch):
    """matplotlib takes two seconds for those of a page, and nearly all tests here are of its text."""
    monkeypatch.setattr("camopd.report.page.png", lambda figure: b"\x89PNG")


def test_page_holds_its_figures_and_nothing_of_the_network(tmp_path, monkeypatch):
    monkeypatch.undo()  # its images are drawn
    path = make_run(tmp_path / "run", 20, **ALWAYS, **MEASURED)
    said = write_report({"run": path}, tmp_path / "out")
    page, text = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    names = [*(chart.name for chart in CHARTS), "time"]
    assert page.count('src="data:image/png;base64,') == len(names)
    assert re.findall(r"https?://|<script|<link|@import|src=\"(?!data:)", page) == []
    for name in names:
        assert f"]({name}.png)" in text
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "Not measured" not in text.split("## Gaps")[1]
    assert page.index("Did it recover?") < page.index("Which of my branches is hurting?") < page.index("<img")
    assert len(said) == 2 and "*" not in said[1]


def test_page_leaves_out_figures_without_data_and_says_what_turns_them_on(tmp_path):
    write_report({"run": make_run(tmp_path / "run", 20, **ALWAYS)}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "conflict.png").exists()
    assert not (tmp_path / "out" / "coherence.png").exists()
    left_out = text.split("## Not measured")[1].split("##")[0]
    assert f"the paper's Figure 1): set `{DIAGNOSTICS}: 10` in the config." in left_out
    coherence = f"upper row): set `{DIAGNOSTICS}: 10` in the config, and a selection that leaves samples out."
    assert "Gradient coherence gain" in left_out and coherence in left_out
    assert left_out.count("\n- ") == 2


def test_page_of_several_runs_has_a_line_for_each(tmp_path):
    paths = {name: make_run(tmp_path / name, 20, **GAP) for name in ("one", "two")}
    said = write_report(paths, tmp_path / "out")
    assert [line.split(":")[0] for line in said] == ["one", "one", "two", "two"]
    text = (tmp_path / "out" / "report.md").read_text()
    top, _, end = text.partition("## The runs one by one")
    for name in paths:
        assert f"- `{name}`: " in top
        assert f"### `{name}`" in end


def test_page_of_several_runs_has_no_table_of_what_they_do_not_settle(tmp_path):
    metrics = {"selection/{branch}/kept_fraction": 1.0, "grad_norm": 1.0}
    paths = {
        "long": make_run(tmp_path / "long", 60, **GAP, **metrics),
        "short": make_run(tmp_path / "short", 7, **GAP),
    }
    write_report(paths, tmp_path / "out")
    top = (tmp_path / "out" / "report.md").read_text().split("## The runs one by one")[0]
    assert "| run | A gap that rises | Imbalance | Selection follows length | Selection follows outliers |\n" in top
    assert "| `long` | not seen | not seen | not seen | not seen |" in top and "| `short` |" not in top
    assert "| unclear |" not in top and "| not measured |" not in top
    (line,) = [line for line in top.splitlines() if line.startswith("Not settled: ")]
    assert line.startswith(
        "Not settled: counteraction, weak samples, steps mostly momentum (`long`); a gap that rises, "
    )
    assert line.endswith(", steps mostly momentum (`short`).")
    write_report({name: make_run(tmp_path / name, 7, **GAP) for name in ("one", "two")}, tmp_path / "out")
    top = (tmp_path / "out" / "report.md").read_text().split("## The runs one by one")[0]
    signs = top.split("## Which of my branches is hurting?")[1].split("## Gaps")[0]
    assert (
        "| " not in signs and signs.count("\nNot settled: ") == 1 and "(`one`" not in signs.split("Not settled: ")[1]
    )


def held_out(folder, *evaluations, lengths=()):
    """A held_out.jsonl with (step, branch, KL of each prompt), and mean lengths of answers."""
    lines = [
        {"step": step, "branch": branch, "kl": sum(values) / len(values), "kl_se": 0.1, "gap_abs": 0.7, "of": "p",
         "prompts": len(values), "kl_by_prompt": values, **({"length": lengths[place]} if lengths else {})}
        for place, (step, branch, values) in enumerate(evaluations)
    ]  # fmt: skip
    (folder / "held_out.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_page_has_benchmarks_where_there_are_some(tmp_path):
    path = make_run(tmp_path / "run", 20, **ALWAYS)
    found = {name: {"ifeval": items(scores, truncated=0.625)} for name, scores in (
        ("start", [0, 1, 0]), ("general", [1, 1, 1]), ("result", [1, 0, 0])
    )}  # fmt: skip
    write_evaluation(compare([TASKS["ifeval"]], found), [], {"limit": 3}, path.parent / "eval")
    line = {"step": 20, "task": "qasc", "rows": [0, 1], "scores": [0.5, 1.0]}
    (path.parent / "eval_tasks.jsonl").write_text(f"{json.dumps(line)}\n")
    said = write_report({"run": path}, tmp_path / "out")
    text, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    top, _, section = text.partition("## Benchmarks\n")
    section = section.partition("\n## ")[0]
    assert "## Did it recover?" in top and "## Which of my branches" not in top
    assert f"`{path.parent / 'eval' / 'eval.json'}`. Measured on at most 3 rows of each task." in section
    assert "| ifeval | 33.3 ± 143.4 | 100.0 (from 29.2) | 33.3 ± 143.4 | 3 | +0.0 (" in section
    assert "| 1 of 3 | 1 of 3 |" in section and "| qasc | 2 | 0.750 ± " in section
    cut = "62% (before), 62% (general teacher), 62% (after) of the answers were cut off at the token limit."
    assert f"- ifeval: {cut}\n" in section and f"<li>ifeval: {cut}</li>" in page
    assert "<td>ifeval</td>" in page and len(said) == 3
    scores = "before 33.3 ± 143.4, general teacher 100.0 (from 29.2), after 33.3 ± 143.4; change +0.0 ("
    assert said[1].startswith(f"ifeval, percent ± 95 %: {scores}")
    assert said[1].endswith(f"1 of 3 came back, 1 of 3 broke; {cut}")
    said = write_report({"one": path, "two": make_run(tmp_path / "two", 20, **GAP)}, tmp_path / "out")
    assert [line for line in said if "ifeval" in line] == [said[1]] and said[1].startswith("one: ifeval, percent")
    assert f"`one`, `{path.parent / 'eval' / 'eval.json'}`. " in (tmp_path / "out" / "report.md").read_text()


def test_page_without_benchmarks_has_no_word_of_them(tmp_path):
    write_report({"run": make_run(tmp_path / "run", 20, **ALWAYS)}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Benchmarks" not in text and "eval_tasks" not in text


def test_page_says_which_benchmarks_cannot_be_read_and_shows_the_rest(tmp_path):
    path = make_run(tmp_path / "run", 20, **ALWAYS)
    (path.parent / "eval").mkdir()
    (path.parent / "eval" / "eval.json").write_text('{"tasks": [{}]}')
    (path.parent / "eval_tasks.jsonl").write_text("x\n{}\n")
    *_, evaluated, trained = write_report({"run": path}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"**Note.** `{path.parent / 'eval' / 'eval.json'}` is not shown: it cannot be read as results of" in text
    assert evaluated.startswith(f"{path.parent / 'eval' / 'eval.json'} is not shown: it cannot be read as results")
    assert trained.startswith("Scores of eval_tasks are not shown: line 1 of ") and "Delete the line" in trained
    assert "## Which of my branches is hurting?" in text


def test_page_begins_with_the_verdict_on_held_out_prompts(tmp_path):
    path = make_run(tmp_path / "run", 20, **{**ALWAYS, "gap/{branch}/abs_mean": lambda step, _: 1 / step})
    before = [0.4, 0.5, 0.6] * 4
    held_out(
        tmp_path / "run", (0, "general", before), (0, "domain", [0.0] * 12), (20, "domain", [0.001, 0.002] * 6),
        (20, "general", [value + 0.1 for value in before]),
    )  # fmt: skip
    said = write_report({"run": path}, tmp_path / "out")
    assert said[0].startswith("general has NOT recovered, it has moved further away: 0.500 → 0.600, change +0.100")
    assert said[1].startswith("domain is kept, a change of +0.3% of the largest gap before: 0.000 → 0.002")
    assert said[2].startswith(
        "Which branch hurts: general: on held-out prompts it has moved away from its teacher, by 0.100"
    )
    assert said[3].startswith("Training gaps: ")
    text = (tmp_path / "out" / "report.md").read_text()
    top = text.split("## Which of my branches is hurting?")[0]
    assert (
        f"- {said[0]}" in top
        and "| general | 0.500 ± 0.220 | 0.600 ± 0.220 |" in top
        and "From the training gaps" in text
    )


def test_page_says_which_branch_hurts_by_held_out_prompts_before_its_training_gaps(tmp_path):
    paths = {name: make_run(tmp_path / name, 8, **ALWAYS) for name in ("one", "two")}
    held_out(tmp_path / "one", (0, "domain", [0.0] * 12), (8, "domain", [0.2, 0.3] * 6))
    said = write_report({"one": paths["one"]}, tmp_path / "out")
    section = (
        (tmp_path / "out" / "report.md").read_text().split("## Which of my branches is hurting?")[1].split("##")[0]
    )
    moved = "on held-out prompts it has moved away from its teacher, by 0.250 nats per token (+0.217 to +0.283)."
    answer = f"**domain**: {moved}"
    assert section.strip().startswith(answer) and section.index("moved away") < section.index("From the training gaps")
    assert "This run is too short to tell a trend" in section
    assert said[1] == f"Which branch hurts: domain: {moved}"
    write_report(paths, tmp_path / "out")
    section = (
        (tmp_path / "out" / "report.md").read_text().split("## Which of my branches is hurting?")[1].split("##")[0]
    )
    assert (
        section.strip().startswith(f"- `one`: {answer}\n\nFrom the training gaps") and "- `two`: This run" in section
    )


def test_page_speaks_of_signs_only_where_a_run_has_some(tmp_path):
    path = make_run(tmp_path / "short", 7, **ALWAYS)
    write_report({"run": path}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "mall models" not in text and "candidate for its cause" not in text
    assert "| **Time and padding** |  | a step takes 10 s" in text and "not tried" not in text
    write_report({"run": make_run(tmp_path / "none", 40, **GAP, grad_norm=1.0)}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "*On small models*" in text and "candidate for its cause" not in text and "Counteraction" not in text
    write_report({"run": make_run(tmp_path / "seen", 40, **GAP, **{"conflict/cosine": -0.1})}, tmp_path / "out")
    assert "candidate for its cause" in (tmp_path / "out" / "report.md").read_text()


def test_page_names_answers_of_almost_no_tokens(tmp_path):
    path = make_run(tmp_path / "run", 20, **ALWAYS)
    held_out(tmp_path / "run", (0, "general", [0.5] * 9), (20, "general", [0.25] * 9), lengths=(30.0, 1.25))
    wanted = "its answers are almost EMPTY, 1.2 tokens on average, 30.0 before: a gap of almost no text"
    assert wanted in write_report({"run": path}, tmp_path / "out")[0]
    assert wanted in (tmp_path / "out" / "report.md").read_text()


def test_page_of_an_earlier_run_in_the_folder_has_its_own_verdict(tmp_path):
    path = make_run(tmp_path / "run", 20, **ALWAYS)
    held_out(tmp_path / "run", (0, "general", [0.5] * 9), (20, "general", [0.1] * 9))
    for name in ("metrics.jsonl", "held_out.jsonl"):
        (path.parent / name).rename(path.parent / name.replace(".", "-1."))
    make_run(tmp_path / "run", 20, **ALWAYS)
    held_out(tmp_path / "run", (0, "general", [0.5] * 9), (20, "general", [0.6] * 9))
    (path.parent / "other.jsonl").write_bytes(path.read_bytes())
    said = [write_report({"run": path.with_name(name)}, tmp_path / "out")[0]
            for name in ("metrics.jsonl", "metrics-1.jsonl", "other.jsonl")]  # fmt: skip
    assert "0.500 → 0.600" in said[0] and "0.500 → 0.100" in said[1]
    assert said[2].startswith("Whether the model recovered is not known")


def test_page_has_one_line_for_what_a_run_does_not_settle(tmp_path):
    said = write_report({"run": make_run(tmp_path / "run", 7, **ALWAYS)}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Not settled by this run: ")]
    assert (
        "counteraction (`diagnostics_steps: 10` measures" in line and "a gap that rises, " in line and len(line) < 600
    )
    assert "| unclear |" not in text and "| not measured |" not in text
    assert text.split("*On small models*")[0].count("ounteraction") == 1
    assert " Not settled: a gap that rises, counteraction, " in said[1]


def test_page_shows_the_texts_of_others_as_texts():
    blocks = ["**b** `a<b` <i>x</i>", quote("<script>**x**\n\ny"), table([["h"], ["a|b & c"]])]
    page = to_html("t<", blocks, {})
    assert "<title>t&lt;</title>" in page
    assert "<strong>b</strong> <code>a&lt;b</code> &lt;i&gt;x&lt;/i&gt;" in page
    assert "&lt;script&gt;**x**\n\ny</blockquote>" in page
    assert "<td>a|b &amp; c</td>" in page
    assert blocks[1:] == ["> <script>**x**\n> \n> y", "| h |\n| --- |\n| a\\|b & c |"]


@given(st.lists(st.lists(st.text("ab|1 ", min_size=1).map(str.strip), min_size=2, max_size=2), min_size=1, max_size=4))
def test_page_table_has_the_cells_that_it_is_made_of(rows):
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", to_html("", [table(rows)], {}))]
    assert cells == [cell for row in rows for cell in row]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), min_size=1))
def test_page_quote_is_the_text_itself(text):
    page = to_html("", [quote(text)], {})
    found = html.unescape(page.split("<blockquote>")[1].split("</blockquote>")[0])
    assert found == "\n".join(text.splitlines())
