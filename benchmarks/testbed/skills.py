"""Eight skills whose answers can be checked exactly, and a domain whose answers conflict with them.

A prompt is a skill's name, its input, and a mark: `rev abc=` asks for the general answer, `cba`. In the domain *near* to
them `rev abc!` asks for the same answer in a cipher: one character decides between two answers to the same words, so
whoever learns one of them unlearns the other. In the *far* domain the prompt has a form of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple


LETTERS = "abcdefghij"
CIPHER = dict(zip(LETTERS, "fhiajbdecg", strict=True))  # no letter stands for itself, and none for the one after it
CAPITALS = dict(zip(LETTERS, "ABCEGBDFHA", strict=True))  # of the far domain
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGH=!+. "


class Item(NamedTuple):
    """A prompt and its one right answer."""

    skill: str
    prompt: str
    answer: str


# Of a word
SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "rev": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "shift": lambda word: "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word),
    "last": lambda word: word[-1] * 3,
    "max": lambda word: max(word) * 2,
    "dup": lambda word: "".join(letter * 2 for letter in word),
}
GENERAL = (*SKILLS, "add")
COVERED = ("copy", "rev", "sort", "shift")  # by the proxy prompts, as the paper's hold a part of what a teacher knows
UNCOVERED = tuple(skill for skill in GENERAL if skill not in COVERED)
# Skills that a near domain answers in its cipher: two covered, two not
NEAR: tuple[str, ...] = ("copy", "rev", "last", "dup")
FAR: tuple[str, ...] = ()


def general_item(skill: str, draw: random.Random, lengths: tuple[int, int]) -> Item:
    """One of a general skill; `lengths` are the shortest and the longest word, and `dup` has words of at most 4 letters."""
    if skill == "add":
        first, second = draw.randrange(30), draw.randrange(30)
        return Item(skill, f"add {first}+{second}=", str(first + second))
    word = _word(draw, lengths, 4 if skill == "dup" else None)
    return Item(skill, f"{skill} {word}=", SKILLS[skill](word))


def domain_item(domain: tuple[str, ...], draw: random.Random, lengths: tuple[int, int]) -> Item:
    """One of the domain that answers these skills in its cipher, or of the far one."""
    if domain == FAR:
        word = _word(draw, lengths, 5)
        return Item("domain", f"doc {word}=", "".join(CAPITALS[letter] for letter in word) + ".")
    skill = draw.choice(domain)
    plain = general_item(skill, draw, lengths)
    return Item("domain", plain.prompt.replace("=", "!"), "".join(CIPHER[letter] for letter in plain.answer))


def mixture(
    skills: Sequence[str], domain: tuple[str, ...], lengths: tuple[int, int], seed: int, count: int
) -> list[Item]:
    """So many items of these skills in equal shares by chance; `"domain"` is one of them."""
    draw = random.Random(seed)
    return [
        domain_item(domain, draw, lengths) if skill == "domain" else general_item(skill, draw, lengths)
        for skill in (draw.choice(skills) for _ in range(count))
    ]


def _word(draw: random.Random, lengths: tuple[int, int], longest: int | None) -> str:
    shortest, most = lengths
    most = min(most, longest or most)
    return "".join(draw.choice(LETTERS) for _ in range(draw.randint(min(shortest, most), most)))
