"""`camopd gaps`: a finished model against the teachers of a run (camopd/commands/gaps.py)."""

import json
import re
import shlex

import pytest
import yaml
from conftest import make_model, make_prompts
from fake_rollouts import FakeRollouts
from peft import LoraConfig, get_peft_model
from trainers import SETTINGS, refused, save_models
from transformers import AutoModelForCausalLM

from camopd import cli
from camopd.commands.gaps import measured_otherwise, since_start
from camopd.folder_lock import LOCK_FILE, FolderLock
from camopd.measured import lines_of
from camopd.verdict import Measured


@pytest.fixture
def run(tmp_path):
    """A run of four steps, as a file."""
    save_models(tmp_path, student=1, teacher=2)
    for branch in ("general", "domain"):
        make_prompts(branch, 9).to_json(tmp_path / f"{branch}.jsonl")
    prompts = {branch: str(tmp_path / f"{branch}.jsonl") for branch in ("general", "domain")}
    settings = {
        **SETTINGS, "model_name_or_path": str(tmp_path / "student"), "output_dir": str(tmp_path / "out"),
        "teachers": {"general": str(tmp_path / "teacher"), "domain": str(tmp_path / "student")}, "prompts": prompts,
        "eval_prompts": prompts, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 4,
        "prompts_per_step": 4, "max_completion_length": 8, "learning_rate": 0.01, "save_strategy": "no",
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_gaps_of_the_trained_model_are_those_that_its_run_has_measured_last(run, tmp_path, capsys):
    cli.main(["train", str(run)])
    said = capsys.readouterr().out
    lines = lines_of(tmp_path / "out" / "held_out.jsonl")
    assert [(line["step"], line["branch"]) for line in lines] == [
        (step, branch) for step in (0, 4) for branch in ("general", "domain")
    ]
    assert all(len(line["kl_by_prompt"]) == 9 for line in lines) and len({line["of"] for line in lines}) == 2
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    cli.main(["gaps", str(tmp_path / "out"), "--config", str(run), "--json", str(tmp_path / "gaps.json")])
    result = json.loads((tmp_path / "gaps.json").read_text())
    shown, beside = capsys.readouterr()
    assert "9 of general and 9 of domain held-out prompts" in beside
    assert list(result["branches"]) == ["general", "domain"]
    for line in lines[2:]:
        found = result["branches"][line["branch"]]
        assert found == {name: value for name, value in line.items() if name != "step"}  # to the last bit
        assert result["verdicts"][line["branch"]] in shown
        assert result["verdicts"][line["branch"]].split(".")[0].split(":")[0] in " ".join(said.split())
    assert shown.splitlines()[1].split() == ["branch", "KL", "to", "the", "teacher", "mean", "|gap|", "prompts"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == kept  # nothing is written there
    cli.main(["gaps", str(tmp_path / "out"), "--config", str(run), "--max_completion_length", "4"])
    said = capsys.readouterr().out
    assert "general: no change is shown, answers have 4 tokens at most here, and had 8 before" in said
    assert "RECOVERED" not in said and " → " not in said and "has no evaluation of these prompts" not in said
    other = json.dumps({"general": str(tmp_path / "student"), "domain": str(tmp_path / "student")})
    cli.main(["gaps", str(tmp_path / "out"), "--config", str(run), "--teachers", other])
    said = capsys.readouterr().out
    assert (
        "general: no change is shown, its teacher is 'student' here, and was 'teacher' before the run's first" in said
    )
    assert "domain: no change is shown" not in said and "domain has" in said


@pytest.mark.parametrize(
    "settings", [{"divergence": "full"}, {"baseline": "kl"}, {"divergence": "top_k", "divergence_top_k": 50}], ids=str
)  # fmt: skip
def test_gaps_of_a_run_with_the_whole_distributions_may_be_measured_against_servers(
    run, capsys, start_server, settings
):
    of_run = yaml.safe_load(run.read_text())
    server = start_server(model=make_model(2))
    teachers = json.dumps({**of_run["teachers"], "general": server.url})
    run.write_text(yaml.safe_dump({**of_run, **settings}))
    cli.main(["gaps", of_run["model_name_or_path"], "--config", str(run), "--teachers", teachers])
    assert "general" in capsys.readouterr().out and server.sequences


def test_gaps_of_other_prompts_are_not_compared(run, tmp_path, capsys):
    cli.main(["train", str(run), "--max_steps", "1"])
    capsys.readouterr()
    few = json.dumps({"general": {"path": str(tmp_path / "general.jsonl"), "limit": 8}})
    cli.main(["gaps", str(tmp_path / "teacher"), "--config", str(run), "--eval_prompts", few])
    said = capsys.readouterr().out.splitlines()
    assert said[2].split() == ["general", "0.000", "±", "0.000", "0.000", "8"]  # it is that teacher
    assert said[3].startswith("No change is shown: ") and "held_out.jsonl" in said[3]


def test_gaps_of_a_merged_model_are_those_to_the_student_that_had_the_adapter(run, tmp_path, capsys):
    """It has no adapter to switch off: its teacher `adapter_off` is the model that the adapter was trained on."""
    settings = yaml.safe_load(run.read_text())
    teachers = {"general": settings["teachers"]["general"], "domain": "adapter_off"}
    run.write_text(yaml.safe_dump({**settings, "teachers": teachers, "use_peft": True}))
    cli.main(["train", str(run), "--max_steps", "1"])
    named = {line["branch"]: line["teacher"] for line in lines_of(tmp_path / "out" / "held_out.jsonl")}
    assert named == {"general": "teacher", "domain": "student"}
    capsys.readouterr()
    for model in ("student", "teacher"):
        cli.main(["gaps", str(tmp_path / model), "--config", str(run)])
        rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "±" in line}
        assert (rows["domain"][1] == "0.000") == (model == "student")
        assert (rows["general"][1] == "0.000") == (model == "teacher")


def test_gaps_of_an_adapter_are_those_to_the_model_that_the_run_began_with(run, tmp_path, capsys):
    """Without its adapter it is the run's teacher if it is on the run's student, or on that one's base."""
    save_models(tmp_path, other=3)
    for name in ("student", "other"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / f"on-{name}")
    settings = yaml.safe_load(run.read_text())
    teachers = {"general": settings["teachers"]["general"], "domain": "adapter_off"}
    for student in ("student", "on-student"):
        changed = {**settings, "teachers": teachers, "model_name_or_path": str(tmp_path / student), "use_peft": True}
        run.write_text(yaml.safe_dump(changed, sort_keys=False))
        said = refused(capsys, "gaps", str(tmp_path / "on-other"), "--config", str(run))
        assert f"the adapter '{tmp_path / 'on-other'}' is on '{tmp_path / 'other'}', and the run's teacher" in said
        named = {**teachers, "domain": str(tmp_path / "student")}
        assert f"Name the run's: --teachers '{json.dumps(named)}'" in said
        for model in ("on-student", "student"):  # an adapter as PEFT makes it changes nothing
            cli.main(["gaps", str(tmp_path / model), "--config", str(run)])
            rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "±" in line}
            assert rows["domain"][1] == "0.000"


def test_gaps_by_rollout_servers_write_weights_where_the_servers_can_read_them(run, tmp_path, tokenizer, start_server):
    server = FakeRollouts(make_model(9), tokenizer)
    try:
        words = ["--rollout_servers", json.dumps([server.url])]
        cli.main(["gaps", str(tmp_path / "student"), "--config", str(run), *words])
    finally:
        server.close()
    assert server.loads and all(folder.is_relative_to(tmp_path / "out") for folder in server.loads)
    assert all(
        folder.relative_to(tmp_path / "out").parts[0].startswith("_") for folder in server.loads
    )  # not for the Hub
    assert not (tmp_path / "out").exists()  # as before


def refused_under_way(capsys, tmp_path, words, servers):
    said = refused(capsys, *words)
    assert re.search(
        rf"'{tmp_path / 'out'}' is in use: a run trains in it, process \d+ on .*\. Its {servers} its weights", said
    )
    assert f"those of '{tmp_path / 'student'}' would take their place. Wait for its end" in said
    return said


def test_gaps_leave_the_rollout_servers_of_a_run_that_is_under_way_alone(
    run, tmp_path, capsys, tokenizer, start_server
):
    servers = [FakeRollouts(make_model(9), tokenizer) for _ in range(2)]
    settings = {**yaml.safe_load(run.read_text()), "rollout_servers": [servers[0].url], "rollout_lag": 1}
    run.write_text(yaml.safe_dump(settings))
    words = ["gaps", str(tmp_path / "student"), "--config", str(run)]
    lock = FolderLock(tmp_path / "out")
    lock.take()
    try:
        said = refused_under_way(capsys, tmp_path, words, "rollout_servers have")
        assert "output_dir" not in said  # another one would not help
        cli.main([*words, *shlex.split(said.partition("completions by ")[2].strip().removesuffix("."))])
        for other in (["--vllm_server_port", "9"], ["--vllm_server_host", "host"]):  # without effect
            refused_under_way(capsys, tmp_path, [*words, *other], "rollout_servers have")
        cli.main([*words, "--rollout_servers", servers[1].url])
        assert not servers[0].loads and servers[1].loads
        lock.release()
        cli.main(words)
        assert servers[0].loads and [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]
    finally:
        lock.release()
        for server in servers:
            server.close()


def test_gaps_leave_the_vllm_server_of_a_run_that_is_under_way_alone(run, tmp_path, capsys, monkeypatch):
    """TRL's server: whoever rolls out sends it the weights first."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")  # it is looked for before anything is asked
    settings = yaml.safe_load(run.read_text())
    run.write_text(yaml.safe_dump({**settings, "use_vllm": True, "vllm_mode": "server"}))
    words = ["gaps", str(tmp_path / "student"), "--config", str(run)]
    lock = FolderLock(tmp_path / "out")
    lock.take()
    try:
        said = refused_under_way(capsys, tmp_path, words, "vLLM server has")
        for other in (["--vllm_server_timeout", "9"], ["--rollout_lag", "0"]):  # the server is the same
            assert "Its vLLM server has" in refused(capsys, *words, *other)
        for name in ("--vllm_server_base_url", "--vllm-server-base-url"):
            assert "is in use" not in refused(capsys, *words, name, "http://127.0.0.1:9")
        unwritten = PermissionError(13, "Permission denied")
        monkeypatch.setattr(
            FolderLock, "take", lambda lock: (_ for _ in ()).throw(unwritten)
        )  # for root there is no such
        refused_under_way(capsys, tmp_path, words, "vLLM server has")
        lock.release()
        assert "is in use" not in refused(capsys, *words) and "denied" not in refused(capsys, *words)
        cli.main([*words, *said.partition("completions by ")[2].strip().removesuffix(".").split()])
        assert "±" in capsys.readouterr().out
        run.write_text(
            yaml.safe_dump({**settings, "use_vllm": "false", "vllm_mode": "server"})
        )  # which is False as well
        cli.main(words)
        assert "±" in capsys.readouterr().out
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eval_prompts": None}, "has no eval_prompts to measure"),
        ({"teachers": {"general": "./no/such", "domain": "adapter_start"}}, "'./no/such', but there is no such path"),
        ({"teachers": {"general": "student", "domain": "adapter_start"}}, "branch 'domain' is 'adapter_start'"),
        (None, "the model './gone' cannot be measured: there is no such path"),
        (
            {"model_revision": "v1", "model": "me/other"},
            "would be looked for in 'me/other', too. Give --model_revision main",
        ),
        (
            {"model_init_kwargs": {"revision": "v1", "dtype": "float32"}, "model": "me/other"},
            """would be looked for in 'me/other', too. Give --model_init_kwargs '{"dtype": "float32"}'""",
        ),
        (
            {
                "model_revision": "v1",
                "model_name_or_path": "me/base",
                "use_peft": True,
                "model": "me/base",
                "teachers": {"general": "http://localhost:1", "domain": "adapter_off"},
            },
            "'adapter_off' is revision 'v1' of 'me/base', and would be another one here. hf download me/base --revision v1 "
            "--local-dir DIR/base",
        ),
    ],
)
def test_gaps_that_cannot_be_measured_are_an_error_with_the_way_out(run, tmp_path, capsys, change, says):
    settings = {**yaml.safe_load(run.read_text()), **(change or {})}
    model = "./gone" if change is None else settings.pop("model", str(tmp_path / "student"))
    run.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gaps", model, "--config", str(run)])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_place_of_the_numbers_is_made_or_refused_before_anything_is_measured(run, tmp_path, capsys, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr("camopd.commands.gaps.make_trainer", measured)
    words = ["gaps", str(tmp_path / "student"), "--config", str(run), "--json"]
    with pytest.raises(AssertionError, match="nothing is to be loaded"):
        cli.main([*words, str(tmp_path / "new" / "folder" / "gaps.json")])
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "new", tmp_path / "file" / "gaps.json"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, str(place)])
        assert stopped.value.code == 2
        assert f"--json '{place}' cannot be written" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("then", "here", "compared"),
    [
        ("org/base", "base", True),
        ("org/base", "org/other", False),
        ("org/base", "others/base", False),
        ("", "other", True),
        ("org/base", "", True),
    ],
)
def test_gaps_to_a_teacher_that_was_fetched_meanwhile_are_compared(then, here, compared):
    """A folder has the last part of the model's name, as the error names it for a revision."""
    start, end = (Measured(step, kl, 0.1, 2, (kl, kl + 0.1), "same", teacher=teacher)
                  for step, kl, teacher in ((0, 1.0, then), (1, 0.5, here)))  # fmt: skip
    found, run = {"general": [end]}, {"general": [start]}
    assert bool(since_start(found, run)) == compared
    said = measured_otherwise(found, run)
    assert bool(said) != compared and all("a folder named 'base'" in line for line in said.values())
