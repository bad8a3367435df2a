"""The tasks of `camopd eval`: whose rows, which prompt, which sampling, and what counts as an answer. No heavy imports."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import arena, distraction, gca, live_code


LETTERS = "ABCDEFGHIJ"
LETTER_PROMPT = (
    "{question}\n\n{choices}\n\nThink step by step. End with one line of the form `Final answer: X`, where X is one of "
    "{letters}."
)
CODE_PROMPT = "Implement the following Python function. Answer with the whole function in one block of code."
GREEDY = {
    "temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
    "presence_penalty": 0.0, "extra_body": {"min_p": 0.0}, "max_tokens": 32768,
}  # fmt: skip
SAMPLED = GREEDY | {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}


@dataclass(frozen=True)
class Task:
    """A benchmark as it is run here. The sampling is the paper's (Table 5) where it has the benchmark."""

    name: str
    side: str  # "general", which is to come back, or "domain", which is to be kept
    benchmark: str  # in evalscope
    hub: tuple[str, str | None, str] | None  # dataset, config and split on the Hugging Face Hub
    size: int  # rows of the whole task
    convert: Callable[[dict[str, Any]], dict[str, Any] | None]  # into evalscope's form; `None` if not of the task
    # "letter", "number", "code" run in a cage, "rules", "verified" or "compared" by a model, "checked" by evalscope,
    # "played" with a model, which judges, without evalscope, "weighed" by the likelihood of options, without it, too,
    # "scripted" by another program, which asks and judges, or "read" from where it has put what it was run for before
    answer: str = "checked"
    metric: str = "accuracy"  # of evalscope, the score of an answer; "" where it is to score nothing
    split: str = "test"  # name of the file that evalscope reads
    dataset_args: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=lambda: dict(GREEDY))
    repeats: int = 1
    paper: str | None = None  # its column in Tables 1 and 2
    make: Callable[[], list[dict[str, Any]]] | None = None  # of rows that are not on the Hub
    judge: str | None = None  # the paper's, where a model judges
    source: str = ""  # where its files are from, if not from the Hub
    rows_of: str = ""  # the task whose file of rows it has, if not its own
    # Where a row needs other files than its own: makes `convert`, of the path of the rows.
    opened: Callable[[Path], Callable[[dict[str, Any]], dict[str, Any] | None]] | None = None

    @property
    def judged(self) -> bool:
        """Whether a model judges its answers."""
        return self.judge is not None


def need(row: dict[str, Any], *names: str) -> Any:
    """The first of these columns that a row has. Raises `ValueError` where it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"has no column {' or '.join(map(repr, names))}, only {sorted(row)}")


def multiple_choice(row: dict[str, Any]) -> dict[str, Any]:
    """Question, options under their letters and the right letter, from any of the forms that these tasks have on the Hub.

    >>> multiple_choice({"question": "1 + 1?", "choices": ["1", "2"], "answer": 1})
    {'question': '1 + 1?', 'A': '1', 'B': '2', 'answer': 'B'}

    Raises `ValueError` for a missing column, options that are not a list of texts, and an answer that is none of them.
    """
    options = need(row, "options", "choices")
    if isinstance(options, dict) and "text" in options and "label" in options:  # QASC
        options = dict(zip(options["label"], options["text"], strict=True))
    texts = list(options.values()) if isinstance(options, dict) else list(options)
    if isinstance(options, dict) and list(options) != list(LETTERS[: len(options)]):
        raise ValueError(f"has options {list(options)}, which are not the letters A, B, ... in their order")
    if not 2 <= len(texts) <= len(LETTERS) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"has {len(texts)} options; 2 to {len(LETTERS)} texts can be shown")
    gold = need(row, "answer_idx", "answerKey", "label", "answer")
    if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(texts):
        gold = LETTERS[gold]
    if gold not in tuple(LETTERS[: len(texts)]):
        raise ValueError(f"has the answer {gold!r}, which is none of {LETTERS[: len(texts)]}")
    question = need(row, "question").partition("\nAnswer Choices:")[0].strip()  # MedXpertQA repeats them there
    return {"question": question, **dict(zip(LETTERS, texts, strict=False)), "answer": gold}


def weighable(row: dict[str, Any]) -> dict[str, Any]:
    """The same, of a row whose options all have a likelihood. Raises `ValueError` for one that is nothing."""
    found = multiple_choice(row)
    if not all(found[letter].strip() for letter in LETTERS if letter in found):
        raise ValueError("has an option without text, which has no likelihood")
    return found


def human_eval(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt for a function, and what tests it. evalscope has a task of this name that runs the code where it is."""
    gold = {name: need(row, name) for name in ("prompt", "test", "entry_point")}
    return {"query": f"{CODE_PROMPT}\n\n{gold['prompt']}", "response": json.dumps(gold)}


def over_a_text(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation of the task `distraction`, and what its answer is held against. Raises as `distraction.check`."""
    gold = need(row, "gold")
    distraction.check(gold)
    return {"messages": need(row, "messages"), "response": json.dumps(gold)}


def zebra(row: dict[str, Any]) -> dict[str, Any]:
    """A puzzle with its solution. Raises `ValueError` for those of the public dataset, which hides the solutions."""
    solution = need(row, "solution")
    header, houses = need(solution, "header"), need(solution, "rows")
    if header[:1] != ["House"] or any("___" in house for house in houses):
        raise ValueError(
            "has no solution. The public ZebraLogicBench hides them; ZebraLogicBench-private has them, once its terms are "
            "accepted"
        )
    return {"puzzle": need(row, "puzzle"), "solution": solution, "created_at": str(row.get("created_at"))}


def with_columns(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Rows with these columns and no others."""
    return lambda row: {name: need(row, name) for name in names}


def _letters(name: str, side: str, hub: tuple[str, str | None, str], size: int, paper: str | None = None) -> Task:
    args: dict[str, Any] = {"prompt_template": LETTER_PROMPT}  # evalscope's own is Chinese
    return Task(
        name, side, "general_mcq", hub, size, multiple_choice, "letter", "accuracy", "default_val", args, paper=paper
    )


def _weighed(name: str, side: str, hub: tuple[str, str | None, str], size: int) -> Task:
    return Task(f"{name}_options", side, "", hub, size, weighable, "weighed", "", rows_of=name)


def _code(name: str, release: str, dates: tuple[str, str], size: int, paper: str) -> Task:
    hub = ("marianna13/livecodebench_code_generation_lite_parquet", release, "test")  # the official one is a script
    convert = live_code.between(*dates)
    return Task(name, "general", "live_code_bench", hub, size, convert, "code", "", paper=paper)


_IFEVAL = with_columns("key", "prompt", "instruction_id_list", "kwargs")


def _arena(name: str, category: str, size: int, paper: str) -> Task:
    return Task(
        name, "general", "general_qa", None, size, dict, "compared", "", "default_test",
        {"metric_list": ["acc"], "primary_metric": "acc"}, paper=paper, judge="gpt-4.1", source=arena.WHAT,
        opened=arena.rows_of(category),
    )  # fmt: skip


_MMLU = (("cais/mmlu", "all", "test"), 14042)
_QASC = (("allenai/qasc", None, "validation"), 926)
_MEDQA = (("GBaker/MedQA-USMLE-4-options", None, "test"), 1273)
_VERIFIER = "Qwen2.5-14B-Instruct"
_STRICT = "prompt_level_strict"
TASKS = {
    task.name: task
    for task in (
        Task("ifeval", "general", "ifeval", ("google/IFEval", None, "train"), 541, _IFEVAL, metric=_STRICT, split="train",
             generation=GREEDY | {"max_tokens": 16384}, paper="IF Eval"),
        Task("ifbench", "general", "ifbench", ("allenai/IFBench_test", None, "train"), 300, _IFEVAL, metric=_STRICT,
             split="train"),
        Task("gsm8k", "general", "gsm8k", ("openai/gsm8k", "main", "test"), 1319, with_columns("question", "answer"),
             "number"),
        Task("humaneval", "general", "general_qa", ("openai/openai_humaneval", None, "test"), 164, human_eval, "code", "",
             "default_test", {"metric_list": ["acc"], "primary_metric": "acc"}),
        Task("distraction", "general", "general_qa", ("", None, ""), distraction.ROWS, over_a_text, "rules", "",
             "default_test", {"metric_list": ["acc"], "primary_metric": "acc"}, make=distraction.rows),
        Task("livebench", "general", "", None, 0, dict, "read", "", paper="LiveBench 1125"),  # its size is its release's
        Task("gca", "domain", "", None, 200, dict, "played", "", paper="Avg.", judge="Qwen2.5-72B-Instruct",
             generation=GREEDY | {"max_tokens": gca.MAX_TOKENS}, source=gca.WHAT, opened=gca.opened),
        # The paper's own, below: all but IF-Eval need a judge, a cage, or data behind a gate.
        Task("gpqa", "general", "gpqa_diamond", ("Idavidrein/gpqa", "gpqa_diamond", "train"), 198,
             with_columns("Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))), "verified", "",
             "train", generation=SAMPLED, repeats=4, paper="GPQA Diamond", judge=_VERIFIER),
        Task("hmmt25", "general", "hmmt25", ("MathArena/hmmt_feb_2025", None, "train"), 30,
             with_columns("problem", "answer"), "verified", "", "train", generation=SAMPLED | {"temperature": 0.6},
             repeats=16, paper="HMMT 25", judge=_VERIFIER),
        Task("zebralogic", "general", "zebralogicbench", ("allenai/ZebraLogicBench-private", "grid_mode", "test"), 1000,
             zebra, metric="Solved Puzzle", paper="Zebra Logic"),
        _code("lcb_v5", "release_v5", ("2024-08-01", "2025-02-01T00:00:00"), 279, "LCB v5"),
        _code("lcb_v6", "v6", ("2023-01-01", "2100-01-01"), 175, "LCB v6"),
        _arena("arena_hard", "hard_prompt", 500, "Arena HP"),
        _arena("arena_creative", "creative_writing", 250, "Arena CW"),
        _letters("mmlu", "general", *_MMLU),
        _letters("qasc", "general", *_QASC),
        _letters("medqa", "domain", *_MEDQA, "MedQA USMLE"),
        _letters("medxpertqa", "domain", ("TsinghuaC3I/MedXpertQA", "Text", "test"), 2450, "MedXpertQA Text"),
        _weighed("mmlu", "general", *_MMLU),
        _weighed("qasc", "general", *_QASC),
        _weighed("medqa", "domain", *_MEDQA),
    )
}  # fmt: skip


# What a reader must know of how tasks are run, by their names.
NOTES = {
    "mmlu qasc medqa medxpertqa": (
        "Tasks of letters (mmlu, qasc, medqa, medxpertqa): no examples; a letter counts where the answer names it "
        "as its final one, or is nothing else. An answer without one, or whose reasoning never ends, is wrong, "
        "and is counted as no answer."
    ),
    "mmlu_options qasc_options medqa_options": (
        "mmlu_options, qasc_options and medqa_options: no examples, and no list of the options; the one that is likeliest "
        "per character behind the question, as lm-eval's acc_norm. By acc, the likeliest as it is, in eval.json as `parts`."
    ),
    "humaneval": ("humaneval: one answer, run in a cage; passed is coming to the end of its tests within 10 seconds."),
    "distraction": (
        "distraction: in the manner of DistractionIF, on rows made here; its numbers are not those of that paper's "
        "data. How often each kind of rule holds is in eval.json as `parts`."
    ),
    "lcb_v5 lcb_v6": ("lcb_v5 and lcb_v6: one answer, run in a cage, 6 seconds a test."),
    "gpqa hmmt25": (
        "gpqa and hmmt25: four and sixteen sampled answers a question; a judge says whether each comes to the "
        "known answer. One for which it has no verdict counts as nothing, and a question without any is left out."
    ),
    "zebralogic": ("zebralogic: the whole grid is right."),
    "arena_hard arena_creative": (
        "arena_hard and arena_creative: mean over prompts of the score against the baseline's answer in both "
        "orders; the official score is a mean over verdicts, in eval.json as `pooled`."
    ),
    "livebench": ("livebench: mean over questions; the official mean over categories is in eval.json as `pooled`."),
    "gca": ("gca: mean over scenes of four dimensions, in eval.json as `parts`."),
    "ifeval ifbench": ("ifeval and ifbench: strict, all instructions of a prompt."),
    "gsm8k": ("gsm8k: no examples, the number in the box or at the end."),
}


def named(names: Sequence[str]) -> list[Task]:
    """Tasks by their names, each once. Raises `ValueError` for one that there is not, with the nearest name."""
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name.lower(), TASKS, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"there is no task {name!r}. {hint}Tasks are {', '.join(TASKS)}.")
    return [TASKS[name] for name in dict.fromkeys(names)]
