"""Rollouts by vLLM, through TRL's `VLLMGeneration`, with the trainer's own type, weights, random numbers, ends and limits.

TRL leaves each of them to vLLM's own choice, and nothing fails where that is another: the run just samples from another
model than the one that it trains.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import set_seed
from trl.extras.profiling import profiling_context
from trl.generation import vllm_generation

from .errors import CaMOPDError, RolloutError, on_all_ranks
from .masters import is_quantised
from .precision import compute_dtype
from .teachers.address import public_url, without_secrets
from .teachers.vllm.plan import refuse_quantised
from .vllm import limits
from .watchdog import ROLLOUT_SERVERS, current, phase


logger = logging.getLogger(__name__)

PROMPTS_PER_REQUEST = 1024  # vLLM refuses more: VLLM_MAX_COMPLETION_PROMPTS of its environment


# ------------------------------------------------------------------------------------------------------- at the start


@contextmanager
def starting(trainer: Any, args: Any) -> Iterator[None]:
    """Inside, TRL starts vLLM in this process with the type that the student computes in, or reaches its server.

    TRL names no type: vLLM then takes bfloat16 or float16 for a float32 checkpoint. Loading also seeds the random numbers
    of this process, the same for every `seed`; those of before are there again afterwards. Its client waits for an answer
    without end, see `reach`.
    """
    make, client = getattr(vllm_generation, "LLM", None), vllm_generation.VLLMClient
    if not args.use_vllm or make is None:
        yield
        return

    def make_in_type(**given: Any) -> Any:
        dtype = compute_dtype(trainer.accelerator, trainer.model)
        with random_numbers():
            return make(**{**given, "dtype": str(dtype).removeprefix("torch.")})

    vllm_generation.LLM, vllm_generation.VLLMClient = make_in_type, partial(reach, client, args)
    try:
        yield
    finally:
        vllm_generation.LLM, vllm_generation.VLLMClient = make, client


def reach(make: Callable[..., Any], args: Any, **given: Any) -> Any:
    """TRL's client of a server that answers, none of whose requests waits for ever.

    Raises `CaMOPDError` where the server does not answer within `vllm_server_timeout`. Later that is a `RolloutError`, for
    which a checkpoint is made; with several ranks the others wait for the answer, and the launcher ends them. A server that
    stops while weights are sent is not noticed so: torch waits for it then, and the watchdog says for whom.
    """
    import requests  # which TRL's client is made of, and nothing else here

    url, began = given["base_url"], time.monotonic()
    while True:
        try:
            asked = (requests.get(f"{url}{path}", timeout=limits.ANSWER_SECONDS) for path in ("/health", "/v1/models"))
            well = all(answer.status_code == 200 for answer in asked)  # as TRL asks
            why = "it is not well"
        except requests.RequestException as error:
            well, why = False, without_secrets(str(error))
        if well:
            break
        if time.monotonic() - began > args.vllm_server_timeout:
            raise CaMOPDError(
                f"the rollout server at {public_url(url)} has not answered for {args.vllm_server_timeout:g} s, which is "
                f"vllm_server_timeout ({why}). Is it running, and does vllm_server_base_url, or vllm_server_host and "
                "vllm_server_port, say where?"
            )
        time.sleep(limits.QUESTION_PAUSE)
    client = make(**given)
    # All of a step is asked for at once, and the server writes so many together.
    prompts = max(args.prompts_per_step, args.world_size * args.per_device_eval_batch_size)
    waves = math.ceil(prompts / limits.ROLLOUTS_PER_REPLICA)
    seconds = max(limits.WEIGHTS_SECONDS, waves * limits.completion_seconds(args.longest_completion))
    kind = RolloutError if args.world_size == 1 else CaMOPDError
    client.session.request = bounded(client.session.request, url, seconds, kind)
    for adapter in client.session.adapters.values():
        adapter.max_retries = _patient_once(adapter.max_retries)
    return client


def bounded(request: Callable[..., Any], url: str, seconds: float, kind: type[CaMOPDError]) -> Callable[..., Any]:
    """`requests.Session.request`, which waits for an answer no longer than so many seconds, and raises errors of a kind."""
    import requests

    def ask(*words: Any, **given: Any) -> Any:
        try:
            return request(*words, **{"timeout": (limits.CONNECT_SECONDS, seconds), **given})
        except requests.RequestException as error:
            raise kind(
                f"the rollout server at {public_url(url)} has not answered within {seconds:.0f} s, or has failed: "
                f"{without_secrets(str(error))}. Look at its log, start it again, and go on with resume_from_checkpoint="
                "'auto'."
            ) from error

    return ask


def _patient_once(retries: Any) -> Any:
    """TRL's retries of a request, but none for an answer that has not come in time: each would wait as long again."""
    from urllib3.exceptions import ReadTimeoutError

    class PatientOnce(type(retries)):  # type: ignore[misc]
        def increment(self, *words: Any, **given: Any) -> Any:
            error = given.get("error")
            if isinstance(error, ReadTimeoutError):
                raise error
            return super().increment(*words, **given)

    names = ("total", "connect", "read", "status", "status_forcelist", "backoff_factor", "allowed_methods")
    return PatientOnce(**{name: getattr(retries, name) for name in names})


_BITS = ("load_in_4bit", "load_in_8bit")  # with or without an underscore, of bitsandbytes


def check_student(model: Any, args: Any, quantization_config: Any) -> None:
    """Raise `ValueError` for a student whose weights vLLM could not take, and for an object that vLLM in this process could
    not load: it has no folder or id."""
    if args.use_vllm or args.rollout_servers:
        given = quantization_config or (args.model_init_kwargs or {}).get("quantization_config") or {}
        given = given if isinstance(given, dict) else vars(given)
        refuse_quantised(any(bits in name and value is True for name, value in given.items() for bits in _BITS))
    named = isinstance(model, str) or bool(getattr(model, "name_or_path", None))
    if args.use_vllm and args.vllm_mode == "colocate" and not named:
        raise ValueError(
            f"use_vllm=True with vllm_mode='colocate' loads the student from its folder or id, and this "
            f"{type(model).__name__} has none. Save it and its tokenizer with save_pretrained, and pass the folder as "
            "`model`."
        )


def check_length(args: Any, longest: int) -> None:
    """Raise `ValueError` where vLLM in this process has no room for the longest prompt and completion, and would cut it."""
    given = args.vllm_max_model_length
    if args.use_vllm and args.vllm_mode == "colocate" and given is not None and given < longest:
        raise ValueError(
            f"vllm_max_model_length={given} is less than max_prompt_length + max_completion_length = {longest}: vLLM would "
            "cut completions before max_completion_length, and refuse long prompts. Leave it out, and it is just that."
        )


def refuse_tools(args: Any, tools: Any) -> None:
    """Raise `ValueError` for tools where ranks ask one server together: the number of turns differs between them."""
    if tools and args.use_vllm and args.vllm_mode == "server" and args.world_size > 1:
        raise ValueError(
            f"tools with vllm_mode='server' cannot be used on {args.world_size} ranks: TRL has all ranks ask the server "
            "together, and conversations of some ranks have more turns than those of others, which then wait for ever. Use "
            "vllm_mode='colocate', or one rank."
        )


def settle(trainer: Any, longest: int) -> None:
    """Ready TRL's `VLLMGeneration` for rollouts. Called on all ranks; raises `CaMOPDError` for a server that cannot.

    Args:
        trainer: whose `vllm_generation` is there.
        longest: tokens of a prompt and its completion.
    """
    generation, args = trainer.vllm_generation, trainer.args
    refuse_quantised(is_quantised(trainer.model))
    # TRL asks the sampler for no log-probs; w_t is the ratio to them. 0 means the sampled token only.
    generation.logprobs = 0
    # The trainer's own ends, and with `ignore_eos` no other: vLLM knows those of its folder, which may be fewer or more.
    generation.generation_kwargs = {
        **(args.generation_kwargs or {}), "stop_token_ids": ends_of(trainer), "ignore_eos": True,
    }  # fmt: skip
    if is_peft_model(trainer.model) and generation._dist.fsdp_version != 1:
        refuse_adapter_on_half_a_tie(trainer.model)
        generation._iter_named_params = partial(adapted_weights, generation)
    if args.vllm_mode != "server":
        end_quietly(generation)
        return
    send = generation._iter_named_params
    # The sender packs tensors and copies them once many are together: gathered ones are gone by then.
    generation._iter_named_params = lambda: ((name, weight.clone()) for name, weight in send())
    with on_all_ranks(gather_object):
        client = getattr(generation, "vllm_client", None)  # of the first rank alone
        if client is not None:
            client.generate = in_requests(client.generate)
            check_server(client, longest, compute_dtype(trainer.accelerator, trainer.model))


def adapted_weights(generation: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """In place of TRL's `_iter_named_params`: the weights of a student with an adapter, by the names that vLLM knows, each
    with its layer's adapter in it. A collective of all ranks.

    TRL merges all layers in place and subtracts their adapters again, which rounds: at every sync the frozen base would
    move, `adapter_off` with it, and the adapter that is saved would be one of another base. Here the base is not written
    to, whatever stream of a GPU the next weight is asked for on.
    """
    model = generation.model
    with generation._dist.gather_params(list(model.parameters())):
        for name in [name for name, _ in model.named_parameters()]:
            if model.prefix in name or "original_module" in name:
                continue
            path, is_base, _ = name.partition(".base_layer.")
            with merged(model.get_submodule(path)) if is_base else nullcontext():
                weight = model.get_parameter(name)
                if hasattr(weight, "full_tensor"):  # of FSDP2, which may keep it on the CPU
                    weight = weight.to(generation.accelerator.device).full_tensor()
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                known = generation._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."])
                yield known, weight.data


@contextmanager
def merged(layer: Any) -> Iterator[None]:
    """Inside, a layer of PEFT has a copy of its base, with its adapters in it; those of several parameters are around each
    other."""
    base, around = layer.get_base_layer(), []
    while hasattr(layer, "base_layer"):
        around.append(layer)
        layer = layer.base_layer
    kept = dict(base.named_parameters(recurse=False))
    try:
        for name, weight in kept.items():
            setattr(base, name, torch.nn.Parameter(weight.data.clone(), requires_grad=False))
        for layer in around:
            layer.merge()
        yield
    finally:
        for name, weight in kept.items():
            setattr(base, name, weight)
        for layer in around:
            layer.merged_adapters.clear()


def refuse_adapter_on_half_a_tie(model: Any) -> None:
    """Raise `ValueError` for an adapter on one of two layers that share a weight, or a trained copy of one of them
    (`modules_to_save`): vLLM has the weight once."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for tied in names.values():
        adapted = [name for name in tied if ".base_layer." in name or ".original_module." in name]
        ensured = all(getattr(config, "ensure_weight_tying", False) for config in model.peft_config.values())
        if adapted and len(tied) > 1 and not (ensured and len(adapted) == len(tied)):
            raise ValueError(
                f"{' and '.join(tied)} are one weight, and an adapter on {adapted[0]}, or a copy of it, makes two of it: "
                "vLLM has one. Leave embeddings and output head out of target_modules and modules_to_save, or set "
                "ensure_weight_tying in the LoraConfig."
            )


def end_quietly(generation: Any) -> None:
    """Have vLLM in this process shut down when Python ends, as it would itself, but without a traceback: the process groups
    that it wants to leave are gone by then if the trainer has left them."""
    engine = getattr(getattr(generation, "llm", None), "llm_engine", None)
    if engine is None:
        return
    core = weakref.ref(engine.engine_core)

    def shut_down() -> None:
        with suppress(Exception):  # of an engine that is gone already, too
            core().shutdown()  # type: ignore[union-attr]

    atexit.register(shut_down)  # the latest is called first: before vLLM's own


def ends_of(trainer: Any) -> list[int]:
    """Tokens that end a completion: the trainer's, and `stop_token_ids` of `generation_kwargs`."""
    asked = (trainer.args.generation_kwargs or {}).get("stop_token_ids") or []
    return sorted({*trainer.eos_token_ids, *asked})


def check_server(client: Any, longest: int, dtype: torch.dtype) -> None:
    """Raise `CaMOPDError` unless a rollout server takes `longest` tokens; warn of another type than the student's.

    vLLM cuts completions at its own limit without a word.
    """
    model = client.get_server_info().get("model_config") or {}
    length = model.get("max_model_len")
    if isinstance(length, int) and length < longest:
        raise CaMOPDError(
            f"the rollout server at {public_url(client.base_url)} takes sequences of {length} tokens, and max_prompt_length"
            f" + max_completion_length is {longest}: it would cut completions before max_completion_length. Start it with "
            f"--max-model-len {longest}, or lower max_completion_length."
        )
    warn_of_type(public_url(client.base_url), str(model.get("dtype", "")), dtype)


def warn_of_type(url: str, theirs: str, dtype: torch.dtype) -> None:
    """Warn of a rollout server that computes in another type than the student's `dtype`; "" where it is not known."""
    theirs, ours = (str(each).removeprefix("torch.") for each in (theirs, dtype))
    if theirs and theirs != ours:
        logger.warning(
            "the rollout server at %s computes in %s, the student in %s: importance/log_ratio grows by the rounding. Start "
            "it with --dtype %s.", url, theirs, ours, ours,
        )  # fmt: skip


def in_requests(generate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`VLLMClient.generate` in as many requests as vLLM's limit of prompts asks for, all at once."""

    def generate_all(prompts: Sequence[list[int]], **settings: Any) -> dict[str, Any]:
        if len(prompts) <= PROMPTS_PER_REQUEST:
            return generate(prompts=prompts, **settings)
        pieces = [
            prompts[start : start + PROMPTS_PER_REQUEST] for start in range(0, len(prompts), PROMPTS_PER_REQUEST)
        ]
        with ThreadPoolExecutor(len(pieces)) as pool:
            answers = list(pool.map(lambda piece: generate(prompts=piece, **settings), pieces))
        return {name: [row for answer in answers for row in answer[name]] for name in answers[0]}

    return generate_all


# --------------------------------------------------------------------------------------------------------- each turn


class VLLMTurns:
    """Batches of requests to TRL's `VLLMGeneration`, with the weights and random numbers of the step or evaluation."""

    def __init__(self, trainer: Any):
        """`trainer` is asked at each turn which step or evaluation is under way."""
        self._trainer = trainer
        self._under_way: Callable[[], Any] = lambda: None
        self._turns = 0  # of the step or evaluation under way

    def generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """The completions, and the sampled token's log-prob at each of their positions. Called on all ranks.

        vLLM's NaN arrives as `None`, and is NaN again: no weight for this token.
        """
        trainer = self._trainer
        step = trainer.step if trainer.model.training else None
        self._sync(trainer.held_out_results if step is None else step)
        self._turns += 1
        numbers = random_numbers(self._seed(step)) if trainer.args.vllm_mode == "colocate" else nullcontext()
        with numbers, self._waiting():
            _, completion_ids, logprobs, _ = trainer.vllm_generation.generate(
                prompts=prompt_ids,
                images=None,
                num_generations=1,
                profiler=profiling_context(trainer, "vLLM.generate"),
            )
        return completion_ids, [[math.nan if token[0] is None else token[0] for token in row] for row in logprobs]

    def _waiting(self) -> AbstractContextManager[None]:
        """Inside, the watchdog says that the first rank waits for TRL's server."""
        client = getattr(self._trainer.vllm_generation, "vllm_client", None)
        if client is None:
            return nullcontext()
        return phase(f"{current().what}: {ROLLOUT_SERVERS} ({public_url(client.base_url)})")

    def _sync(self, under_way: Any) -> None:
        """Give vLLM the student's weights, once for each step and for each evaluation.

        TRL does it once per `global_step`, which stays where it is when the best checkpoint is loaded, when `train` is
        called again, and when a schedule-free optimizer changes between its two sets of weights.
        """
        if self._under_way() is under_way:
            return
        with profiling_context(self._trainer, "sync_weights"), self._waiting():
            self._trainer.vllm_generation.sync_weights()
        # Weak: the samples of a step are gone before the next ones are rolled out.
        self._under_way, self._turns = weakref.ref(under_way), 0

    def _seed(self, step: Any) -> int:
        """Of this turn. Ranks that share an engine by tensor parallelism have to draw the same tokens."""
        args = self._trainer.args
        group = args.process_index // args.vllm_tensor_parallel_size
        where = "evaluation" if step is None else step.number
        digest = hashlib.blake2b(repr((args.seed, where, self._turns, group)).encode(), digest_size=4)
        return int.from_bytes(digest.digest(), "little")  # 32 bits, numpy's limit


@contextmanager
def random_numbers(seed: int | None = None) -> Iterator[None]:
    """Inside, random numbers are those of `seed`; afterwards those of before: Python's, numpy's, and torch's on the CPU and
    on this process's GPU. vLLM in this process draws from torch's, or seeds its own from numpy's."""
    before = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            set_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
