"""The model card, and what a run sends to the Hub and takes from it, with the real client against a server on localhost."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_prompts, make_tokenizer
from eval_items import items
from fake_hub import FakeHub
from forks import Forks
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from trainers import make_trainer, save_models

from camopd import CaMOPDConfig, CaMOPDTrainer, cli
from camopd.card import add_benchmarks, write_merged_card
from camopd.eval import page
from camopd.eval.compare import compare
from camopd.eval.tasks import TASKS
from camopd.files import load_all
from camopd.run import SERVED_TEACHERS, methods


DATA_CARD = "---\npretty_name: Medical prompts\ntags:\n- camopd\n- on-policy-distillation\n---\n\n# Medical prompts\n"


@pytest.fixture
def run(tmp_path):
    """A run of four steps as a YAML file, with a data card beside the domain prompts."""
    save_models(tmp_path, student=1, teacher=2)
    for branch in ("general", "domain"):
        (tmp_path / branch).mkdir()
        make_prompts(branch).to_json(tmp_path / branch / "prompts.jsonl")
    (tmp_path / "domain" / "README.md").write_text(DATA_CARD)
    (tmp_path / "general" / "README.md").write_text("# The notes of a project\n")
    settings = {
        "model_name_or_path": str(tmp_path / "student"), "dtype": "float32", "output_dir": str(tmp_path / "tiny"),
        "teachers": {"general": str(tmp_path / "teacher"), "domain": str(tmp_path / "student")},
        "prompts": {branch: str(tmp_path / branch / "prompts.jsonl") for branch in ("general", "domain")},
        "schedule": "general:3,domain:1", "max_steps": 4, "prompts_per_step": 4, "per_device_train_batch_size": 2,
        "max_prompt_length": 64, "max_completion_length": 12, "learning_rate": 0.01, "save_steps": 2,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def row(card: str, name: str) -> list[str]:
    """Cells of the first row of that name."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_card_has_what_was_trained_from_what_and_the_gaps_before_and_after(run, tmp_path):
    held_out = json.dumps({"general": {"path": str(tmp_path / "general" / "prompts.jsonl"), "limit": 3}})
    cli.main(
        [
            "train", str(run), "--eval_prompts", held_out, "--eval_strategy", "steps", "--eval_steps", "4",
            "--eval_on_start", "true", "--scale", '{"general": 2, "domain": 0.5}',
        ]
    )  # fmt: skip
    card = card_of(tmp_path / "tiny")
    assert row(card, "specialised model (the student at the start)") == ["`student`"]
    assert row(card, "general teacher") == ["`teacher`"]
    assert row(card, "domain teacher") == ["`student`"]
    assert row(card, "learning rate") == ["0.01, constant"]
    assert row(card, "schedule") == ["`general:3,domain:1`"]
    assert row(card, "steps") == ["4 of 4, one answer to each of 4 prompts"]
    history = json.loads((tmp_path / "tiny" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    before, after = [entry for entry in history if "eval_general_kl" in entry]
    assert (before["step"], after["step"]) == (0, 4)
    moves = f"{before['eval_general_kl']:.3f} → {after['eval_general_kl']:.3f}"
    answer = card.split("## Did it recover?")[1].split("\n## ")[0]
    assert f"- general: 3 held-out prompts are too few to tell ({moves})." in answer
    assert "- domain: not measured on held-out prompts." in answer
    assert card.count(moves) == 1 and "± SE" not in card and "gaps\n" not in card.lower()  # no second table of them
    assert "| general | 0.8 | absolute | 2.0 | on | 11 prompts of prompts.jsonl |" in card
    assert "| domain | 0.8 | positive | 0.5 | on | [11 prompts of prompts.jsonl](data_cards/domain.md) |" in card
    assert (tmp_path / "tiny" / "data_cards" / "domain.md").read_text() == DATA_CARD
    assert not (tmp_path / "tiny" / "data_cards" / "general.md").exists()  # that one is of something else
    assert "https://arxiv.org/abs/2605.27115" in card
    assert "@article{chen2026camopd" in card
    assert str(tmp_path) not in card  # a path says nothing to others
    data = ModelCard(card).data
    assert {"camopd", "trl", "on-policy-distillation"} <= set(data.tags)
    assert data.library_name == "transformers"
    assert (data.base_model, data.license) == (None, None)  # a local path is none


@pytest.mark.parametrize(
    ("readme", "base", "licence"),
    [
        ("---\nlicense: apache-2.0\nbase_model: my-org/general\n---\n# Mine\n", "my-org/general", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3.2\nbase_model: [my-org/a, my-org/b]\n---\n", ["my-org/a", "my-org/b"],
         "other"),
        # A path says nothing to others, and the Hub refuses a card with a licence that it does not know by such a name.
        ("---\nlicense: Apache 2.0\nbase_model: /home/me/general\n---\n", None, None),
        ("---\nlicense: [\n---\n", None, None),
        ("---\n- camopd\n---\n", None, None),
    ],
)  # fmt: skip
def test_card_has_licence_and_base_model_that_the_students_own_readme_names(tmp_path, readme, base, licence):
    save_models(tmp_path, student=1)
    (tmp_path / "student" / "README.md").write_text(readme)
    trainer = make_trainer(tmp_path / "out", make_tokenizer(), model=str(tmp_path / "student"))
    trainer.create_model_card("named")
    data = ModelCard(card_of(tmp_path / "out")).data
    assert (data.base_model, data.license, data.to_dict().get("license_name")) == (
        base, licence, "llama3.2" if licence == "other" else None,
    )  # fmt: skip
    assert "/home/me" not in card_of(tmp_path / "out")


def test_readme_that_is_no_card_is_left_alone(run, tmp_path):
    for text in ("---\ntags: [camopd\n---\n", "---\n- camopd\n---\n", "# Notes\n"):
        (tmp_path / "domain" / "README.md").write_text(text)
        cli.main(["train", str(run), "--max_steps", "1", "--save_strategy", "no", "--overwrite_output_dir", "true"])
        assert "| on | 11 prompts of prompts.jsonl |" in card_of(tmp_path / "tiny")
        assert not (tmp_path / "tiny" / "data_cards" / "domain.md").exists()


def test_card_has_the_gaps_of_the_steps_without_held_out_prompts(run, tmp_path):
    cli.main(["train", str(run)])
    steps = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    first, last = (-steps[place]["gap/general/mean"] for place in (0, 2))
    card = card_of(tmp_path / "tiny")
    assert f"| general | {first:.3f} (step 1) | {last:.3f} (step 3) |" in card
    assert f"| domain | {-steps[3]['gap/domain/mean']:.3f} (step 4) |" in card
    assert "## Training gaps" in card and "no held-out prompts (`eval_prompts`)" in card.replace("\n", " ")


def test_names_of_the_hub_are_links_and_an_adapter_says_so(tmp_path):
    from peft import LoraConfig

    student = make_model(1)
    student.config._name_or_path = "my-org/specialised"
    prompts = {branch: make_prompts(branch) for branch in ("general", "domain")}
    prompts["general"].info.homepage = "https://huggingface.co/datasets/my-org/prompts"
    teacher = make_model(2)
    teacher.config._name_or_path = "my-org/general"
    trainer = CaMOPDTrainer(
        model=student,
        teachers={"general": teacher, "domain": "adapter_off"},
        args=CaMOPDConfig(
            output_dir=str(tmp_path / "out"), prompts_per_step=4, per_device_train_batch_size=2, max_prompt_length=64,
            max_completion_length=12, use_cpu=True, bf16=False, report_to="none", max_steps=1,
        ),
        train_dataset=prompts,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.create_model_card("named", tags="mine")
    card = card_of(tmp_path / "out")
    assert card.count("[my-org/specialised](https://huggingface.co/my-org/specialised)") == 4  # and the base
    assert row(card, "general teacher") == ["[my-org/general](https://huggingface.co/my-org/general)"]
    assert row(card, "domain teacher") == [
        "[my-org/specialised](https://huggingface.co/my-org/specialised) (`adapter_off`)"
    ]
    assert "[my-org/prompts](https://huggingface.co/datasets/my-org/prompts)" in card
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.datasets) == ("peft", "my-org/specialised", ["my-org/prompts"])
    assert "mine" in data.tags
    assert "# named" in card
    assert "by a path" not in card
    merged_card_is_of_a_whole_model(tmp_path / "out", tmp_path / "merged")
    trainer.model.config._name_or_path = "/home/me/specialised"  # which the adapter names as its base, too
    trainer.create_model_card("named")
    card = card_of(tmp_path / "out")
    assert "names its base, `specialised`, by a path" in card and "PeftModel.from_pretrained(base, adapter)" in card
    assert "/home/me" not in card and "by a path" not in card_of(
        write_merged_card(tmp_path / "out", tmp_path / "two").parent
    )
    trainer.model.config._name_or_path = "gpt2"  # of the Hub, too
    trainer.create_model_card("named")
    assert "by a path" not in card_of(tmp_path / "out")
    student.config._name_or_path = "my-org/specialised"
    trainer.state.log_history = [
        {"eval_general_kl": 1.0, "eval_general_kl_se": 0.1, "eval_general_prompts": 3, "step": 0}
    ]
    trainer.create_model_card("named")  # of a run under way
    assert "- general: not known yet, its gap before the run is 1.000 ± 0.430 (95 %, 3 prompts), and" in card_of(
        tmp_path / "out"
    )


def merged_card_is_of_a_whole_model(run: Path, folder: Path) -> None:
    (run / "data_cards").mkdir()
    (run / "data_cards" / "domain.md").write_text(DATA_CARD)
    before = card_of(run)
    assert "  # needs peft" in before and "`metrics.jsonl` beside this card" in before
    card = card_of(write_merged_card(run, folder, "me/merged").parent)
    data = ModelCard(card).data
    assert (data.library_name, data.model_name, data.base_model) == ("transformers", "merged", "my-org/specialised")
    assert 'pipeline("text-generation", model="me/merged", device_map="auto")\n' in card and "peft" not in card
    assert "metrics.jsonl" not in card and "# merged\n" in card and "named" not in card
    assert row(card, "trained") == [
        "LoRA on [my-org/specialised](https://huggingface.co/my-org/specialised), merged into it"
    ]
    changed = {"library_name: peft", "model_name: named", "# named"}  # all else is as it was
    lost = set(before.splitlines()) - set(card.splitlines())
    assert {line for line in lost if "trained |" not in line and "metrics.jsonl" not in line} == {
        *changed, *(line for line in before.splitlines() if "# needs peft" in line)
    }  # fmt: skip
    assert card.count("## ") == before.count("## ")
    assert (folder / "data_cards" / "domain.md").read_text() == DATA_CARD
    assert "# merged\n" in card_of(write_merged_card(run, folder).parent)


def evaluate(run: Path) -> None:
    found = {name: {"ifeval": items(scores, truncated=0.5)} for name, scores in (
        ("start", [0, 0]), ("general", [1, 1]), ("result", [1, 0])
    )}  # fmt: skip
    page.write(compare([TASKS["ifeval"]], found), [], {"models": {"result": "/home/me/run"}}, run / "eval")


def test_card_takes_the_results_of_camopd_eval(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    text = "---\nlibrary_name: peft\n---\n\n# run\n\n## Gaps before and after\n\nx\n\n## Training\n\ny\n\n## Use\n"
    (run / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"no folder of '.*run' has the eval.json.*Run it with --out .*run/eval"):
        add_benchmarks(run)
    assert "Benchmarks" not in card_of(write_merged_card(run, tmp_path / "merged").parent)
    evaluate(run)
    for _ in range(2):  # a second time in place of the first
        card = card_of(add_benchmarks(run).parent)
        assert "/home" not in card and card.count("## Benchmarks\n") == 1
        assert row(card, "ifeval")[3:] == ["2", "+50.0 (+0.0 to +100.0)", "1 of 2", "0 of 2"]
        assert "\n\n- ifeval: 50% (before), 50% (general teacher), 50% (after) of the answers were cut off at" in card
        assert "x\n\n## Benchmarks\n\n| task | before" in card and "after.\n\n## Training\n\ny" in card
    merged = card_of(write_merged_card(run, tmp_path / "merged").parent)
    assert merged.count("## Benchmarks\n") == 1 and row(merged, "ifeval") == row(card, "ifeval")
    (run / "README.md").write_text(text)
    assert row(card_of(write_merged_card(run, tmp_path / "merged").parent), "ifeval") == row(card, "ifeval")
    own = "## Benchmarks\n\nby hand\n\n## My notes\n\nz\n\n"  # whatever somebody has written between ours stays
    (run / "README.md").write_text(text.replace("## Training", f"{own}## Training"))
    for _ in range(2):
        card = card_of(add_benchmarks(run).parent)
        assert own in card and card.count("## Benchmarks\n") == 2 and card.count("| ifeval") == 1
    (run / "eval" / "eval.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as results of"):
        add_benchmarks(run)
    assert own in card_of(write_merged_card(run, tmp_path / "merged").parent)


def test_card_has_the_scores_of_tasks_in_training(tmp_path):
    trainer = make_trainer(tmp_path, make_tokenizer(), max_steps=1)
    trainer.train()
    trainer.create_model_card("named")
    assert "in training" not in card_of(tmp_path)
    lines = [{"step": step, "task": "ifeval", "rows": [0, 1], "scores": [1, 1 - step]} for step in (0, 1, 2)]
    (tmp_path / "eval_tasks.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    trainer.create_model_card("named")  # of the model after step 1
    assert row(card_of(tmp_path), "ifeval")[0] == "2" and "(step 1)" in row(card_of(tmp_path), "ifeval")[3]
    (tmp_path / "eval_tasks.jsonl").write_text("x\ny\n")
    trainer.create_model_card("named")  # a broken file keeps no model from its card
    assert "in training" not in card_of(tmp_path)


PAPER = "[CaMOPD](https://arxiv.org/abs/2605.27115)"


@pytest.mark.parametrize(
    ("method", "said", "rows"),
    [
        ("camopd", "in turn, on the samples with the largest teacher-student gaps.", {}),
        ("vanilla_mopd", "toward the teachers of all branches in every step, on all samples.", {}),
        ("without_selection", "toward the teacher of each branch in turn, on all samples.", {}),
        ("random_selection", "toward the teacher of each branch in turn, on samples drawn at random.", {}),
        ("smallest_gaps", "in turn, on the samples with the smallest teacher-student gaps.", {}),
        ("relaxed_opd", "of all branches in every step, on all samples.",
         {"token_rule": "relaxed_opd", "loss_normalization": "token"}),
        ("dn_mopd", "of all branches in every step, on all samples.", {"branch_weights": "sigma"}),
    ],
)  # fmt: skip
def test_card_describes_the_method_that_ran(tmp_path, tokenizer, method, said, rows):
    settings = yaml.safe_load(Path(methods()[method]).read_text())
    make_trainer(tmp_path, tokenizer, **settings).create_model_card("named")
    card = card_of(tmp_path)
    assert said in card
    assert (f"trained with {PAPER} to bring" in card) == (method == "camopd")
    assert (
        f"trained by on-policy distillation with the code of {PAPER}, in another form than the paper's, to" in card
    ) == (method != "camopd")
    shown = {line.split("`")[1]: line.split("`")[3] for line in card.splitlines() if line.startswith("| `")}
    assert shown == rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"selection": {"general": True, "domain": False}},
         "on the samples with the largest teacher-student gaps (general) and all samples (domain)."),
        ({"schedule": "general:2,general+domain"}, "toward the teachers of its branches, of several in one step, on"),
        ({"divergence": "full"}, "| `divergence` | `full` |"),
        ({"divergence": "top_k", "divergence_top_k": 20}, "| `divergence_top_k` | `20` |"),
        ({"selection": False}, "| general | - | - | 2.0 | off |"),
        ({"baseline": "kl"}, "| `baseline` | `kl` |"),
        ({"loss_prefix_tokens": 3}, "| `loss_prefix_tokens` | `3` |"),
    ],
)  # fmt: skip
def test_card_says_what_is_not_as_in_the_paper(tmp_path, tokenizer, settings, said):
    make_trainer(tmp_path, tokenizer, **settings).create_model_card("named")
    assert said in card_of(tmp_path) and "with the code of [CaMOPD]" in card_of(tmp_path)


# --- the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """A Hub, its client's environment, which is read as that is imported, and a `python` with it."""
    served = FakeHub({})
    environment = {
        "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path_factory.mktemp("hf") / "home"), "HF_HUB_OFFLINE": "",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    forks = Forks(["camopd.commands.train", "camopd.trainer", "camopd.card"], **environment)
    yield served, environment, forks.python
    forks.close()
    served.close()


@pytest.fixture
def hub(online):
    served, environment, _ = online
    served.forget()
    shutil.rmtree(environment["HF_HOME"], ignore_errors=True)
    return served


@pytest.fixture
def train(run, hub, online, python):
    """`camopd train` in a process of its own, with the Hub of the test."""
    _, settings, with_hub = online

    def train(*words, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [
            python if "HF_HUB_OFFLINE" in environment else with_hub,
            "-m",
            "camopd.cli",
            "train",
            str(run),
            *words,
        ]
        environment = {**clean, **settings, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return train


@pytest.mark.slow
def test_run_is_sent_to_the_hub_and_goes_on_from_there(run, train, hub, tmp_path):
    push = ["--push_to_hub", "true", "--hub_model_id", "me/tiny", "--hub_strategy", "checkpoint"]
    push += ["--log_completions", "true"]
    (tmp_path / "tiny").mkdir()
    stray = [".env", "notes.txt", "secrets.json"]
    for name in stray:
        (tmp_path / "tiny" / name).write_text("not for others")
    done = train(*push, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_secret" not in done.stdout + done.stderr
    assert hub.tokens == {"Bearer hf_secret"}
    assert [made["name"] for made in hub.created] == ["tiny"]

    files = hub.models["me/tiny"]
    out = tmp_path / "tiny"
    for name in ("README.md", "model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"):
        assert files[name] == (out / name).read_bytes(), name
    assert files["data_cards/domain.md"] == DATA_CARD.encode()
    assert any(name.startswith("last-checkpoint/") and name.endswith("optimizer.pt") for name in files)
    assert files["last-checkpoint/camopd.json"] == (out / "checkpoint-4" / "camopd.json").read_bytes()
    assert not [name for name in files if name.startswith(("checkpoint-", "_", "completions"))]
    assert list((out / "completions").iterdir()) and not set(stray) & set(files)
    assert not any(b"not for others" in content for content in files.values())
    for name in ("README.md", "last-checkpoint/camopd.json", "metrics.jsonl"):
        assert str(tmp_path).encode() not in files[name], name
    card = ModelCard(files["README.md"].decode())
    assert {"camopd", "trl", "on-policy-distillation"} <= set(card.data.tags)
    assert 'model="me/tiny"' in card.text
    assert any(request.endswith("me/tiny.git/info/lfs/objects/batch") for request in hub.requests)

    # On another machine: what is there of the run is on the Hub, with all that it has measured.
    later = ["--max_steps", "6", "--output_dir", str(tmp_path / "later")]
    done = train(*later, "--resume_from_checkpoint", "me/tiny", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "later" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    done = train("--max_steps", "6", "--output_dir", str(tmp_path / "at-once"))
    assert done.returncode == 0, done.stderr[-3000:]
    resumed, at_once = (load_file(tmp_path / name / "model.safetensors") for name in ("later", "at-once"))
    assert all((resumed[name] == value).all() for name, value in at_once.items())


@pytest.mark.slow
def test_upload_leaves_out_what_camopd_serve_has_written(run, train, hub, tmp_path):
    """`_teachers.json` names hosts of a cluster."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / SERVED_TEACHERS).write_text("{}")
    done = train("--push_to_hub", "true", "--hub_model_id", "me/tiny", "--max_steps", "1", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model.safetensors" in hub.models["me/tiny"]
    assert SERVED_TEACHERS not in hub.models["me/tiny"]


@pytest.mark.parametrize(
    ("files", "environment", "said"),
    [
        (None, {}, "the Hub knows no such model, or it is private, and this machine has no token; check the name, or set"),
        ({"config.json": b"{}"}, {}, "'me/tiny' on the Hub has no folder 'last-checkpoint', which a run with"),
        ({"config.json": b"{}"}, {"HF_HUB_OFFLINE": "1"}, "cannot be fetched: HF_HUB_OFFLINE is set; unset it where there"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_checkpoint_that_cannot_be_fetched_is_an_error_with_the_way_out(train, hub, files, environment, said):
    if files is not None:
        hub.models["me/tiny"] = files
    done = train("--resume_from_checkpoint", "me/tiny", **environment)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")
    assert "'me/tiny'" in done.stderr
    if "no folder" not in said:
        assert "hf download me/tiny --include 'last-checkpoint/*' --local-dir DIR" in done.stderr


def test_pickled_checkpoint_is_not_fetched(run, tmp_path, monkeypatch):
    from camopd.errors import ResumeError
    from camopd.run import parse, teachers_of

    prompts, model, args = parse(str(run), [])
    trainer = CaMOPDTrainer(
        model=model.model_name_or_path,
        teachers=teachers_of({"teachers": args.teachers, "output_dir": args.output_dir}),
        args=args,
        train_dataset=load_all(prompts.prompts),
    )
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ResumeError, match=r"DeepSpeed and FSDP unpickle what they load.*hf download me/tiny"):
        trainer.train(resume_from_checkpoint="me/tiny")
