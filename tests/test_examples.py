"""The examples: the plain loop is held to the trainer; the others run as their heads say, with tiny models."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LOSS, make_model, make_prompts, make_tokenizer
from data_rows import talk
from steps import LEARNING_RATE, MAX_GRAD_NORM, PARAMETER, ROWS, Case, FakeSampler, trainer_step
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from trainers import save_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from camopd import cli
from camopd.data.medical import to_prompt
from camopd.demo_data import ROLE
from camopd.errors import CaMOPDError
from camopd.eval import distraction
from camopd.files import load_all
from camopd.prompts import PromptStream, StepDataset
from camopd.schedule import Schedule


EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("branch", ["general", "domain"])
def test_minimal_loop_has_the_loss_and_gradient_of_the_trainer(branch, tmp_path):
    loop = load_example("minimal_loop")
    other = "domain" if branch == "general" else "general"
    case = Case("minimal", schedule=f"{branch}:1,{other}:1")
    parameters, metrics = trainer_step(case, str(tmp_path), batch_size=2)

    student, teacher = make_model(1), make_model(2 if branch == "general" else 3)
    streams = {name: PromptStream(make_prompts(name), name, seed=42) for name in ("general", "domain")}
    rows = StepDataset(streams, Schedule.parse(case.schedule), ROWS, num_steps=1).rows_of(0)
    sequences, prompt_lens, logps = [], [], []
    for row in rows:
        prompt = make_tokenizer()(row["prompt"])["input_ids"]
        completion, rollout = FakeSampler.complete(tuple(prompt))
        sequences.append(prompt + completion)
        prompt_lens.append(len(prompt))
        logps.append(torch.tensor(rollout))
    rollout_logps = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
    loss, _ = loop.step_loss(student, teacher, branch, sequences, prompt_lens, rollout_logps)
    assert loss.item() == pytest.approx(metrics["loss"], rel=LOSS)

    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
    torch.optim.SGD(student.parameters(), lr=LEARNING_RATE).step()
    for name, value in student.named_parameters():
        torch.testing.assert_close(value.detach(), parameters[name], atol=PARAMETER, rtol=0)


@pytest.mark.slow
def test_minimal_loop_runs_as_a_script(tmp_path, python):
    save_models(tmp_path, student=1, teacher=2)
    run = subprocess.run(
        [python, str(EXAMPLES / "minimal_loop.py"), str(tmp_path / "student"), str(tmp_path / "teacher"),
         "--steps", "4", "--save-to", str(tmp_path / "recovered")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line.split()[2] for line in run.stdout.splitlines() if line.startswith("step")] == [
        "general:",
        "general:",
        "general:",
        "domain:",
    ]
    assert (tmp_path / "recovered" / "model.safetensors").is_file()


def test_minimal_loop_is_short_and_uses_no_trl():
    text = (EXAMPLES / "minimal_loop.py").read_text()
    assert "import trl" not in text and "from trl" not in text
    assert len(text.splitlines()) < 170


# --- the scripts of the two experiments, with tiny models ----------------------------------------------------------

TINY = [
    "--use_cpu", "true", "--bf16", "false", "--max_prompt_length", "512", "--max_completion_length", "8",
    "--prompts_per_step", "4", "--per_device_train_batch_size", "2", "--max_steps", "2", "--learning_rate", "0.01",
    "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Student and general teacher, with room for a system prompt of one token a letter."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("general", 2)):
        model = make_model(seed)
        model.config.max_position_embeddings = 1024
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def script(python):
    """Run an example under `accelerate launch`, as its head says."""

    def script(name: str, *words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        # Not --cpu, with which accelerate starts one process, whatever --num_processes says.
        launch = [
            python, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml",
            "--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*launch, str(EXAMPLES / f"{name}.py"), *words], cwd=EXAMPLES.parent, env=environment, capture_output=True,
            text=True, timeout=400, check=False,
        )  # fmt: skip

    return script


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_train_medical_puts_raw_rows_into_the_template_saves_resumes_and_writes_a_card(models, tmp_path, script):
    rows = [
        {"id": n, "question": f"which of {n}?", "options": {"A": "one", "B": "two"}, "answer": "B"} for n in range(8)
    ]
    prompts = {
        "general": jsonl(tmp_path / "general.jsonl", [{"prompt": f"say {n}"} for n in range(8)]),
        "domain": jsonl(tmp_path / "raw.jsonl", rows),
    }
    seen = load_all(prompts, {"domain": to_prompt})["domain"][0]["prompt"]
    assert [message["role"] for message in seen] == ["system", "user"]
    assert seen[1]["content"].startswith("which of 0?\nA. one\nB. two\nPlease reason step by step")
    out = tmp_path / "out"
    words = [
        "--config", "configs/smoke.yaml", *TINY, "--output_dir", str(out), "--schedule", "general:1,domain:1",
        "--model_name_or_path", str(models / "student"), "--prompts", json.dumps(prompts),
        "--eval_prompts", json.dumps({"domain": {"path": prompts["domain"], "limit": 2}}), "--eval_steps", "2",
        "--teachers", json.dumps({"general": str(models / "general"), "domain": str(models / "student")}),
        "--save_steps", "2", "--log_completions", "false",
    ]  # fmt: skip
    run = script("train_medical", *words, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert steps_of(out) == [1, 2]
    AutoModelForCausalLM.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert "| processes | 2 |" in card
    assert "- domain: 2 held-out prompts are too few to tell (0.000 → " in card and "8 prompts of raw.jsonl" in card
    run = script("train_medical", *words, "--max_steps", "3", "--resume_from_checkpoint", "true", processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert steps_of(out) == [1, 2, 3]


@pytest.mark.slow
def test_script_without_prompts_of_a_branch_says_which(models, tmp_path, script):
    run = script("train_medical", "--config", "configs/smoke.yaml", "--prompts", '{"general": "general.jsonl"}')
    assert run.returncode != 0
    assert "visits branch 'domain', but prompts has only ['general']. Add prompts.domain" in run.stderr


@pytest.mark.slow
def test_specialize_makes_the_model_that_train_roleplay_recovers(models, tmp_path, script):
    """From CoSER's own form, by the builder, to a recovered model."""
    raw = tmp_path / "coser.json"
    raw.write_text(json.dumps([talk(turns) for turns in (3, 5, 7, 9, 4, 6, 8, 10)]))
    cli.main(["data", "roleplay", "--out", str(tmp_path / "data"), "--limit", "4", "--source", f"coser={raw}"])
    tuned = tmp_path / "roleplay-sft"
    run = script(
        "specialize", "--model_name_or_path", str(models / "student"), "--dataset_name",
        str(tmp_path / "data" / "sft.jsonl"), "--output_dir", str(tuned), "--max_steps", "2", "--learning_rate", "0.01",
        "--use_cpu", "true", "--bf16", "false", "--per_device_train_batch_size", "2", "--report_to", "none",
        "--dtype", "float32",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    out = tmp_path / "out"
    run = script(
        "train_roleplay", "--config", "configs/smoke.yaml", *TINY, "--output_dir", str(out), "--model_name_or_path",
        str(tuned), "--teachers", json.dumps({"general": str(models / "student"), "domain": str(tuned)}), "--prompts",
        json.dumps({branch: str(tmp_path / "data" / "prompts.jsonl") for branch in ("general", "domain")}),
        "--eval_prompts", "null", "--eval_strategy", "no", "--eval_on_start", "false",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert steps_of(out) == [1, 2]
    card = (out / "README.md").read_text()
    assert "(data_cards/domain.md)" in card and "(data_cards/general.md)" in card  # the builder's
    AutoModelForCausalLM.from_pretrained(out)


def test_specialize_takes_the_columns_of_each_form_of_trl():
    columns = load_example("specialize").columns_of
    assert columns(["id", "messages", "tools", "text"]) == ["messages", "tools"]
    assert columns(["prompt", "completion", "id"]) == ["prompt", "completion"]
    assert columns(["text", "prompt"]) == ["text"]
    with pytest.raises(ValueError, match=r"has the columns \['answer', 'prompt'\]. Rename them to one of the forms"):
        columns(["prompt", "answer"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"dataset_streaming": True},
            "Leave out --dataset_streaming, --dataset_test_split, --ignore_bias_buffers",
        ),
        ({"dataset_config": "main"}, r"--dataset_config main would be ignored: '.*\.jsonl' is a file\. Leave it out"),
        ({"dataset_train_split": "test"}, "--dataset_train_split test would be ignored"),
        ({"dataset_test_split": "validation"}, "Leave out .*--dataset_test_split, --ignore_bias_buffers: no effect"),
        ({"ignore_bias_buffers": True}, "Leave out .*--dataset_test_split, --ignore_bias_buffers: no effect"),
        ({"dataset_name": None}, "--dataset_name is missing"),
    ],
)
def test_specialize_refuses_what_it_would_ignore(tmp_path, settings, said):
    module = load_example("specialize")
    name = jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    assert module.rows_of(module.ScriptArguments(dataset_name=name)).column_names == ["text"]
    with pytest.raises(ValueError, match=said):
        module.rows_of(module.ScriptArguments(**{"dataset_name": name, **settings}))


@pytest.mark.parametrize(
    ("given", "taken"), [("false", None), ("True", True), ("out/checkpoint-2", "out/checkpoint-2")]
)
def test_specialize_goes_on_where_it_is_told_to(tmp_path, monkeypatch, given, taken):
    module, seen = load_example("specialize"), []

    class Trainer:
        def __init__(self, **_):
            pass

        def train(self, resume_from_checkpoint):
            seen.append(resume_from_checkpoint)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "SFTTrainer", Trainer)
    words = ["--model_name_or_path", "org/model", "--dataset_name", jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])]
    words += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--resume_from_checkpoint", given]
    monkeypatch.setattr(sys, "argv", ["specialize.py", *words])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert seen == [taken]


@pytest.mark.slow
def test_train_custom_needs_no_config(models, tmp_path, script):
    prompts = {
        name: jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}"} for n in range(8)]) for name in ("a", "b")
    }
    run = script(
        "train_custom", "--student", str(models / "student"), "--general", str(models / "general"), "--general_prompts",
        prompts["a"], "--domain_prompts", prompts["b"], "--output_dir", str(tmp_path / "out"), *TINY,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert steps_of(tmp_path / "out") == [1, 2]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "adapter_off" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["train_medical", "train_roleplay", "train_custom", "specialize"])
def test_script_is_a_few_dozen_lines_with_its_dependencies(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith("# /// script\n# dependencies = [")
    assert len(text.splitlines()) < 80


# --- teachers that see more than the student, in this process ------------------------------------------------------


def run_example(module, monkeypatch, capsys, *words) -> str:
    """What an example prints as a script with these words."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    module.main()
    return capsys.readouterr().out


def save_reader(folder: Path, texts, seed: int = 1) -> str:
    """A model whose tokens are the words of texts, with room for a long prompt."""
    backend = Tokenizer(WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    backend.train_from_iterator([*texts, "u s a ."], trainers.WordLevelTrainer(special_tokens=special))
    model = make_model(seed, vocab_size=backend.get_vocab_size())
    model.config.max_position_embeddings = 8192
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=make_tokenizer().chat_template, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def weights_of(folder) -> torch.Tensor:
    return torch.cat([each.flatten() for each in AutoModelForCausalLM.from_pretrained(folder).parameters()])


def test_distill_prompt_brings_a_system_prompt_into_the_weights(tmp_path, monkeypatch, capsys):
    module = load_example("distill_prompt")
    rows = [{"prompt": f"who are you {n} ?", "answer": "(waves) the keeper of the light"} for n in range(9)]
    base = save_reader(tmp_path / "base", [ROLE, *(f"Q: {row['prompt']} A: {row['answer']}" for row in rows)])
    monkeypatch.setattr(module, "load_prompts", lambda branch, split: rows)
    monkeypatch.setattr(module, "unpack_base_model", lambda target: base)
    out = tmp_path / "out"
    said = run_example(
        module, monkeypatch, capsys, "--output_dir", out, "--examples", 4, "--steps", 1, "--held_out", 2
    )
    length = len(AutoTokenizer.from_pretrained(base)(module.system_prompt(4))["input_ids"])
    assert f"The teacher sees a system prompt of {length} tokens." in said and length > 4 * 10
    shown = re.findall(r"(?m)^(.+): \d of (\d) answers begin with a stage direction; the first: ", said)
    assert shown == [(who, "2") for who in ("teacher", "student before", "student after")]
    held = [json.loads(line) for line in (out / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held] == [0, 1]
    assert min(abs(line["kl"]) for line in held) > 0.01  # of equal weights: the prompt alone
    assert not torch.equal(weights_of(out / "run"), weights_of(base))


def test_resist_distraction_measures_the_margin_before_and_after(tmp_path, monkeypatch, capsys):
    module = load_example("resist_distraction")
    texts = [message["content"] for row in distraction.rows(48) for message in row["messages"]]
    base = save_reader(tmp_path / "base", texts)
    words = ["--model", base, "--held_out", 4, "--output_dir", tmp_path / "out"]
    only = run_example(module, monkeypatch, capsys, *words, "--steps", 0)
    said = run_example(module, monkeypatch, capsys, *words, "--steps", 1)
    number = r"(\d+\.\d{3}) \[\d+\.\d{3}, \d+\.\d{3}\]"
    (before,) = re.findall(rf"(?m)^before: margin {number}, above 1 in \d of 4 rows$", said)
    (after,) = re.findall(rf"(?m)^after: margin {number}, above 1 in \d of 4 rows$", said)
    (change,) = re.findall(rf"(?m)^the margin is {number} times what it was$", said)
    assert float(before) * float(change) == pytest.approx(float(after), rel=2e-3)
    assert f"before: margin {before} " in only and "after" not in only
    assert not torch.equal(weights_of(tmp_path / "out" / "run"), weights_of(base))


def test_resist_distraction_gives_geometric_means_with_their_interval():
    """Two margins, 1 and 4: the logs' mean is ln 2, their standard error ln 4 / 2."""
    found = load_example("resist_distraction").interval(torch.tensor([1.0, 4.0]).log())
    ends = [2 * 4 ** (sign * 1.96 / 2) for sign in (-1, 1)]
    assert found == f"2.000 [{ends[0]:.3f}, {ends[1]:.3f}]"


@pytest.fixture
def tutors(tmp_path):
    """Words of examples/co_distill.py: two models, three problems, little of everything."""
    rows = [{"prompt": f"is it {n}?", "answer": str(n), "concepts": ["number"]} for n in range(3)]
    for name, seed in (("one", 1), ("two", 2)):
        model = make_model(seed)
        model.config.max_position_embeddings = 8192
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return [
        tmp_path / "one", tmp_path / "two", jsonl(tmp_path / "problems.jsonl", rows), "--rounds", 1, "--max-answer", 4,
        "--threshold", 0, "--learning-rate", 0.01, "--output-dir", tmp_path / "out",
    ]  # fmt: skip


def test_co_distill_trains_and_saves_both_students(tmp_path, monkeypatch, capsys, tutors):
    module = load_example("co_distill")
    monkeypatch.setattr(module, "is_right", lambda problem, text: sum(map(ord, text)) % 2 == 0)
    for name, value in (("STEPS", 1), ("PROMPTS", 2)):
        monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    said = run_example(module, monkeypatch, capsys, *tutors)
    found = [json.loads(line) for line in said.splitlines() if line.startswith('{"student"')]
    assert [(line["student"], line["round"], line["problems"]) for line in found] == [("a", 0, 3), ("b", 0, 3)]
    for start, student in (("one", "a"), ("two", "b")):
        assert not torch.equal(weights_of(tmp_path / "out" / student), weights_of(tmp_path / start))
        AutoTokenizer.from_pretrained(tmp_path / "out" / student)


def test_co_distill_says_that_no_answer_is_right(monkeypatch, capsys, tutors):
    with pytest.raises(CaMOPDError, match=r"accepts nothing: of 3 problems neither 'a' nor 'b' .* Look at is_right"):
        run_example(load_example("co_distill"), monkeypatch, capsys, *tutors)


def test_co_distill_names_a_line_without_a_column_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": "1\u2028\x85?", "answer": "1", "concepts": []}, {"prompt": "2?", "answer": "2"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(SystemExit):
        run_example(load_example("co_distill"), monkeypatch, capsys, "no/such", "no/such", path)
    assert "line 2 of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "right"),
    [("so\nAnswer: B", True), ("answer: b.", True), ("Answer: C", False), ("Answer: B\nor C", False), ("", False)],
)
def test_co_distill_takes_the_last_line_as_the_answer(text, right):
    module = load_example("co_distill")
    assert module.is_right(module.Problem("?", "B"), text) == right
