"""Tasks: which rows they take and which prompt they show (camopd/eval/tasks.py)."""

import pytest

from camopd.eval.tasks import GREEDY, LETTERS, NOTES, TASKS, multiple_choice, named, zebra


ROW = {"question": "1 + 1?", "options": {"A": "1", "B": "2", "C": "3"}, "answer": "B"}
WANTED = {"question": "1 + 1?", "A": "1", "B": "2", "C": "3", "answer": "B"}


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": 1, "subject": "s"},  # cais/mmlu
        {
            "question": "1 + 1?",
            "choices": {"text": ["1", "2", "3"], "label": list("ABC")},
            "answerKey": "B",
        },  # allenai/qasc
        {
            "question": "1 + 1?",
            "answer": "2",
            "options": ROW["options"],
            "answer_idx": "B",
        },  # MedQA: `answer` is its text
        {
            "question": "1 + 1?\nAnswer Choices: (A) 1 (B) 2 (C) 3",
            "options": ROW["options"],
            "label": "B",
        },  # MedXpertQA
    ],
)
def test_multiple_choice_reads_the_forms_of_the_hub(row):
    assert multiple_choice(row) == WANTED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": None}, "no column 'options' or 'choices', only"),
        ({"answer": None}, "no column 'answer_idx' or 'answerKey' or 'label' or 'answer'"),
        ({"answer": "D"}, "the answer 'D', which is none of ABC"),
        ({"answer": 3}, "the answer 3"),
        ({"answer": True}, "the answer True"),
        ({"options": {"B": "1", "A": "2"}}, r"options \['B', 'A'\], which are not the letters"),
        ({"options": ["1"]}, "1 options; 2 to 10"),
        ({"options": [1, 2]}, "2 options; 2 to 10 texts"),
    ],
)
def test_multiple_choice_refuses_what_has_no_right_letter(change, said):
    with pytest.raises(ValueError, match=said):
        multiple_choice(ROW | change)


def test_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no task 'MedQA-USMLE'\. Did you mean 'medqa'\? Tasks are ifeval, "):
        named(["ifeval", "MedQA-USMLE"])
    assert [task.name for task in named(["qasc", "ifeval", "qasc"])] == ["qasc", "ifeval"]


def test_tasks_set_everything_that_an_engine_has_a_default_for():
    """evalscope's multiple-choice prompt is Chinese, and what a request leaves out the model's own file may set."""
    for task in TASKS.values():
        assert set(task.generation) == set(GREEDY)
        assert (task.generation["temperature"] == 0) == (task.repeats == 1)
        if task.benchmark == "general_mcq":
            template = task.dataset_args["prompt_template"]
            shown = template.format(question="Q", choices="A) 1", letters="A,B")
            assert shown.startswith("Q\n\nA) 1\n\n") and shown.endswith("is one of A,B.")
            assert template.isascii() and task.split == "default_val"
    assert LETTERS == "ABCDEFGHIJ"


def test_tasks_of_the_paper_have_its_sampling_repeats_and_denominators():
    """Table 5, and the sizes of the benchmarks."""
    found = {}
    for name in ("gpqa", "hmmt25", "zebralogic", "lcb_v5", "lcb_v6", "ifeval"):
        task = TASKS[name]
        sampling = [
            task.generation[key] for key in ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
        ]
        found[name] = [*sampling, task.repeats, task.size, task.judge]
    greedy, verifier = [0, 1, -1, 1, 32768, 1], "Qwen2.5-14B-Instruct"
    assert found == {
        "gpqa": [0.7, 0.95, 20, 1.05, 32768, 4, 198, verifier],
        "hmmt25": [0.6, 0.95, 20, 1.05, 32768, 16, 30, verifier],
        "zebralogic": [*greedy, 1000, None],
        "lcb_v5": [*greedy, 279, None],
        "lcb_v6": [*greedy, 175, None],
        "ifeval": [*greedy[:4], 16384, 1, 541, None],
    }


def test_puzzle_without_its_solution_is_refused():
    hidden = {"header": ["House", "Name"], "rows": [["___", "___"]]}
    with pytest.raises(ValueError, match=r"has no solution\. The public ZebraLogicBench hides them"):
        zebra({"puzzle": "p", "solution": hidden})
    shown = {"header": ["House", "Name"], "rows": [["1", "Eric"]]}
    assert zebra({"puzzle": "p", "solution": shown, "created_at": 1}) == {
        "puzzle": "p",
        "solution": shown,
        "created_at": "1",
    }


def test_every_task_has_a_note_for_its_reader():
    assert {name for names in NOTES for name in names.split()} == set(TASKS)
