"""Scoring by a teacher on a vLLM server: camopd's client and TRL's, on a real server and on prepared answers.

    python benchmarks/teacher_scoring.py [--part both] [--rounds 5] [--sequences 64] [--tokens 32768]

Part `server`: SmolLM2-135M-Instruct on a vLLM server of this machine (`CAMOPD_VLLM_PYTHON`, or .venv-vllm, which `make
test-vllm` makes). `ServerTeacher.score` on both transports, `VLLMClient.get_sequence_logprobs` with the arguments of
TRL's server distillation trainer, and the server's own prefill take the same sequences in turn.

Part `client`: the clients alone. A server that computes nothing replays what the real one answered, at the lengths of
training; every run is a fresh client process. It starts the real server too, for the recording.

Bytes are counted in an untimed round by a TCP proxy. Writes benchmarks/results/teacher_scoring.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from measuring import RESULTS, base_model, environment, reset_resident_peak, resident_peak, run, write_report


COMPACT, JSON, TRL = CLIENTS = ("camopd compact", "camopd JSON", "TRL")
PREFILL = "prefill"
ROOT = Path(__file__).parent.parent
MODEL_NAME = "smollm2"
MAX_MODEL_LEN = 2048
REPLAY = "recording.json"  # what the replaying server needs
EXPECTED = "expected.npz"  # tokens, and the log-probs that the clients must find
MARK = "@@"  # stands in a recorded answer for what differs from one to the next
Rows = list[dict[str, float]]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=("both", "server", "client"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real-sequences", type=int, default=48, help="part server: sequences")
    parser.add_argument("--real-tokens", type=int, nargs=2, default=(100, 900), help="part server: shortest, longest")
    parser.add_argument("--sequences", type=int, default=64, help="part client: sequences")
    parser.add_argument("--tokens", type=int, default=32768, help="part client: scored tokens of each")
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--report", type=Path, default=RESULTS / "teacher_scoring.md")
    parser.add_argument("--replay", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.replay:
        serve_replay(options.replay, options.folder)
        return
    if options.client:
        run_client(options.client, options.url, options.folder, options.sequences, options.tokens)
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, found, replayed = base_model(options.model, name), None, None
        sequences, prompt_lens = real_sequences(model, options.real_sequences, *options.real_tokens)
        with vllm_server(model, folder / "vllm.log") as url:
            if options.part != "client":
                found = measure_on_server(url, sequences, prompt_lens, options.rounds)
            if options.part != "server":
                recorded = record(url, sequences, folder)
        if options.part != "server":
            replayed = {**measure_clients(folder, options), "recorded": recorded}
        lines = report(found, replayed, (sequences, prompt_lens), options)
    write_report(lines, options.report)


# ----------------------------------------------------------------------------------------------------------- real server


def real_sequences(model: str, count: int, shortest: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of the demo's prompts and answers strung together; the first third of each is the prompt."""
    from transformers import AutoTokenizer

    from camopd.demo_data import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"{row['prompt']}\n{row['answer']}\n" for row in load_prompts("domain", "finetune")]
    texts += [row["prompt"] + "\n" for row in load_prompts("general", "train")]
    pieces = [tokenizer(text)["input_ids"] for text in texts]
    dice = random.Random(0)
    sequences = []
    for _ in range(count):
        length = dice.randint(shortest, longest)
        # Each text at most once in a sequence: a repeated one would be easy to predict.
        ids = [token for piece in dice.sample(pieces, len(pieces)) for token in piece]
        sequences.append(ids[:length])
    return sequences, [len(ids) // 3 for ids in sequences]


def vllm_python() -> str:
    python = Path(os.environ.get("CAMOPD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        sys.exit(f"{python} does not exist. `make test-vllm` makes it, or set CAMOPD_VLLM_PYTHON.")
    return str(python)


@contextlib.contextmanager
def vllm_server(model: str, log: Path) -> Iterator[str]:
    """URL of a vLLM server with the model in float32; it stops at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The `vllm` command looks for a distribution of that name, which the CPU build is not.
    command = [
        vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", MODEL_NAME,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN),
        "--enforce-eager", "--enable-scale-out", "--max-logprobs", "20", "--no-enable-prefix-caching",
    ]  # fmt: skip
    settings = {**environment(), "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
    try:
        print("vLLM starts", flush=True)
        wait_until_well(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_well(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 300
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"vLLM is not up:\n{log.read_text(encoding='utf-8')[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(1)


def measure_on_server(url: str, sequences: list[list[int]], prompt_lens: list[int], rounds: int) -> dict[str, Any]:
    """Seconds, CPU seconds and bytes of each client, seconds of the server's prefill, and how far the numbers differ."""
    import httpx

    traffic = {}
    for name in offered(url):  # warms the server as well
        with Proxy(url) as proxy:
            score, _ = make_client(name, proxy.url)
            before = proxy.counts()
            score(sequences, prompt_lens)
            traffic[name] = difference(proxy.counts(), before)
    clients = {name: make_client(name, url) for name in traffic}

    def prefill(sequences: list[list[int]], _: list[int]) -> None:
        body = {"model": MODEL_NAME, "prompt": sequences, "max_tokens": 1, "temperature": 1.0}
        httpx.post(f"{url}/v1/completions", json=body, timeout=None).raise_for_status()

    prefill(sequences, prompt_lens)
    work = {PREFILL: prefill, **{name: score for name, (score, _) in clients.items()}}
    rows: dict[str, Rows] = {name: [] for name in work}
    logps = {}
    for number in range(rounds):
        for name in list(work)[:: 1 if number % 2 == 0 else -1]:
            row, answer = measured(lambda name=name: work[name](sequences, prompt_lens))
            rows[name].append(row)
            print(f"round {number + 1} {name}: {row}", flush=True)
            if name != PREFILL:
                logps[name] = np.concatenate(clients[name][1](answer))
    apart = {name: float(np.abs(logps[name] - logps[TRL]).max()) for name in logps if name != TRL}
    return {"rows": rows, "traffic": traffic, "apart": apart}


def offered(url: str) -> tuple[str, ...]:
    """The clients that this server can serve."""
    from camopd.teachers.vllm.teacher import ServerTeacher

    teacher = ServerTeacher([url], "general")
    teacher.close()
    return CLIENTS if teacher.transports[url] == "compact" else (JSON, TRL)


def measured(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of this process, and what the work returns."""
    cpu, wall = time.process_time(), time.perf_counter()
    answer = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, answer


def record(url: str, sequences: list[list[int]], folder: Path) -> dict[str, float]:
    """Keep what the real server answers, for the replay.

    Returns its bytes of answer per token, and the share of tokens that are not its first choice.
    """
    import httpx

    def ask(path: str, body: dict[str, Any]) -> bytes:
        body = {"model": MODEL_NAME, **body}
        return httpx.post(url + path, json=body, timeout=None).raise_for_status().content

    plain = {"max_tokens": 1, "temperature": 1.0}
    with_top = ask("/v1/completions", {"prompt": sequences, "prompt_logprobs": 1, **plain})
    alone = ask("/v1/completions", {"prompt": sequences, "prompt_logprobs": 0, **plain})
    # The form of a compact answer is here even where the log-probs of it are not.
    generate = orjson.loads(ask("/inference/v1/generate", {"token_ids": sequences[0], "sampling_params": plain}))

    completion = orjson.loads(with_top)
    entries = [entry for choice in completion["choices"] for entry in choice["prompt_logprobs"][1:]]
    tokens = [token for ids in sequences for token in ids[1:]]
    choice = {**completion["choices"][0], "index": MARK, "prompt_logprobs": MARK}
    templates = {
        "choice": choice,
        "completion": {**completion, "choices": MARK},
        "generate": {**generate, "request_id": MARK, "prompt_token_id_logprobs": MARK},
    }
    (folder / REPLAY).write_text(json.dumps({"tokens": tokens, "entries": entries, **templates}), encoding="utf-8")
    logps = [entry[str(token)]["logprob"] for token, entry in zip(tokens, entries, strict=True)]
    np.savez(folder / EXPECTED, tokens=tokens, logps=np.array(logps, dtype=np.float32))
    others = sum(len(entry) > 1 for entry in entries) / len(tokens)
    return {JSON: len(alone) / len(tokens), TRL: len(with_top) / len(tokens), "others": others}


# --------------------------------------------------------------------------------------------------------------- clients


def make_client(name: str, url: str) -> tuple[Callable[..., Any], Callable[[Any], list[np.ndarray]]]:
    """A function that scores, and one that gets the log-probs of each sequence's tokens out of what it returns."""
    if name == TRL:
        from trl.generation import vllm_client

        # It wants vLLM beside TRL, of which scoring needs nothing.
        vllm_client.is_vllm_available = lambda *_, **__: True
        client = vllm_client.VLLMClient(base_url=url)

        def score(sequences: list[list[int]], prompt_lens: list[int]) -> Any:
            # As ServerDistillationTrainer asks with its defaults, loss_top_k=1 and temperature=1.0.
            return client.get_sequence_logprobs(
                sequences=sequences, prompt_lengths=prompt_lens, top_logprobs=1, temperature=1.0
            )

        return score, lambda answer: [np.array(row, dtype=np.float32)[:, 0] for row in answer["actual_logprobs"]]

    from camopd.teachers.vllm.teacher import ServerTeacher

    teacher = ServerTeacher([url], "general")
    if name == JSON:  # as on a server that does not offer the other transport
        teacher.transports[url] = JSON.removeprefix("camopd ")
    if teacher.transports[url] != name.removeprefix("camopd "):
        sys.exit(f"{url} does not offer the transport of {name!r}")
    return teacher.score, lambda answer: [scores.logps.numpy() for scores in answer]


class Proxy:
    """A TCP proxy that counts the bytes of both directions, in threads of this process."""

    def __init__(self, target: str):
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._bytes = {"up": 0, "down": 0}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._bytes)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(self._target)
                for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                with self._lock:
                    self._bytes[direction] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in after}


# ------------------------------------------------------------------------------------------------------- clients, alone


def measure_clients(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, CPU seconds, memory and bytes of each client on replayed answers."""
    traffic: dict[str, dict[str, int]] = {}
    rows: dict[str, Rows] = {name: [] for name in CLIENTS}
    for number in range(options.rounds + 1):  # the first one counts bytes and is not timed
        for name in CLIENTS[:: 1 if number % 2 == 0 else -1]:
            with replay_server(name, folder) as url:
                if number == 0:
                    with Proxy(url) as proxy:
                        _, traffic[name] = client_process(name, proxy.url, folder, options, proxy)
                else:
                    row, _ = client_process(name, url, folder, options, None)
                    rows[name].append(row)
                    print(f"round {number} {name}: {row}", flush=True)
    return {"rows": rows, "traffic": traffic}


@contextlib.contextmanager
def replay_server(name: str, folder: Path) -> Iterator[str]:
    command = [sys.executable, __file__, "--replay", name, "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), encoding="utf-8")
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def client_process(
    name: str, url: str, folder: Path, options: argparse.Namespace, proxy: Proxy | None
) -> tuple[dict[str, float], dict[str, int]]:
    """What one client process measures of itself, and what the proxy counts meanwhile."""
    command = [sys.executable, __file__, "--client", name, "--url", url, "--folder", str(folder)]
    command += ["--sequences", str(options.sequences), "--tokens", str(options.tokens)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), encoding="utf-8"
    ) as process:
        ready = process.stdout.readline()
        before = proxy.counts() if proxy else {}
        output, _ = process.communicate("go\n")
        counted = difference(proxy.counts(), before) if proxy else {}
    if process.returncode or not ready:
        sys.exit(f"{name} failed")
    return json.loads(output.splitlines()[-1]), counted


def run_client(name: str, url: str, folder: Path, sequences: int, tokens: int) -> None:
    """Score once, after one short sequence and a word from the parent; print what it took."""
    expected = np.load(folder / EXPECTED)
    ids = replayed_ids(expected["tokens"], sequences, tokens)
    score, logps = make_client(name, url)
    score([ids[0][:16]], [1])
    print("ready", flush=True)
    sys.stdin.readline()
    before = reset_resident_peak()
    row, answer = measured(lambda: score(ids, [1] * sequences))
    row |= {"peak": resident_peak(), "start": before}
    for number, found in enumerate(logps(answer)):
        start = replay_start(number, len(expected["logps"]))
        if not np.array_equal(found, np.resize(np.roll(expected["logps"], -start), tokens)):
            sys.exit(f"{name}: the log-probs of sequence {number} are not those that the server sent")
    print(json.dumps(row))


def replay_start(number: int, length: int) -> int:
    """Where sequence `number` begins in the recording, which it then repeats."""
    return number * 7919 % length


def replayed_ids(tokens: np.ndarray, sequences: int, length: int) -> list[list[int]]:
    """A prompt of one token, the number of the sequence, and `length` tokens of the recording."""
    return [
        [number, *np.resize(np.roll(tokens, -replay_start(number, len(tokens))), length).tolist()]
        for number in range(sequences)
    ]


class Replay:
    """Answers in vLLM's form, put together from the bytes of recorded ones."""

    def __init__(self, name: str, folder: Path):
        recording = json.loads((folder / REPLAY).read_text(encoding="utf-8"))
        self.compact = name == COMPACT
        entries = recording["entries"]
        if name != TRL:  # only the token's own
            own = zip(map(str, recording["tokens"]), entries, strict=True)
            entries = [{token: entry[token]} for token, entry in own]
        pieces = [b"," + dumps(entry) for entry in entries]
        self._length = len(pieces)
        self._offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).tolist()
        self._entries = b"".join(pieces)
        self._logps = np.load(folder / EXPECTED)["logps"]
        self._choice, self._completion, self._generate = (
            dumps(recording[name]).split(dumps(MARK)) for name in ("choice", "completion", "generate")
        )

    def completion(self, body: dict[str, Any]) -> list[bytes | memoryview]:
        prompts = body["prompt"]
        parts: list[bytes | memoryview] = [self._completion[0], b"["]
        for index, ids in enumerate(prompts):
            parts += [b"," * (index > 0) + self._choice[0], b"%d" % index, self._choice[1], b"[null"]
            parts += [*self._slices(ids[0], len(ids) - 1), b"]", self._choice[2]]
        return [*parts, b"]", self._completion[1]]

    def _slices(self, number: int, length: int) -> Iterator[memoryview]:
        view, position = memoryview(self._entries), replay_start(number, self._length)
        while length:
            end = min(position + length, self._length)
            yield view[self._offsets[position] : self._offsets[end]]
            length, position = length - (end - position), 0

    def generate(self, body: dict[str, Any]) -> list[bytes | memoryview]:
        number, length = body["token_ids"][0], len(body["token_ids"]) - 1
        logps = np.resize(np.roll(self._logps, -replay_start(number, self._length)), length)
        file = io.BytesIO()
        np.save(file, logps[:, None])
        named = b'"generate-tokens-%s"' % str(body.get("request_id", "0")).encode()
        encoded = b'"%s"' % base64.b64encode(file.getvalue())
        return [self._generate[0], named, self._generate[1], encoded, self._generate[2]]

    def answer(self, path: str, body: dict[str, Any] | None) -> list[bytes | memoryview] | None:
        if path == "/v1/models":
            return [dumps({"data": [{"id": MODEL_NAME, "root": MODEL_NAME, "max_model_len": 1 << 20}]})]
        if path == "/health":
            return [b""]
        if path == "/v1/completions":
            return self.completion(body)
        if path == "/inference/v1/generate" and self.compact:
            return self.generate(body)
        return None


def dumps(value: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def serve_replay(name: str, folder: Path) -> None:
    replay = Replay(name, folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            parts = replay.answer(self.path, orjson.loads(self.rfile.read(size)) if size else None)
            self.send_response(200 if parts is not None else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(sum(map(len, parts or []))))
            self.end_headers()
            for part in parts or []:
                self.wfile.write(part)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer.request_queue_size = 128  # with the usual 5, connections made together wait for a second
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


# ---------------------------------------------------------------------------------------------------------------- report


def report(
    found: dict[str, Any] | None,
    replayed: dict[str, Any] | None,
    real: tuple[list[list[int]], list[int]],
    options: argparse.Namespace,
) -> list[str]:
    import torch
    import trl

    intro = [
        "# Scoring by a teacher on a vLLM server",
        "",
        *paragraph(
            f"""`ServerTeacher.score` of camopd on its two transports, against `VLLMClient.get_sequence_logprobs` of TRL as
            its server distillation trainer calls it: `top_logprobs=1`, `temperature=1.0`, the whole batch in one request.
            Medians of alternating rounds ({options.rounds}), the order reversed in every second one; in brackets the
            smallest and the largest. Bytes are counted at the socket, headers included, in an untimed round."""
        ),
        *paragraph(
            f"""{cpu_model()}, {len(os.sched_getaffinity(0))} CPU cores. vLLM {vllm_version()}, trl {trl.__version__},
            torch {torch.__version__}, Python {platform.python_version()}."""
        ),
    ]
    sections: list[str] = []
    bars: list[tuple[str, float, str]] = []
    if replayed:
        sections += client_section(replayed, options, bars)
    if found:
        sections += server_section(found, *real, bars)
    summary = ["## Bars", "", "| | bar | measured | met |", "|---|---|---|---|"]
    for what, value, bar in bars:
        met = value >= float(bar[2:]) if bar.startswith("≥") else value <= float(bar[2:])
        summary.append(f"| {what} | {bar} | {value:.3f} | {'yes' if met else '**no**'} |")
    command = f"python benchmarks/teacher_scoring.py --part {options.part} --rounds {options.rounds}"
    command += f" --real-sequences {options.real_sequences} --real-tokens {' '.join(map(str, options.real_tokens))}"
    command += f" --sequences {options.sequences} --tokens {options.tokens}"
    return [*intro, *summary, "", *sections, f"Again: `{command}`"]


def client_section(replayed: dict[str, Any], options: argparse.Namespace, bars: list[Any]) -> list[str]:
    rows, traffic = replayed["rows"], replayed["traffic"]
    tokens = options.sequences * options.tokens
    down, up = ({name: traffic[name][key] / tokens for name in CLIENTS} for key in ("down", "up"))
    both = {name: down[name] + up[name] for name in CLIENTS}
    cpu = {name: median(rows[name], "cpu") * 1e6 / tokens for name in CLIENTS}
    wall = {name: median(rows[name], "wall") for name in CLIENTS}
    peak = {name: median(rows[name], "peak") - median(rows[name], "start") for name in CLIENTS}
    bars += [
        ("compact answers, bytes per token relative to TRL's", down[COMPACT] / down[TRL], "≤ 0.1"),
        ("JSON answers, bytes per token relative to TRL's", down[JSON] / down[TRL], "≤ 0.6"),
        ("JSON, client CPU per token relative to TRL's", cpu[JSON] / cpu[TRL], "≤ 0.5"),
    ]
    lines = [
        "## The client alone",
        "",
        *paragraph(
            f"""{options.sequences} sequences of one prompt token and {options.tokens} scored tokens. A server that computes
            nothing replays entries recorded from the real one, over and over. It runs in its own process, on the same
            cores, and each client in a fresh one. Memory is the peak above what was resident before the call, in MiB."""
        ),
        "| | CPU s per million tokens | wall s | answers, bytes per token | requests, bytes per token | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in CLIENTS:
        lines.append(
            f"| {name} | {cpu[name]:.3f} {spread(rows[name], 'cpu', 1e6 / tokens, 3)} | {wall[name]:.2f} "
            f"{spread(rows[name], 'wall', 1, 2)} | {down[name]:.2f} | {up[name]:.2f} | {peak[name]:.0f} |"
        )
    lines += ["", "Relative to TRL:", "", "| | CPU | wall | answers | requests | both directions | memory |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in (COMPACT, JSON):
        ratios = [values[name] / values[TRL] for values in (cpu, wall, down, up, both, peak)]
        lines.append(f"| {name} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    recorded = replayed["recorded"]
    second_entry = (down[TRL] - down[JSON]) / recorded["others"]
    half, third = (down[JSON] / (down[JSON] + share * second_entry) for share in (1 / 2, 1 / 3))
    return [
        *lines,
        "",
        *paragraph(
            f"""The bars on bytes are about the answers. With the requests included the ratios are
            **{both[COMPACT] / both[TRL]:.3f}** (compact) and **{both[JSON] / both[TRL]:.3f}** (JSON): a compact request
            names every token twice, in the sequence and as the one to score."""
        ),
        *paragraph(
            f"""TRL asks for the teacher's first choice as well, which is a second entry wherever the token is another one:
            {recorded["others"]:.1%} of the recorded tokens. The ratio of the JSON answers depends on that share: at one
            half it would be {half:.3f}, at one third {third:.3f}. A compact answer has the same size for any text."""
        ),
        *paragraph(
            f"""Bodies of the real server's own answers: {recorded[JSON]:.2f} bytes per token (camopd JSON),
            {recorded[TRL]:.2f} (TRL). The compact ones are made here of the same log-probs in vLLM's form: base64 of a
            float32 .npy array, in a recorded answer of `/inference/v1/generate`."""
        ),
        *paragraph(
            f"""TRL asks for the batch in one request; its answer is one body of {traffic[TRL]["down"] / 1e6:.0f} MB, parsed
            as a whole. camopd asks for one such sequence per request, up to 16 in flight."""
        ),
    ]


def server_section(
    found: dict[str, Any], sequences: list[list[int]], prompt_lens: list[int], bars: list[Any]
) -> list[str]:
    rows, traffic, apart = found["rows"], found["traffic"], found["apart"]
    total = sum(map(len, sequences))
    scored = total - sum(prompt_lens)
    wall = {name: median(rows[name], "wall") for name in rows}
    bars += [(f"end to end, TRL's time relative to {name}'s", wall[TRL] / wall[name], "≥ 1.0") for name in apart]
    lengths = sorted(map(len, sequences))
    lines = [
        "## On a real server",
        "",
        *paragraph(
            f"""SmolLM2-135M-Instruct in float32 on vLLM's CPU build, on the same cores as the client. {len(sequences)}
            sequences of real text, {lengths[0]} to {lengths[-1]} tokens, {total} in all, of which {scored} are scored.
            Tokens/s counts whole sequences, which is what the server computes; CPU and bytes are per scored token.
            `{PREFILL}` is the server with no log-probs asked for, all sequences in flight together; prefix caching is
            off."""
        ),
        "| | tokens/s | share of prefill | TRL's time / this | CPU s per million | answers, bytes | requests, bytes |",
        "|---|---|---|---|---|---|---|",
        f"| {PREFILL} | {total / wall[PREFILL]:.0f} {rate_spread(rows[PREFILL], total)} | 1.00 | | | | |",
    ]
    for name in traffic:
        lines.append(
            f"| {name} | {total / wall[name]:.0f} {rate_spread(rows[name], total)} | {wall[PREFILL] / wall[name]:.2f} | "
            f"{wall[TRL] / wall[name]:.3f} | {median(rows[name], 'cpu') * 1e6 / scored:.2f} | "
            f"{traffic[name]['down'] / scored:.2f} | {traffic[name]['up'] / scored:.2f} |"
        )
    lines.append("")
    if COMPACT not in traffic:
        lines += paragraph(
            """The compact transport is missing here: this server refuses `prompt_logprob_token_ids`, which needs vLLM's V2
            model runner."""
        )
    differences = ", ".join(f"{value:.1e} nats ({name})" for name, value in apart.items())
    return [*lines, f"Largest difference from TRL's log-probs: {differences}.", ""]


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 119, break_long_words=False, break_on_hyphens=False), ""]


def median(rows: Rows, key: str) -> float:
    return statistics.median(row[key] for row in rows)


def spread(rows: Rows, key: str, factor: float, digits: int) -> str:
    values = [row[key] * factor for row in rows]
    return f"({min(values):.{digits}f}-{max(values):.{digits}f})"


def rate_spread(rows: Rows, tokens: int) -> str:
    rates = [tokens / row["wall"] for row in rows]
    return f"({min(rates):.0f}-{max(rates):.0f})"


def cpu_model() -> str:
    names = [
        line
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def vllm_version() -> str:
    code = """
from importlib.metadata import distributions
found = {dist.metadata["Name"]: dist.version for dist in distributions()}
print(next(f"{found[name]} ({name})" for name in ("vllm", "vllm-cpu") if name in found))
"""
    return subprocess.run(
        [vllm_python(), "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout.strip()


if __name__ == "__main__":
    run(main, main)
