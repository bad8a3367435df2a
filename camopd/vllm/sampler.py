"""vLLM servers that write the student's completions: requests with token ids in and out, and the student's weights.

An answer may be that of any program that listens there: no token, log-prob or end is taken that was not asked for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RolloutError
from . import limits
from .http import Client, Fault, NotThere, Role, base_url, together
from .loop import LoopThread
from .replicas import Replica, Replicas


ROLE = Role("the rollout server", ("CAMOPD_ROLLOUT_API_KEY",), RolloutError)
BYTES_PER_TOKEN = 1024  # more than a token of an answer takes: its text and its id, three times in JSON
# With every request, so that none of them is a default of the server or of the model's generation_config.json.
PLAIN_SAMPLING = {
    "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "stop": [],
}  # fmt: skip
_ADAPTERS = (
    "It must run with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a --max-lora-rank of the adapter's: start it "
    "by `camopd serve --student`"
)
_WHOLE = "It must run with VLLM_SERVER_DEV_MODE=1: start it by `camopd serve --student`"


class Version(NamedTuple):
    """The student's weights as they were at some time."""

    name: str
    folder: Path  # which the servers read
    is_adapter: bool  # a LoRA adapter alone, which requests name as their model
    ties_head: bool = False  # all weights, and the output head is the embeddings


class Completion(NamedTuple):
    """What a server has drawn: token ids, and the log-prob of each (nats, NaN where it gave none); and which server."""

    token_ids: list[int]
    logps: list[float]
    url: str = ""


class Sampling(NamedTuple):
    """What all requests of a batch share."""

    max_tokens: int
    ends: Collection[int]  # tokens that end a completion; no other does
    vocab_size: int


class Sampler:
    """The rollout servers of a run, on this rank. Each of them has the whole student."""

    def __init__(self, urls: Sequence[str], patience: float = 900.0):
        """Reach every server. An API key is read from the environment variable `CAMOPD_ROLLOUT_API_KEY`.

        Args:
            urls: `http(s)://host:port` of each.
            patience: seconds to wait for one when all of them are gone.

        Raises `RolloutError` when one does not answer, or serves another model than the others.
        """
        self.urls = list(dict.fromkeys(base_url(url, ROLE) for url in urls))
        self.where = ", ".join(self.urls)
        self._client = Client(ROLE)
        self._replicas = Replicas(self.urls, self._client, patience, limits.ROLLOUTS_PER_REPLICA, self._make_ready)
        self._version: Version | None = None
        self._holders: dict[str, str] = {}  # by URL, the process there that has the weights of `_version`
        self._settling = asyncio.Lock()  # weights are on their way
        self._loop = LoopThread("rollouts")
        try:
            self._loop.wait(self._replicas.connect(None))
        except BaseException:
            self.close()
            raise
        self.name, self.max_model_len = self._replicas.model.name, self._replicas.max_model_len

    def close(self) -> None:
        """Drop all connections and end the thread. What is still being written fails."""
        self._loop.close(self._client.close)

    def check_context(self, max_tokens: int) -> None:
        """Raise `RolloutError` unless a prompt and its completion of `max_tokens` together fit: vLLM would cut them."""
        if self.max_model_len < max_tokens:
            raise RolloutError(
                f"{ROLE.name} at {self.where} takes sequences of {self.max_model_len} tokens, and max_prompt_length + "
                f"max_completion_length is {max_tokens}: it would cut completions before max_completion_length. Start it "
                f"with --max-model-len {max_tokens}, or lower max_completion_length."
            )

    def types(self) -> dict[str, str]:
        """What each server computes in, by its URL: "torch.bfloat16", or "" where it does not say."""
        return self._loop.wait(self._types())

    def begin(self) -> Future[None]:
        """See that every server that is well still has the weights it was given. To be waited for before a batch."""
        return self._loop.submit(self._begin())

    def submit(self, prompt: Sequence[int], seed: int, sampling: Sampling) -> Future[Completion]:
        """Have one server write a completion; another one, with the same seed, where that fails. Returns at once."""
        tokens = len(prompt) + sampling.max_tokens
        work = f"write a completion of {sampling.max_tokens} tokens"
        version = self._version  # that of this batch, whatever comes after it

        async def complete() -> Completion:
            _, found = await self._replicas.ask(
                tokens, lambda replica: self._complete(replica, version, prompt, seed, sampling), work
            )
            return found

        return self._loop.submit(complete())

    # --------------------------------------------------------------------------------------------------------- weights

    def hold(self) -> None:
        """Let no weights be sent by this rank until `adopt`; a server that comes back waits for it."""
        self._loop.wait(self._settling.acquire())

    def give(self, version: Version) -> Future[dict[str, str]]:
        """Between `hold` and `adopt`, on one rank: give all servers that are well these weights. To be waited for: who has
        them.

        A server that fails is taken out, and gets them when it is well again. Raises `RolloutError` where a server refuses
        them, and where any fails to take the first ones.
        """
        return self._loop.submit(self._give(version))

    def adopt(self, version: Version, holders: Mapping[str, str]) -> None:
        """After `hold`, on all ranks: ask for completions by these weights, which `holders` have."""
        self._loop.wait(self._adopt(version, holders))

    def release(self) -> None:
        """After `hold`, in place of `adopt`: all is as it was."""
        self._loop.wait(self._let_go())

    def drop(self, version: Version) -> None:
        """Forget an adapter. Nothing happens where a server is gone, or does not have it."""
        if version.is_adapter:
            self._loop.wait(self._drop(version))

    async def _give(self, version: Version) -> dict[str, str]:
        first, self._version, self._holders = self._version is None, version, {}

        async def load(replica: Replica) -> None:
            try:
                await self._load(replica.url)
            except Fault as fault:
                if first:
                    hint = _ADAPTERS if version.is_adapter else _WHOLE
                    raise RolloutError(
                        f"{ROLE.name} cannot take the student's weights: {fault}. {hint}, and see that it can read "
                        f"{str(version.folder)!r}: output_dir must be on a disk that all machines see."
                    ) from None
                await self._replicas.take_out(replica, str(fault))

        try:
            await together(load(replica) for replica in self._replicas.all if replica.alive)
        except BaseException:
            self._version = None if first else self._version
            raise
        return self._holders

    async def _adopt(self, version: Version, holders: Mapping[str, str]) -> None:
        self._version, self._holders = version, dict(holders)
        self._settling.release()

    async def _let_go(self) -> None:
        self._settling.release()

    async def _begin(self) -> None:
        self._replicas.wait_anew()

        async def look(replica: Replica) -> None:
            try:
                await self._make_ready(replica)
            except Fault as fault:
                await self._replicas.take_out(replica, str(fault))

        await together(look(replica) for replica in self._replicas.all if replica.alive)

    async def _make_ready(self, replica: Replica) -> None:
        """A server that was started again has the weights of its folder."""
        if self._version is None:
            return
        if self._version.is_adapter and replica.alive:  # requests name it, and find out themselves
            return
        async with self._settling:
            await self._load(replica.url, again=True)

    async def _load(self, url: str, again: bool = False) -> None:
        """Give a server the weights unless it has them. Raises `Fault`, and `RolloutError` where it refuses.

        `again`: weights that it had before it was started again. Another rank may have given it the same already, and have
        it write. While new ones come nobody of this run has it write, and who else does is not to go on by them.
        """
        version = self._version
        assert version is not None
        if version.is_adapter:
            await self._load_adapter(url, version)
            return
        process = await self._process(url)
        if self._holders.get(url) == process:
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(version.folder)}}
        await self._tell(url, "/collective_rpc", body, _WHOLE)
        # Keys and values that the old weights have made. While a server writes, vLLM resets nothing, unless it may compute
        # the keys of what it writes again.
        path = "/reset_prefix_cache?reset_running_requests=true" if again else "/reset_prefix_cache"
        found = await self._tell(url, path, {}, _WHOLE)
        if not isinstance(found, dict) or found.get("success") is not True:
            raise Fault(f"{url} did not reset its prefix cache: {self._client.without_key(str(found))[:200]}")
        self._holders[url] = process

    async def _process(self, url: str) -> str:
        """Tells a server from another one that was started in its place. Raises `RolloutError` for one that would take only
        some of the weights."""
        config = await self._config(url)
        name = config.get("instance_id")
        if not isinstance(name, str) or not name:
            raise RolloutError(f"{ROLE.name} at {url} does not say which instance it is. Is it vLLM 0.12 or newer?")
        # vLLM 0.32 packs a copy of the head there, and packs it again only where it is loaded as a weight of its own.
        device = config.get("device_config")
        on_cpu = isinstance(device, dict) and device.get("device") == "cpu"
        if on_cpu and self._version is not None and self._version.ties_head:
            raise RolloutError(
                f"{ROLE.name} at {url} is vLLM on a CPU. Given new weights of a model whose output head is its embeddings "
                "(tie_word_embeddings), it goes on with the old head. Train a LoRA adapter (use_peft), leave "
                "rollout_servers out, or have the server on a GPU."
            )
        return name

    async def _config(self, url: str) -> dict[str, Any]:
        """What a server was started with; empty where it does not say. Raises `RolloutError` without its developer mode."""
        found = await self._tell(url, "/server_info?config_format=json", None, _WHOLE, seconds=limits.STATE_SECONDS)
        config = found.get("vllm_config") if isinstance(found, dict) else None
        return config if isinstance(config, dict) else {}

    async def _types(self) -> dict[str, str]:
        async def ask(url: str) -> str:
            try:
                model = (await self._config(url)).get("model_config")
            except (Fault, RolloutError):  # what it is needed for says so
                model = None
            return str(model.get("dtype") or "") if isinstance(model, dict) else ""

        return dict(zip(self.urls, await together(map(ask, self.urls)), strict=True))

    async def _load_adapter(self, url: str, version: Version) -> None:
        body = {"lora_name": version.name, "lora_path": str(version.folder)}
        try:
            await self._tell(url, "/v1/load_lora_adapter", body, _ADAPTERS, parse=False)
        except RolloutError as error:
            if "already been loaded" not in str(error):  # by another rank
                raise
        self._holders[url] = version.name

    async def _drop(self, version: Version) -> None:
        async def drop(url: str) -> None:
            try:
                body = {"lora_name": version.name}
                await self._client.request(url, "/v1/unload_lora_adapter", body, limits.ANSWER_SECONDS, parse=False)
            except (Fault, RolloutError):
                pass  # it is gone, or was started again since

        await together(drop(replica.url) for replica in self._replicas.all if replica.alive)

    async def _tell(
        self, url: str, path: str, body: dict[str, Any] | None, needs: str, parse: bool = True,
        seconds: float = limits.WEIGHTS_SECONDS,
    ) -> Any:  # fmt: skip
        try:
            return await self._client.request(url, path, body, seconds, parse=parse, may_miss=True)
        except NotThere:
            raise RolloutError(f"{ROLE.name} at {url} has no {path.partition('?')[0]}. {needs}.") from None

    # ----------------------------------------------------------------------------------------------------- completions

    async def _complete(
        self, replica: Replica, version: Version | None, prompt: Sequence[int], seed: int, sampling: Sampling
    ) -> Completion:
        name = version.name if version is not None and version.is_adapter else self._replicas.model.name
        body = {
            **PLAIN_SAMPLING, "model": name, "prompt": prompt, "max_tokens": sampling.max_tokens, "seed": seed,
            "stop_token_ids": sorted(sampling.ends), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        seconds = limits.completion_seconds(sampling.max_tokens)
        most = 65536 + BYTES_PER_TOKEN * sampling.max_tokens + 32 * len(prompt)
        ask = (replica.url, "/v1/completions", body, seconds, most)
        process, outages = self._holders.get(replica.url), replica.outages
        whole = version is not None and not version.is_adapter
        if whole and replica.requests_in_flight == 1 and await self._process(replica.url) != process:
            # While it had none of this rank's requests, no failure could tell.
            raise Fault(f"{replica.url} was started again since it was given the weights")
        try:
            try:
                answer = await self._client.request(*ask, may_miss=True)
            except NotThere:
                if version is None or not version.is_adapter:
                    raise
                async with self._settling:  # it was started again, and has no adapter
                    await self._load_adapter(replica.url, version)
                answer = await self._client.request(*ask, may_miss=True)
        except NotThere as error:
            raise RolloutError(f"{ROLE.name} at {replica.url} answered 404: {error}") from None
        if whole and replica.outages != outages and await self._process(replica.url) != process:
            # The request may have reached another server than the one that had the weights when it was made.
            raise Fault(f"{replica.url} was started again while a completion was asked for", takes_out=False)
        try:
            return read_completion(answer, name, prompt, sampling)._replace(url=replica.url)
        except ValueError as error:
            raise RolloutError(f"{ROLE.name} at {replica.url} {self._client.without_key(str(error)[:500])}") from None


def read_completion(answer: Any, model: str, prompt: Sequence[int], sampling: Sampling) -> Completion:
    """The completion of an answer of `/v1/completions`.

    Raises `ValueError` for one that is not the answer to this request, with a text that goes on from the server's URL, and
    `Fault` where the server has given the request up. What has quite another form may raise anything.
    """
    if answer.get("model", model) != model:
        raise ValueError(f"answered as {answer['model']!r} and not as {model!r}. Another server may listen there now.")
    if len(answer["choices"]) != 1:
        raise ValueError(f"wrote {len(answer['choices'])} completions of one prompt. Is it a vLLM server?")
    choice = answer["choices"][0]
    if choice["finish_reason"] in ("abort", "error", None):
        raise Fault(f"it ended a completion with {choice['finish_reason']!r}")
    ids, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(ids, list) or not isinstance(logps, list):
        raise ValueError("gave no token ids or no log-probs. It must be vLLM 0.12 or newer, without --max-logprobs 0.")
    if choice.get("prompt_token_ids") not in (None, list(prompt)):
        raise ValueError("went on from another prompt than the one that it was sent.")
    if not all(type(token) is int and 0 <= token < sampling.vocab_size for token in ids):
        raise ValueError(
            f"wrote tokens that the student does not have, which has {sampling.vocab_size}. Does it serve it?"
        )
    if len(ids) != len(logps):
        raise ValueError(f"gave {len(logps)} log-probs for {len(ids)} tokens. Is it a vLLM server?")
    if not all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in logps):
        raise ValueError("gave log-probs that are not numbers. Is it a vLLM server?")
    _check_end(ids, choice["finish_reason"], sampling)
    return Completion(ids, [math.nan if value is None else float(value) for value in logps])


def _check_end(ids: Sequence[int], reason: str, sampling: Sampling) -> None:
    """Raise `ValueError` unless a completion ends where it should."""
    limit, ends = sampling.max_tokens, set(sampling.ends)
    if not 1 <= len(ids) <= limit:
        raise ValueError(f"wrote {len(ids)} tokens, of 1 to {limit} that it was asked for. Is it a vLLM server?")
    early = next((place for place, token in enumerate(ids[:-1]) if token in ends), None)
    if early is not None:
        raise ValueError(f"wrote on after token {ids[early]}, which ends a completion. Is it a vLLM server?")
    if ids[-1] not in ends and (reason == "stop" or len(ids) < limit):
        raise ValueError(
            f"ended a completion after {len(ids)} of {limit} tokens with token {ids[-1]}, which does not end one "
            f"(finish_reason {reason!r}). It has ends or a length of its own: start it with --generation-config vllm and a "
            "larger --max-model-len, as `camopd serve --student` does."
        )
