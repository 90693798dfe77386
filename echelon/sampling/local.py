"""The in-process engine: samples from the live module, many conversations at a time.

There is no copy of the weights and no staleness, and the log-probabilities are the trainer's own. A conversation keeps
its keys and values between turns, found again by token ids; requests join and leave the running batch at every step;
each draws from its own random stream, so what else is in the batch does not change what it samples.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from echelon.models import lora
from echelon.models.lm import evaluating
from echelon.ops.sampling import counter_uniform, draw, penalise_repetition, restrict_logits
from echelon.sampling.cache import BLOCK, Cache, Resident, default_budget
from echelon.sampling.ends import Ending
from echelon.sampling.plain import OneByOne, Unshared
from echelon.sampling.ragged import Piece, Ragged, reads_like_the_model
from echelon.types import Completion, SamplingParams, StopReason

PASS_TOKENS = 2048
"""Most tokens in one forward pass; longer prompts are read in several, beside conversations that already answer."""


@dataclass(slots=True, eq=False)
class _Request:
    prompt: list[int]
    params: SamplingParams
    done: asyncio.Future[Completion]
    ending: Ending
    resident: Resident | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalSampler:
    """Samples from a Hugging Face causal LM in this process. Concurrent calls of `sample` are batched.

    `concurrency` bounds how many answers are written at once, `cache_tokens` how many tokens of conversations are
    kept (by default what fits a quarter of the memory): more requests wait, and when a new one needs room, the
    conversations idle for longest are forgotten (and read again should they come back). Of a module with several
    adapters, `adapter` names the one that speaks here; without it, the one that speaks when a rollout begins.

    With `copies` the module is this engine's own: `load` copies the weights it is given into it, while those they came
    from go on learning.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        concurrency: int = 256,
        cache_tokens: int | None = None,
        version: int = 0,
        adapter: str = "",
        copies: bool = False,
    ) -> None:
        self.module = module
        self.copies = copies
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.version = version
        self.concurrency = concurrency
        self.cache_tokens = cache_tokens or default_budget(module)
        self.pass_tokens = PASS_TOKENS
        self._model, self._new_cache = self._path()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._pump: asyncio.Task[None] | None = None
        self._forget()

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered, nor what was given up still being dropped."""
        return not self._running

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion. `params.seed` alone decides what is drawn, given the prompt and the weights."""
        assert prompt, "a prompt needs at least one token"
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(list(prompt), params, done, Ending(params, self.tokenizer)))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return await done

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Resident keys and values are those of the old weights and go. A live module has the new ones already; into
        one of this engine's own they are copied, all of them, by their names."""
        assert not self._running, "weights change between rollouts: a completion would mix old and new ones"
        if self.copies:
            copy_weights(self.module, weights)
        self.version = version
        self._forget()

    def _path(self) -> tuple[Ragged | OneByOne, Callable[[], Cache]]:
        """How the module is run: many conversations in one pass, or each alone if that does not give its own logits."""
        try:
            ragged = Ragged(self.module)
            with evaluating(self.module):
                reads = reads_like_the_model(ragged)
            reason = "" if reads else "it does not look its attention up by name"
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not reason:
            return ragged, lambda: Cache(self.cache_tokens)
        warnings.warn(
            f"{type(self.module).__name__} cannot read several conversations in one pass, so completions are written "
            f"one after the other, which is slow. {reason}",
            stacklevel=3,
        )
        return OneByOne(self.module), Unshared

    def _forget(self) -> None:
        self._weights = self._fingerprint()
        self._cache = self._new_cache()

    def _fingerprint(self) -> tuple[int, str]:
        """Another one once weights have changed or another adapter speaks: keys and values are then void."""
        versions = sum(parameter._version for parameter in self.module.parameters())
        return versions, self.adapter or lora.speaking(self.module)

    def _speaking(self) -> AbstractContextManager[None]:
        return lora.use(self.module, self.adapter) if self.adapter else nullcontext()

    async def _run(self) -> None:
        """Serve until nothing is asked for. A failure goes to everybody who waits."""
        self.module.eval()  # in training mode, gradient checkpointing would get in the way
        try:
            while self._waiting or self._running:
                await asyncio.sleep(0)  # whoever just got an answer may ask the next question in the same batch
                self._admit()
                if self._running:
                    with self._speaking():
                        self._step()
        except BaseException as error:
            for request in (*self._waiting, *self._running):
                if not request.done.done():
                    request.done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self._waiting.clear()
            self._running = []
            self._forget()
            if not isinstance(error, Exception):
                raise

    @torch.inference_mode()
    def _admit(self) -> None:
        """Give whoever fits a place. What is known of a prompt from other conversations is not computed again; what is
        just being computed for another one is waited for."""
        if not self._running and self._fingerprint() != self._weights:
            self._forget()  # the module was trained since: keys and values of the old weights are void
        later: list[_Request] = []
        try:
            while self._waiting and len(self._running) < self.concurrency:
                request = self._waiting.popleft()
                if request.done.done():
                    continue  # given up
                later.append(request)  # until it has a place
                source, shared = self._cache.find(request.prompt)
                if source is not None and min(shared, len(request.prompt) - 1) >= source.known + BLOCK:
                    continue
                length = len(request.prompt) + min(request.params.max_tokens, self.cache_tokens)
                request.resident = self._cache.open(request.prompt, length, source, shared, must=not self._running)
                if request.resident is None:
                    break
                self._running.append(later.pop())
        finally:  # should the memory end here, those without a place are told, too
            self._waiting.extendleft(reversed(later))

    @torch.inference_mode()
    def _step(self) -> None:
        """One forward pass: a token for everybody whose prompt is read, and a part of the prompts that are not."""
        pieces: list[Piece] = []
        answering: list[_Request] = []
        wanted: list[int] = []
        room = max(self.pass_tokens - len(self._running), 1)
        for request in self._running:
            assert request.resident is not None
            left = len(request.prompt) - request.resident.known
            if left <= 0:
                self._cache.grow(request.resident, request.resident.known + 1)
                pieces.append(Piece(request.resident, request.tokens[-1:]))
            elif room:
                start = request.resident.known
                pieces.append(Piece(request.resident, request.prompt[start : start + room]))
                room -= min(room, left)
            else:
                continue
            if left <= len(pieces[-1].tokens):
                wanted.append(len(pieces) - 1)
                answering.append(request)
        logits = self._model(pieces, wanted)
        if answering:
            self._finish(answering, *self._draw(answering, logits))

    def _draw(self, requests: Sequence[_Request], logits: Tensor) -> tuple[list[int], list[float]]:
        params = [request.params for request in requests]
        device = logits.device
        if any(param.repetition_penalty != 1 for param in params):
            penalty = torch.tensor([param.repetition_penalty for param in params])
            logits = penalise_repetition(logits, penalty, [request.prompt + request.tokens for request in requests])
        if any(param.temperature != 1 or param.top_k > 0 or param.top_p < 1 for param in params):
            logits = restrict_logits(
                logits,
                temperature=torch.tensor([param.temperature or 1.0 for param in params], device=device),
                top_k=torch.tensor([param.top_k for param in params], device=device),
                top_p=torch.tensor([param.top_p for param in params], device=device),
            )
        seeds = torch.tensor([param.seed for param in params])
        counts = torch.tensor([len(request.tokens) for request in requests])
        chosen, logprobs = draw(logits, counter_uniform(seeds, counts).to(device))
        if any(param.temperature == 0 for param in params):
            greedy = torch.tensor([param.temperature == 0 for param in params], device=device)
            chosen = torch.where(greedy, logits.argmax(-1), chosen)
            logprobs = torch.log_softmax(logits, dim=-1).gather(-1, chosen[:, None])[:, 0]
        return chosen.tolist(), logprobs.tolist()

    def _finish(self, requests: Sequence[_Request], drawn: list[int], logprobs: list[float]) -> None:
        """Hand every request its token, and answer those that are complete."""
        left: set[_Request] = set()
        for request, token, logprob in zip(requests, drawn, logprobs, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            try:
                reason = request.ending.reason(request.tokens)
            except Exception as error:  # the caller's own predicate: its request fails, the others go on
                request.done.set_exception(error)
                reason = "abort"
            if reason is not None or request.done.done():
                self._answer(request, reason or "abort")
                left.add(request)
        if left:
            self._running = [request for request in self._running if request not in left]

    def _answer(self, request: _Request, reason: StopReason) -> None:
        assert request.resident is not None
        self._cache.note(request.resident, request.prompt + request.tokens[:-1])  # the last one was never read
        self._cache.rest(request.resident)
        if not request.done.done():
            said = request.ending.completion(request.tokens, request.logprobs, reason, self.version)
            request.done.set_result(said)


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the module's by name: all of them, and of those that are one, any."""
    own = module.state_dict(keep_vars=True)
    filled = set()
    for name, tensor in weights:
        own[name].copy_(tensor)
        filled.add(id(own[name]))
    missing = sorted(name for name, tensor in own.items() if id(tensor) not in filled)
    assert not missing, f"weights that were not given would stay old: {missing[:3]}"
