"""Run by the Python that has vLLM: reads a compact scoring request, validates it with vLLM's own classes, and answers it
with vLLM's own classes and made-up log-probs, -1/7, -2/7, ... Its answer to `recorded_generate.json`'s request is recorded
there."""

import sys

import numpy as np
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
    GenerateRequest,
    GenerateTokensChoice,
    GenerateTokensResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.utils.serial_utils import numpy2base64


request = GenerateRequest.model_validate_json(sys.stdin.read())
rows = request.sampling_params.prompt_logprob_token_ids
size = len(request.token_ids)
# vLLM's own rule, in v1/engine/input_processor.py
assert len(rows) == size - 1 - request.sampling_params.prompt_logprob_start
answer = GenerateTokensResponse(
    choices=[GenerateTokensChoice(index=0, finish_reason="length", token_ids=[1])],
    request_id=f"generate-tokens-{request.request_id}",
    created=1,
    model=request.model,
    usage=UsageInfo(prompt_tokens=size, completion_tokens=1, total_tokens=size + 1),
    prompt_token_id_logprobs=numpy2base64(-np.arange(1, len(rows) + 1, dtype=np.float32)[:, None] / np.float32(7)),
)
print(answer.model_dump_json())
