"""Small real models and prompts. Nothing here reaches a network."""

import dataclasses
import functools
import gc
import importlib.metadata
import math
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Before torch is, too: more threads than cores spin while they wait for each other, and a step takes ten times as long. Of
# workers alone: they get the environment of the process that starts them, and must not get its number.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import accelerate
import hypothesis
import pytest
import torch
import yaml
from datasets import Dataset
from forks import Forks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from camopd.forward import Forward
from camopd.samples import SampleSummary


signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` has it ignored, which the processes of tests would inherit
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # and a script's background has this one
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("camopd", deadline=None)  # a busy machine is no fault of what is tested
hypothesis.settings.load_profile("camopd")
pytest.register_assert_rewrite("steps", "fake_vllm", "plain_logits")  # that assert for many tests
# accelerate reads the metadata of its optional packages several times in each forward, which takes longer than a tiny one.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
# As each `train` begins it also has Python look through all that was imported for garbage, of which there is little.
accelerate.utils.memory.gc = SimpleNamespace(collect=lambda: None)
collect_ignore = [
    "schema_of_vllm.py",
    "vllm_on_cpu.py",
    "faults",
]  # for the environment that has vLLM, and for `make test-faults`
VOCAB = ["<pad>", "<s>", "</s>", "<unk>", *(chr(code) for code in range(97, 123)), *"0123456789 .?"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


def pytest_collection_modifyitems(items):
    """What takes a minute starts first, and the workers end together."""
    items.sort(
        key=lambda item: not (item.get_closest_marker("slow") and item.path.stem in ("test_faults", "test_trainer"))
    )


def pytest_collection_finish():
    """What has been imported is no garbage, and need not be looked through."""
    gc.collect()
    gc.freeze()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with a chat template."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCAB)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# Sums on the way to a log-prob of `make_model`: in each of two layers 2 norms of 32, projections of 3 x 32 and 64, heads of
# 8 and some 60 tokens of attention; then a norm, a head of 32 and a softmax of 42. And back again, over some 70 tokens.
FORWARD, GRADIENT = 750, 2 * 750 + 70


def rounding(magnitude: float = 1.0, sums: int = GRADIENT) -> float:
    """How far apart two float32 computations of a number may lie that differ in the order of their sums.

    That order depends on the processor, its vector width, the number of threads, and what else is in the batch. Each of the
    `sums` rounds a number of `magnitude` to half of 2**-23; independent errors add up to sqrt(sums) of these
    (Higham and Mary, 2019, https://doi.org/10.1137/18M1226312). Four times as much covers all of thousands of numbers, and
    each of the two computations has its own.
    """
    return 2 * 4 * 2.0**-24 * math.sqrt(sums) * magnitude


LOGP = rounding(10, FORWARD)  # log-probs, and gaps, of `make_model`: nats, down to -10 or so
LOSS = rounding(4)  # of Eq. 9, relative: its terms cancel to no less than a quarter or so


@pytest.fixture(scope="session")
def python():
    """In the place of `sys.executable`, for programs that import torch, transformers, TRL and camopd: see forks.py."""
    forks = Forks(
        [
            "steps", "train_tiny", "fake_rollouts", "torch.distributed.run", "accelerate.commands.launch", "camopd.cli",
            "camopd.commands.train", "camopd.commands.serve", "camopd.card",
        ]
    )  # fmt: skip
    yield forks.python
    forks.close()


@pytest.fixture(scope="session")
def vllm_python():
    """As `python`, and it has imported vLLM: a server does that in three processes, and takes longer over it than over the
    rest of its start."""
    forks = Forks(
        [
            "vllm.entrypoints.openai.api_server", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama",
            "trl.generation.vllm_generation", "torch.distributed.run", "camopd.cli", "camopd.commands.check",
            "conftest", "trainers",
        ],
        MALLOC_MMAP_MAX_="65536", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_TOP_PAD_="131072",  # glibc's, not make's
    )  # fmt: skip
    yield forks.python
    forks.close()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_model(seed: int, vocab_size: int = len(VOCAB)) -> LlamaForCausalLM:
    """Two layers, 32 wide, random weights large enough that two seeds disagree about every token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_forward(model, batch_size: int = 2, padding_free: bool | None = None) -> Forward:
    """The `Forward` of a model that nothing is wrapped around."""
    return Forward(
        model,
        lambda function, *args: function(model, *args),
        model,
        nullcontext,
        batch_size,
        0,
        padding_free,
        "the model",
    )


def student_forward(student):
    return lambda ids, lens: make_forward(student).logps(ids, lens)


@pytest.fixture
def model_factory():
    return make_model


def make_summary(**values) -> SampleSummary:
    """A `SampleSummary` with zeros where nothing is given."""
    zeros = {
        "position": 0, "branch": "b", "owner": 0, "prompt_len": 1, "num_ids": 1, "num_tokens": 0, "length": 0,
        "truncated": False, "category": None, "score": 0.0, "gap": 0.0, "gap_abs": 0.0, "gap_positive": 0.0,
        "gap_square": 0.0, "teacher_logp": 0.0, "entropy": 0.0,
    }  # fmt: skip
    return SampleSummary(**{**zeros, **values})


def make_prompts(branch: str, count: int = 11) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": f"{branch} {'x' * (index % 4)} {index}"} for index in range(count)])


@pytest.fixture
def prompts():
    return {branch: make_prompts(branch) for branch in ("general", "domain")}


@pytest.fixture
def teacher_model(model_factory):
    return model_factory(1)


def later_settings() -> set[str]:
    """Settings that transformers 5.23 has and the installed one lacks."""
    from camopd import CaMOPDConfig

    later = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    return later - {field.name for field in dataclasses.fields(CaMOPDConfig)}


@pytest.fixture
def make_config(tmp_path):
    """A `CaMOPDConfig` on a CPU, of the defaults and the given values."""
    from camopd import CaMOPDConfig

    def make(**values):
        return CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)

    return make


@pytest.fixture
def start_server(teacher_model, tokenizer, monkeypatch):
    """Start servers of fake_vllm.py; the client waits less between its attempts than it would outside."""
    from fake_vllm import FakeVLLM

    monkeypatch.delenv("CAMOPD_TEACHER_API_KEY", raising=False)
    for name, seconds in (("QUESTION_PAUSE", 0.0), ("SCORE_PAUSE", 0.0), ("HEALTH_SECONDS", 0.05)):
        monkeypatch.setattr(f"camopd.vllm.limits.{name}", seconds)
    servers = []

    def start(**changes):
        servers.append(FakeVLLM(**{"model": teacher_model, "tokenizer": tokenizer, **changes}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start_server):
    return start_server()


@pytest.fixture
def connect():
    """Make teachers on servers and close them in the end."""
    from camopd.teachers.vllm.teacher import ServerTeacher

    teachers = []

    def connect(*servers, patience=20.0, branch="general"):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        teachers.append(ServerTeacher(urls, branch, patience))
        return teachers[-1]

    yield connect
    for teacher in teachers:
        teacher.close()


@pytest.fixture
def local_scores(teacher_model):
    """What a server with the same model must answer."""
    from fake_vllm import PROMPT_LENS, TOKEN_IDS

    from camopd.teachers.local import LocalTeacher

    def scores(top_k=0):
        return LocalTeacher(teacher_model, "local", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS, top_k)

    return scores


@pytest.fixture
def lora_student(model_factory):
    """A LoRA student whose adapter changes every log-prob."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    base = model_factory(0)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5  # which goes on when the adapter is off
    return get_peft_model(base, config)


@pytest.fixture
def without_compiler(monkeypatch):
    """torchao compiles its step, which takes a minute here and changes no rule of it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def write(tmp_path):
    """Write settings, or any text, into a YAML file and return its path."""

    def write(settings, name="run.yaml"):
        path = tmp_path / name
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings, sort_keys=False))
        return str(path)

    return write
