"""The files of configs/: each is a run, and the baselines are the steps they are said to be, by a loop in plain torch."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import LOSS, make_model, make_prompts, make_tokenizer
from steps import LEARNING_RATE, MAX_GRAD_NORM, PARAMETER, Case, FakeSampler, trainer_step
from trainers import lines, make_trainer

from camopd import CaMOPDConfig, TokenScores, cli
from camopd.errors import CaMOPDError
from camopd.prompts import PromptStream, StepDataset
from camopd.run import parse
from camopd.schedule import Schedule


CONFIGS = Path(__file__).parent.parent / "configs"
METHODS = sorted((CONFIGS.parent / "camopd" / "methods").glob("*.yaml"))
RUNS = (
    sorted(path for path in CONFIGS.rglob("*.yaml") if not {"accelerate", "sweeps", "methods"} & set(path.parts))
    + METHODS
)
BRANCHES = ("general", "domain")


def settings_of(name: str) -> dict:
    return yaml.safe_load((CONFIGS / "methods" / f"{name}.yaml").read_text())


# --- every file is a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("general", 2), ("domain", 1)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def tiny(models, tmp_path):
    """What makes a file a tiny run: the student, teachers and prompts, and sizes for a test."""
    for branch in BRANCHES:
        make_prompts(branch).to_json(tmp_path / f"{branch}.jsonl")
    settings = {
        "model_name_or_path": str(models / "student"), "output_dir": str(tmp_path / "out"), "dtype": "float32",
        "prompts": {branch: str(tmp_path / f"{branch}.jsonl") for branch in BRANCHES},
        "teachers": {branch: str(models / branch) for branch in BRANCHES},
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
        "use_vllm": False, "rollout_servers": "", "max_prompt_length": 64, "max_completion_length": 12, "max_steps": 2,
        "prompts_per_step": 4,
        "per_device_train_batch_size": 1, "learning_rate": 0.01, "save_strategy": "no", "attn_implementation": "sdpa",
        "eval_prompts": {"general": {"path": str(tmp_path / "general.jsonl"), "limit": 2}}, "eval_steps": 2,
        "max_tokens_per_micro_batch": 256,
    }  # fmt: skip
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS.parent).with_suffix("")))
def test_configs_each_take_two_steps_on_a_tiny_model(path, tiny, tmp_path):
    _, _, args = parse(str(path), tiny)
    assert isinstance(args, CaMOPDConfig)
    cli.main(["train", str(path), *tiny])
    found = lines(tmp_path / "out")
    schedule = Schedule.parse(args.schedule)
    assert [line["branch"] for line in found] == ["+".join(schedule.shares(step)) for step in range(2)]
    assert all(math.isfinite(line["loss"]) for line in found)
    assert any(
        line["grad_norm"] > 0 for line in found
    )  # a tiny step of Relaxed OPD may hold only tokens without a gap


@pytest.mark.parametrize("name", ["medical", "roleplay", "medical_1gpu", "roleplay_1gpu", "demo", "smoke"])
def test_run_is_accepted_as_it_is(name):
    """But for the device: a GPU is not at hand in every test."""
    prompts, model, args = parse(str(CONFIGS / f"{name}.yaml"), ["--use_cpu", "true", "--bf16", "false"])
    assert set(prompts.prompts) == set(prompts.eval_prompts) == set(args.teachers) == set(BRANCHES)
    longest = args.max_prompt_length + args.longest_completion
    assert (args.max_tokens_per_micro_batch or longest) >= longest
    if args.use_vllm and args.vllm_mode == "colocate":  # else vLLM plans for all that the model can take
        assert args.vllm_max_model_length == longest
    assert ("adapter_off" in args.teachers.values()) == model.use_peft


def test_methods_each_set_what_another_may_have_set():
    """A file laid over a run must win in all that makes a method, whatever that run had."""
    common = {"schedule", "selection", "scale", "token_rule", "loss_normalization", "branch_weights"}
    of_selection = {"mass_target", "score"}
    for path in METHODS:
        settings = settings_of(path.stem)
        assert common <= set(settings), path.stem
        assert (of_selection <= set(settings)) == bool(settings["selection"]), path.stem
        assert f"--method {path.stem}\n" in path.read_text(), path.stem


def test_files_of_camopd_are_the_defaults(tmp_path):
    default = CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name in ("camopd", "table7_3_1_r2_rho08"):
        settings = settings_of(name)
        config = CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
        for key in settings:
            per_branch = key in ("selection", "mass_target", "score", "scale")
            found, wanted = (c.per_branch(key) if per_branch else getattr(c, key) for c in (config, default))
            assert found == wanted, key


def test_row_without_decoupling_that_has_vanillas_numbers_has_its_settings():
    assert settings_of("without_decoupling_1_1") == settings_of("vanilla_mopd")


def test_method_wins_over_the_run_and_the_command_line_over_the_method(tiny, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("schedule: general:5,domain:1\nscale: 3\n")
    method = ["--method", "vanilla_mopd"]
    cli.main(["train", str(run), *method, "--scale", "4", *tiny, "--save_strategy", "steps", "--save_steps", "2"])
    record = json.loads((tmp_path / "out" / "checkpoint-2" / "camopd.json").read_text())
    assert (record["schedule"], record["scale"]) == ("general:1+domain:1", dict.fromkeys(BRANCHES, 4.0))


def test_method_that_is_not_there_is_an_error_with_its_path(tiny, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text("schedule: general:5,domain:1\n")
    with pytest.raises(SystemExit):
        cli.main(["train", str(run), "--method", "no/such.yaml", *tiny])
    assert "the config 'no/such.yaml' cannot be read: No such file" in capsys.readouterr().err


# --- the baselines, by a loop ------------------------------------------------------------------------------------


def vanilla(samples: list[dict]) -> list[list[float]]:
    """Eq. 2: A_t / (N T_i)."""
    return [[gap / len(s["gaps"]) / len(samples) for gap in s["gaps"]] for s in samples]


def relaxed_opd(samples: list[dict], share: float = 0.2) -> list[list[float]]:
    """M_t max(A_t, floor) / sum M, with M_t the fifth (or another share) of all tokens that has the highest entropy."""
    floor = math.log(0.3) - math.log(0.7)
    entropy = [[-sum(p * math.log(p) for p in student) for student, _ in s["probabilities"]] for s in samples]
    ranked = sorted(value for row in entropy for value in row)
    threshold = ranked[math.ceil((1 - share) * (len(ranked) - 1))]
    chosen = sum(value >= threshold for value in ranked)
    return [
        [max(gap, floor) / chosen if value >= threshold else 0.0 for gap, value in zip(s["gaps"], row, strict=True)]
        for s, row in zip(samples, entropy, strict=True)
    ]


def selectkd(samples: list[dict]) -> list[list[float]]:
    """V_t A_t / (N T_i), with V_t = 0.01 unless the student's likeliest token is one of the teacher's five likeliest."""
    result = []
    for s, row in zip(samples, vanilla(samples), strict=True):
        top = [
            student.index(max(student)) in sorted(range(len(teacher)), key=lambda i: -teacher[i])[:5]
            for student, teacher in s["probabilities"]
        ]
        result.append([value * (1.0 if accepted else 0.01) for value, accepted in zip(row, top, strict=True)])
    return result


def teacher_free(samples: list[dict]) -> list[list[float]]:
    """-0.5 / (N T_i) of tokens that the student gave less than 0.2, whatever the gap."""
    return [
        [-0.5 / len(s["gaps"]) / len(samples) if math.exp(logp) < 0.2 else 0.0 for logp in s["logps"].tolist()]
        for s in samples
    ]


def loop(method) -> tuple[dict[str, torch.Tensor], float]:
    """One step of a mixed batch: parameters and loss. The loss is -sum over tokens of w_t c_t log pi(y_t)."""
    student, teachers, tokenizer = make_model(1), {"general": make_model(2), "domain": make_model(3)}, make_tokenizer()
    schedule = Schedule.parse("general:1+domain:1")
    streams = {branch: PromptStream(make_prompts(branch), branch, seed=42) for branch in BRANCHES}
    samples = []
    for row in StepDataset(streams, schedule, 8, num_steps=1).rows_of(0):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion, rollout_logps = FakeSampler.complete(tuple(prompt))
        if not completion:
            continue
        own, theirs = (
            model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            for model in (student, teachers[row["branch"]])
        )
        sampled = (range(len(completion)), completion)
        ratio = (own[sampled].detach() - torch.tensor(rollout_logps)).exp()
        samples.append({
            "logps": own[sampled],
            "weights": torch.where((ratio >= 0.5) & (ratio <= 2.0), ratio, 0.0),
            "gaps": (theirs[sampled] - own[sampled]).tolist(),
            "probabilities": list(zip(own.exp().tolist(), theirs.exp().tolist(), strict=True)),
        })  # fmt: skip
    loss = torch.zeros(())
    for sample, coefficients in zip(samples, method(samples), strict=True):
        loss = loss - (sample["weights"] * torch.tensor(coefficients) * sample["logps"]).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
    torch.optim.SGD(student.parameters(), lr=LEARNING_RATE).step()
    return {name: value.detach() for name, value in student.named_parameters()}, loss.item()


def relaxed_opd_on_most(samples: list[dict]) -> list[list[float]]:
    return relaxed_opd(samples, share=0.8)


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("vanilla_mopd", vanilla, {}),
        ("relaxed_opd", relaxed_opd, {}),
        ("relaxed_opd", relaxed_opd_on_most, {"relaxed_entropy_share": 0.8}),  # tokens below the floor among them
        ("selectkd", selectkd, {}),
        ("teacher_free", teacher_free, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_baseline_is_the_step_of_its_loop(name, method, settings, tmp_path):
    expected, expected_loss = loop(method)
    parameters, metrics = trainer_step(Case(name), str(tmp_path), 2, **{**settings_of(name), **settings})
    assert metrics["loss"] == pytest.approx(expected_loss, rel=LOSS)
    for key, value in expected.items():
        torch.testing.assert_close(parameters[key], value, atol=PARAMETER, rtol=0)


def test_loops_differ_from_each_other():
    losses = [loop(method)[1] for method in (vanilla, relaxed_opd, selectkd, teacher_free)]
    assert all(abs(a - b) > 1e-2 for a, b in zip(losses, losses[1:] + losses[:1], strict=True))


# --- the documents -----------------------------------------------------------------------------------------------


def test_paper_map_names_only_what_exists():
    root = CONFIGS.parent
    cells = [cell for row in (root / "docs" / "paper_map.md").read_text().splitlines() for cell in row.split("|")]
    checked = 0
    for cell in cells:
        source = ""  # of the file that the names after it are in
        for word in re.findall(r"`([^`]+)`", cell):
            path, _, name = word.partition("::")
            if re.match(r"(camopd|tests|configs|docs)/", path):
                assert (root / path).is_file(), word
                source = (root / path).read_text()
            elif re.match(r"(test_|_)\w+$", word):
                name = word
            for part in name.split(".") if name else ():
                assert re.search(rf"(def|class) {part}\b", source), word
                checked += 1
    assert checked > 30


def test_methods_are_all_in_the_table():
    text = (CONFIGS.parent / "docs" / "methods.md").read_text()
    assert [path.stem for path in METHODS if path.stem not in text and not path.stem.startswith("table7_")] == []


# --- around them -------------------------------------------------------------------------------------------------


def test_server_gives_the_selectkd_step_of_the_same_teacher_in_the_process(tmp_path, tokenizer, start_server):
    server = start_server(model=make_model(2), compact=True)
    losses = []
    for name, teacher in (("server", server.url), ("process", make_model(2))):
        make_trainer(
            tmp_path / name, tokenizer, teachers={"general": teacher, "domain": make_model(3)}, max_steps=2,
            schedule="general:1+domain:1", token_rule="selectkd", selection=False, prompts_per_step=8,
            max_completion_length=24,
        ).train()  # fmt: skip
        losses.append([(line["loss"], line["token_rule/general/accepted"]) for line in lines(tmp_path / name)])
    assert 0 < losses[0][0][1] < 1
    for found, wanted in zip(*losses, strict=True):
        assert found == pytest.approx(wanted, rel=2 * LOSS)


def test_student_that_proposes_as_its_teacher_is_always_accepted(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, schedule="domain,general", token_rule="selectkd", max_steps=1).train()
    (line,) = lines(tmp_path)
    assert line["token_rule/domain/accepted"] == 1.0
    assert line["grad_norm"] == 0.0


def test_relaxed_opd_has_phases_that_follow_the_step(tmp_path, tokenizer):
    make_trainer(
        tmp_path, tokenizer, schedule="general:2,domain:1", token_rule="relaxed_opd", relaxed_exploration_steps=1,
        max_steps=2, max_completion_length=24,
    ).train()  # fmt: skip
    first, second = lines(tmp_path)
    kept, below = "token_rule/general/kept_tokens", "token_rule/general/below_floor"
    assert first[kept] == pytest.approx(1 - first[below])
    assert "token_rule/entropy_threshold" not in first
    assert second[kept] == pytest.approx(0.2, abs=0.05)
    assert second["token_rule/entropy_threshold"] > 0


def test_relaxed_opd_with_all_tokens_below_the_floor_is_a_step_of_zero(tmp_path, tokenizer):
    """No token is left in the first phase, and the mean over none is 0, not NaN."""
    make_trainer(
        tmp_path, tokenizer, schedule="domain,general", token_rule="relaxed_opd", relaxed_exploration_steps=1, max_steps=1,
        relaxed_mixture=0.9, loss_normalization="token",
    ).train()  # fmt: skip
    (line,) = lines(tmp_path)
    assert (line["loss"], line["grad_norm"], line["token_rule/domain/kept_tokens"]) == (0.0, 0.0, 0.0)


class WithoutTopK:
    """Ignores `top_k`."""

    name = "terse"

    def score(self, token_ids, prompt_lens, top_k=0):
        return [TokenScores(torch.zeros(len(ids) - start)) for ids, start in zip(token_ids, prompt_lens, strict=True)]


def test_teacher_without_top_k_is_refused_for_selectkd(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, teachers={"general": WithoutTopK(), "domain": make_model(1)}, token_rule="selectkd"
    )
    with pytest.raises(CaMOPDError, match=r"teacher 'terse' gave top_ids of shape None where .* needs \(\d+, 5\)"):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"token_rule": "relaxed_opd"},
        {"token_rule": "selectkd"},
        {"token_rule": "teacher_free"},
        {"branch_weights": "sigma"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_metrics_of_the_baselines_are_documented(settings, tmp_path, tokenizer):
    names = []
    for number, extra in enumerate(({}, settings)):
        folder = tmp_path / str(number)
        make_trainer(folder, tokenizer, schedule="general:1+domain:1", max_steps=1, **extra).train()
        names.append(
            {name.replace("/general", "/<branch>").replace("/domain", "/<branch>") for name in lines(folder)[0]}
        )
    text = (CONFIGS.parent / "docs" / "metrics.md").read_text()
    table = text.split("## Of the baselines")[1].split("\n## ")[0]
    (setting,) = settings.values()
    documented = {row.split("`")[1] for row in table.splitlines() if row.startswith("| `") and f"`{setting}`" in row}
    assert names[1] - names[0] == documented
