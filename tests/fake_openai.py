"""An OpenAI-compatible server in a thread, whose answers a test gives."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Raw:
    """A reply as it is. `{key}` in its body becomes the Authorization of the request; `pause` is behind each byte."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], Any], context: int = 4096, model: str = "tiny", listing: Raw | None = None
) -> Iterator[Any]:
    """Yields an object with `url` and `requests`, the bodies of chat requests in the order of their arrival.

    `answer` gives the text of a request's answer, or (text, finish_reason), or an int: a status with an error, or bytes: a
    body as it is, or a `Raw`. `listing` is in place of the list of models, and of counts of tokens. `keys` has the
    Authorization of each request, and `encodings` what it accepts.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # a reply in one piece: the second waits for the first's acknowledgement

        def log_message(self, *args):
            pass

        def handle(self):
            with suppress(ConnectionError):  # a client that has read enough
                super().handle()

        def finish(self):
            with suppress(ConnectionError):
                super().finish()

        def raw(self, found):
            content = found.body.replace(b"{key}", (self.headers["Authorization"] or "").encode())
            self.send_response(found.status)
            for name, value in {"Content-Length": str(len(content)), **found.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for place in range(len(content) if found.pause else 0):
                self.wfile.write(content[place : place + 1])
                self.wfile.flush()
                time.sleep(found.pause)
            self.wfile.write(content if not found.pause else b"")

        def reply(self, status, body):
            if isinstance(body, Raw):
                return self.raw(body)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            if self.path == "/v1/models" and listing is not None:
                self.raw(listing)
            elif self.path == "/v1/models":
                card = {"id": model, "object": "model", "max_model_len": context, "root": model}
                self.reply(200, {"object": "list", "data": [card]})
            else:
                self.reply(200 if self.path == "/health" else 404, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize" and listing is not None:
                return self.raw(listing)
            if self.path == "/tokenize":
                words = sum(len(message["content"].split()) for message in body["messages"])
                return self.reply(200, {"count": words, "max_model_len": context})
            server.requests.append(body)
            server.keys.append(self.headers["Authorization"])
            server.encodings.append(self.headers["Accept-Encoding"])
            found = answer(body)
            if isinstance(found, bytes | Raw):
                return self.reply(200, found)
            if isinstance(found, int):
                text = "This model's maximum context length is 8 tokens. However, you requested more."
                error = {"message": text, "type": "BadRequestError", "code": found}
                return self.reply(found, {"error": error, **error})
            text, reason = found if isinstance(found, tuple) else (found, "stop")
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 1, "completion_tokens": len(text.split()), "total_tokens": 1 + len(text.split())}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            self.reply(
                200,
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": model,
                    "choices": [choice],
                    "usage": usage,
                },
            )

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.keys, server.encodings = [], [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
