"""vLLM's own server, in another process or on another machine, behind the two methods of a sampler.

It is asked over HTTP, by token ids, and says token ids, log-probs, and which weights each token was drawn with. New
weights, or adapters beside their base, reach it through a folder that it sees too. Starts no server, and knows nothing
of how weights are trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echelon.config import ServerConfig
from echelon.errors import ConfigError, DataError, EchelonError, RolloutError, need
from echelon.models import lora
from echelon.models.lm import first_line
from echelon.sampling.copied import check_adapter, check_alone, check_copyable, within
from echelon.sampling.ends import cut
from echelon.sampling.vllm_engine import check_length, drawing, logprobs_of, settings
from echelon.text.endpoint import trust
from echelon.types import Completion, SamplingParams

TRIES = 5
"""So often a request is sent to a server that drops the connection, or has too much to do."""
BACKOFF = 0.5
"""Seconds before the second try; twice as many before each further one."""
PART = 1 << 31
"""Bytes of weights that are written into one file."""
BUSY = (429, 502, 503, 504)
"""Statuses of a server that may answer the next time."""


class ServedSampler:
    """Samples from a copy of a Hugging Face causal LM that a running `vllm serve` holds.

    The server is given the weights when it is first asked or loaded, and must then compute what the module computes.
    Each set of weights has a name that no other run uses; the server says it of every token, so that one that was
    restarted, or that somebody else loads weights into, is found out. `longest` is how many tokens a prompt and its
    answer may have together.

    With `apart`, the server is given the base of a model with adapters once, and then the adapter that speaks alone,
    which has such names, too. Several samplers whose adapters are on one base ask one server, each with its own.

    Raises MissingExtra without httpx2, and ConfigError for what cannot be: weights of few bits, several ranks, apart
    what is no adapter.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        server: ServerConfig,
        *,
        longest: int,
        version: int = 0,
        apart: bool = False,
    ) -> None:
        need("httpx2", "endpoint")
        check_copyable(module, "server")
        check_alone("server")
        if apart:
            check_adapter(module)
        self.module, self.tokenizer, self.server = module, tokenizer, server
        self.version = version
        self.longest = within(module, longest)
        self.url = server.url.rstrip("/")
        self._adapter = lora.speaking(module) if apart else None
        self._held: _Held | None = None
        self._called = ""
        self._take_back: Callable[[], object] | None = None
        self._checked = False
        self._run, self._numbers = secrets.token_hex(4), itertools.count(1)
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._asked = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered."""
        return not self._asked

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion. `params.seed` alone decides what is drawn, given the prompt and the weights.

        Stop strings and `stop_when` are looked for here, in the whole answer, and what was drawn after them is dropped.
        Raises RolloutError for more tokens than fit, a server that cannot be reached, and one that holds other weights
        than it was given; ConfigError for parameters that vLLM does not know.
        """
        assert prompt, "a prompt needs at least one token"
        check_length(self.longest, prompt, params)
        drawn = drawing(params)
        if self._held is None:
            self._open(lora.merged_weights(self.module))
        request, version = self._request(prompt, drawn), self.version
        label = self._held.label if self._held else ""
        slot = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.server.in_flight))
        self._asked += 1
        try:
            async with slot:
                said = await self._ask(request)
        finally:
            self._asked -= 1
        tokens, logprobs = self._read(said, label, request["model"])
        if answer := cut(tokens, logprobs, params, self.tokenizer, version):
            return answer
        raise RolloutError(f"{self.url}: the server ended a completion where nothing ends it. Is it another model's?")

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Put full weights, by the names that the module's files have, in place of the server's, and have it forget all
        keys and values. With `apart` only the adapter is read, from the module itself, whose weights these are. Without
        any weights, only the version changes.

        Raises ConfigError and RolloutError for a server that does not take them.
        """
        assert not self._asked, "weights change between rollouts: a completion would mix old and new ones"
        weights = iter(weights)
        first = next(weights, None)
        if first and self._held is None:
            self._open(itertools.chain([first], weights))
        elif first and self._adapter is not None:
            weights = iter(())  # a generator that is dropped ends whatever it had begun
            self._put()
        elif first and self._held:
            self._push(itertools.chain([first], weights), self._held)
        self.version = version

    def _open(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See what the server is, give it these weights, the module's, and see that it reads as the module. With
        `apart`, it is given the module's base, unless another level has done so, and its adapter."""
        held = self._claimed()
        first = not held.label
        try:
            held.model = self._found()
            if first:
                self._call("GET", "/weight_info")
                with nullcontext() if self._adapter is None else lora.off(self.module):
                    self._push(weights if self._adapter is None else lora.merged_weights(self.module), held)
            self._held = held
            if self._adapter is None:
                self._check_reading()
            else:
                self._put()
        except BaseException:
            self._held = None
            if first:
                _OPEN.pop(self.url, None)
            raise

    def _claimed(self) -> _Held:
        """What the server holds of this run: nothing yet, or the base that this module's adapter is on, too. Raises
        ConfigError where it is others' weights."""
        for _ in range(2):
            held = _OPEN.get(self.url)
            if held is None:
                held = _OPEN[self.url] = _Held(self.module, self._adapter is not None)
                return held
            if held.apart and self._adapter is not None and lora.same_base(held.module, self.module):
                return held
            del held
            gc.collect()  # that of an earlier run in this process
        raise ConfigError(
            f"sampling.server.url = {self.url}: two levels, or rollouts ahead, with weights of their own would "
            "load them into one server. Give each a server, or another sampler."
        )

    def _found(self) -> str:
        """What the server calls its model. Raises ConfigError for one with too little room."""
        found = self._call("GET", "/v1/models")["data"][0]
        room = int(found.get("max_model_len") or self.longest)
        if room < self.longest:
            raise ConfigError(
                f"sampling.server.url = {self.url}: the server has room for {room} tokens, and a prompt and its answer "
                f"have up to {self.longest}. Start it with --max-model-len {self.longest}, or lower "
                "sampling.max_prompt_tokens."
            )
        return str(found["id"])

    def _push(self, weights: Iterable[tuple[str, Tensor]], held: _Held) -> None:
        """Hand weights over: write them, have the server read them and forget what it has read with older ones."""
        label, folder = self._named("weights")
        try:
            _write(self.module, weights, folder)
            read = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._call("POST", "/collective_rpc", read)
            self._forget()
            self._call("POST", "/update_weight_version", {"new_version": label})
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        held.label = label

    def _put(self) -> None:
        """Hand the adapter over as it is now, in place of what it was.

        It goes by a name that no other one ever had, and so do keys and values. Its files stay as long as it is asked:
        a server that has room for fewer adapters than there are drops one, and reads it again.
        """
        assert self._adapter is not None
        label, folder = self._named("adapter")
        try:
            lora.write(self.module, self._adapter, folder)
            self._call("POST", "/v1/load_lora_adapter", {"lora_name": label, "lora_path": str(folder)})
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        before, self._called = self._take_back, label
        self._take_back = finalize(self, _take_back, self.url, label, folder)
        if before is not None:
            before()
        if not self._checked:
            self._check_reading()
            self._checked = not self._adapter or lora.has_learned(self.module, self._adapter)

    def _named(self, what: str) -> tuple[str, Path]:
        """A name that no other weights have, and a folder for them."""
        label = f"{self._run}-{next(self._numbers)}"
        return label, Path(self.server.folder).expanduser().resolve() / f"{what}-{label}"

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"sampling.server.folder = {self.server.folder}: weights cannot be written there "
            f"({first_line(error).rstrip('.')}). Give a folder that this process may write and the server reads."
        )

    def _forget(self) -> None:
        """Have the server forget all keys and values: at once, or when it has dropped what was given up here."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            if self._call("POST", "/reset_prefix_cache", {}).get("success"):
                return
        raise RolloutError(
            f"{self.url}: the server does not forget what it has read with older weights, because it answers somebody. "
            "Give the run a server of its own."
        )

    def _request(self, prompt: list[int], drawn: Mapping[str, Any]) -> dict[str, Any]:
        model = self._called or (self._held.model if self._held else "")
        return {"model": model, "token_ids": list(prompt), "sampling_params": drawn}

    async def _ask(self, body: Mapping[str, Any]) -> Any:
        """What the server answers, over a connection that may break and be made again: the seed names the answer."""
        http, why = need("httpx2", "endpoint"), ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                async with http.AsyncClient(verify=trust(), timeout=self.server.timeout) as client:
                    response = await client.post(f"{self.url}/inference/v1/generate", json=body)
            except http.TimeoutException as error:
                raise self._late() from error
            except http.TransportError as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if response.status_code not in BUSY:
                return self._answer("/inference/v1/generate", response)
            why = f"status {response.status_code}"
        raise self._silent(why)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The same for what is asked between rollouts, once."""
        http = need("httpx2", "endpoint")
        try:
            with http.Client(verify=trust(), timeout=self.server.timeout) as client:
                response = client.request(method, f"{self.url}{path}", json=body)
        except http.TimeoutException as error:
            raise self._late() from error
        except http.TransportError as error:
            raise self._silent(f"{type(error).__name__}: {error}") from error
        return self._answer(path, response)

    def _answer(self, path: str, response: Any) -> Any:
        """The body of an answer. Raises what a server without some setting, or that refuses the request, calls for."""
        status = response.status_code
        if status == 200 and path == "/v1/load_lora_adapter":
            return {}  # words
        if status == 200:
            try:
                return response.json() if response.content else {}
            except ValueError as error:
                raise RolloutError(f"{self.url}: what answers at {path} is no vLLM server. Check the url.") from error
        if status in (403, 404) and path == "/inference/v1/generate" and "model" not in response.text:
            raise self._lacks("answers no token ids", "--enable-scale-out")
        if status == 404 and path == "/v1/models":
            raise RolloutError(f"{self.url}: what answers there is no vLLM server. Check sampling.server.url.")
        said = _told(response)
        if path == "/v1/load_lora_adapter":
            raise self._refused(status, said)
        if status == 404 and path == "/inference/v1/generate" and self._called:
            raise RolloutError(
                f"{self.url}: the server has no adapter {self._called} any more, which it was given: it was restarted, "
                "or somebody takes adapters from it. Give the run a server of its own, and go on with --resume."
            )
        if status == 404 and path != "/inference/v1/generate":
            raise self._lacks("takes no weights", "VLLM_SERVER_DEV_MODE=1 in its environment")
        if status == 400:
            raise ConfigError(f"{self.url} refuses the request: {said}. Change that setting, or use --sampler local.")
        if path == "/collective_rpc":
            raise RolloutError(
                f"{self.url}: the server cannot read the weights in {self.server.folder} (status {status}: {said}). "
                "Give sampling.server.folder a folder that its machine sees under the same name, and serve this model."
            )
        raise RolloutError(f"{self.url}{path}: status {status}: {said}. See what the server prints.")

    def _refused(self, status: int, said: str) -> EchelonError:
        """Why the server takes no adapter, or not this one."""
        rank = lora.widths(self.module)[self._adapter] if self._adapter else 1
        if status == 404 and "adapter" not in said.lower():
            return self._lacks("takes no adapters", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")
        if "LoRA is not enabled" in said:
            return self._lacks("takes no adapters", f"--enable-lora --max-lora-rank {rank}, or the next it knows")
        if "max_lora_rank" in said:
            return self._lacks(f"takes no adapter of rank {rank}", f"--max-lora-rank {rank}, or the next it knows")
        return RolloutError(
            f"{self.url}: the server does not take the adapter in {self.server.folder} (status {status}: {said}). Give "
            "sampling.server.folder a folder that its machine sees under the same name, or leave sampling.adapters out."
        )

    def _read(self, said: Any, label: str, model: str) -> tuple[list[int], list[float]]:
        """Tokens and their log-probs. Raises RolloutError unless all were drawn with these weights, as was asked."""
        try:
            (choice,) = said["choices"]
            tokens = [int(token) for token in choice["token_ids"]]
            logprobs = [min(float(entry["logprob"]), 0.0) for entry in choice["logprobs"]["content"]]
            drawn = {str(span["version"]) for span in choice["weight_versions"]}
            drawn |= {f"{said['model']} in place of {model}"} if said["model"] != model else set()
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutError(
                f"{self.url}: an answer without tokens, log-probs and the version of its weights. Serve with vLLM 0.32 "
                "or later."
            ) from error
        if drawn != {label} or len(tokens) != len(logprobs):
            raise RolloutError(
                f"{self.url}: a completion was drawn with the weights {' and '.join(sorted(drawn))}, and the server "
                f"was given {label}: it was restarted, or somebody else loads weights into it. Give the run a server "
                "of its own, and go on with --resume."
            )
        return tokens, logprobs

    def _check_reading(self) -> None:
        """Raise unless the server gives the log-probs of the module, of the distribution that it draws from."""
        prompt = [1, 2, 3, 4, 5, 6, 7]
        weight = next(self.module.parameters())
        for temperature in (0.0, 0.5):
            params = SamplingParams(max_tokens=4, temperature=temperature)
            request = self._request(prompt, drawing(params))
            said = self._call("POST", "/inference/v1/generate", request)
            tokens, logprobs = self._read(said, self._held.label if self._held else "", request["model"])
            with nullcontext() if self._adapter is None else lora.use(self.module, self._adapter):
                ours = logprobs_of(self.module, prompt, tokens, temperature=temperature or 1.0)
            off = float((ours - torch.tensor(logprobs)).abs().mean())
            if off <= (1e-3 if weight.dtype == torch.float32 else 0.1):
                continue
            if temperature:
                raise self._lacks(
                    "gives log-probs of another distribution than it draws from", "--logprobs-mode processed_logprobs"
                )
            raise DataError(
                f"{type(self.module).__name__}: the server at {self.url} computes other log-probabilities than the "
                f"model itself (by {off:.2g}). Serve the folder of this model, with --dtype "
                f"{str(weight.dtype).removeprefix('torch.')}"
                + (", or leave sampling.adapters out." if self._called else ".")
            )

    def _lacks(self, what: str, flag: str) -> ConfigError:
        return ConfigError(f"sampling.server.url = {self.url}: the server {what}. Start it with {flag}.")

    def _late(self) -> RolloutError:
        return RolloutError(
            f"{self.url}: no answer within {self.server.timeout:g} s. Raise sampling.server.timeout, or look at what "
            "the server prints; go on with --resume."
        )

    def _silent(self, why: str) -> RolloutError:
        return RolloutError(
            f"{self.url}: no vLLM server answers there ({' '.join(why.split()).rstrip('.')}). Start it, or check "
            "sampling.server.url; a run that had begun goes on with --resume."
        )


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Held:
    """What a server holds: all weights of a module, or those below the adapters of it and of others."""

    module: nn.Module
    apart: bool
    model: str = ""
    """What the server calls the model."""
    label: str = ""
    """What the weights are called, once it has them."""


_OPEN: WeakValueDictionary[str, _Held] = WeakValueDictionary()
"""What each server holds, as long as somebody asks it."""


def _take_back(url: str, adapter: str, folder: Path) -> None:
    """Have the server forget an adapter, if it is still there, and remove its files: nobody asks it any more."""
    http = need("httpx2", "endpoint")
    with contextlib.suppress(http.HTTPError), http.Client(verify=trust(), timeout=10.0) as client:
        client.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": adapter})
    shutil.rmtree(folder, ignore_errors=True)


def _told(response: Any) -> str:
    """Why a server refuses, in a line that goes on."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = response.text
    return " ".join(said.split())[:300].partition(" (parameter=")[0].rstrip(". ") or "it says nothing"


def _write(module: nn.Module, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Weights as a model folder, a part at a time; those that are one tensor under two names are written twice."""
    folder.mkdir(parents=True)
    settings(module).save_pretrained(folder)
    part: dict[str, Tensor] = {}
    numbers = itertools.count(1)
    with torch.no_grad():
        for name, weight in weights:
            part[name] = weight.detach().to("cpu", copy=True).contiguous()
            if sum(tensor.numel() * tensor.element_size() for tensor in part.values()) >= PART:
                save_file(part, folder / f"model-{next(numbers):05}.safetensors", {"format": "pt"})
                part = {}
    if part:
        save_file(part, folder / f"model-{next(numbers):05}.safetensors", {"format": "pt"})
