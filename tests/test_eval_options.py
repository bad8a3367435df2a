"""What the options of `camopd eval` say of its tasks, and those without effect (camopd/eval/options.py)."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from camopd.commands.eval import parse
from camopd.eval.models import Model
from camopd.eval.options import check, files_of, folder_of, judges_of, models_of, need_context, server_context
from camopd.eval.tasks import named


HERE, THERE = {"m": Model("m", "org/model")}, {"m": Model("m", "http://h:1")}


def checked(tasks, *words, models=HERE):
    options = parse(["--tasks", tasks, *words])
    return check(options, named([name for name in tasks.split(",") if name != "gaps"]), models)


def test_options_are_told_apart_by_task():
    assert files_of(["folder", "medqa=a=b"]) == {"medqa": Path("a=b")}
    assert files_of(["livebench=~/checkout"]) == {
        "livebench": Path.home() / "checkout"
    }  # not all shells do it after a "="
    assert files_of(["qasc=~of-nobody.jsonl"]) == {"qasc": Path("~of-nobody.jsonl")}
    assert folder_of(["~/data"]) == Path.home() / "data"
    assert folder_of(["medqa=a"]) == Path("eval-data") and folder_of(["x", "medqa=a"]) == Path("x")
    assert judges_of(["http://h:1/?a=b", "gpqa=http://h:2#m"]) == {"": "http://h:1/?a=b", "gpqa": "http://h:2#m"}
    assert list(models_of(["a=org/x", "b=org/x"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (lambda: models_of(["m=org/a", "m=org/b"]), "--models names 'm' twice, as org/a and as org/b. Leave one"),
        (lambda: files_of(["qasc=a", "qasc=b"]), "--data names 'qasc' twice, as a and as b"),
        (
            lambda: judges_of(["http://h:1", "http://u:secret@h:2"]),
            "--judge is given twice, as http://h:1 and as http://h:2",
        ),
        (lambda: judges_of(["gpqa=http://h:1", "gpqa=http://h:2"]), "--judge names 'gpqa' twice"),
        (lambda: folder_of(["a", "b"]), "--data takes one folder, got a, b"),
    ],
)
def test_option_that_says_two_things_of_one_is_refused(found, said):
    with pytest.raises(ValueError, match=said) as raised:
        found()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("tasks", "words", "said"),
    [
        ("gaps", ["--limit", "1", "--paper", "medical"], "--paper, as the task gaps asks no model; --limit, as"),
        ("gaps", ["--models", "m=org/model"], "--models, as the task gaps asks no model. Leave it out"),
        ("gaps", ["--judge", "http://h:1", "--data", "x", "--max-tokens", "5"], "--judge, .*--data, .*--max-tokens, "),
        ("livebench", ["--limit", "1", "--max-tokens", "5"], "--limit, as livebench is read as it was run; --max-tokens"),
        ("livebench", ["--context", "9"], "--context, as no server is started here"),
        ("livebench", ["--data", "x", "livebench=y"], "--data x, as no rows are read from it"),
        ("qasc_options", ["--max-tokens", "5"], "--max-tokens, as no model writes in qasc_options"),
        ("qasc_options", ["--context", "9"], "--context, as no server is started here"),
        ("qasc", ["--judge", "http://h:1"], "--judge http://h:1, as none of qasc is judged by a model"),
        ("qasc", ["--judge", "qasc=http://h:1"], "--judge qasc=, as that task is not judged by a model"),
        ("qasc", ["--judge", "gpqa=http://h:1"], "--judge gpqa=, as that task is not asked for"),
        ("gpqa", ["--judge", "http://h:1", "gpqa=http://h:2"], "--judge http://h:1, as each task that is judged has"),
        ("qasc", ["--data", "medqa=x"], "--data medqa=, as that task is not asked for"),
        ("qasc_options", ["--data", "qasc=x", "qasc_options=y"], "--data qasc=, as that task is not asked for"),
        ("qasc", ["--data", "x", "qasc=y"], "--data x, as no rows are read from it"),
    ],
)  # fmt: skip
def test_option_without_effect_is_refused(tasks, words, said):
    with pytest.raises(ValueError, match=f"without effect: .*{said}"):
        checked(tasks, *words)


def test_limit_is_without_effect_on_what_scripts_ask_as_a_whole():
    def of(tasks, *words):
        found = [
            replace(task, answer="scripted") if task.name == "livebench" else task for task in named(tasks.split(","))
        ]
        return check(parse(["--tasks", tasks, *words]), found, HERE)

    with pytest.raises(ValueError, match="without effect: --limit, as livebench is asked as a whole"):
        of("livebench", "--limit", "5")
    assert of("livebench,qasc", "--limit", "5") == [
        "--limit is without effect on livebench, which is asked as a whole."
    ]
    assert of("livebench", "--max-tokens", "5", "--context", "9", "--data", "livebench=x") == []


@pytest.mark.parametrize("option", ["context", "vllm-python"])
def test_option_of_servers_here_is_refused_where_all_are_elsewhere(option):
    words = ("qasc", f"--{option}", "9")
    assert not checked(*words) and not checked(*words, models=HERE | {"n": THERE["m"]})
    with pytest.raises(ValueError, match=f"--{option}, as no server is started here"):
        checked(*words, models=THERE)


def test_option_without_effect_on_a_part_is_said():
    (line,) = checked("qasc,livebench,gaps", "--limit", "5")
    assert line == "--limit is without effect on livebench, which is read as it was run."
    (line,) = checked("qasc,qasc_options", "--max-tokens", "5", "--context", "9")
    assert line == "--max-tokens is without effect on qasc_options, where no model writes."


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("gaps", []),
        ("qasc,gaps", ["--limit", "5", "--max-tokens", "5", "--paper", "medical", "--data", "x"]),
        ("qasc,gpqa,gca", ["--judge", "http://h:1", "gca=http://h:2", "--data", "x", "gca=y"]),
        ("livebench", ["--data", "livebench=x", "--paper", "medical"]),
        ("qasc_options", ["--limit", "5", "--concurrency", "9"]),
    ],
)  # fmt: skip
def test_option_with_an_effect_is_silent(tasks, words):
    assert checked(tasks, *words) == []


@pytest.mark.parametrize(
    ("tasks", "max_tokens", "context"),
    [("qasc", None, 32768 + 4096), ("ifeval,gca", None, 8196 + 28672), ("qasc,gca", 100, 28772), ("qasc", 100, 4196)],
)
def test_context_of_a_server_here_has_room_for_the_longest_task(tasks, max_tokens, context):
    options = SimpleNamespace(context=None, max_tokens=max_tokens)
    assert server_context(named(tasks.split(",")), options) == context
    options.context = 5
    assert server_context(named(tasks.split(",")), options) == 5


def test_context_of_a_models_positions_is_taken_and_that_of_a_server_is_its_own(tmp_path, monkeypatch):
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 4100}', encoding="utf-8")
    tasks, local = named(["qasc"]), [Model("m", str(model))]
    need_context(local, tasks, SimpleNamespace(context=None, max_tokens=4))
    need_context([Model("m", "http://h:1")], tasks, SimpleNamespace(context=None, max_tokens=None))
    wrong = SimpleNamespace(context=None, max_tokens=5)
    with pytest.raises(ValueError, match="has 4100 positions"):
        need_context(local, tasks, wrong)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    need_context(local, tasks, wrong)
