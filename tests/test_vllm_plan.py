"""Which vLLM servers a run needs, with which ports, GPUs and flags (camopd/teachers/vllm/plan.py)."""

import json
import re
import socket

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import PeftConfig

from camopd.teachers.vllm.plan import (
    VLLM,
    Server,
    assign_gpus,
    command_line,
    environment_of,
    flags_of,
    key_of,
    models_of,
    plan_servers,
    plan_students,
    replicas_of,
)


branch_names = st.text("abcdef_-09", min_size=1, max_size=6).filter(lambda name: name[0].isalpha())
teachers = st.dictionaries(branch_names, st.sampled_from(["org/a", "org/b", "./c d"]), min_size=1, max_size=5)


def test_branches_with_the_same_model_share_its_servers_and_their_name():
    models = models_of({"general": "org/one", "code": "org/one"}, None, [])
    servers = plan_servers(models, {"org/one": 2}, "127.0.0.1", 1)
    assert [server.name for server in servers] == ["general+code/0", "general+code/1"]


def test_processes_each_get_the_next_gpus():
    servers = plan_servers({"m": ["general"], "n": ["domain"]}, {"m": 2, "n": 1}, "127.0.0.1", 8001)
    assign_gpus(servers, ["0", "1", "2", "3", "4", "5", "6"], 2)
    assert [server.gpus for server in servers] == [["0", "1"], ["2", "3"], ["4", "5"]]


@pytest.mark.parametrize(
    ("host", "url", "health"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", "http://127.0.0.1:80/health"),
        ("fd00::1", "http://[fd00::1]:80", "http://[fd00::1]:80/health"),
        ("0.0.0.0", f"http://{socket.gethostname()}:80", "http://127.0.0.1:80/health"),
        ("::", f"http://{socket.gethostname()}:80", "http://[::1]:80/health"),
    ],
)
def test_urls_are_those_that_others_can_use(host, url, health):
    server = Server(["general"], 0, "m", host, 80)
    assert (server.url, server.health_url) == (url, health)


@pytest.mark.parametrize(("version", "has"), [("0.29.1", False), ("0.30.0", True), ("0.32.0", True), ("1.0", True)])
def test_scale_out_is_a_flag_since_vllm_0_30(version, has):
    assert VLLM("python", version, cpu=False).has_scale_out is has


@given(teachers)
def test_models_are_each_started_once_for_all_their_branches(teachers):
    notes = []
    others = {"URL": "http://a:1", "URLs": {"urls": ["http://a:1", "http://b:1"], "model": "m"}, "off": "adapter_off"}
    models = models_of({**teachers, **others}, None, notes)
    assert {branch: model for model, branches in models.items() for branch in branches} == teachers
    assert notes == [
        "URL: http://a:1 is a server already, nothing to start",
        "URLs: http://a:1, http://b:1 is a server already, nothing to start",
        "off: adapter_off is the student without its adapter, it needs no server",
    ]


@given(teachers, st.data())
def test_replicas_of_a_model_are_the_most_that_one_of_its_branches_is_given(teachers, data):
    models = models_of(teachers, None, [])
    named = data.draw(st.dictionaries(st.sampled_from(sorted(teachers)), st.integers(1, 9), min_size=1))
    found = replicas_of(",".join(f" {branch} = {count}" for branch, count in named.items()), models, list(teachers))
    for model, branches in models.items():
        assert found[model] == max(named.get(branch, 1) for branch in branches)
    assert replicas_of("3", models, list(teachers)) == dict.fromkeys(models, 3)


@given(st.text("a=,0123 ", max_size=8))
def test_replicas_are_whole_numbers_or_an_error_that_shows_the_text(text):
    try:
        (count,) = replicas_of(text, {"m": ["a"]}, ["a"]).values()
    except ValueError as error:
        assert str(error).startswith("--replicas") and (repr(text) in str(error) or "names" in str(error))
    else:
        assert count >= 1 and str(count) in text


@given(teachers, st.integers(1, 4), st.integers(-10, 70000))
def test_planned_servers_have_consecutive_ports_that_exist(teachers, count, port):
    models = models_of(teachers, None, [])
    try:
        servers = plan_servers(models, dict.fromkeys(models, count), "127.0.0.1", port)
    except ValueError as error:
        assert f"--port {port} leaves no room for {count * len(models)} ports" in str(error)
        assert port < 1 or port + count * len(models) - 1 > 65535
        return
    assert [server.port for server in servers] == list(range(port, port + count * len(models)))
    assert servers[0].port >= 1 and servers[-1].port <= 65535
    assert len({server.name for server in servers}) == len(servers)
    assert {branch for server in servers for branch in server.branches} == set(teachers)


@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.sampled_from("01234567"), max_size=20))
def test_gpus_are_given_in_order_and_none_twice_to_one_server(count, size, gpus):
    servers = plan_servers({"m": ["general"]}, {"m": count}, "127.0.0.1", 8001)
    try:
        assign_gpus(servers, gpus, size)
    except ValueError as error:
        if "one of them twice" not in str(error):
            assert len(gpus) < count * size
        return
    assert [gpu for server in servers for gpu in server.gpus] == gpus[: count * size]
    assert all(len(set(server.gpus)) == size for server in servers)


@given(st.lists(st.sampled_from("0123"), min_size=1, max_size=8))
def test_servers_on_one_gpu_leave_room_for_each_other(gpus):
    servers = plan_servers({"m": ["general"]}, {"m": len(gpus)}, "127.0.0.1", 8001)
    assign_gpus(servers, gpus, 1)
    taken = dict.fromkeys(gpus, 0.0)
    for server in servers:
        flags = flags_of(server, servers, None, 512)
        alone = "--gpu-memory-utilization" not in flags
        taken[server.gpus[0]] += 0.92 if alone else float(flags[flags.index("--gpu-memory-utilization") + 1])
    assert max(taken.values()) <= 0.92 + 0.005 * len(gpus)  # two digits are shown


@given(st.text(min_size=1), st.text(min_size=1))
def test_server_gets_the_key_of_its_branch_and_no_other(model, key):
    assume(key.strip() and "\0" not in key + model)
    server = Server(["my-code"], 0, model, "127.0.0.1", 8001)
    vllm = VLLM("python", "0.32.0", cpu=False)
    environment = {
        "CAMOPD_TEACHER_API_KEY": "other",
        "CAMOPD_TEACHER_API_KEY_MY_CODE": key,
        "MALLOC_X": "1",
        "PATH": "p",
    }
    found = environment_of(server, vllm, environment)
    assert found == {"VLLM_API_KEY": key.strip(), "VLLM_NO_USAGE_STATS": "1", "PATH": "p"}
    assert key_of(server, {}) is None


def test_rollout_servers_are_planned_on_their_hosts_and_ports():
    settings = {
        "model_name_or_path": "org/student",
        "rollout_servers": ["http://localhost:9000", "http://node-b:9001"],
    }
    one, two = plan_students(settings, None, None)
    assert [(each.host, each.port, each.url) for each in (one, two)] == [
        ("localhost", 9000, "http://localhost:9000"), ("node-b", 9001, "http://node-b:9001")
    ]  # fmt: skip
    text = f" {' , '.join(settings['rollout_servers'])},"  # as `camopd train` takes it, too
    assert plan_students({**settings, "rollout_servers": text}, None, None) == [one, two]
    moved = plan_students(settings, "0.0.0.0", 7000)
    assert [(each.host, each.port) for each in moved] == [("0.0.0.0", 7000), ("0.0.0.0", 7001)]
    line = command_line(one, flags_of(one, [one, two], None, 512))
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 vllm serve org/student --host localhost --port 9000")
    assert "--enable-lora" not in line and "weight-transfer" not in line and "processed_logprobs" in line


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (8, 8), (9, 16), (64, 64), (65, 128), (512, 512)])
def test_rollout_server_of_a_lora_student_takes_adapters_of_its_rank(tmp_path, rank, most):
    settings = {"model_name_or_path": "org/student", "rollout_servers": "http://localhost:9000", "use_peft": True}
    (server,) = plan_students({**settings, "lora_r": rank}, None, None)
    line = command_line(server, flags_of(server, [server], None, 512))
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve org/student")
    assert f"--enable-lora --max-lora-rank {most} --max-loras 2" in line
    config = {"r": 1, "rank_pattern": {"q_proj": rank}, "base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    settings = {"model_name_or_path": str(tmp_path), "rollout_servers": "http://localhost:9000"}
    (server,) = plan_students(settings, None, None)
    assert (server.model, server.lora_rank) == ("org/base", most)
    del config["r"], config["rank_pattern"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert plan_students(settings, None, None)[0].lora_rank == PeftConfig.from_pretrained(str(tmp_path)).r


@pytest.mark.parametrize(
    "text", ["version https://git-lfs.github.com/spec/v1\n", "{}", '{"base_model_name_or_path": null}']
)
def test_rollout_server_of_an_adapter_whose_config_is_broken_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(repr(str(tmp_path / "adapter_config.json")))):
        plan_students({"model_name_or_path": str(tmp_path), "rollout_servers": "http://localhost:9000"}, None, None)


def test_rollout_servers_that_cannot_be_are_refused():
    settings = {"model_name_or_path": "org/student", "rollout_servers": ["http://localhost:9000"]}
    with pytest.raises(ValueError, match=r"must be URLs of vLLM servers, got \['here'\]"):
        plan_students({**settings, "rollout_servers": ["here"]}, None, None)
    with pytest.raises(ValueError, match=r"a LoRA rank of 600 is more than vLLM takes, 512"):
        plan_students({**settings, "use_peft": True, "lora_r": 600}, None, None)
    with pytest.raises(ValueError, match=r"quantised weights .* cannot be rolled out by vLLM"):
        plan_students({**settings, "load_in_4bit": True}, None, None)
    with pytest.raises(ValueError, match="model_name_or_path"):
        plan_students({"rollout_servers": ["http://localhost:9000"]}, None, None)


def test_rollout_server_gets_its_own_key_and_no_teachers():
    (server,) = plan_students({"model_name_or_path": "x", "rollout_servers": "http://localhost:9"}, None, None)
    keys = {"CAMOPD_ROLLOUT_API_KEY": "own", "CAMOPD_TEACHER_API_KEY": "teachers", "PATH": "x"}
    found = environment_of(server, VLLM("python", "0.32", cpu=False), keys)
    assert found["VLLM_API_KEY"] == key_of(server, keys) == "own"
    assert found["VLLM_SERVER_DEV_MODE"] == "1" and not {name for name in found if name.startswith("CAMOPD")}
    teacher = Server(["general"], 0, "x", "localhost", 9)
    assert "own" not in environment_of(teacher, VLLM("python", "0.32", cpu=False), keys).values()


@pytest.mark.parametrize("given", [{}, {"rollout_servers": ["http://h:8000"]}])
def test_misspelt_student_is_named_with_its_like(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recovered").mkdir()
    (tmp_path / "recovered" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"names 'recoverd', .* no such path\. Did you mean 'recovered'\?"):
        plan_students({"model_name_or_path": "recoverd", "vllm_mode": "server", "use_vllm": True, **given}, None, 8000)


def test_revision_that_no_server_would_load_is_refused():
    with pytest.raises(ValueError, match=r"revision 'v2'.*hf download MODEL --revision v2.*name DIR as the teacher"):
        models_of({"general": "org/one"}, {"revision": "v2"}, [])
    for kwargs in ({"dtype": "float32"}, {"revision": "main"}):
        assert models_of({"general": "org/one"}, kwargs, []) == {"org/one": ["general"]}
    student = {"model_name_or_path": "org/one", "rollout_servers": ["http://a:1"], "model_revision": "v2"}
    with pytest.raises(ValueError, match=r"revision 'v2' reaches no rollout server.*download org/one --revision v2"):
        plan_students(student, None, None)
    assert plan_students({**student, "model_revision": "main"}, None, None)
