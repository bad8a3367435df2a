"""Answers written where the GPU is, and scored where evalscope is: `camopd eval` without a network between the two.

    python benchmarks/recorded_answers.py serve --questions questions.jsonl                   # 1. note what is asked
    python benchmarks/recorded_answers.py write NAME=PATH ... --questions questions.jsonl --out FOLDER   # 2. on the GPU
    python benchmarks/recorded_answers.py serve --answers FOLDER                              # 3. give the answers

1 and 3 are OpenAI-compatible servers on 127.0.0.1, for `camopd eval --models MODEL=http://127.0.0.1:PORT/v1#NAME`. The
first gives every request an empty answer and notes it; what that evaluation makes is thrown away. The last gives what
`write` wrote for NAME, and refuses a question that was not asked there, or with other sampling. `write` draws greedily, in
float32, prompts of like length together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any


GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
BATCH_TOKENS = 300_000  # of prompts and answers, padded: what a batch keeps in its cache


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing, serving = verbs.add_parser("write"), verbs.add_parser("serve")
    writing.add_argument("models", nargs="+", metavar="NAME=PATH")
    writing.add_argument("--questions", type=Path, required=True)
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    serving.add_argument("--port", type=int, default=8123)
    which = serving.add_mutually_exclusive_group(required=True)
    which.add_argument("--questions", type=Path)
    which.add_argument("--answers", type=Path)
    options = parser.parse_args(argv)
    if options.verb == "serve":
        with server(options.port, options.questions, options.answers) as found:
            print(f"http://127.0.0.1:{found.server_port}/v1", flush=True)
            found.serve_forever()
    else:
        if not options.questions.is_file():
            sys.exit(f"--questions {options.questions} is not there. `serve --questions` makes it, see above.")
        models = [model.partition("=") for model in options.models]
        if wrong := [name for name, _, path in models if not Path(path or "?").is_dir()]:
            sys.exit(f"{', '.join(wrong)}: not NAME=PATH with the folder of a model. Write mine=runs/mine, say.")
        for name, _, path in models:
            write(Path(path), read(options.questions), options.out / f"{name}.jsonl", options.batch_tokens)


def read(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def key(messages: Iterable[dict[str, str]], max_tokens: int) -> str:
    """By what a question is known."""
    return json.dumps([[[each["role"], each["content"]] for each in messages], max_tokens])


def server(port: int, questions: Path | None, answers: Path | None) -> ThreadingHTTPServer:
    """That of step 1 or 3; `port` 0 is a free one."""
    told = {path.stem: {row["key"]: row for row in read(path)} for path in answers.glob("*.jsonl")} if answers else {}
    noted: set[str] = {key(row["messages"], row["max_tokens"]) for row in read(questions)} if (
        questions and questions.exists()) else set()  # fmt: skip
    lock = Lock()

    def note(body: dict[str, Any]) -> dict[str, Any]:
        assert questions
        row = {"messages": body["messages"], "max_tokens": body["max_tokens"]}
        with lock:
            if (known := key(**row)) not in noted:
                noted.add(known)
                with open(questions, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        return {"text": "", "stop": "stop", "tokens": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # a reply in one piece

        def log_message(self, *args: Any) -> None:
            pass

        def reply(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            names = list(told) or ["questions"]
            cards = [{"id": name, "object": "model", "max_model_len": 1 << 15} for name in names]
            self.reply(200, {"object": "list", "data": cards})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/tokenize"):
                return self.reply(200, {"count": 1, "max_model_len": 1 << 15})
            other = {name: body[name] for name, value in GREEDY.items() if body.get(name, value) != value}
            row = note(body) if questions else told[body["model"]].get(key(body["messages"], body["max_tokens"]))
            if other or row is None:
                why = f"sampled with {other}, not greedily" if other else "not among the recorded questions"
                return self.reply(400, {"error": {"message": why, "type": "BadRequestError", "code": 400}})
            message = {"role": "assistant", "content": row["text"]}
            usage = {"prompt_tokens": 1, "completion_tokens": row["tokens"], "total_tokens": 1 + row["tokens"]}
            choice = {"index": 0, "message": message, "finish_reason": row["stop"]}
            self.reply(200, {"id": "recorded", "object": "chat.completion", "created": 0, "model": body["model"],
                             "choices": [choice], "usage": usage})  # fmt: skip

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def write(model: Path, questions: list[dict[str, Any]], target: Path, batch_tokens: int = BATCH_TOKENS) -> None:
    """The answers of one model into a file, unless they are there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from camopd import atomic

    if target.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    student = student.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    rows = []
    for batch in batches(tokenizer, questions, batch_tokens):
        rows += answer(student, tokenizer, batch)
    assert len(rows) == len(questions)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{target}: {len(rows)} answers", flush=True)


def batches(tokenizer: Any, questions: list[dict[str, Any]], tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Questions with their `ids`, of one answer's length and of like length together."""
    for question in questions:
        question["ids"] = tokenizer.apply_chat_template(
            question["messages"], add_generation_prompt=True, return_dict=False
        )
    batch: list[dict[str, Any]] = []
    for question in sorted(questions, key=lambda each: (each["max_tokens"], -len(each["ids"]))):
        widest = len((batch or [question])[0]["ids"]) + question["max_tokens"]
        if batch and (batch[0]["max_tokens"] != question["max_tokens"] or (len(batch) + 1) * widest > tokens):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def answer(model: Any, tokenizer: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model writes, greedily: no setting of its generation_config.json but the end token."""
    import torch

    from camopd.generation import neutral_generation

    inputs = tokenizer.pad({"input_ids": [each["ids"] for each in batch]}, return_tensors="pt").to(model.device)
    with torch.no_grad(), neutral_generation(model):
        ends = model.generation_config.eos_token_id
        output = model.generate(**inputs, max_new_tokens=batch[0]["max_tokens"], do_sample=False)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    rows = []
    for question, ids in zip(batch, output[:, inputs["input_ids"].size(1) :].tolist(), strict=True):
        stop = next((place for place, each in enumerate(ids) if each in ends), None)
        kept = ids if stop is None else ids[:stop]
        rows.append({
            "key": key(question["messages"], question["max_tokens"]),
            "text": tokenizer.decode(kept, skip_special_tokens=True),
            "stop": "length" if stop is None else "stop", "tokens": len(kept),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
