"""One vLLM in this process, and all who ask it: a model's whole weights, or the adapters of one base side by side.

It holds a copy of the weights, which `load` replaces in place, and draws from vLLM's own random streams. Token ids go
in and out; vLLM gets no tokenizer, and where a completion ends is decided by the rule that the local engine follows.
Knows nothing of how weights are trained, or of who asks.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from echelon.errors import ConfigError, DataError, EchelonError, RolloutError, need
from echelon.models import lora
from echelon.models.lm import evaluating, first_line
from echelon.sampling.cache import bytes_per_key
from echelon.sampling.copied import rank_count
from echelon.sampling.ends import Ending
from echelon.types import Completion, SamplingParams

BLOCK = 32
"""Prefixes are shared, and the cache is given out, in blocks of this many tokens."""
COLDEST = 0.01
"""vLLM raises temperatures above 0 to this."""
BASE = "base"
"""The version of weights that stay as they are, below adapters."""


@dataclass(slots=True, eq=False)
class Voice:
    """Who is asked: a model as it is, or with one of the adapters that vLLM holds beside each other."""

    module: nn.Module
    tokenizer: Any
    adapter: str | None
    """None where vLLM holds the whole weights of the module; empty for the base below its adapters."""
    version: int
    longest: int
    """Tokens that a prompt and its answer may have together."""
    cache_tokens: int
    held: Any = None
    """What vLLM calls the adapter. Every set of numbers has a name of its own, so those of older ones mean nothing."""
    checked: bool = False
    """Whether vLLM was seen to compute what the module computes with this adapter, once that says anything."""


@dataclass(slots=True, eq=False)
class _Request:
    voice: Voice
    prompt: list[int]
    params: Any
    ending: Ending
    done: asyncio.Future[Completion]
    version: int = 0
    held: Any = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """Answers whoever of its voices is asked, all in one batch. vLLM starts when it is first asked or loaded.

    The voices are one model's whole weights, or any number of adapters of one base, to which `join` adds.
    """

    def __init__(self, voice: Voice, *, concurrency: int, sleep: bool) -> None:
        self.voices = [voice]
        self.concurrency, self.sleep = concurrency, sleep
        self.vllm: Any = None
        self.running: dict[str, _Request] = {}
        self._told = ""
        self._names, self._numbers = itertools.count(), itertools.count(1)
        self._waiting: deque[_Request] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def apart(self) -> bool:
        """Whether vLLM holds adapters beside their base, rather than whole weights."""
        return self.voices[0].adapter is not None

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together, whoever is asked."""
        return max(voice.longest for voice in self.voices)

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values there is room for."""
        return max(voice.cache_tokens for voice in self.voices)

    def join(self, voice: Voice, *, sleep: bool) -> None:
        """One more adapter of the same base. vLLM sleeps where one of those who ask it lets it."""
        assert self.vllm is None, "vLLM makes room for all adapters when it starts: join before anything is asked"
        assert None not in (voice.adapter, self.voices[0].adapter), "whole weights are those of one model"
        self.voices.append(voice)
        self.sleep = self.sleep or sleep

    async def ask(self, voice: Voice, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion. Raises RolloutError for more tokens than fit, and ConfigError for parameters that vLLM does
        not know."""
        assert prompt, "a prompt needs at least one token"
        check_length(voice.longest, prompt, params)
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        ending = Ending(params, voice.tokenizer)
        self._waiting.append(_Request(voice, list(prompt), _translated(params), ending, done))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        if self.sleep and (self._watch is None or self._watch.done()):
            self._watch = asyncio.create_task(self._sleep_when_the_loop_ends())
        return await done

    def load(self, voice: Voice, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """New weights for a voice: all of them, in place of vLLM's, after which no keys and values stay; or its adapter
        as it is in the module now, of which these weights are. Without any weights, only the version changes."""
        assert not self.running, "weights change between rollouts: a completion would mix old and new ones"
        weights = iter(weights)
        first = next(weights, None)
        voice.version = version
        if first is None and self.vllm is None:
            return
        here = self.vllm is not None
        self._wake()
        if voice.adapter is None:
            if first is not None:
                self._replace(itertools.chain([first], weights))
            self._told = str(version)
            self._forget()
        elif first is not None and here:  # it starts with the adapters as they are
            weights = iter(())  # a generator that is dropped ends whatever it had begun
            self._put(voice)

    async def _run(self) -> None:
        """Serve until nothing is asked for. A failure goes to everybody who waits."""
        try:
            while self._waiting or self.running:
                await asyncio.sleep(0)  # whoever just got an answer may ask the next question in the same batch
                self._admit()
                if self.running:
                    self._step()
        except BaseException as error:
            for request in (*self._waiting, *self.running.values()):
                if not request.done.done():
                    request.done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self._waiting.clear()
            self._abort(list(self.running))
            if self.vllm is not None:
                self._forget()
            if not isinstance(error, Exception):
                raise

    def _admit(self) -> None:
        """Hand on what is asked, and take back what was given up. vLLM has its own queue."""
        self._abort([name for name, request in self.running.items() if request.done.done()])
        while self._waiting:
            request = self._waiting[0]
            if not request.done.done():
                self._wake()
                voice, name = request.voice, str(next(self._names))
                request.version, request.held = voice.version, voice.held
                prompt: Any = {"prompt_token_ids": request.prompt}
                self.vllm.add_request(name, prompt, request.params, lora_request=request.held)
                self.running[name] = request
            self._waiting.popleft()

    def _step(self) -> None:
        with _same_draws():
            outputs = self.vllm.step()
        for output in outputs:
            request = self.running.get(output.request_id)
            if request is not None:
                self._take(output.request_id, request, output.outputs[0], finished=output.finished)

    def _take(self, name: str, request: _Request, new: Any, *, finished: bool) -> None:
        """Hand a request its new tokens, and answer it if one of them ends it."""
        for token, scores in zip(new.token_ids, new.logprobs, strict=True):
            request.tokens.append(token)
            request.logprobs.append(min(scores[token].logprob, 0.0))
            try:
                reason = request.ending.reason(request.tokens)
            except Exception as error:  # the caller's own predicate: its request fails, the others go on
                if not request.done.done():
                    request.done.set_exception(error)
                reason = "abort"
            if reason is not None:
                break
        else:
            assert not finished, "vLLM ends a completion where we would"
            return
        self._check_version(request)
        del self.running[name]
        if not finished:
            self.vllm.abort_request([name])
        if not request.done.done():
            said = request.ending.completion(request.tokens, request.logprobs, reason, request.version)
            request.done.set_result(said)

    def _check_version(self, request: _Request) -> None:
        held, voice = self.vllm.get_weight_version(), request.voice
        if held == self._told and voice.held is not None:
            held = str(voice.version) if voice.held.lora_int_id in self.vllm.list_loras() else "none"
        if not held == str(voice.version) == str(request.version) or request.held is not voice.held:
            raise RolloutError(
                f"a completion was begun with weights of version {request.version} and vLLM now holds version {held}, "
                "so it may mix both. Load weights between rollouts only."
            )

    def _abort(self, names: list[str]) -> None:
        if names:
            self.vllm.abort_request(names)
        for name in names:
            del self.running[name]

    def _wake(self) -> None:
        """Make sure that vLLM runs and is awake."""
        if self.vllm is None:
            self._start()
        elif self.vllm.is_sleeping():
            self.vllm.wake_up()

    async def _sleep_when_the_loop_ends(self) -> None:
        """`asyncio.run` cancels what still waits when its rollout is over."""
        try:
            await asyncio.Event().wait()
        finally:
            self._abort(list(self.running))
            if self.vllm is not None:
                self.vllm.sleep(level=1)

    def _replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad(), _same_draws():
            self.vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _forget(self) -> None:
        """No keys and values of other weights stay, and vLLM knows which version it holds."""
        assert self.vllm.reset_prefix_cache(), "nobody is being answered, so nothing holds a key"
        self.vllm.set_weight_version(self._told)

    def _put(self, voice: Voice) -> None:
        """Give vLLM an adapter as it is now, in place of what it was.

        It goes by a number that no other one ever had, and keys and values go by it too: none of older numbers are
        found, and those of other adapters stay.
        """
        assert voice.adapter is not None
        number = next(self._numbers)
        with tempfile.TemporaryDirectory() as folder:
            lora.write(voice.module, voice.adapter, Path(folder))
            called = need("vllm.lora.request", "vllm").LoRARequest(f"{voice.adapter}-{number}", number, folder)
            if voice.held is not None:
                self.vllm.remove_lora(voice.held.lora_int_id)
                voice.held = None
            try:
                self.vllm.add_lora(called)
            except (ValueError, RuntimeError) as error:
                raise DataError(
                    f"vLLM does not take the adapter by itself ({first_line(error).rstrip('.')}). Leave "
                    "sampling.adapters out, and it is folded into the weights."
                ) from error
        voice.held = called
        if voice.adapter and not voice.checked and lora.has_learned(voice.module, voice.adapter):
            self._check_reading(voice)
            voice.checked = True

    def _start(self) -> None:
        """Start vLLM on the module's settings, give it the module's weights, and see that it reads as the module."""
        first = self.voices[0]
        try:
            with undisturbed(), tempfile.TemporaryDirectory() as folder:
                settings(first.module).save_pretrained(folder)
                self.vllm = _open(folder, self)
                with lora.off(first.module) if self.apart else nullcontext():
                    self._replace(lora.merged_weights(first.module))
                self._told = BASE if self.apart else str(first.version)
                self._forget()
                for voice in self.voices if self.apart else []:
                    self._put(voice)
                if not first.checked:
                    self._check_reading(first)
        except Exception as error:
            self.vllm = None
            for voice in self.voices:
                voice.held = None
            if isinstance(error, EchelonError):
                raise
            way = "Leave sampling.adapters out, or use" if self.apart else "Use"
            raise DataError(
                f"{type(first.module).__name__}: vLLM cannot run it ({first_line(error).rstrip('.')}). {way} "
                "--sampler local, which runs any causal model."
            ) from error

    def _check_reading(self, voice: Voice) -> None:
        """Raise DataError unless vLLM gives the log-probs that the module gives: then all weights found their place."""
        prompt = [1, 2, 3, 4, 5, 6, 7]
        params = _translated(SamplingParams(max_tokens=4, temperature=0))
        self.vllm.add_request("check", {"prompt_token_ids": prompt}, params, lora_request=voice.held)
        found: Any = None
        while self.vllm.has_unfinished_requests():
            for output in self.vllm.step():
                found = output.outputs[0]
        said = list(found.token_ids)
        theirs = torch.tensor([scores[token].logprob for token, scores in zip(said, found.logprobs, strict=True)])
        weight = next(voice.module.parameters())
        with nullcontext() if voice.adapter is None else lora.use(voice.module, voice.adapter):
            ours = logprobs_of(voice.module, prompt, said)
        if not (ours - theirs).abs().mean() <= (1e-3 if weight.dtype == torch.float32 else 0.1):
            raise DataError(
                f"{type(voice.module).__name__}: vLLM computes other log-probabilities than the model itself (by "
                f"{(ours - theirs).abs().mean():.2g}), so it could not be trained on what vLLM says. Use "
                "--sampler local."
            )


def settings(module: nn.Module) -> Any:
    """What a model folder says of a model in config.json."""
    return module.config


def logprobs_of(module: nn.Module, prompt: list[int], said: list[int], *, temperature: float = 1.0) -> Tensor:
    """Log-probs of these tokens after that prompt by the module itself, (T,), on the CPU."""
    ids = torch.tensor([prompt + said], device=next(module.parameters()).device)
    with torch.no_grad(), evaluating(module):
        logits = module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()


def check_length(longest: int, prompt: list[int], params: SamplingParams) -> None:
    """Raise RolloutError for a prompt and an answer that together are longer."""
    if len(prompt) + params.max_tokens > longest:
        raise RolloutError(
            f"a prompt of {len(prompt)} tokens and an answer of up to {params.max_tokens} do not fit the "
            f"{longest} tokens that vLLM has room for. Raise sampling.max_prompt_tokens or "
            "sampling.max_tokens, take a model with more positions, or use --sampler local."
        )


def _open(folder: str, engine: Engine) -> Any:
    """vLLM in this process, without weights yet, for the model whose settings lie in the folder."""
    arguments = need("vllm.engine.arg_utils", "vllm").EngineArgs
    vllm = need("vllm.v1.engine.llm_engine", "vllm").LLMEngine
    module = engine.voices[0].module
    whole, weight = settings(module), next(module.parameters())
    text = whole.get_text_config()
    per_token = text.num_hidden_layers * bytes_per_key(text, weight.element_size())
    return vllm.from_engine_args(
        arguments(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",
            trust_remote_code=type(whole).__module__.startswith("transformers_modules"),  # then its code runs already
            dtype=str(weight.dtype).removeprefix("torch."),
            enforce_eager=weight.device.type == "cpu",
            distributed_executor_backend="external_launcher" if rank_count() > 1 else "uni",
            async_scheduling=False,
            max_model_len=engine.longest,
            max_num_seqs=engine.concurrency,
            kv_cache_memory_bytes=engine.cache_tokens * per_token,
            block_size=BLOCK,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            enable_sleep_mode=engine.sleep,
            disable_log_stats=True,
            **_room_for_adapters(engine),
        )
    )


def _room_for_adapters(engine: Engine) -> dict[str, Any]:
    """vLLM's settings for as many adapters at once as there are voices."""
    if not engine.apart:
        return {}
    count, widest = len(engine.voices), max(width(voice.module, voice.adapter or "") for voice in engine.voices)
    rank = min(fitting for fitting in ranks() if fitting >= widest)
    return {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": rank}


def width(module: nn.Module, adapter: str) -> int:
    """The rank of an adapter; that of the base below has the first one's."""
    found = lora.widths(module)
    return found[adapter or next(iter(found))]


def ranks() -> tuple[int, ...]:
    """The ranks that vLLM makes room for: an adapter gets the next larger one."""
    found: tuple[int, ...] = get_args(need("vllm.config.lora", "vllm").MaxLoRARanks)
    return found


def drawing(params: SamplingParams) -> dict[str, Any]:
    """How vLLM is told to draw, by the names it has for it. Raises ConfigError for temperatures it would change."""
    if 0 < params.temperature < COLDEST:
        raise ConfigError(
            f"temperature = {params.temperature}: vLLM draws at {COLDEST} or more. Give 0 for the most likely token, "
            "or use --sampler local."
        )
    return {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "repetition_penalty": params.repetition_penalty,
        "seed": params.seed,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,
    }


def _translated(params: SamplingParams) -> Any:
    """The same for vLLM in this process. Raises ConfigError, one line, for what it refuses."""
    vllm = need("vllm.sampling_params", "vllm")
    drawn, watched = drawing(params), params.stop or params.stop_when is not None
    kind = vllm.RequestOutputKind.DELTA if watched else vllm.RequestOutputKind.FINAL_ONLY
    try:
        return vllm.SamplingParams(**drawn, output_kind=kind)
    except (ValueError, need("vllm.exceptions", "vllm").VLLMError) as error:
        reason = first_line(error).partition(" (parameter=")[0].rstrip(".")
        raise ConfigError(f"vLLM cannot draw so: {reason}. Change that setting, or use --sampler local.") from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """What starting vLLM changes in its process and may not: threads, random numbers, variables, warnings."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.update({name: os.environ.get(name, value) for name, value in quiet.items()})
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with _same_draws(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        for name in [name for name in os.environ if not name.startswith("VLLM_") and name not in variables]:
            del os.environ[name]
        os.environ.update(variables)


@contextmanager
def _same_draws() -> Iterator[None]:
    """The process's random numbers go on as if nothing had been drawn within."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
