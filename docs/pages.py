"""What MkDocs needs to make a site of these pages, which are written to be read in the repository (see mkdocs.yml).

Pages may link to any file or folder of the repository: those outside docs/ get pages of their own, and the links lead
there. Docstrings in the form of transformers become lists.
"""

import os
import re
import textwrap
from pathlib import Path
from urllib.parse import quote

from griffe import Extension
from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?\[[^\]\n]*\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".jsonl": "json", ".txt": "text"}

# The page of the API: what users import, and what they extend.
REFERENCE = """\
# Python API

From the docstrings. `CaMOPDTrainer`, `CaMOPDConfig`, `Schedule`, `Teacher` and `TokenScores` are imported from `camopd`
itself.

## Train

::: camopd.trainer.CaMOPDTrainer
    options: {members: [train, evaluate, predict, save_model, push_to_hub, create_model_card]}
::: camopd.config.CaMOPDConfig
    options: {members: false}
::: camopd.schedule.Schedule
::: camopd.files.load_prompts
::: camopd.messages.before_answer

## Extend

::: camopd.teachers.base.Teacher
::: camopd.teachers.base.RemoteTeacher
::: camopd.teachers.base.TokenScores
::: camopd.token_rules.base.TokenRule
::: camopd.step.StepCallback

## The paper's equations

::: camopd.objective
"""


def on_files(files, config):
    """Add the pages that are not in docs/: the README as the first one, the API, and what any page links to."""
    texts = {"reference.md": REFERENCE}
    waiting = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")]
    waiting += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        text = text_of(path)
        if not path.startswith("docs/"):
            texts[page_of(path)] = text
        for target in targets_of(text, path):
            if target not in seen and not target.startswith("docs/"):
                seen.add(target)
                waiting.append(target)
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    config["extra"]["paths"] = {page_of(path): path for path in seen}
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of a page lead to pages of the site."""
    path = config["extra"]["paths"].get(page.file.src_uri)
    return markdown if path is None else with_links(markdown, path)


def page_of(path: str) -> str:
    """The page of a file or folder of the repository, both relative to their roots."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def text_of(path: str) -> str:
    """The Markdown of a page: of a Markdown file its text, of another file its content, of a folder what is in it."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(each.name for each in place.iterdir() if each.suffix in (".yaml", ".py", ".md", ".sh"))
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = place.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{_LANGUAGES.get(place.suffix, 'text')}\n{text.rstrip()}\n````\n"


def targets_of(text: str, path: str) -> list[str]:
    """Files and folders of the repository that a page links to."""
    found = (target_of(link, path) for _, link, _ in _LINK.findall(_FENCE.sub("", text)))
    return [target for target in found if target is not None]


def target_of(link: str, path: str) -> str | None:
    """What a link of the page of `path` names in the repository; `None` for one that leads elsewhere or into the page."""
    name = link.partition("#")[0]
    if not name or re.match(r"[a-z]+:", name):
        return None
    folder = path if (ROOT / path).is_dir() else os.path.dirname(path)
    target = os.path.normpath(os.path.join(folder, name))
    return target if (ROOT / target).exists() else None


def with_links(text: str, path: str) -> str:
    """The page of `path` with links to pages of the site. What is in fences stays."""
    here = os.path.dirname(page_of(path))

    def lead(match: re.Match) -> str:
        target = target_of(match[2], path)
        if target is None:
            return match[0]
        anchor = match[2].partition("#")[1:]
        page = page_of(target) if target.endswith(".md") or not target.startswith("docs/") else target[len("docs/") :]
        return f"{match[1]}{quote(os.path.relpath(page, here or '.'))}{''.join(anchor)}{match[3]}"

    parts = _FENCE.split(text)
    return "".join(part if place % 2 else _LINK.sub(lead, part) for place, part in enumerate(parts))


class Docstrings(Extension):
    """Docstrings of transformers' form: parameters become lists, and names in brackets are names."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


_PARAMETER = re.compile(r"^( +)([\w, ]+?)( \(`.*\))?:\n((?:(?:\1 +.*)?\n)+)", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """A docstring with its parameters as a list, where they have the form "name (`type`, *optional*):"."""
    text = re.sub(r"\[`~?(?:\w+\.)*([\w.]+)`\](?!\()", r"`\1`", docstring + "\n")
    text = re.sub(r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", text, flags=re.MULTILINE)
    if not _PARAMETER.search(text):
        return text
    text = re.sub(r"^(?:Parameters|Args):$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ +> (.*)$", r"\n**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r"^> \[!NOTE\]$", "", text, flags=re.MULTILINE)
    return _PARAMETER.sub(lambda found: f"\n- **`{found[2]}`**{found[3] or ''}: {_one_line(found[4])}\n\n", text)


def _one_line(text: str) -> str:
    return " ".join(textwrap.dedent(text).split())
