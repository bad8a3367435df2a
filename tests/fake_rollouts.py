"""The server of fake_vllm.py, which also writes completions by weights that it is given, as a rollout server does."""

import copy
import itertools
import json
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from fake_vllm import FakeVLLM
from packaging.version import Version
from safetensors.torch import load_file


CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"  # a model's keyword


instances = itertools.count()


class FakeRollouts(FakeVLLM):
    """Answers have the fields of vLLM 0.32's `/v1/completions` with `return_token_ids`. `model` is what it starts with."""

    def __init__(self, model, tokenizer, dev=True, lora=True, **more):
        self.dev, self.lora = dev, lora  # whether it was started so that it takes weights, and adapters
        self.instance = f"{next(instances):05}"  # another one of the same port is another one
        self.device, self.dtype = "cuda", "torch.float32"
        self.adapters = {}  # name -> the model with it
        self.loads = []  # folders that weights were read from
        self.writing = []  # a mark for each completion under way
        super().__init__(model, tokenizer, **more)

    @property
    def written(self):
        """Bodies of the requests for completions."""
        return [body for path, _, body in self.requests if path == "/v1/completions" and "return_token_ids" in body]

    def answer(self, path, body):
        if self.always is not None or path in ("/health", "/v1/models"):
            return super().answer(path, body)
        path, _, query = path.partition("?")
        if path == "/v1/completions":
            self.writing.append(1)
            try:
                return self._complete(body)
            finally:
                self.writing.pop()
        if path.endswith("_lora_adapter") and self.lora:
            return self._adapter(path, body)
        if self.dev and path == "/server_info":
            config = {
                "instance_id": self.instance,
                "device_config": {"device": self.device},
                "model_config": {"dtype": self.dtype},
            }
            return 200, json.dumps({"vllm_config": config})
        if self.dev and path == "/collective_rpc":
            return self.reload(Path(body["kwargs"]["weights_path"]))
        if self.dev and path == "/reset_prefix_cache":
            return 200, json.dumps({"success": not self.writing or "reset_running_requests=true" in query})
        return 404, json.dumps({"detail": "Not Found"})

    def _complete(self, body):
        self.before()
        with suppress(IndexError):
            answer = self.answers.popleft()
            return answer if answer != "cut" else ("cut", self.write(body))
        if body["model"] not in (self.name, *self.adapters):
            return 404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
        return 200, self.write(body)

    def reload(self, folder):
        weights = {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        if not weights:
            return 500, f"no weights in {folder}"
        self.model = copy.deepcopy(self.model)
        missing = self.model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
        self.loads.append(folder)
        return 200, json.dumps({"results": [None]})

    def _adapter(self, path, body):
        from peft import PeftModel

        name = body["lora_name"]
        if path.startswith("/v1/unload"):
            found = self.adapters.pop(name, None)
            return (404, "no such adapter") if found is None else (200, f"Success: '{name}' removed.")
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"]).eval()
        self.loads.append(Path(body["lora_path"]))
        return 200, f"Success: LoRA adapter '{name}' added."

    def write(self, body):
        assert body["temperature"] == body["top_p"] == body["repetition_penalty"] == 1.0 and body["ignore_eos"]
        model = self.adapters.get(body["model"], self.model).eval()
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logps, cache = list(body["prompt"]), [], None
        while len(logps) < body["max_tokens"] and not (logps and ids[-1] in body["stop_token_ids"]):
            with torch.no_grad():
                found = model(torch.tensor([ids[-1:] if cache else ids]), **{CACHE: cache}, use_cache=True)
            row, cache = found.logits[0, -1].float().log_softmax(-1), found[CACHE]
            ids.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
            logps.append(float(row[ids[-1]]))
        written = ids[len(body["prompt"]) :]
        choice = {
            "index": 0, "text": "x", "finish_reason": "stop" if written[-1] in body["stop_token_ids"] else "length",
            "logprobs": {"token_logprobs": logps, "tokens": [f"token_id:{token}" for token in written]},
            "token_ids": written, "prompt_token_ids": body["prompt"],
        }  # fmt: skip
        answer = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
        return json.dumps(self.edit_answer(answer))
