"""Hostile input of every kind: it is taken as it says, or refused with an error in words. `make test-fuzz` tries 100,000.

Each target counts its cases. An error counts as one in words when it was raised on purpose; a `TypeError` out of a
comparison, a `KeyError`, an `OverflowError` or memory beyond bounds is a crash.
"""

import base64
import copy
import io
import json
import linecache
import logging
import math
import os
import resource
import traceback
from collections import Counter
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from camopd import CaMOPDConfig, manifest
from camopd.checkpoints import RunCheckpoints
from camopd.errors import CaMOPDError, TeacherError
from camopd.messages import read_row
from camopd.prompts import PromptReader, named
from camopd.rollouts import load_rollouts, save_rollouts
from camopd.samples import Sample
from camopd.schedule import Schedule
from camopd.teachers.vllm.teacher import ServerTeacher


SHARES = {"schedule": 0.4, "prompts": 0.2, "answers": 0.2, "rollouts": 0.1, "checkpoints": 0.05, "config": 0.05}
CASES = int(os.environ.get("CAMOPD_FUZZ_CASES", "3000"))
BATCH = 2000
MOST_MEMORY = 100  # MiB that the process may grow by over all cases of a target
BASE = {"use_cpu": True, "bf16": False, "report_to": "none"}
taken, refused, crashed = Counter(), Counter(), Counter()


def cases(target, share=1.0):
    """A parameter `batch` for so many cases of a target: Hypothesis remembers all of a batch, which takes memory."""
    return pytest.mark.parametrize("batch", range(-(-round(CASES * SHARES[target] * share) // BATCH)))


def try_all(target, batch, check, *strategies, share=1.0):
    """Call `check` with what the strategies draw, the same cases whenever they run."""
    left = round(CASES * SHARES[target] * share) - batch * BATCH
    how = settings(
        max_examples=min(BATCH, left), deadline=None, database=None, suppress_health_check=list(HealthCheck),
        print_blob=False,
    )  # fmt: skip

    def one(drawn):
        check(*drawn)

    seed(batch)(how(given(st.tuples(*strategies))(one)))()


@pytest.fixture(autouse=True, scope="module")
def table():
    log = logging.getLogger("camopd")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)
    print(f"\n{'target':<10}{'cases':>9}{'taken':>9}{'refused':>9}{'crashes':>9}")
    for target in SHARES:
        row = (taken[target], refused[target], crashed[target])
        print(f"{target:<10}{sum(row):>9}" + "".join(f"{number:>9}" for number in row))
    print(f"{'all':<10}{sum(map(sum, (taken.values(), refused.values(), crashed.values()))):>9}")


@pytest.fixture(autouse=True)
def within_memory():
    """The peak of the whole process: no case may have taken much, not even for a moment."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MEMORY, f"{grown:.0f} MiB"


def on_purpose(error):
    """Whether an error was raised by a `raise`, and not by what a line does."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "raise" in linecache.getline(frame.filename, frame.lineno)


@contextmanager
def in_words(target, *names):
    """Counts what happens inside, and lets an error in words pass that has all of these `names`."""
    try:
        yield
    except (CaMOPDError, ValueError, TypeError) as error:
        plain = type(error) in (ValueError, TypeError) or isinstance(error, CaMOPDError)
        if plain and on_purpose(error) and len(str(error)) < 5000 and all(name in str(error) for name in names):
            refused[target] += 1
            return
        crashed[target] += 1
        raise
    except BaseException:
        crashed[target] += 1
        raise
    else:
        taken[target] += 1


# --- schedule ------------------------------------------------------------------------------------------------------

digits = st.sampled_from("0123456789") | st.sampled_from("١３²½_")
number = st.one_of(
    st.integers(0, 10**7).map(str), st.floats().map(str), st.text(digits, max_size=5),
    st.sampled_from(["1e8", "1e308", "1e309", "-0", "1_000", "nan", "inf", "1e-400", ".5", "5.", "1e", "9" * 400, "0x1"]),
)  # fmt: skip
branch = st.sampled_from(["general", "domain", "a", "_", "2nd", "", "do main", "röle", "a" * 300]) | st.text(
    max_size=4
)
part = st.builds(
    lambda name, colon, count: name + colon + count, branch, st.sampled_from([":", "", "::", " : "]), number
)
sound = st.builds("{}:{}".format, st.sampled_from(["general", "domain", "a", "b-2", "_"]), st.integers(1, 99))
schedules = st.one_of(
    st.lists(
        st.lists(sound, min_size=1, max_size=3, unique_by=lambda part: part.partition(":")[0]).map("+".join),
        min_size=1, max_size=9,
    ).map(",".join),
    st.lists(st.lists(part, min_size=1, max_size=3).map("+".join), min_size=1, max_size=5).map(",".join),
    st.text("ab:+,.eE0123456789- \n\0", max_size=30),
    st.builds(str.__mul__, st.sampled_from(["a,", "a+", "a:1,", "9", "a:9", "\n"]), st.integers(1, 9000)),
    st.sampled_from([None, 3, 0.5, b"a", ["a"], {"a": 1}, True]),
)  # fmt: skip


@cases("schedule")
def test_fuzz_schedule(batch):
    try_all("schedule", batch, parse, schedules, st.integers(1, 4096))


def parse(text, rows):
    with in_words("schedule", "schedule"):
        schedule = Schedule.parse(text)
        assert str(schedule) == text and 1 <= schedule.period <= 1_000_000
        for step in (0, schedule.period - 1):
            dealt = schedule.rows(step, rows)
            assert sum(dealt.values()) == rows and min(dealt.values()) >= 0
            assert math.isclose(sum(schedule.shares(step).values()), 1, rel_tol=1e-9)


# --- prompts -------------------------------------------------------------------------------------------------------

word = st.text(max_size=6) | st.sampled_from(
    ["hello", "</s>", "<pad>", "\ud800", "\0", "{{ x }}", "[", '{"role":', "a" * 3000]
)
keys = st.sampled_from(["role", "content", "type", "text", "from", "value", "tool_calls", "name"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | word | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | word, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
roles = st.sampled_from(["user", "system", "assistant", "tool", "developer", "human", "gpt", ""]) | anything
message = st.fixed_dictionaries({"role": roles, "content": word | anything}) | anything
deep = st.integers(1, 6000).map(lambda depth: "[" * depth + "]" * depth)
LONG = ["a" * 4096, "a" * 40_000, "a" * 600_000, "a" * 10**7, json.dumps([{"role": "user", "content": "a" * 10**7}])]
prompts = st.one_of(
    word, st.lists(message, max_size=4), st.lists(message, max_size=3).map(lambda m: json.dumps(m, default=str)),
    anything, deep, deep.map(lambda text: f'[{{"role": "user", "content": {text}}}]'),
    st.sampled_from(LONG),
)  # fmt: skip
row = st.fixed_dictionaries(
    {"prompt": prompts},
    optional={"system": word | anything, "tools": anything | deep, "chat_template_kwargs": anything | deep},
)
TOKENIZER = make_tokenizer()
READERS = [PromptReader(TOKENIZER, TOKENIZER, len(TOKENIZER), (), None, {}, split) for split in (False, True)]
PLAIN, SPLIT = READERS


@cases("prompts")
def test_fuzz_prompts(batch):
    try_all("prompts", batch, read_prompt, row)


def read_prompt(row):
    with in_words("prompts", "row 3"):
        found = named(read_row, {**row, "row": "row 3"})
        (ids,) = PLAIN.ids([found])
        (split,) = SPLIT.ids([found])
        special = set(TOKENIZER.all_special_ids) - {TOKENIZER.unk_token_id}
        said = found["prompt"]
        text = said if isinstance(said, str) else TOKENIZER.apply_chat_template(
            said, add_generation_prompt=said[-1]["role"] != "assistant", tokenize=False,
            continue_final_message=said[-1]["role"] == "assistant",
        )  # fmt: skip
        assert ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        written = any(m["role"] == "assistant" for m in said) if isinstance(said, list) else False
        assert written or not special & set(split)


# --- answers of servers --------------------------------------------------------------------------------------------

TOKENS, PROMPT = [5, 9, 12, 30, 7], 2
LOGPS = [-0.5, -1.25, -3.0]  # of the completion


def json_answer():
    entries = [None, *({str(token): {"logprob": -9.0, "rank": 1}} for token in TOKENS[1:PROMPT])]
    entries += [{str(t): {"logprob": v, "rank": 1}} for t, v in zip(TOKENS[PROMPT:], LOGPS, strict=True)]
    return {"model": "m", "choices": [{"index": 0, "text": "x", "prompt_logprobs": entries}]}


def npy(values):
    with io.BytesIO() as buffer:
        np.save(buffer, values, allow_pickle=False)
        return buffer.getvalue()


def compact_answer(request_id):
    array = npy(np.array(LOGPS, dtype="<f4")[:, None])
    return {"model": "m", "request_id": request_id, "prompt_token_id_logprobs": base64.b64encode(array).decode()}


value = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({}), st.just([[]] * 50),
    st.sampled_from([0.5, 0.005, -9999.0, 1e300, -1e300, -0.25, 2**63]), deep.map(lambda text: text),
)  # fmt: skip


def paths(tree, above=()):
    """Where something stands in an answer."""
    yield above
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from paths(tree[key], (*above, key))


@st.composite
def changes(draw):
    """Changes of an answer, of its bytes, and of its head; the same for both transports."""
    return {
        "edits": draw(
            st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["set", "drop", "copy"]), value), max_size=2)
        ),
        "bytes": draw(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=2)),
        "cut": draw(st.sampled_from([None] * 9 + [5, 50, 200])),
        "value": draw(st.binary(max_size=9)),
        "array": draw(st.none() | st.lists(st.floats(width=32), max_size=4)),
        "status": draw(st.sampled_from([200] * 12 + [400, 401, 404, 302, 204])),
        "encoding": draw(st.sampled_from([None] * 9 + ["gzip", "gzip, gzip", "\xff", "identity"])),
    }


def apply(answer, change):
    answer = copy.deepcopy(answer)
    for place, kind, new in change["edits"]:
        found = [path for path in paths(answer) if path]
        if not found:
            break
        *above, key = found[place % len(found)]
        parent = answer
        for step in above:
            parent = parent[step]
        if kind == "drop":
            del parent[key]
        elif kind == "copy" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(new)
    data = bytearray(json.dumps(answer).encode(errors="replace"))
    for place, byte in change["bytes"]:
        if data:
            data[place % len(data)] = byte
    return bytes(data[: change["cut"]])


def reply(status, data, headers=None):
    """As it comes from a network: `content` would be unpacked already."""
    return httpx.Response(status, headers=headers, stream=Bytes(data))


class Stranger:
    """What answers in place of a vLLM server, without a network."""

    def __init__(self):
        self.change = None

    def __call__(self, request):
        path = request.url.path
        if path == "/health":
            return reply(200, b"")
        if path == "/v1/models":
            return reply(200, b'{"data": [{"id": "m", "max_model_len": 64}]}')
        body = json.loads(request.content)
        change = self.change
        if path == "/inference/v1/generate":
            answer = compact_answer(body["request_id"])
            if change is None and len(body["token_ids"]) == 2:  # the question whether it speaks so
                one = base64.b64encode(npy(np.array([[-1.0]], dtype="<f4"))).decode()
                return reply(200, json.dumps({**answer, "prompt_token_id_logprobs": one}).encode())
            if change["array"] is not None:
                array = npy(np.array(change["array"], dtype="<f4")[:, None])
                answer["prompt_token_id_logprobs"] = base64.b64encode(array).decode()
        else:
            answer = json_answer()
        headers = {} if change["encoding"] is None else {"Content-Encoding": change["encoding"]}
        return reply(change["status"], apply(answer, change), headers)


class Bytes(httpx.AsyncByteStream):
    def __init__(self, data):
        self.data = data

    async def __aiter__(self):
        yield self.data


@pytest.fixture(params=[True, False], ids=["compact", "JSON"])
def stranger(request, monkeypatch):
    """A teacher whose server answers what it is told to, with one attempt."""
    for name, number in (("QUESTION_PAUSE", 0.0), ("SCORE_PAUSE", 0.0), ("HEALTH_SECONDS", 0.0), ("ATTEMPTS", 1)):
        monkeypatch.setattr(f"camopd.vllm.limits.{name}", number)
    server, client = Stranger(), httpx.AsyncClient

    def answer(question):
        if not request.param and question.url.path == "/inference/v1/generate":
            return reply(404, b"")
        return server(question)

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **more: client(**more, transport=transport))
    teacher = ServerTeacher(["http://stranger:1"], "general", patience=5.0)
    yield server, teacher
    teacher.close()


def score(server, teacher, change):
    server.change = change
    with in_words("answers", "teacher 'general'"):
        (found,) = teacher.score([TOKENS], [PROMPT])
        assert found.logps.dtype == torch.float32 and found.logps.shape == (3,)
        assert bool(found.logps.isfinite().all())  # how high they may be, the guards say
        if not change["bytes"] and not change["edits"] and change["array"] is None:
            assert found.logps.tolist() == LOGPS


@cases("answers", share=0.5)
def test_fuzz_answers(stranger, batch):
    try_all("answers", batch, lambda change: score(*stranger, change), changes(), share=0.5)


# --- kept rollouts -------------------------------------------------------------------------------------------------

SAMPLES = [
    Sample("general", 3, [4, 5, 6], 1, torch.tensor([True, False]), 1, True, None, torch.tensor([-1, math.nan])),
    Sample("domain", 5, [7, 8, 9], 2, torch.tensor([True]), 4, False, None, torch.tensor([-0.5])),
]  # fmt: skip
ROWS = [{"branch": "general", "position": 3}, {"branch": "domain", "position": 5}]


@cases("rollouts")
def test_fuzz_rollouts(tmp_path, batch):
    try_all(
        "rollouts", batch, lambda *drawn: load(tmp_path / "rollouts-0-of-1.safetensors", *drawn),
        st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
        st.sampled_from([None] * 9) | st.integers(0, 1200),
        st.binary(max_size=40),
        st.sampled_from(["all", "header", "tensors"]),
    )  # fmt: skip


def load(path, edits, cut, more, where):
    save_rollouts(SAMPLES, 1, path)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    first, last = {"all": (0, len(data)), "header": (0, header), "tensors": (header, len(data))}[where]
    for place, byte in edits:
        data[first + place % (last - first)] = byte
    path.write_bytes(bytes(data[:cut]) + (more if cut is not None else b""))
    with in_words("rollouts"):
        found = load_rollouts(path, ROWS)
        if not edits and (cut is None or (cut >= len(data) and not more)):
            assert found is not None
        if found is None:
            refused["rollouts"] += 1
            taken["rollouts"] -= 1
            return
        samples, prompts_cut = found
        assert 0 <= prompts_cut <= 2 and len(samples) == 2
        for sample, asked in zip(samples, ROWS, strict=True):
            length = len(sample.token_ids) - sample.prompt_len
            assert (sample.branch, sample.position) == (asked["branch"], asked["position"])
            assert sample.prompt_len >= 1 and sample.mask.shape == (length,) and min(sample.token_ids) >= 0
            assert sample.rollout_logps is None or sample.rollout_logps.shape == (length,)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the config of a run, and what its checkpoints record."""
    folder = tmp_path_factory.mktemp("run")
    return (
        folder,
        CaMOPDConfig(**BASE, output_dir=str(folder)),
        {"schedule": "general:3,domain:1", "seed": 42, "scale": {"a": 1.0}},
    )


def write_checkpoint(folder, record, rehash, change):
    """A whole checkpoint, of which one file is changed before (`rehash`) or after its manifest is written."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    text = json.dumps(record).encode()
    (folder / "camopd.json").write_bytes(change(text) if rehash else text)
    found = manifest.entries(folder, manifest.files_in(folder))
    manifest.write(folder, found, step=4, processes=1, resumable=True)


@cases("checkpoints")
def test_fuzz_checkpoints(run, batch):
    files = st.sampled_from(["camopd.json", "manifest.json", "model.safetensors", "rehashed"])
    given_as = st.sampled_from([True, "auto", "path"])
    try_all("checkpoints", batch, lambda *drawn: find(run, *drawn), changes(), files, given_as)


def find(run, change, which, given_as):
    output_dir, args, record = run
    folder = output_dir / "checkpoint-4"
    write_checkpoint(folder, record, which == "rehashed", lambda text: apply(json.loads(text), change))
    if which != "rehashed":
        before = (folder / which).read_bytes()
        tree = json.loads(before) if which.endswith("json") else {}
        after = apply(tree, change) if which.endswith("json") else change["value"]
        (folder / which).write_bytes(after)
    with in_words("checkpoints", "checkpoint-4"):
        found = RunCheckpoints(args, record).find(str(folder) if given_as == "path" else given_as, unpickles=False)
        assert found == str(folder)
        kept = json.loads((folder / "camopd.json").read_bytes())
        assert {name: kept.get(name) for name in record} == record
        assert (folder / "model.safetensors").read_bytes() == b"weights"


# --- config --------------------------------------------------------------------------------------------------------

OWN = sorted(set(CaMOPDConfig.__annotations__))
setting = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.sampled_from([10**30, -(10**30), 10**400, 10**5000]),
    st.text(max_size=5), st.binary(max_size=3), st.lists(st.integers(), max_size=2), st.just(object()), st.just(()),
    st.sampled_from(["general", "general:3,domain:1", "none", "true", "{", '{"general": 1}', '{"0": 8, "1": 9}', "[1]",
                     "1_0", '{"a":' * 5000, "http://user:sk-secret@host", "trainer", "mask", "adapter_off", "1", "0.5",
                     "x" * 10**6]),
    st.dictionaries(st.sampled_from(["general", "domain", "x", 0, 1, None, "0", "1"]),
                    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3) | st.just([1]),
                    max_size=3),
)  # fmt: skip
# Of an own field, an error may speak of the field that another one depends on.
SPEAKS_OF = {
    "gap_student": "student_logps", "exchange": "rebalance", "teacher_patience": "teacher_timeout",
    "score_batch_size": "score_tokens", "num_train_epochs": "epoch", "lr_scheduler_type": "SchedulerType",
}  # fmt: skip


@cases("config")
def test_fuzz_config(tmp_path, batch):
    try_all("config", batch, lambda *drawn: make(tmp_path, *drawn), st.sampled_from(OWN), setting)


def make(folder, name, value):
    values = {**BASE, "output_dir": str(folder)}
    with in_words("config"):
        try:
            args = CaMOPDConfig(**{**values, name: value})
        except (ValueError, TypeError) as error:
            assert name in str(error) or SPEAKS_OF.get(name, name) in str(error), f"{name}: {error}"
            assert name != "teachers" or "sk-secret" not in str(error)
            raise
        assert args.prompts_per_step >= 1 and args.longest_completion >= 1
        assert args.completion_length_at(args.max_steps - 1) <= args.longest_completion
        for field in ("mass_target", "scale", "score", "selection"):
            assert set(args.per_branch(field)) == set(Schedule.parse(args.schedule).branches)


def test_fuzz_finds_a_crash():
    """The counter of crashes is not always 0: what is not raised on purpose is one."""
    before = crashed.copy()
    for crash in (lambda: {}["x"], lambda: 0 < "x", lambda: int("x"), lambda: 10**400 / 3, lambda: json.loads("{")):
        with pytest.raises(Exception), in_words("test"):  # noqa: B017
            crash()
    assert crashed["test"] == 5 and (crashed - before).total() == 5
    with in_words("test"):
        raise TeacherError("in words")
    crashed.pop("test"), refused.pop("test")
