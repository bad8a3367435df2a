"""A small server on localhost that speaks vLLM's schema, scores with a real tiny model, and misbehaves on demand."""

import base64
import copy
import io
import json
import socket
import threading
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from conftest import LOGP, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


# Prompt + completion of each row; lengths differ, row 3 has no completion, row 4 a prompt of one token.
TOKEN_IDS = [[5, 9, 12, 30, 7, 8], [6, 6, 20, 21, 22, 23, 24, 25, 2], [11, 4, 33], [14, 15], [17, 18, 19]]
PROMPT_LENS = [2, 4, 1, 2, 1]


def assert_same_scores(ours, expected, atol=LOGP):
    assert len(ours) == len(expected)
    for score, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(score.logps, other.logps, rtol=0, atol=atol)
        assert (score.top_ids is None) == (other.top_ids is None)
        if other.top_ids is not None:
            torch.testing.assert_close(score.top_ids, other.top_ids)
            torch.testing.assert_close(score.top_logps, other.top_logps, rtol=0, atol=atol)


def other_tokenizer():
    """The same tokens with other ids: the letters are turned round."""
    vocab = [*VOCAB[:4], *VOCAB[4:30][::-1], *VOCAB[30:]]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_noise(model, size):
    """The model with weights that are off by a share of their own size, as after a coarse rounding."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + size * torch.randn(parameter.shape, generator=generator)
    return model


def without_weights(model):
    model = copy.deepcopy(model)
    model.lm_head.weight.data.zero_()
    return model


def reference_logps(model, ids):
    """Log-probs of every token but the first, and of the whole vocabulary there: (L - 1,), (L - 1, V)."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(dim=-1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logps


def is_probe(body):
    """Whether a request only asks which transport the server speaks."""
    return body.get("token_ids") == [0, 1]


class FakeVLLM:
    """What it is asked lies in `requests`; the other attributes make it misbehave.

    Answers have the fields of vLLM 0.32's `/v1/completions` and `/inference/v1/generate`.
    """

    def __init__(self, model, tokenizer, name="tiny-teacher", max_model_len=256, compact=False, port=0, root=None):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.others = []  # cards of further models
        self.root = root or name
        self.max_model_len = max_model_len
        self.compact = compact
        self.most_logprobs = 20  # of --max-logprobs
        self.requests = []  # (path, headers, body)
        # For the next scoring requests instead of scores: (status, text), None to drop the line, "hang", or "cut" for half
        # of the body.
        self.answers = deque()
        self.always = None  # the same for every request
        self.edit = lambda entries, body: entries  # changes a sequence's prompt_logprobs
        self.edit_logps = lambda logps, body: logps  # changes the array of the compact answer
        self.edit_answer = lambda answer: answer  # changes a scoring answer as a whole
        self.before = lambda: None  # runs before a scoring request is answered
        self.released = threading.Event()  # ends what hangs
        self.connections = set()
        self.closed = False
        self.port_is_free = threading.Event()
        handler = type("Handler", (_Handler,), {"fake": self})
        self.httpd = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.port = self.httpd.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        """Die: no more connections, and those that are open break."""
        self.closed = True
        self.released.set()
        self.httpd.shutdown()
        self.httpd.server_close()
        self.port_is_free.set()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def scored(self):
        """Bodies of the scoring requests, without the probe for the transport."""
        return [
            body
            for path, _, body in self.requests
            if path in ("/v1/completions", "/inference/v1/generate") and not is_probe(body)
        ]

    @property
    def sequences(self):
        """Token ids of the scored sequences, in the order they came."""
        found = []
        for body in self.scored:
            found += body["prompt"] if "prompt" in body else [body["token_ids"]]
        return found

    def answer(self, path, body):
        if self.always is not None:
            return self.always
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            model = {"id": self.name, "root": self.root, "max_model_len": self.max_model_len}
            return 200, json.dumps({"data": [*self.others, model]})
        if body is None or body["model"] != self.name:
            return 404, json.dumps({"error": {"message": f"The model `{body and body['model']}` does not exist."}})
        if path == "/tokenize":
            return self._tokenize(body)
        if path == "/inference/v1/generate" and not self.compact:
            return 404, json.dumps({"detail": "Not Found"})
        if path not in ("/v1/completions", "/inference/v1/generate"):
            return 404, json.dumps({"detail": "Not Found"})
        prompts = body.get("prompt", body.get("token_ids"))
        largest = max(token for ids in (prompts if isinstance(prompts[0], list) else [prompts]) for token in ids)
        if largest >= self.model.config.vocab_size:
            return 400, json.dumps({"error": {"message": f"Token id {largest} is out of vocabulary"}})
        if body.get("prompt_logprobs", 0) > self.most_logprobs:
            asked = f"Requested prompt logprobs of {body['prompt_logprobs']}"
            text = f"{asked}, which is greater than max allowed: {self.most_logprobs}"
            return 400, json.dumps({"error": {"message": text}})
        if not is_probe(body):
            self.before()
            with suppress(IndexError):
                answer = self.answers.popleft()
                return answer if answer != "cut" else ("cut", self._scores(path, body))
        return 200, self._scores(path, body)

    def _tokenize(self, body):
        if "messages" in body:
            if not self.tokenizer.chat_template:
                return 400, json.dumps({"error": {"message": "no chat template"}})
            ids = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=body["add_generation_prompt"], return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            ids = [1, *ids] if body.get("add_special_tokens", True) else ids
        return 200, json.dumps({"tokens": list(ids), "count": len(ids), "max_model_len": self.max_model_len})

    def _scores(self, path, body):
        answer = self._compact_scores(body) if path == "/inference/v1/generate" else self._json_scores(body)
        return json.dumps(self.edit_answer(answer))

    def _compact_scores(self, body):
        ids, sampling = body["token_ids"], body["sampling_params"]
        rows, start = sampling["prompt_logprob_token_ids"], sampling["prompt_logprob_start"]
        assert len(rows) == len(ids) - 1 - start
        table = reference_logps(self.model, ids)[1][start:]
        logps = np.array(
            [[table[row, token] for token in tokens] for row, tokens in enumerate(rows)], dtype=np.float32
        )
        with io.BytesIO() as buffer:
            np.save(buffer, self.edit_logps(logps, body), allow_pickle=False)
            text = base64.b64encode(buffer.getvalue()).decode()
        return {
            "request_id": f"generate-tokens-{body.get('request_id', '0')}",
            "model": self.name,
            "created": 1,
            "usage": {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1},
            "prompt_logprobs": None,
            "prompt_token_id_logprobs": text,
            "choices": [{"index": 0, "token_ids": [1], "finish_reason": "length", "logprobs": None}],
            "output_mode": "tokens",
        }

    def _json_scores(self, body):
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for index, ids in enumerate(prompts):
            entries = [None]  # the first token has no predecessor
            for token, logps in zip(ids[1:], reference_logps(self.model, ids)[1], strict=True):
                order = logps.argsort(descending=True)
                entry = {}
                for place in [
                    int((order == token).nonzero()),
                    *range(body["prompt_logprobs"]),
                ]:  # the token itself first
                    candidate = int(order[place])
                    entry[str(candidate)] = {
                        "logprob": float(logps[candidate]),
                        "rank": place + 1,
                        "decoded_token": VOCAB[candidate] if candidate < len(VOCAB) else "",
                    }
                entries.append(entry)
            entries = self.edit(entries, ids)
            choices.append({"index": index, "text": "x", "finish_reason": "length", "prompt_logprobs": entries})
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": choices}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.fake.connections.add(self.connection)

    def handle(self):
        with suppress(OSError):  # the client may have gone
            super().handle()

    def finish(self):
        self.fake.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body:  # a server that dies gets half a request
            self.reply(json.loads(body))

    def reply(self, body):
        fake = self.fake
        fake.requests.append((self.path, dict(self.headers), body))
        answer = None if fake.closed else fake.answer(self.path, body)
        if answer == "hang":
            fake.released.wait(30)
            answer = None
        if answer is None:  # drop the line
            self.close_connection = True
            return
        status, text = answer
        payload = text.encode()
        with suppress(OSError):  # the client may have gone
            self.send_response(200 if status == "cut" else status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload[: len(payload) // 2] if status == "cut" else payload)
        if status == "cut":
            self.close_connection = True

    def log_message(self, *args):
        pass
