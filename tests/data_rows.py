"""Rows as the sources of `camopd data` have them."""

import json

from datasets import Features, List, Value


CHARACTER = "You are Anna from 'A Book'.\n\n==Profile==\n..."


START = "===Conversation Start===\n\n"


def talk(turns, system=CHARACTER, last="human", roles=("human", "assistant")):
    """A conversation of the file with `turns` messages behind the system's; it ends on `last`."""
    human, assistant = roles
    order = [human, assistant] if (turns % 2 == 0) == (last == "assistant") else [assistant, human]
    spoken = [
        {"from": order[n % 2], "value": f"{'Ben' if order[n % 2] == human else 'Anna'}: line {n}\n\n"}
        for n in range(turns)
    ]
    spoken[0]["value"] = START if spoken[0]["from"] == human else spoken[0]["value"]
    return {"conversations": [{"from": "system", "value": system}, *spoken]}


GOLD = "GOLD"  # in every column that tells the answer


def medmcqa(n, **changes):
    return {
        "id": f"uuid-{n}", "question": f"mcq {n}?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": n % 4,
        "choice_type": "single", "exp": GOLD, "subject_name": "Anatomy", "topic_name": None, **changes,
    }  # fmt: skip


def medreason(n, **changes):
    return {
        "dataset_name": "medqa", "id_in_dataset": n, "question": f"reason {n}?", "answer": GOLD, "reasoning": GOLD,
        "options": '{"A": "one", "B": "two"}', **changes,
    }  # fmt: skip


def distill(n, **changes):
    return {"question": f"distill {n}?", "reasoning (reasoning_content)": GOLD, "response (content)": GOLD, **changes}


def m23k(n, **changes):
    return {
        "answer_idx": n, "source": "headqa", "metadata": GOLD, "prompt": f"m23k {n}?\nA. one\nB. two", "answer_letter": "B",
        "answer_string": GOLD, "reasoning": GOLD, "distilled_answer_string": GOLD, "domain_code": "1", "domain_name": "x",
        "text": GOLD, **changes,
    }  # fmt: skip


def medqa(question="in medqa?"):
    return {"question": question, "answer": GOLD, "options": {"A": "one"}, "meta_info": "step1", "answer_idx": "A",
            "metamap_phrases": []}  # fmt: skip


def medxpertqa(question="in medxpertqa?"):
    question = f"{question}\nAnswer Choices: (A) one (B) two"
    return {"id": "Text-1", "question": question, "options": {"A": "one", "B": "two"}, "label": "A", "medical_task": "x",
            "body_system": "y", "question_type": "z"}  # fmt: skip


CALL = {
    "id": Value("string"),
    "type": Value("string"),
    "function": {"name": Value("string"), "arguments": Value("string")},
}


FEATURES = Features(
    **dict.fromkeys(("uuid", "license", "generator", "version", "category", "reasoning"), Value("string")),
    messages=List({"role": Value("string"), "content": Value("string"), "tool_calls": List(CALL)}),
    metadata=Value("string"),
)  # the exact columns of the dataset


def turn(role, content, calls=None):
    return {"role": role, "content": content, "tool_calls": calls or []}


def raw(split, number, *turns, metadata="{}", reasoning="on"):
    turns = turns or (turn("user", f"{split} question {number}"), turn("assistant", f"answer {number}"))
    return {
        "uuid": f"{split}-uuid-{number}", "license": "cc-by-4.0", "generator": "g", "version": "v1", "category": split,
        "reasoning": reasoning, "messages": list(turns), "metadata": metadata,
    }  # fmt: skip


def code(number, dataset="code_contests", split="train", index=None):
    """A code row as they are: the question is elsewhere."""
    metadata = {
        "source": "codeforces",
        "dataset": dataset,
        "split": split,
        "index": str(number if index is None else index),
    }
    return raw(
        "code", number, turn("system", ""), turn("user", "-"), turn("assistant", "a"), metadata=json.dumps(metadata)
    )


def tool(number, *turns):
    turns = turns or (turn("user", f"tool question {number}"), turn("assistant", "", [a_call()]))
    return raw(
        "tool_calling", number, *turns, metadata=json.dumps({"tools": [{"type": "function", "name": "weather"}]})
    )


def a_call():
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
