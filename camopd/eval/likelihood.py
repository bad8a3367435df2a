"""One model on one task by the likelihood of options, in a process of camopd's Python: `main(JOB, RESULT)`.

What a small model knows shows here sooner than in letters, which it must have learned to answer with. JOB and RESULT are
those of runner.py, of a model in a folder; `concurrency` is how many options are in a forward. Each option stands behind
the question alone, as in lm-eval's ARC, and its log-likelihood is lm-eval's: `acc` takes the likeliest option, and
`acc_norm`, which is the score, the likeliest per character. A chat template is used where there is one, as by `eval_tasks`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import CaMOPDError
from ..files import json_lines
from .runner import cut_torn_line
from .tasks import LETTERS
from .verdicts import after_thinking


DONE = "options.jsonl"  # among what jobs.py counts
KEPT = 32  # questions from one writing to the next


def main(job_file: str, result_file: str) -> None:
    """Do the job; a killed one goes on where it stopped.

    Raises `ValueError` for a row that the model has no room for, a likelihood that is not finite, a chat template that
    opens reasoning, and answers of another device or type.
    """
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    (rows_file,) = Path(job["dataset_args"]["local_path"]).glob("*.jsonl")
    rows = [json.loads(line) for line in json_lines(rows_file.read_text(encoding="utf-8"))]
    done = Path(job["work"]) / "predictions" / DONE
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    cut_torn_line(done)
    lines = json_lines(done.read_text(encoding="utf-8"))
    found = {each["item"]: each for each in map(json.loads, lines)}
    left = [place for place in range(len(rows)) if place not in found]
    if left:
        tokenizer, forward = load(job["model"], job["concurrency"])
        how = how_asked(tokenizer, forward.model)
        for before in found.values():
            weighed = before.get("how", "in a way that an earlier version did not note")
            if weighed != how:
                raise ValueError(
                    f"{done} has options that were weighed {weighed}, and now it is {how}. Go on where it began, or "
                    "remove the folder."
                )
        asked = {place: encoded(tokenizer, rows[place]) for place in left}
        _need_room(forward.model.config, list(asked.values()), job["model"])
        for start in range(0, len(left), KEPT):
            places = left[start : start + KEPT]
            sums = likelihoods(forward, [pair for place in places for pair in asked[place]])
            new = [answer(place, rows[place], [sums.pop(0) for _ in asked[place]], how) for place in places]
            with open(done, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(each, allow_nan=False) + "\n" for each in new))
            found |= {each["item"]: each for each in new}
    atomic.write(Path(result_file), "".join(json.dumps(found[place]) + "\n" for place in range(len(rows))))


def load(name: str, batch_size: int) -> tuple[Any, Any]:
    """The tokenizer of a model, by its folder or id, and what gives its log-probs. On a CPU it computes in float32.

    Raises `CaMOPDError` for an architecture whose log-probs are not those of its own logits, and `ValueError` for a chat
    template that opens reasoning.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..forward import Forward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = "auto" if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model = model.to(device).eval()
    forward = Forward(
        model, run=lambda function, *args: function(model, *args), whole=model, autocast=nullcontext,
        batch_size=batch_size, pad_token_id=0, padding_free=None, whose=f"model {name}",
    )  # fmt: skip
    try:
        forward.probe()
    except CaMOPDError as error:
        reason = str(error).partition(". ")[0]
        raise CaMOPDError(f"the options cannot be weighed by {name}: {reason}. Leave the task out.") from error
    tokenizer = AutoTokenizer.from_pretrained(name)
    _need_no_reasoning(tokenizer, name)
    return tokenizer, forward


def _need_no_reasoning(tokenizer: Any, name: str) -> None:
    before = texts(tokenizer, {"question": "x", "A": "x"})[0][0]
    if after_thinking(before) is None:
        raise ValueError(
            f"the chat template of {name} opens reasoning (<think>) before an answer, and options would be weighed inside "
            "it. Leave the task out, or take the one of letters (its name without _options)."
        )


def how_asked(tokenizer: Any, model: Any) -> str:
    """What else than the weights decides: scores of models that were asked otherwise differ by that, too."""
    template = "with its chat template" if tokenizer.chat_template else "without a chat template"
    return f"{template}, in {str(model.dtype).removeprefix('torch.')} on {model.device.type}"


def texts(tokenizer: Any, row: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands before each option of a row, and the option as it follows."""
    asked, gap = f"Question: {row['question']}\nAnswer:", " "
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": asked}]
        asked, gap = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), ""
    return [(asked, gap + option) for option in options_of(row)]


def options_of(row: dict[str, Any]) -> list[str]:
    """The options of a row of `tasks.multiple_choice`, in the order of their letters."""
    return [row[letter] for letter in LETTERS if letter in row]


def encoded(tokenizer: Any, row: dict[str, Any]) -> list[tuple[list[int], int]]:
    """For each option the tokens of all and how many are before it: space at the end of a context is the option's, as the
    two are often one token."""
    found = []
    for before, option in texts(tokenizer, row):
        begin = tokenizer.bos_token or tokenizer.eos_token
        special = not (begin and before.startswith(begin))  # a template writes it itself
        context = tokenizer.encode(before.rstrip(), add_special_tokens=special)
        whole = tokenizer.encode(before + option, add_special_tokens=special)
        found.append((context + whole[len(context) :], len(context)))
    return found


def likelihoods(forward: Any, asked: Sequence[tuple[list[int], int]]) -> list[float]:
    """The log-likelihood of each option, nats."""
    scores = forward.token_scores([ids for ids, _ in asked], [start for _, start in asked])
    return [each.logps.double().sum().item() for each in scores]


def answer(item: int, row: dict[str, Any], sums: Sequence[float], how: str) -> dict[str, Any]:
    """A row of the result: what the model finds likeliest per character, and whether that and the likeliest are right.

    Raises `ValueError` for a log-likelihood that is not finite.
    """
    options = options_of(row)
    if not all(map(math.isfinite, sums)):
        raise ValueError(
            f"the options of {row['question']!r} have the log-likelihoods {list(sums)} by the model ({how}), and only "
            "finite ones can be compared. Look at its weights, and at its dtype in config.json: float16 may overflow."
        )
    gold = LETTERS.index(row["answer"])
    per_character = [value / len(option) for value, option in zip(sums, options, strict=True)]
    first, best = (max(range(len(options)), key=values.__getitem__) for values in (sums, per_character))
    return {
        "item": item, "repeat": 0, "prompt": "\n".join([row["question"], *_lettered(options)]),
        "gold": _lettered(options)[gold], "text": _lettered(options)[best], "stop": "stop", "tokens": None,
        "scores": {"acc": float(first == gold), "acc_norm": float(best == gold)}, "likelihoods": list(sums),
        "how": how,
    }  # fmt: skip


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def _need_room(config: Any, asked: Sequence[Sequence[tuple[list[int], int]]], name: str) -> None:
    from ..teachers.local import context_length

    longest, limit = max(len(ids) for row in asked for ids, _ in row), context_length(config)
    if longest > limit:
        raise ValueError(
            f"the longest question and option have {longest} tokens, and the model {name} has {limit:.0f} positions "
            "(config.json). Leave those rows out of the task's file (--data), or the task."
        )
