"""CoSER's given-circumstance acting (camopd/eval/gca.py): the loop and the score by hand, against a local server."""

import json
import threading
import time
from pathlib import Path

import pytest
from fake_openai import serving

from camopd import cli
from camopd.errors import CaMOPDError, DataError
from camopd.eval import gca, rows
from camopd.eval.compare import compare
from camopd.eval.judge import ATTEMPTS, LONGEST, NEUTRAL, Judge, Unusable
from camopd.eval.paper import beside
from camopd.eval.scores import items_of
from camopd.eval.tasks import TASKS


GCA = TASKS["gca"]
UTILS = """
import a_library_that_is_not_here
raise SystemExit("nothing else of it runs")
def get_character_prompt(book_name, character, character_profile, background, scenario, motivation, thoughtless=False,
                         other_character_profiles=None, exclude_plot_summary=False, fixed_template=False,
                         add_output_example=False, add_rag=False):
    return f"PLAY {character} of {book_name}: {character_profile} / {motivation} / {add_output_example}"
def get_environment_prompt(major_characters, scenario):
    return random.choice(["WORLD", "THE WORLD"]) + " of " + scenario
def get_nsp_prompt(all_characters, scenario):
    return f"NEXT of {all_characters} in {scenario}"
"""
PROMPTS = """
critic_prompts = {
    "self-play-deduct-template": "JUDGE {dimension_name} of {book}, {major_characters}: {dimension_criteria} "
                                 "{original_conversation}",
    "dimension_details": {name: {"dimension_brief": "b", "dimension_criteria": "of {major_characters}"} for name in
        ("Storyline Consistency", "Anthropomorphism", "Character Fidelity", "Storyline Quality")},
}
"""
SCENE = {
    "book": "Emma", "scenario": "A ball.",
    "plot": {"summary": "s", "key_characters": [{"name": "Ann", "description": "kind"}]},
    "key_characters": [{"name": "Ann", "motivation": "to dance"}], "character_profiles": {"Ann": "tall", "Bo": "short"},
    "speaking_characters_w_env": ["Ann", "Bo"], "major_characters": ["Ann", "Bo"],
    "dialogues": [{"character": "Ann", "message": "[shy] Hello."}],
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A checkout in small. Yields its test set."""
    (tmp_path / "gca_evaluation").mkdir()
    (tmp_path / "gca_evaluation" / "utils.py").write_text(UTILS, encoding="utf-8")
    (tmp_path / "gca_evaluation" / "prompts.py").write_text(PROMPTS, encoding="utf-8")
    path = tmp_path / "data" / "test" / "test_set.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([SCENE, {**SCENE, "scenario": "A walk."}]), encoding="utf-8")
    return path


class Table:
    """A server on which all roles are, by their system prompts. `asked` has who was asked for what."""

    def __init__(self, next_ones, flaws=(), line="[thinks] I say {}."):
        self.next_ones, self.flaws, self.line, self.asked = iter(next_ones), list(flaws), line, []

    def __call__(self, body):
        system, *messages = [message["content"] for message in body["messages"]]
        role = system.split()[0]
        self.asked.append((system.split()[1] if role == "PLAY" else role, messages, body))
        if role == "NEXT":
            return next(self.next_ones)
        if role == "JUDGE":
            return self.flaws.pop(0)
        return self.line.format(sum(name == self.asked[-1][0] for name, *_ in self.asked))


def judge_of(server, **options):
    return Judge(server.url.removesuffix("/v1"), "m", pause=0, **options)


def played(table, scene):
    with serving(table) as server:
        return gca.play(judge_of(server), judge_of(server), scene)


def test_scenes_have_the_prompts_of_the_checkout_whatever_the_model_is_called(checkout):
    first, second = rows.read(GCA, checkout, None)
    scene = json.loads(first["gold"])
    assert scene["speakers"] == ["Ann", "Bo", "Environment"] and first["prompt"] == "A ball."
    assert scene["systems"]["Ann"] == "PLAY Ann of Emma: kind\n\ntall / to dance / True"
    assert scene["systems"]["Bo"] == "PLAY Bo of Emma: short /  / True"
    criteria = "of {major_characters}"  # as it is in CoSER
    assert scene["judged"]["Anthropomorphism"] == f"JUDGE Anthropomorphism of Emma, Ann, Bo: {criteria} Ann: Hello."
    assert first == rows.read(GCA, checkout, None)[0] and first != second


def test_what_is_missing_of_a_checkout_or_a_row_is_named(checkout):
    with pytest.raises(
        DataError, match=r"no file 'x/gca.jsonl'\. CoSER's scenes are read from a checkout of Neph0s/CoSER"
    ):
        rows.find(GCA, Path("x"), {})
    checkout.write_text(json.dumps([{"scenario": "?"}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1 .* has no 'plot'"):
        rows.read(GCA, checkout, None)
    checkout.write_text("[1", encoding="utf-8")
    with pytest.raises(DataError, match="is not a JSON list"):
        rows.read(GCA, checkout, None)
    (checkout.parents[2] / "gca_evaluation" / "prompts.py").unlink()
    with pytest.raises(DataError, match=r"prompts.py' does not give critic_prompts \(FileNotFoundError"):
        rows.read(GCA, checkout, None)


def test_scene_goes_on_as_predicted_and_ends_from_the_sixth_message_on(checkout):
    (scene, _) = rows.read(GCA, checkout, None)
    order = ["Bo", "Next speaker: Environment", "Ann", "Bo", "Ann", "<END CHAT>"]
    table = Table(order)
    found = played(table, scene)["messages"]
    assert [name for name, _ in found] == ["Ann", "Bo", "Environment", "Ann", "Bo", "Ann"]
    _, heard, body = next(call for call in table.asked if call[0] == "Bo")
    assert heard == ["===Conversation Start===\n\nAnn: I say 1."]  # no thought of another, one message of a user
    _, own, _ = [call for call in table.asked if call[0] == "Ann"][1]
    assert own[1] == "[thinks] I say 1."  # its own as it was
    assert body["temperature"] == 0 and NEUTRAL.items() <= body.items()
    (early,) = [played(Table(["<END CHAT>"] + ["Bo", "Ann"] * 20), scene)["messages"]]
    assert len(early) == gca.ROUNDS  # an end that comes too early is none, and twenty are all


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("[a] I go.\n\n[b] Now (runs).", "Ann: I go.\nNow (runs)."),
        ("<role_thinking>\nWhy?\n\nSo.\n</role_thinking>I go <system thinking>x</system_think> on.", "Ann: I go  on."),
        ("<think>x</think>< role_thinking >y</ role_thinking>I go.", "Ann: I go."),
        ("<role_thinking>I go.", "Ann: <role_thinking>I go."),  # without an end, as in CoSER
        ("Ann\uff1aI go.", "Ann\uff1aI go."),
    ],
)
def test_others_and_the_judge_do_not_hear_what_a_character_thinks(line, shown, checkout):
    (scene, _) = rows.read(GCA, checkout, None)
    table = Table(["Bo", "Ann"] * 20, [flaws(name) for name in gca.DIMENSIONS], line=line)
    found = played(table, scene)["messages"]
    _, heard, _ = next(call for call in table.asked if call[0] == "Bo")
    assert heard == [f"===Conversation Start===\n\n{shown}"]
    _, heard, _ = next(call for call in table.asked if call[0] == "NEXT")
    assert heard == [f"===Conversation Start===\n\n{shown}"]
    with serving(table) as server:
        gca.judge(judge_of(server), scene_of(checkout, found[:1]))
    assert table.asked[-1][1] == [shown.removeprefix("Ann: ")]


@pytest.mark.parametrize(
    ("reply", "speaker"),
    [
        ("1. Reasoning: It is too early for <END CHAT>.\n2. Next Speaker: Mr. Bo.", "Mr. Bo."),
        ("Next speaker: Ann.", "Ann"),
        ("**Next Speaker:** Ann", "Ann"),
        ("Next speaker is Ann", "Ann"),
        ("Next Speaker: Ann\nNo. Next Speaker: <END CHAT>", gca.END),
        ("Next speaker: random", None),
        ("The next speaker could be anyone.\nAnn", None),
        ("It is over. <END CHAT>", gca.END),
    ],
)
def test_last_line_that_says_the_next_speaker_names_it(reply, speaker):
    assert gca.next_of(reply, ["Ann", "Mr. Bo."]) == speaker


def test_speaker_that_is_none_is_drawn_by_the_scene(checkout):
    (scene, _) = rows.read(GCA, checkout, None)
    names = [[name for name, _ in played(Table(["random"] * 30), scene)["messages"]] for _ in range(2)]
    assert names[0] == names[1] and len(set(names[0])) == 3
    assert all(one != other for one, other in zip(names[0], names[0][1:], strict=False))
    table = Table(["Ann"] + ["Bo", "Ann"] * 20)  # Ann spoke: is asked anew, with the rules again
    played(table, scene)
    asked = [messages for role, messages, _ in table.asked if role == "NEXT"]
    assert "NEXT of" in asked[1][-1] and "NEXT of" not in asked[0][-1]


def flaws(dimension, *severities):
    return json.dumps({dimension: {"flaws": [{"instance": "x", "type": "y", **s} for s in severities]}})


def scene_of(checkout, messages):
    return {**rows.read(GCA, checkout, None)[0], "text": json.dumps(messages)}


def test_score_is_worked_by_hand(checkout):
    """Two messages of characters leave 0.6 free. 100 - 5 (3 + 1 - 0.6) = 83; no flaw is 100; 100 - 5 (2.5 - 0.6) = 90.5;
    30 flaws of 1 are below 0."""
    scene = scene_of(checkout, [["Ann", "[t] Hi."], ["Environment", "[Rain.]"], ["Bo", "Ho."]])
    severity = lambda value: {"severity": value}  # noqa: E731
    table = Table([], [
        "Here: " + flaws("Storyline Consistency", severity(3), {}), flaws("Anthropomorphism"),
        flaws("Character Fidelity", severity("2"), severity(0.5)), flaws("Storyline Quality", *[{"severity": None}] * 30),
    ])  # fmt: skip
    with serving(table) as server:
        found = gca.judge(judge_of(server), scene)
    parts = {"Storyline Consistency": 83, "Anthropomorphism": 100, "Character Fidelity": 90.5, "Storyline Quality": 0}
    assert found["parts"] == pytest.approx(parts) and found["score"] == pytest.approx(sum(parts.values()) / 400)
    assert table.asked[0][1] == ["Hi.\n\n[Rain.]\n\nHo."]


@pytest.mark.parametrize("reply", ["no JSON", "{}", '{"Anthropomorphism": {"flaws": [{"severity": "high"}]}}',
                                   '{"Anthropomorphism": {"flaws": [{"severity": NaN}]}}', '{"Anthropomorphism": 3}',
                                   '{"Anthropomorphism": {"flaws": ["x"]}}'])  # fmt: skip
def test_judge_that_answers_nonsense_is_asked_again_and_then_leaves_the_scene_out(reply, checkout):
    with pytest.raises(Unusable):
        gca.severity_of(reply, "Anthropomorphism")
    scene = scene_of(checkout, [["Ann", "Hi."]])
    table = Table([], [flaws("Storyline Consistency"), *[reply] * ATTEMPTS])
    with serving(table) as server:
        found = gca.judge(judge_of(server), scene)
    assert "failed" in found and "score" not in found and not table.flaws
    assert [body["temperature"] for *_, body in table.asked] == [0, 0, 1, 1]  # another draw, as CoSER does
    assert "failed" in gca.judge(Judge("http://127.0.0.1:9", "m", pause=0), scene)


def test_scene_that_a_server_refuses_is_an_error_and_the_others_are_kept(checkout, tmp_path):
    scenes = rows.read(GCA, checkout, None)
    refusing = [True]
    table = Table(["Bo", "Ann"] * 99)
    with serving(lambda body: 400 if refusing[0] and "A walk." in str(body) else table(body)) as server:
        one = judge_of(server)
        with pytest.raises(CaMOPDError, match=r"1 of 2 scenes could not be played, the first as HTTP 400.*kept"):
            gca.play_all(one, one, tmp_path / "kept", scenes, 1, lambda steps=1: None)
        asked, refusing[0] = len(table.asked), False
        found = gca.play_all(one, one, tmp_path / "kept", scenes, 1, lambda steps=1: None)
    assert len(found) == 2 and all(call[0] != "NEXT" or "A walk." in str(call[2]) for call in table.asked[asked:])
    with pytest.raises(CaMOPDError, match="ConnectError"):
        gone = Judge("http://127.0.0.1:9", "m", pause=0)
        gca.play_all(gone, gone, tmp_path / "gone", scenes, 1, lambda steps=1: None)


@pytest.mark.parametrize("slow", ["actor", "world"])
def test_signal_ends_a_scene_whoever_is_waited_for(checkout, tmp_path, slow):
    go_on, begun = threading.Event(), []

    def wait(body):
        begun.append(body)
        go_on.wait(30)
        return "late"

    def tick(steps=1):
        if begun:
            raise KeyboardInterrupt

    table = Table(["Bo", "Ann"] * 99)
    with serving(table) as quick, serving(wait) as other:
        quick, other = judge_of(quick), judge_of(other)
        actor, world = (other, quick) if slow == "actor" else (quick, other)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            gca.play_all(actor, world, tmp_path, rows.read(GCA, checkout, None), 2, tick)
        assert time.monotonic() - started < 25
        go_on.set()
    assert not (tmp_path / "verdicts.jsonl").exists()


@pytest.fixture
def command(checkout, tmp_path, monkeypatch):
    """The command on the checkout, with the server's words: two scenes of six messages each, with flaws of 6."""
    monkeypatch.chdir(tmp_path)
    replies = [flaws(name, {"severity": 6}) for name in gca.DIMENSIONS] * 4

    class Both(Table):
        def __call__(self, body):
            return replies.pop(0) if "JUDGE" in str(body) else super().__call__(body)

    def command(server, *words, world=None):
        cli.main(["eval", "--tasks", "gca", "--models", f"start={server.url}", "--judge", world or server.url, "--data",
                  f"gca={checkout}", "--concurrency", "1", *words])  # fmt: skip

    command.table = Both(["Bo", "Ann", "Bo", "Ann", "Bo", "<END CHAT>"] * 4)
    return command


def test_command_plays_and_judges_and_stands_beside_the_paper(command, capsys):
    with serving(command.table) as server:
        command(server, "--paper", "roleplay")
        asked = len(server.requests)
        command(server)
        assert len(server.requests) == asked  # nothing is played or judged twice
    said = capsys.readouterr().out
    assert "| gca | 79.0 ± 0.0 | 2 of 200 | - | - | 0% |" in said  # 100 - 5 (6 - 0.3 x 6)
    assert "| Anthro. | 23.09 | 33.42 | 34.91 | 33.96 | - | 79.00* | - |" in said
    assert "| Avg. | 30.92 | 41.08 | 42.86 | 45.00 | - | 79.00* | - |" in said


@pytest.mark.parametrize("words", [[], ["--max-tokens", "77"]])
def test_command_gives_the_actor_the_tokens_that_it_is_told_to(command, words):
    with serving(command.table) as server:
        command(server, *words)
    asked = {body["max_tokens"] for body in server.requests if "PLAY" in str(body["messages"][0])}
    assert asked == {int(words[1]) if words else 8196}
    (world,) = {body["max_tokens"] for body in server.requests if "NEXT" in str(body["messages"][0])}
    assert world == LONGEST


def test_command_does_not_judge_what_another_world_has_played(command, capsys):
    with serving(command.table) as server, serving(command.table, model="other") as other:
        command(server)
        with pytest.raises(SystemExit):
            command(server, world=other.url)
        assert not other.requests
        assert 'another world: world was "tiny" and is "other"' in " ".join(capsys.readouterr().err.split())


def test_parts_are_means_over_scenes():
    verdicts = [
        {"score": 0.5, "parts": {"a": 40, "b": 60}},
        {"score": 0.7, "parts": {"a": 60, "b": 80}},
        {"failed": "x"},
    ]
    base = {"repeat": 0, "prompt": "p", "gold": "g", "text": "[]", "stop": "stop"}
    found = items_of(GCA, [{**base, "item": n, "verdict": verdict} for n, verdict in enumerate(verdicts)])
    (row,) = compare([GCA], {"general": {"gca": found}})
    assert row["models"]["general"]["parts"] == {"a": 50, "b": 70}
    errors = {"a": 10, "b": 10}  # 20 / sqrt(2) / sqrt(2)
    assert row["models"]["general"]["parts_standard_error"] == pytest.approx(errors)
    (one,) = compare([GCA], {"general": {"gca": found[:1]}})
    assert one["models"]["general"]["parts_standard_error"] == {"a": None, "b": None}
    row["models"]["general"]["parts"] = dict.fromkeys(gca.DIMENSIONS, 50.0)
    table, _ = beside("roleplay", [row])
    assert [line[5] for line in table[-5:]] == ["50.00*"] * 4 + ["60.00*"]
