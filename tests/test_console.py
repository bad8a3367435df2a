"""What a run shows on the screen: one line per step, a bar where there is a terminal, and the verdict last."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import make_model, make_prompts
from hypothesis import given
from hypothesis import strategies as st
from trainers import lines, make_trainer
from transformers import PrinterCallback, ProgressCallback

from camopd.callbacks.console import Bar, Console, answer, bar, duration, head, layout, line_of, row_of
from camopd.verdict import Measured


NUMBERS = {"gap/general/abs_mean": 0.35444, "selection/general/kept_fraction": 0.625, "gap/domain/abs_mean": 0.02}


def measured(step, kl, se=0.01, prompts=40):
    return Measured(step, kl, se, prompts, gap_abs=0.3)


def test_line_of_a_step_stands_under_its_head_in_80_columns():
    line = line_of("12/200", {"branch": "general", **NUMBERS}, 12_340, 10.0, 623.4, 7, 1)
    assert head(7, 1) == "       step branch   |gap|  kept  tokens/s  s/step     left"
    assert line == "     12/200 general  0.354   62%     1,234   10.00    10:23"
    mixed = line_of("12/200", {"branch": "general+domain", **NUMBERS}, 9, 0.0, 4000, 14, 2)
    assert mixed == "     12/200 general+domain  0.354/0.020      62%/-         -    0.00  1:06:40"
    assert len(mixed) == len(head(14, 2)) <= 80


def test_tokens_per_second_are_those_that_were_written(capsys, monkeypatch):
    """A prompt of 10 tokens and a completion of 90, of which two are trained, in 10 seconds."""
    monkeypatch.setattr("camopd.callbacks.console.time.perf_counter", lambda: 10.0)
    console, row = Console(["general"], ["general"], None), SimpleNamespace(num_ids=12, num_tokens=2, length=90)
    console.on_step_closed(SimpleNamespace(number=0, metrics={"branch": "general", **NUMBERS}, summaries=[row]))
    console.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=1), None)
    assert capsys.readouterr().out.splitlines()[-1].split()[4] == "10"


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_duration_grows_with_the_seconds(first, second):
    def seconds(text):
        return sum(int(part) * 60**place for place, part in enumerate(reversed(text.split(":"))))

    assert seconds(duration(first)) == round(first)
    assert (first <= second) <= (seconds(duration(first)) <= seconds(duration(second)))


@given(st.integers(0, 500), st.integers(1, 500), st.text(max_size=100), st.integers(0, 200))
def test_bar_fits_its_terminal_and_is_as_full_as_the_run(done, total, doing, columns):
    shown = bar(min(done, total), total, doing, columns)
    assert len(shown) <= max(0, columns - 1)
    if columns >= 150:
        assert shown.count("#") == round(40 * min(done, total) / total) or "#" in doing
        assert f"] {min(done, total)}/{total}" in shown


def test_row_of_an_evaluation_has_the_change_since_the_first_one():
    first = measured(0, 0.5)
    assert row_of("general", first, first, 7, 80) == "  general  KL 0.500 ± 0.020    |gap| 0.300  40 prompts"
    assert row_of("general", measured(9, 0.4), first, 7, 80).endswith("40 prompts  change -0.100 ± 0.029")
    for now in (first, measured(9, 0.4)):  # a name too long for one line: all rows of the table are alike
        name, numbers = row_of("resistance", now, first, 10, 80).split("\n")
        assert name == "  resistance" and numbers.startswith("    KL 0.") and len(numbers) < 80


def test_line_of_a_step_of_three_branches_has_a_line_for_each_where_one_is_too_long():
    labels = ("general+domain+code", "general")
    assert layout(labels, 94) == (19, 3) and layout(labels, 93) == (8, 1)
    shown = line_of("12/200", {"branch": labels[0], **NUMBERS}, 12_340, 10.0, 623.4, 8, 1)
    assert [head(8, 1), *shown.split("\n")] == [
        "       step branch    |gap|  kept  tokens/s  s/step     left",
        "     12/200 general+  0.354   62%     1,234   10.00    10:23",
        "            domain+   0.020     -",
        "            code          -     -",
    ]


NAME = st.text("abc_-é", min_size=1, max_size=60)


@given(st.lists(NAME, min_size=1, max_size=4, unique=True), st.integers(80, 130), st.integers(0, 99_999))
def test_console_fits_its_terminal_with_any_branches_and_leaves_out_no_letter(names, columns, prompts):
    label = "+".join(names)
    width, cells = layout((label, *names), columns)
    gaps = {f"gap/{name}/abs_mean": 0.1 + place / 100 for place, name in enumerate(names)}
    step = line_of("12/200", {"branch": label, **gaps}, 12_340, 10.0, 623.4, width, cells).split("\n")
    assert "".join(line[12 : 12 + width].rstrip() for line in step) == label
    assert all(f"{gap:.3f}" in "".join(step) for gap in gaps.values())
    found = {name: [measured(0, 0.5, prompts=prompts), measured(9, 0.4, prompts=prompts)] for name in names}
    rows = [row_of(name, found[name][1], found[name][0], max(map(len, names)), columns) for name in names]
    for name, row in zip(names, rows, strict=True):
        assert "".join(row.split()).startswith(f"{name}KL0.400") and "change -0.100" in row
    said = answer(found, 9, names, columns)
    shown = [head(width, cells), *step, *"\n".join(rows).split("\n"), *said]
    assert max(map(len, shown)) < columns
    for name in names:
        assert name in "".join("".join(said).split())


def test_answer_is_the_verdict_on_each_branch_in_lines_that_fit():
    found = {"general": [measured(0, 0.123, 0.05), measured(8, 0.131, 0.054)], "domain": [measured(0, 0, 0)]}
    said = answer(found, 8, ("general", "domain"), 80)
    assert max(map(len, said)) < 80
    assert said[0] == "Did it recover? Held-out KL to the teacher, nats per token, 95 % intervals:"
    assert said[1].startswith("  general has NOT recovered: 0.123 → 0.131")
    assert any(line.startswith("  domain: not known yet") for line in said)
    nothing = " ".join(answer({}, None, ("general",), 80))
    assert nothing.startswith("Did it recover? Whether the model recovered is not known: no held-out prompts")
    for word in ("eval_prompts", "eval_on_start", "camopd gaps"):
        assert word in nothing


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def screen(text):
    """What stands in each line of a terminal in the end."""
    shown = []
    for line in text.split("\n"):
        row = ""
        for part in re.split(r"\r", line):
            while "\x1b[2K" in part:
                row, part = "", part.replace("\x1b[2K", "", 1)
            row = part + row[len(part) :]
        shown.append(row.rstrip())
    return shown


def test_bar_is_below_the_lines_and_gone_without_a_terminal(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for place in (terminal, file):
        monkeypatch.setattr(sys, "stdout", place)
        bar_ = Bar()
        bar_.draw(1, 4, "rollouts")
        bar_.clear()
        print("a line")
        bar_.draw(2, 4, "")
    assert screen(terminal.getvalue()) == ["a line", bar(2, 4, "", 80)]
    assert file.getvalue() == "a line\n"


def test_bar_goes_before_a_line_of_a_logger(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    handler, log = logging.StreamHandler(terminal), logging.getLogger("camopd")
    monkeypatch.setattr(log, "handlers", [handler])
    bar_ = Bar()
    bar_.begin(True)
    for _ in range(2):
        bar_.draw(1, 4, "step 2: training")
        log.warning("short")
    bar_.end()
    assert screen(terminal.getvalue()) == ["short", "short", ""] and not handler.filters


def make_run(tmp_path, tokenizer, **kwargs):
    held_out = {branch: make_prompts(branch, 9) for branch in ("general", "domain")}
    return make_trainer(
        tmp_path, tokenizer, eval_dataset=held_out, eval_on_start=True, eval_strategy="steps", eval_steps=4, **kwargs
    )


def test_console_shows_a_line_per_step_a_table_per_evaluation_and_the_verdict_last(tmp_path, tokenizer, capsys):
    trainer = make_run(tmp_path, tokenizer)
    capsys.readouterr()
    trainer.train()
    trainer.save_state()
    said = capsys.readouterr().out.splitlines()
    steps = [line.split() for line in said if re.match(r" +\d+/4 ", line)]
    assert [(step[0], step[1]) for step in steps] == [
        (f"{line['step']}/4", line["branch"]) for line in lines(tmp_path)
    ]
    for step, line in zip(steps, lines(tmp_path), strict=True):
        branch = line["branch"]
        gap, kept = line[f"gap/{branch}/abs_mean"], line[f"selection/{branch}/kept_fraction"]
        assert step[2:4] == [f"{gap:.3f}", f"{kept:.0%}"]
    assert steps[-1][-1] == "0:00"
    assert [line for line in said if line.startswith("held-out prompts")] == [
        f"held-out prompts at step {step}: KL to the teacher, nats per token, ± is 95 %" for step in (0, 4)
    ]
    for branch in ("general", "domain"):  # said before it is measured, where nothing moves
        begun = [place for place, line in enumerate(said) if re.fullmatch(f"evaluating 9 .* of {branch} .*", line)]
        rows = [place for place, line in enumerate(said) if line.startswith(f"  {branch} ") and " KL " in line]
        assert len(begun) == len(rows) == 2 and begun[0] < rows[0] < begun[1] < rows[1]
    last = said.index("Did it recover? Held-out KL to the teacher, nats per token, 95 % intervals:")
    assert "general" in said[last + 1] and not any("KL " in line for line in said[last + 1 :])
    assert "{" not in "".join(said) and "\x1b" not in "".join(said) and max(map(len, said)) < 80


def test_verbose_brings_the_dictionaries_back(tmp_path, tokenizer, capsys):
    trainer = make_trainer(tmp_path, tokenizer, verbose=True, max_steps=1)
    capsys.readouterr()
    trainer.train()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("{'loss'") and "gap/general/mean" in said[0]
    assert not any(re.match(r" +1/1 ", line) for line in said)
    verdict = answer({}, None, ("general", "domain"), 80)
    assert verdict[0].startswith("Did it recover?") and said[-len(verdict) :] == verdict


def test_answers_of_almost_no_tokens_are_named_in_the_verdict_on_the_screen_and_in_the_card(
    tmp_path, tokenizer, capsys
):
    trainer = make_run(tmp_path, tokenizer, max_completion_length=2)
    capsys.readouterr()
    trainer.train()
    said = capsys.readouterr().out
    trainer.create_model_card("named")
    verdict = said.partition("Did it recover?")[2]
    for text in (verdict, (tmp_path / "README.md").read_text()):
        shown = re.findall(
            r"answers are almost EMPTY, [12]\.\d tokens on average, [12]\.\d before", " ".join(text.split())
        )
        assert len(shown) == 2


def test_console_stands_in_for_the_printers_of_transformers_alone(tmp_path, tokenizer):
    class Mine(ProgressCallback):
        pass

    for disabled in (True, False):
        trainer = make_trainer(tmp_path / str(disabled), tokenizer, disable_tqdm=disabled, callbacks=[Mine()])
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (kinds.count(Console), kinds.count(Mine)) == (1, 1)
        assert PrinterCallback not in kinds and ProgressCallback not in kinds
    trainer.remove_callback(PrinterCallback)
    assert Console not in [type(callback) for callback in trainer.callback_handler.callbacks]


def test_console_of_a_terminal_leaves_no_bar_behind(tmp_path, tokenizer, monkeypatch):
    terminal = Terminal()
    trainer = make_run(tmp_path, tokenizer, disable_tqdm=False, max_steps=2)
    monkeypatch.setattr(sys, "stdout", terminal)
    trainer.train()
    shown = screen(terminal.getvalue())
    drawn = terminal.getvalue()
    assert "step 1: rollouts" in drawn
    assert (
        drawn.index("0/2 evaluating general: 0 of 9 prompts") < drawn.index("general: 8 of 9") < drawn.index("9 of 9")
    )
    assert "0/2 evaluating domain: 9 of 9 prompts" in drawn and "2/2 evaluating domain: 0 of 9 prompts" in drawn
    assert "held-out prompts of" not in drawn  # the line of a log
    assert not any("[#" in line or "[." in line for line in shown)
    assert max(map(len, shown)) < 80


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_console_writes_to_a_log_in_any_encoding(tmp_path, tokenizer, monkeypatch, encoding):
    log = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, eval_on_start=True, eval_dataset={"general": make_prompts("general", 2)},
        teachers={"general": make_model(2), "domain": make_model(1)},
    )  # fmt: skip
    monkeypatch.setattr(sys, "stdout", log)
    trainer.train()
    log.flush()
    assert b"held-out prompts at step 0" in log.buffer.getvalue()
