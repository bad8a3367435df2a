"""CoSER's given-circumstance acting: the model plays the characters of a scene, and a judge counts what is wrong with it.

The prompts are those of a checkout of CoSER that the user names: three functions and the judge's template are taken out of
it, and nothing else of it runs. Where this differs from its main.py on purpose:

- a model's name changes nothing: CoSER leaves the example of an output away for actors called "coser";
- a severity may be a text that is a number, which CoSER ignores; one that is none makes the reply unusable;
- words on both sides of a thought in tags are not glued together;
- who speaks next where the prediction is none of the speakers is drawn by scene, and not by all scenes before;
- a server that does not answer is asked a few times, and not for ever.

As there, `<END CHAT>` counts from the sixth message on only, and a scene has at most twenty.
"""

from __future__ import annotations

import ast
import json
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CaMOPDError
from .judge import Judge, Unusable
from .verdicts import Verdict, after_thinking, collect


DIMENSIONS = ("Storyline Consistency", "Anthropomorphism", "Character Fidelity", "Storyline Quality")
ROUNDS, FIRST_END = 20, 5
WORLD = "Environment"
END = "<END CHAT>"
WHAT = (
    "CoSER's scenes are read from a checkout of Neph0s/CoSER with its data: name its test set with --data "
    "gca=CHECKOUT/data/test/test_set.json"
)
MAX_TOKENS = 8196  # of a message, as in CoSER
HEARD = 28 << 10  # tokens of a scene, as its actor hears it
_FUNCTIONS = ("get_character_prompt", "get_environment_prompt", "get_nsp_prompt")
# The first is what its prompts ask for; models write the second, too, and its program strips both.
_THOUGHT = re.compile(r"\[.*?\]|(?s:<\s*+(system|role)[_\s]++think(?:ing)?\s*+>.*?</\s*+\1[_\s]++think(?:ing)?\s*+>)")


def opened(path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Makes rows of a test set into scenes with all their prompts written out. Raises `ValueError` without a checkout."""
    folder = path.resolve().parents[2] / "gca_evaluation"
    functions = _taken(folder / "utils.py", _FUNCTIONS)
    template = _taken(folder / "prompts.py", ("critic_prompts",))["critic_prompts"]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        functions["random"].seed(42)  # they choose among spellings
        return {"prompt": row["scenario"], "gold": json.dumps(_scene(row, functions, template))}

    return convert


def _taken(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Functions and constants of a file, without running the rest of it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [
            node
            for node in tree.body
            if getattr(node, "name", None) in names
            or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names)
        ]
        space: dict[str, Any] = {"random": random.Random(42), "Dict": dict}
        exec(compile(ast.Module(nodes, []), str(path), "exec"), space)
        return {name: space[name] for name in (*names, "random")}
    except (OSError, SyntaxError, KeyError) as error:
        raise ValueError(f"{str(path)!r} does not give {', '.join(names)} ({type(error).__name__}: {error})") from None


def _scene(row: Mapping[str, Any], take: Mapping[str, Any], critic: Mapping[str, Any]) -> dict[str, Any]:
    plot, major = row["plot"], list(row["major_characters"])
    speakers = [*row["speaking_characters_w_env"]]
    speakers += [] if WORLD in speakers else [WORLD]
    described = {each["name"]: each.get("description", "").strip("\n") for each in plot["key_characters"]}
    motives = {each["name"]: each.get("motivation", "") for each in row["key_characters"]}
    profiles = {}
    for name in speakers:
        text = f"{described.get(name, '')}\n\n{row['character_profiles'].get(name, '')}".strip(" \n")
        if name != WORLD and text:
            profiles[name] = text
    systems = {
        name: take["get_character_prompt"](
            row["book"], name, profiles.get(name, ""), plot["summary"], row["scenario"], motives.get(name, ""),
            other_character_profiles=dict(profiles), exclude_plot_summary=True, fixed_template=True,
            add_output_example=True,
        )
        for name in speakers if name != WORLD
    }  # fmt: skip
    systems[WORLD] = take["get_environment_prompt"](major, row["scenario"])
    said = [
        f"{each['character']}: {each['message'] if each['character'] == WORLD else aloud(each['message'])}".strip("\n")
        for each in row["dialogues"]
    ]
    judged = {}
    for name in DIMENSIONS:
        details = critic["dimension_details"][name]
        parts = {
            "book": row["book"], "plot_summary": plot["summary"], "scenario": row["scenario"],
            "character_profiles": "\n\n".join(f"### {name}\n\n{text}" for name, text in profiles.items()),
            "original_conversation": "\n\n".join(said), "major_characters": ", ".join(major),
            "additional_instructions": "", "dimension_name": name, "dimension_brief": details["dimension_brief"],
            "dimension_criteria": details["dimension_criteria"],
        }  # fmt: skip
        text = critic["self-play-deduct-template"]
        for part, value in parts.items():  # in this order: a name in the criteria stays as it is, as in CoSER
            text = text.replace(f"{{{part}}}", value)
        judged[name] = text
    return {
        "speakers": speakers, "major": major, "systems": systems, "judged": judged,
        "next": take["get_nsp_prompt"](speakers, row["scenario"]),
    }  # fmt: skip


def aloud(text: str) -> str:
    """What others hear of a message: no thoughts, which are in brackets or in tags, and no empty lines.

    >>> aloud("[I must not.] Yes.\\n\\n<role_thinking>\\nWhy\\n</role_thinking> Go (opens the door).")
    'Yes.\\nGo (opens the door).'
    """
    lines = (line.strip() for line in _THOUGHT.sub("", text).split("\n"))
    return "\n".join(filter(None, lines))


def play_all(
    actor: Judge,
    world: Judge,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    workers: int,
    tick: Callable[..., None],
) -> list[dict[str, Any]]:
    """The scenes as answers, in order; each is kept in `folder` when it is played.

    Raises `CaMOPDError` where one could not be played.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = [{**row, "text": ""} for row in rows]

    def end() -> None:
        actor.end()
        world.end()

    played = collect(
        folder, asked, f"{actor.model} with {world.model}", partial(play, actor, world), workers, tick, end
    )
    failed = [scene["failed"] for scene in played if "failed" in scene]
    if failed:
        raise CaMOPDError(
            f"{len(failed)} of {len(rows)} scenes could not be played, the first as {failed[0]}. The others are kept, and "
            "the same command goes on."
        )
    known = {"repeat": 0, "stop": "stop", "tokens": None, "scores": {}}
    return [
        {**row, **known, "item": item, "text": json.dumps(scene["messages"])}
        for item, (row, scene) in enumerate(zip(rows, played, strict=True))
    ]


def play(actor: Judge, world: Judge, row: Mapping[str, Any]) -> Verdict:
    """The messages of a scene, [speaker, text] each; {"failed": why} where a server gave none."""
    scene = json.loads(row["gold"])
    speakers, start = scene["speakers"], {"role": "user", "content": "===Conversation Start===\n\n"}
    heard = {name: [{"role": "system", "content": text}, start] for name, text in scene["systems"].items()}
    asked = [{"role": "system", "content": scene["next"]}, start]
    rng = random.Random(zlib.crc32(row["prompt"].encode()))
    messages: list[list[str]] = []
    speaker = speakers[0]
    while speaker != END and len(messages) < ROUNDS:
        found = (world if speaker == WORLD else actor).ask(_merged(heard[speaker]), 0.0, _some, again=1.0)
        if "failed" in found:
            return found
        text = str(after_thinking(found["said"])).strip()
        messages.append([speaker, text])
        shown = aloud(text)
        prefixed = any(
            line.startswith((f"{speaker}:", f"{speaker}\uff1a")) for line in shown.split("\n")
        )  # of Chinese
        named = shown if prefixed else f"{speaker}: {shown}"
        for name, messages_of in [*heard.items(), ("", asked)]:
            own = name == speaker
            messages_of.append({"role": "assistant", "content": text} if own else {"role": "user", "content": named})
        reply = world.ask(_merged(asked), 0.0, _some, again=1.0)
        if "failed" in reply:
            return reply
        predicted = next_of(reply["said"], speakers)
        ended = predicted == END and len(messages) > FIRST_END
        if ended or (predicted in speakers and predicted != speaker):
            asked.append({"role": "assistant", "content": reply["said"]})
            speaker = str(predicted)
            continue
        asked.append({"role": "assistant", "content": predicted or reply["said"]})
        asked.append({"role": "user", "content": scene["next"]})
        others = sorted({*scene["major"], WORLD} - {speaker}) or sorted({*speakers} - {speaker})
        speaker = rng.choice([name for name in others if name in heard] or [WORLD])
    return {"messages": messages}


def _some(text: str) -> Verdict:
    if not (after_thinking(text) or "").strip():
        raise Unusable("an empty message")
    return {}


def _merged(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Messages of a user that follow each other as one, as chat templates want them."""
    found: list[dict[str, str]] = []
    for message in messages:
        if found and message["role"] == found[-1]["role"] == "user":
            found[-1] = {"role": "user", "content": found[-1]["content"] + message["content"]}
        else:
            found.append(dict(message))
    return found


def next_of(reply: str, speakers: Sequence[str]) -> str | None:
    """The speaker, or the end of the scene, that a prediction names; `None` where it names none.

    >>> next_of("Next speaker: Ann", ["Ann", "Bo"]), next_of("<END CHAT>", ["Ann"]), next_of("random", ["Ann"])
    ('Ann', '<END CHAT>', None)
    """
    text = reply.strip()
    said = re.findall(r"(?im)next speaker[\W_]*?(?::|\bis\b)(.+)$", text)
    if said:  # the last line that says it, whatever the reasoning before it names
        name = said[-1].strip(" \t*_`\"'.,:;()[]")
        return END if END in said[-1] else next((each for each in speakers if each.strip(".") == name), None)
    for part in (text, text.partition(":")[0].strip(), text.rpartition(":")[2].strip()):
        if part in (*speakers, END):
            return part
    return END if END in text else None


def judge(of: Judge, row: Mapping[str, Any]) -> Verdict:
    """The score of a played scene, 0 to 1, the mean of four dimensions: each is 100 less five times the severities of its
    flaws, of which 0.3 a message of the characters are free, and within 0 and 100."""
    scene, messages = json.loads(row["gold"]), json.loads(row["text"])
    rounds = sum(speaker != WORLD for speaker, _ in messages)
    said = "\n\n".join((text if speaker == WORLD else aloud(text)).strip("\n") for speaker, text in messages)
    found, replies = {}, []
    for name in DIMENSIONS:
        asked = [{"role": "system", "content": scene["judged"][name]}, {"role": "user", "content": said}]
        verdict = of.ask(asked, 0.0, partial(_read, name), again=1.0)
        replies.append(verdict)
        if "failed" in verdict:
            return {"failed": verdict["failed"], "replies": replies}
        found[name] = min(100.0, max(0.0, 100 - 5 * (verdict["severity"] - 0.3 * rounds)))
    return {"score": sum(found.values()) / (100 * len(found)), "parts": found, "replies": replies}


def _read(dimension: str, reply: str) -> Verdict:
    return {"severity": severity_of(reply, dimension)}


def severity_of(reply: str, dimension: str) -> float:
    """The severities of a reply's flaws together; one that is not given is 1. Raises `Unusable` for another form."""
    try:
        flaws = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])[dimension]["flaws"]
        severities = [float(1 if flaw.get("severity") is None else flaw["severity"]) for flaw in flaws]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"no flaws of {dimension} ({type(error).__name__}) in {reply[-200:]!r}") from None
    if not all(0 <= severity < 100 for severity in severities):
        raise Unusable(f"severities {severities}")
    return sum(severities)
