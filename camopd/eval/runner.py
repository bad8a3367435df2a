"""One model on one task, by evalscope: `python runner.py JOB RESULT`, in an environment that has evalscope and not camopd.

JOB is a JSON file:

    benchmark, dataset_args   of evalscope; `dataset_args` has the folder of the task's rows
    work                      folder for evalscope's own files; it continues what an earlier call left there
    url, model                an OpenAI-compatible address that ends in /v1, and the name it serves the model under
    generation                every sampling parameter, so that none comes from the model's generation_config.json
    repeats, concurrency, seed, context
    metric                    of evalscope, that every answer must get a score by; "" where it is to score nothing, and so
                              to run nothing: evalscope runs code where it is
    unscored_is_wrong         an answer without a score is a wrong one, and not the failure of a checker

RESULT is a JSON Lines file with a row per answer, in the order of the rows and their repeats: `item`, `repeat`, `prompt`,
`gold`, `text`, `stop`, `tokens`, `scores`. It is written when all are there. The key of the server is CAMOPD_EVAL_API_KEY.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


API = "strict_openai_api"
SECONDS, MOST = 60.0, 16 << 20  # for a server to count the tokens of a prompt, and bytes of its answer
MODEL = "model"  # evalscope names files after it; a job has one


def main(job_file: str, result_file: str) -> None:
    """Do the job, and write its result whole or not at all. Raises what evalscope raises; finished answers are kept."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    work = Path(job["work"])
    prepare_environment(work)
    from evalscope.config import TaskConfig
    from evalscope.run import run_task

    register_api()
    if not job["metric"]:
        leave_unscored(job["benchmark"])
    for folder in ("predictions", "reviews"):
        for path in (work / folder).rglob("*.jsonl"):
            cut_torn_line(path)
    begun = (work / "configs" / "task_config.yaml").exists()
    config: dict[str, Any] = {
        "model": job["model"], "model_id": MODEL, "api_url": job["url"], "eval_type": API,
        "api_key": key() or "EMPTY",  # which evalscope keeps as a secret: its files have stars
        "datasets": [job["benchmark"]], "dataset_args": {job["benchmark"]: job["dataset_args"]},
        "dataset_hub": "huggingface", "dataset_dir": str(work / "datasets"),
        "generation_config": job["generation"], "repeats": job["repeats"], "seed": job["seed"],
        "eval_batch_size": job["concurrency"], "work_dir": str(work), "no_timestamp": True,
        # evalscope's identity of a run has the server's address in it, which is another after a kill. `jobs.prepare`
        # compared model, rows and sampling with those of the answers that are there: they are kept, and scored again.
        "use_cache": str(work) if begun else None, "rerun_review": begun,
    }  # fmt: skip
    samples = samples_of(TaskConfig(**config), job["benchmark"])
    check_lengths(samples, job)
    run_task(TaskConfig(**config))
    rows = answers(work, job, samples)
    beside = Path(f"{result_file}.part")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    beside.replace(result_file)


def prepare_environment(work: Path) -> None:
    """Nothing is fetched: rows lie in the job's folder, and NLTK's sentence splitter comes with a wheel, if at all."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    for folder in map(Path, sys.path):
        found = folder / "llama_index" / "core" / "_static" / "nltk_cache"
        if found.is_dir():
            os.environ.setdefault("NLTK_DATA", str(found))


def register_api() -> None:
    """An API by which what a server refuses is an error.

    By evalscope's own, "maximum context length" becomes the model's answer, and its multiple-choice parser reads it as "A".
    """
    from evalscope.api.registry import register_model_api
    from evalscope.models.openai_compatible import OpenAICompatibleAPI

    class Strict(OpenAICompatibleAPI):
        def handle_bad_request(self, ex: Any) -> Any:
            raise ex

    register_model_api(API)(lambda: Strict)


def leave_unscored(benchmark: str) -> None:
    """Answers of a benchmark get no score, and nothing of them is run or asked of anyone."""
    from evalscope.api.metric import Score
    from evalscope.api.registry import BENCHMARK_REGISTRY

    def match_score(self: Any, original_prediction: str, filtered_prediction: str, *args: Any, **options: Any) -> Any:
        return Score(
            value={"acc": 0.0}, prediction=original_prediction, extracted_prediction=filtered_prediction,
            main_score_name="acc",
        )  # fmt: skip

    BENCHMARK_REGISTRY.get(benchmark).data_adapter.match_score = match_score


def samples_of(config: Any, benchmark: str) -> list[Any]:
    """What evalscope makes of the rows, prompts written out, in its order."""
    from evalscope.api.registry import get_benchmark

    datasets = get_benchmark(benchmark, config).load_dataset()
    return [sample for name in datasets.keys() for sample in datasets[name]]  # noqa: SIM118 - not a mapping


def text_of(messages: Any) -> str:
    """Prompt messages as one text."""
    if isinstance(messages, str):
        return messages
    return "\n\n".join(f"{message.role}: {message.text}" for message in messages)


def check_lengths(samples: list[Any], job: dict[str, Any]) -> None:
    """Raise `ValueError` for a prompt that leaves the answer too little room, before anything is generated.

    By vLLM's own count; a server that has no /tokenize is not asked, and refuses such a prompt later.
    """
    import httpx

    if not job["context"]:
        return
    address = job["url"].removesuffix("/v1") + "/tokenize"
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key()}"} if key() else {})}
    with httpx.Client(timeout=SECONDS, trust_env=False, headers=headers) as client:

        def count(sample: Any) -> int:
            messages = [{"role": message.role, "content": message.text} for message in sample.input]
            with client.stream("POST", address, json={"model": job["model"], "messages": messages}) as reply:
                return json.loads(bounded(reply))["count"] if reply.status_code == 200 else 0

        if count(samples[0]) == 0:
            return
        with ThreadPoolExecutor(job["concurrency"]) as pool:
            longest = max(pool.map(count, samples))
    wanted = longest + job["generation"]["max_tokens"]
    if wanted > job["context"]:
        raise ValueError(
            f"the longest prompt has {longest} tokens and an answer may have {job['generation']['max_tokens']}, but the "
            f"server's context is {job['context']}. Serve the model with --max-model-len {wanted}, or set --max-tokens to "
            f"at most {job['context'] - longest}."
        )


def bounded(reply: Any) -> bytes:
    """The body of a reply as it arrives. Raises `ValueError` for one that is packed, too long or too slow."""
    encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    content, until = bytearray(), time.monotonic() + SECONDS
    if encoding == "identity":
        for chunk in reply.iter_raw():
            content += chunk
            if len(content) > MOST or time.monotonic() > until:
                break
        else:
            return bytes(content)
    raise ValueError(
        f"{reply.url} answers with more than {MOST} bytes, in more than {SECONDS:.0f} seconds, or compressed, asked for "
        "nothing of these. Is the server a vLLM, without a proxy before it that compresses?"
    )


def key() -> str:
    """The key of the model's server, or ""."""
    return os.environ.get("CAMOPD_EVAL_API_KEY", "").strip()  # env files and mounted secrets end in a newline


def cut_torn_line(path: Path) -> None:
    """Take off a last line without an end, of a run that was killed: the next one would be written into it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)


def rows_by_index(folder: Path, benchmark: str) -> dict[int, dict[str, Any]]:
    """The last row of each index in evalscope's file of a benchmark with one subset."""
    files = sorted(folder.glob(f"{MODEL}/{benchmark}_*.jsonl"))
    if len(files) > 1:
        raise ValueError(f"{folder} has answers of more than one subset: {[path.name for path in files]}.")
    # Not str.splitlines(), which would also end a line at U+2028, U+2029 or U+0085 within an answer.
    lines = files[0].read_text(encoding="utf-8").split("\n") if files else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {row["index"]: row for row in rows}


def answers(work: Path, job: dict[str, Any], samples: list[Any]) -> list[dict[str, Any]]:
    """A row per answer. Raises `ValueError` unless every sample has exactly one, with a score."""
    benchmark, repeats = job["benchmark"], job["repeats"]
    predictions = rows_by_index(work / "predictions", benchmark)
    reviews = rows_by_index(work / "reviews", benchmark)
    found = []
    for index, sample in enumerate(samples):
        if sample.id != index or index not in predictions or index not in reviews:
            raise ValueError(f"answer {index} of {len(samples)} of {benchmark} is missing in {work}.")
        output = predictions[index]["model_output"]
        choice = output["choices"][0]
        score = reviews[index]["sample_score"]["score"]
        scored = isinstance(score["value"].get(job["metric"]), int | float)
        if job["metric"] and not scored and not job["unscored_is_wrong"]:
            raise ValueError(  # evalscope logs what its checkers raise, and goes on without a score
                f"the checker of {benchmark} gave answer {index} no {job['metric']}: see {work / 'logs' / 'eval_log.log'}. "
                "Where it names punkt_tab, install llama-index-core, which carries it, beside evalscope."
            )
        gold = sample.target if isinstance(sample.target, str) else json.dumps(sample.target)
        found.append(
            {
                "item": index // repeats,
                "repeat": index % repeats,
                "prompt": text_of(sample.input),
                "gold": gold or json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False, default=str),
                "text": content_of(choice["message"]),
                "stop": choice["stop_reason"],
                "tokens": (output.get("usage") or {}).get("output_tokens"),
                "scores": score["value"],
            }
        )
    if len(predictions) != len(samples):
        raise ValueError(f"{work} has {len(predictions)} answers of {benchmark}, and it has {len(samples)} rows.")
    return found


def content_of(message: dict[str, Any]) -> str:
    """The text of an answer; a server with a reasoning parser gives what comes before it apart."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def leave_own_folder() -> None:
    """No library is to find this folder's code.py in place of Python's, which pdb imports, and torch pdb."""
    own = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != own]


if __name__ == "__main__":
    leave_own_folder()
    main(*sys.argv[1:])
