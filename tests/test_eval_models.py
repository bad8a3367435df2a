"""Which models are evaluated, and whether they are there (camopd/eval/models.py)."""

import json
import os
import re
import time

import pytest
import yaml
from fake_openai import Raw, serving

from camopd.errors import CaMOPDError
from camopd.eval.models import Model, look, need_whole, of_run, parse, prepare_environment


def test_models_are_named_paths_or_urls(tmp_path):
    assert parse(f"start={tmp_path}") == Model("start", str(tmp_path))
    assert parse("a.b-c=org/model") == Model("a.b-c", "org/model")
    assert parse("x=http://localhost:8000/v1/#org/model") == Model("x", "http://localhost:8000", "org/model")
    assert parse("x=http://localhost:8000").is_url


@pytest.mark.parametrize("text", ["org/model", "=x", "a b=x", "../up=x", "x=", "http://u:secret@h:1/"])
def test_models_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="--models takes NAME=PATH_OR_URL, got") as raised:
        parse(text)
    assert "secret" not in str(raised.value)


def test_path_that_is_not_there_is_refused():
    said = r"'start' is named as '\./nowhere', but there is no such path\."
    with pytest.raises(ValueError, match=f"{said} Give the folder of a model, its id on the Hub, or a URL"):
        parse("start=./nowhere")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'m', '.*', is a folder without a config\.json.*--models m=PATH_OR_URL"):
        need_whole([parse(f"m={tmp_path}")])


def make_run(folder, general):
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "config.json").write_text("{}", encoding="utf-8")
    settings = {"model_name_or_path": "org/medical", "teachers": {"general": general, "domain": "org/medical"},
                "output_dir": str(folder / "out")}  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("general", "wanted"),
    [
        ("org/general", Model("general", "org/general")),
        ("http://h:1", Model("general", "http://h:1")),
        (["http://h:1", "http://h:2"], Model("general", "http://h:1")),
        ({"urls": "http://h:1", "model": "org/general"}, Model("general", "http://h:1", "org/general")),
    ],
)
def test_config_of_a_run_brings_its_three_models(tmp_path, general, wanted):
    start, teacher, result = of_run(str(make_run(tmp_path, general)))
    assert start == Model("start", "org/medical") and teacher == wanted
    assert result == Model("result", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "name", "revision"),
    [
        ({"model_revision": "step-500"}, "start", "step-500"),
        ({"model_init_kwargs": {"revision": "v2"}}, "start", "v2"),
        ({"model_init_kwargs": '{"revision": "v2"}'}, "start", "v2"),
        ({"teacher_model_init_kwargs": {"revision": "v1.0"}}, "general", "v1.0"),
    ],
)
def test_revision_of_a_run_is_not_taken_for_the_main_one(tmp_path, settings, name, revision):
    path = make_run(tmp_path, "org/general")
    path.write_text(path.read_text(encoding="utf-8") + yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"the {name} model .* is revision '{revision}' of .*--models {name}=DIR"):
        of_run(str(path))
    given = Model(name, str(tmp_path))
    assert given in of_run(str(path), {name: given})


def test_template_settings_that_a_run_has_and_an_evaluation_lacks_are_warned_of(tmp_path, caplog):
    path = make_run(tmp_path, "org/general")
    of_run(str(path))
    assert not caplog.records
    path.write_text(path.read_text(encoding="utf-8") + "chat_template_kwargs: {thinking: false}\n", encoding="utf-8")
    of_run(str(path))
    assert "chat_template_kwargs={'thinking': False}" in caplog.text and "not passed on" in caplog.text


def test_env_of_a_runs_config_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "before")
    path = make_run(tmp_path, "org/general")
    path.write_text(path.read_text(encoding="utf-8") + "env: {SOME_VARIABLE: 7}\n", encoding="utf-8")
    prepare_environment(str(path))
    assert os.environ["SOME_VARIABLE"] == "7"
    prepare_environment(str(tmp_path / "out"))  # a folder has none


def test_run_without_a_result_is_refused(tmp_path):
    path = make_run(tmp_path, "org/general")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"does not say where the result model is, or it is not there\. Name it with --models"
    ):
        of_run(str(path))


def test_folder_of_a_run_brings_its_three_models(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint that says what run it is\. Give the run's config"):
        of_run(str(tmp_path))
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    found = {"student": {"name": "org/medical"}, "teachers": {"general": "org/general"}}
    (checkpoint / "camopd.json").write_text(json.dumps(found), encoding="utf-8")
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    models = [Model("start", "org/medical"), Model("general", "org/general")]
    assert of_run(str(tmp_path)) == [*models, Model("result", str(checkpoint))]
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert of_run(str(tmp_path)) == [*models, Model("result", str(tmp_path))]


def test_newest_checkpoint_of_a_run_is_the_one_with_most_steps(tmp_path):
    """Whatever the clock says: a copy has made them in another order. A config and the folder say the same."""
    path = make_run(tmp_path, "org/general")
    (tmp_path / "out" / "config.json").unlink()
    for step in (12, 8, 4):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        checkpoint.mkdir()
        found = {"student": {"name": "org/medical"}, "teachers": {"general": "org/general"}}
        (checkpoint / "camopd.json").write_text(json.dumps(found), encoding="utf-8")
    assert of_run(str(path)) == of_run(str(tmp_path / "out"))
    assert of_run(str(path))[2].where.endswith("checkpoint-12")


def make_checkpoint(folder, step, student="org/medical", general="org/general", saved=None):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    found = {"student": {"name": student}, "teachers": {"general": general}}
    (checkpoint / "camopd.json").write_text(json.dumps(found), encoding="utf-8")
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    if saved is not None:
        manifest = {"files": {}, "saved": time.time() + saved}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        set_time(checkpoint / "manifest.json", saved)
    return checkpoint


def set_time(path, seconds):
    os.utime(path, (time.time() + seconds,) * 2)


def make_model(folder, seconds):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
        set_time(folder / name, seconds)


def test_result_is_the_newest_checkpoint_where_the_folder_has_an_earlier_model(tmp_path):
    """As after an overwrite or a resume that was killed."""
    checkpoint = make_checkpoint(tmp_path, 4, saved=-50)
    make_model(tmp_path, -100)
    result = of_run(str(tmp_path))[2]
    assert result == Model("result", str(checkpoint)) and f"after the model in {tmp_path} itself" in result.note
    set_time(tmp_path / "config.json", -10)  # the last save was killed, too
    assert of_run(str(tmp_path))[2] == result
    later = make_checkpoint(tmp_path, 2, saved=-40)  # which went back to a step before
    assert of_run(str(tmp_path))[2].where == str(later)


def test_files_of_a_model_before_do_not_make_the_folders_model_an_earlier_one(tmp_path):
    make_checkpoint(tmp_path, 4, saved=-50)
    make_model(tmp_path, -10)
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
        set_time(tmp_path / name, -100)
    assert of_run(str(tmp_path))[2] == Model("result", str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.of.another.name")
    assert of_run(str(tmp_path))[2] == Model("result", str(tmp_path))  # whose config is new


@pytest.mark.parametrize(("saved", "written"), [(-200, -200), (-50, -150), (-200, -50), (None, -50), (None, None)])
def test_result_is_the_model_of_the_folder_where_it_may_be_the_last(tmp_path, saved, written):
    """Where either clock says so, that of the run or that of the files; a checkpoint without a manifest is in part."""
    checkpoint = make_checkpoint(tmp_path, 4, saved=saved)
    make_model(tmp_path, -100)
    if written is not None:
        if saved is None:
            (checkpoint / "manifest.json").write_text('{"files": {}}', encoding="utf-8")
        set_time(checkpoint / "manifest.json", written)
    result = of_run(str(tmp_path))[2]
    assert result == Model("result", str(tmp_path)) and result.note == ""


@pytest.mark.parametrize("name", ["specialised", "checkpoint-4 (run)", "gpt2", "general model", "/nowhere/model"])
@pytest.mark.parametrize("of", ["start", "general"])
def test_name_without_its_place_in_the_record_of_a_run_is_refused(tmp_path, monkeypatch, name, of):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specialised").mkdir()  # another one of that name
    make_checkpoint(tmp_path / "out", 4, **{"student" if of == "start" else of: name})
    said = rf"have of the {of} model '{re.escape(name)}' alone.*Give the run's config, or --models {of}=PATH_OR_URL"
    with pytest.raises(ValueError, match=said):
        of_run("out")
    other = Model(of, "org/other")
    assert other in of_run("out", {of: other})


def test_place_in_the_record_of_a_run_is_taken(tmp_path):
    make_checkpoint(tmp_path / "out", 4, general=str(tmp_path))
    assert of_run(str(tmp_path / "out"))[1] == Model("general", str(tmp_path))


def test_hub_id_that_is_a_folder_here_is_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "out", 4)
    (tmp_path / "org" / "general").mkdir(parents=True)
    with pytest.raises(ValueError, match="have of the general model 'org/general' alone"):
        of_run("out")


def test_models_that_are_given_are_not_looked_for(tmp_path):
    """As an error asks for."""
    path = make_run(tmp_path, "adapter_off")
    (tmp_path / "out" / "config.json").unlink()
    given = {name: Model(name, f"org/{name}") for name in ("general", "result")}
    assert of_run(str(path), given) == [Model("start", "org/medical"), *given.values()]
    with pytest.raises(ValueError, match=r"does not say where the result model is, .* --models result="):
        of_run(str(path), {"general": given["general"]})
    everything = {"start": Model("start", "org/start"), **given}
    (tmp_path / "empty").mkdir()
    assert of_run(str(tmp_path / "empty"), everything) == list(everything.values())


@pytest.mark.parametrize("teacher", ["adapter_off", "adapter_start", "self", "adapter_off:general", "self:org/base"])
def test_general_teacher_that_is_the_student_itself_is_refused_in_a_folder_too(tmp_path, teacher):
    make_checkpoint(tmp_path, 4, general=teacher)
    with pytest.raises(ValueError, match=f"general teacher of .* is '{teacher}', the student .*--models general="):
        of_run(str(tmp_path))


@pytest.mark.parametrize("teacher", ["adapter_off", "adapter_start", "self"])
def test_general_teacher_that_is_the_student_itself_is_no_model_to_evaluate(tmp_path, teacher):
    with pytest.raises(ValueError, match=f"general teacher of .* is '{teacher}', the student .*--models general="):
        of_run(str(make_run(tmp_path, teacher)))


def test_adapter_alone_is_refused_with_the_way_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    model = parse(f"result={tmp_path}")
    with pytest.raises(ValueError, match=r"'result'.*is an adapter.*Merge it.*--models result=FOLDER"):
        need_whole([Model("start", "org/medical"), model])
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    need_whole([model])


def test_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="'x' is at http://h:1, and its URL has a user, a password") as raised:
        parse("x=http://me:secret@h:1#org/model")
    assert "secret" not in str(raised.value)


def test_server_says_what_it_serves():
    with serving(lambda body: "", context=128, model="org/tiny") as server:
        url = server.url.removesuffix("/v1")
        assert look(Model("m", url), url, "KEY") == look(Model("m", url, "org/tiny"), url, "KEY") == ("org/tiny", 128)
        with pytest.raises(
            CaMOPDError, match=r"of 'm', http://.*, serves org/tiny, not 'org/other'\. Write --models m=http"
        ):
            look(Model("m", url, "org/other"), url, "KEY")


@pytest.mark.parametrize(
    ("listing", "said"),
    [
        (Raw(b"{key}", 401), r"\(HTTP 401: Bearer \*\*\*\)\. .* Its key is read from KEY"),
        (Raw(b"1"), r"\(TypeError: "),
        (Raw(b'{"data": [{"id": "{key}"}, {"id": "x"}]}'), r"serves Bearer \*\*\*, x, and none was named"),
        (Raw(b"", headers={"Content-Encoding": "gzip"}), "in Content-Encoding 'gzip', and asked for none"),
    ],
)
def test_server_that_repeats_its_key_does_not_have_it_shown(listing, said, monkeypatch):
    monkeypatch.setenv("KEY", "a-secret")
    with serving(lambda body: "", listing=listing) as server:
        url = server.url.removesuffix("/v1")
        with pytest.raises(CaMOPDError, match=said) as raised:
            look(Model("m", url), url, "KEY")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://u:secret@127.0.0.1:9"])
def test_server_that_does_not_answer_is_named(url):
    with pytest.raises(
        CaMOPDError, match=r"'m' has the address http://127\.0\.0\.1:9, which does not answer"
    ) as raised:
        look(Model("m", url), url, "KEY")
    assert "secret" not in str(raised.value)
