"""The in-process engine: samples from the live module, many conversations at a time.

There is no copy of the weights and no staleness, and the log-probabilities are the trainer's own. A conversation keeps
its keys and values between turns, found again by token ids; requests join and leave the running batch at every step;
each draws from its own random stream, so what else is in the batch does not change what it samples.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from echelon.models.lm import AttentionForm, head_reads
from echelon.ops.sampling import counter_uniform, restrict_logits, sample_from
from echelon.types import Completion, SamplingParams, StopReason

GROW = 64
"""Cache capacity grows in multiples of this many positions."""
SHARE_FROM = 16
"""Prompts that have at least this many first tokens in common with a resident conversation copy its keys and values."""
PREFILL_TOKENS = 8192
"""Most tokens, padding included, that are prefilled in one forward pass."""


@dataclass(slots=True)
class _Request:
    prompt: list[int]
    params: SamplingParams
    done: asyncio.Future[Completion]
    stop_ids: frozenset[int]
    text: _Text | None
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Slots(Cache):
    """Keys and values of many conversations, one slot each, as Hugging Face models expect a cache to look.

    `view` says which slots the next forward pass works on and where in them its tokens go; `update` writes there and
    returns everything up to the longest row. What lies beyond a row's length is garbage that the mask hides.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows: slice | Tensor = slice(0, 0)
        self.positions = torch.empty(0, 0, dtype=torch.long)
        self.width = 0

    def view(self, rows: slice | Tensor, positions: Tensor) -> None:
        """The next pass reads and writes these slots, its tokens at `positions` (rows × tokens)."""
        self.rows, self.positions = rows, positions
        self.width = int(positions.max()) + 1
        if self.width > self.capacity:
            self._grow(self.width)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values (rows, heads, tokens, width) and return those of the whole rows."""
        while len(self.keys) <= layer_idx:
            for store in (self.keys, self.values):
                store.append(torch.empty(0))
        if self.keys[layer_idx].numel() == 0:
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                shape = (self.slots, states.shape[1], self.capacity, states.shape[3])
                store[layer_idx] = states.new_zeros(shape)
        return self._put(self.keys[layer_idx], key_states), self._put(self.values[layer_idx], value_states)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give one slot the first positions of another."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not meaningful per batch: positions and masks are always passed explicitly."""
        return 0

    def _put(self, store: Tensor, states: Tensor) -> Tensor:
        rows = torch.arange(len(store), device=store.device)[self.rows] if isinstance(self.rows, slice) else self.rows
        store[rows[:, None], :, self.positions] = states.transpose(1, 2)
        return store[self.rows, :, : self.width]

    def _grow(self, width: int) -> None:
        self.capacity = max(-(-width // GROW) * GROW, self.capacity * 3 // 2 // GROW * GROW)
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                bigger = store.new_zeros(store.shape[0], store.shape[1], self.capacity, store.shape[3])
                bigger[:, :, : store.shape[2]] = store
                stores[layer] = bigger


class _Text:
    """Text of tokens as they arrive, decoding only the newest ones: for stop strings and predicates."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self.context, self.read = 0, 0

    def add(self, tokens: Sequence[int]) -> str:
        """The whole text so far; `tokens` are all tokens so far."""
        before = self.tokenizer.decode(tokens[self.context : self.read], skip_special_tokens=True)
        after = self.tokenizer.decode(tokens[self.context :], skip_special_tokens=True)
        if not after.endswith("\ufffd"):  # an incomplete character waits for its remaining bytes
            self.text += after[len(before) :]
            self.context, self.read = self.read, len(tokens)
        return self.text


class LocalSampler:
    """Samples from a Hugging Face causal LM in this process. Concurrent calls of `sample` are batched.

    `slots` bounds how many conversations are resident at once; more wait, and when a new one needs room the one idle
    for longest is forgotten (and prefilled again should it come back).
    """

    def __init__(self, module: nn.Module, tokenizer: Any, *, slots: int = 256, version: int = 0) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.version = version
        self.slots = slots
        self._weight = next(module.parameters())
        self._form = AttentionForm(module)
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._pump: asyncio.Task[None] | None = None
        self._forget()

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion. `params.seed` alone decides what is drawn, given the prompt and the weights."""
        assert prompt, "a prompt needs at least one token"
        text = _Text(self.tokenizer) if params.stop or params.stop_when else None
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(list(prompt), params, done, frozenset(params.stop_ids), text))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return await done

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The live module already has the weights; resident keys and values are those of the old ones and go."""
        assert not self._running, "weights change between rollouts: a completion would mix old and new ones"
        self.version = version
        self._forget()

    def _forget(self) -> None:
        self._weights = self._fingerprint()
        self._cache = _Slots(self.slots)
        self._ids: list[list[int]] = [[] for _ in range(self.slots)]
        self._idle: dict[int, None] = dict.fromkeys(range(self.slots))  # in the order in which they were last used
        self._found: dict[tuple[int, ...], list[int]] = {}  # idle slots by the ids they hold
        self._lengths: Counter[int] = Counter()

    def _fingerprint(self) -> int:
        return sum(parameter._version for parameter in self.module.parameters())

    async def _run(self) -> None:
        """Serve until nothing is asked for. A failure goes to everybody who waits."""
        try:
            while self._waiting or self._running:
                await asyncio.sleep(0)  # whoever just got an answer may ask the next question in the same batch
                if self._admissible():
                    self._prefill()
                if self._running:
                    self._finish(self._decode())
        except BaseException as error:
            for request in (*self._waiting, *self._running):
                if not request.done.done():
                    request.done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self._waiting, self._running = [], []
            self._forget()
            if not isinstance(error, Exception):
                raise

    def _admissible(self) -> bool:
        """Prefill in batches: once as many can join as are a third of those that run, or nothing runs."""
        ready = min(len(self._waiting), len(self._idle))
        return ready > 0 and 3 * ready >= len(self._running)

    @torch.inference_mode()
    def _prefill(self) -> None:
        """Admit whoever fits. Those whose conversation is resident continue it; of the others, each prefix that
        several share is computed once, in one of them, and copied to the rest."""
        if not self._running and self._fingerprint() != self._weights:
            self._forget()  # the module was trained since: keys and values of the old weights are void
        count = len(self._idle)
        admitted, self._waiting = self._waiting[:count], self._waiting[count:]
        self._running += admitted  # before any work, so that its failure reaches them
        fresh: list[tuple[_Request, int]] = []
        unknown = [request for request in admitted if not self._continues(request, fresh)]
        followers: list[tuple[_Request, _Request, int]] = []
        leader: _Request | None = None
        for request in sorted(unknown, key=lambda request: request.prompt, reverse=True):
            shared = 0 if leader is None else _shared(leader.prompt, request.prompt)
            if leader is not None and shared >= max(SHARE_FROM, len(request.prompt) // 2):
                followers.append((request, leader, shared))
            else:
                leader = request
                fresh.append((request, self._begin(request)))
        self._prefill_all(fresh)
        copied = []
        for request, leader, shared in followers:
            self._occupy(request, next(iter(self._idle)))
            known = min(shared, len(leader.prompt) - 1, len(request.prompt) - 1)
            self._cache.copy_prefix(leader.slot, request.slot, known)
            self._ids[request.slot] = request.prompt[:known]
            copied.append((request, known))
        self._prefill_all(copied)

    def _prefill_all(self, admitted: list[tuple[_Request, int]]) -> None:
        """Compute what is not yet known of each prompt, rows of similar length together."""
        group: list[tuple[_Request, int]] = []
        for pair in sorted(admitted, key=lambda pair: len(pair[0].prompt) - pair[1]):
            fresh = len(pair[0].prompt) - pair[1] - 1  # the prompt's last token is fed by the first decoding step
            if group and (len(group) + 1) * fresh > PREFILL_TOKENS:
                self._prefill_group(group)
                group = []
            if fresh:
                group.append(pair)
        if group:
            self._prefill_group(group)

    def _prefill_group(self, group: list[tuple[_Request, int]]) -> None:
        width = max(len(request.prompt) - known - 1 for request, known in group)
        tokens = torch.zeros(len(group), width, dtype=torch.long)
        starts = torch.tensor([known for _, known in group])
        for row, (request, known) in enumerate(group):
            fresh = request.prompt[known:-1]
            tokens[row, : len(fresh)] = torch.tensor(fresh)
        rows = torch.tensor([request.slot for request, _ in group])
        ends = torch.tensor([len(request.prompt) - 1 for request, _ in group])
        # Padding goes where the prompt's last token will, and not on: a learned position may not exist that far.
        self._forward(tokens, rows, torch.minimum(starts[:, None] + torch.arange(width), ends[:, None]))
        for request, _ in group:
            self._ids[request.slot] = request.prompt[:-1]

    def _continues(self, request: _Request, fresh: list[tuple[_Request, int]]) -> bool:
        """Take the slot of the conversation this prompt continues, if it is resident and idle."""
        prompt = request.prompt
        for length in sorted(self._lengths, reverse=True):
            if length < len(prompt) and (slots := self._found.get(tuple(prompt[:length]))):
                self._occupy(request, slots[0])
                fresh.append((request, length))
                return True
        return False

    def _begin(self, request: _Request) -> int:
        """Take the slot idle for longest; how many first tokens of the prompt could be copied from another one."""
        slot = next(iter(self._idle))
        known, source = self._longest_shared(request.prompt)
        self._occupy(request, slot)
        if known < SHARE_FROM:
            known = 0
        elif source != slot:
            self._cache.copy_prefix(source, slot, known)
        self._ids[slot] = request.prompt[:known]
        return known

    def _occupy(self, request: _Request, slot: int) -> None:
        self._take(slot)
        request.slot = slot

    def _take(self, slot: int) -> None:
        del self._idle[slot]
        key = tuple(self._ids[slot])
        if slot in self._found.get(key, ()):
            self._found[key].remove(slot)
            self._lengths[len(key)] -= 1
            if not self._found[key]:
                del self._found[key]
            if not self._lengths[len(key)]:
                del self._lengths[len(key)]

    def _longest_shared(self, prompt: list[int]) -> tuple[int, int]:
        """The most first tokens of a prompt, its last one left out, that some slot holds, and the slot."""
        best, source = 0, -1
        for slot, ids in enumerate(self._ids):
            if len(ids) > best and ids[: best + 1] == prompt[: best + 1]:
                best, source = min(_shared(ids, prompt), len(prompt) - 1), slot
        return best, source

    @torch.inference_mode()
    def _decode(self) -> tuple[list[int], list[float]]:
        """One token for every running request."""
        requests = self._running
        last = [request.tokens[-1] if request.tokens else request.prompt[-1] for request in requests]
        lengths = [len(self._ids[request.slot]) for request in requests]
        slots = [request.slot for request in requests]
        low, high = min(slots), max(slots) + 1
        if high - low <= 2 * len(slots):  # mostly contiguous: work on a view, and let the gaps compute garbage
            tokens, positions = torch.zeros(high - low, 1, dtype=torch.long), torch.zeros(high - low, dtype=torch.long)
            at = torch.tensor(slots) - low
            positions[:] = torch.tensor([len(self._ids[slot]) for slot in range(low, high)])
            tokens[at, 0] = torch.tensor(last)
            logits = self._forward(tokens, slice(low, high), positions[:, None])[at]
        else:
            logits = self._forward(torch.tensor(last)[:, None], torch.tensor(slots), torch.tensor(lengths)[:, None])
        for request, token in zip(requests, last, strict=True):
            self._ids[request.slot].append(token)
        return self._draw(requests, logits.float())

    def _draw(self, requests: list[_Request], logits: Tensor) -> tuple[list[int], list[float]]:
        params = [request.params for request in requests]
        seeds = torch.tensor([param.seed for param in params])
        counts = torch.tensor([len(request.tokens) for request in requests])
        greedy = torch.tensor([param.temperature == 0 for param in params])
        shaped = restrict_logits(
            logits,
            temperature=torch.tensor([param.temperature or 1.0 for param in params]).to(logits),
            top_k=torch.tensor([param.top_k for param in params], device=logits.device),
            top_p=torch.tensor([param.top_p for param in params]).to(logits),
        )
        uniforms = counter_uniform(seeds, counts).to(logits.device)
        chosen = torch.where(greedy.to(logits.device), logits.argmax(-1), sample_from(shaped, uniforms))
        logprobs = torch.log_softmax(shaped, dim=-1).gather(-1, chosen[:, None])[:, 0]
        return chosen.tolist(), logprobs.tolist()

    def _forward(self, tokens: Tensor, rows: slice | Tensor, positions: Tensor) -> Tensor:
        """Logits after the last token of each row (rows × vocabulary); keys and values are stored on the way."""
        device = self._weight.device
        tokens, positions = tokens.to(device), positions.to(device)
        self._cache.view(rows.to(device) if isinstance(rows, Tensor) else rows, positions)
        distance = positions[:, None, :, None] - torch.arange(self._cache.width, device=device)
        with head_reads(self.module, lambda hidden: hidden[:, -1:]):
            output = self.module(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=self._form(distance >= 0, distance, self._weight.dtype),
                past_key_values=self._cache,
                use_cache=True,
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _finish(self, drawn: tuple[list[int], list[float]]) -> None:
        """Hand every request its token, and answer those that are complete."""
        running = []
        for request, token, logprob in zip(self._running, *drawn, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            reason = self._stops(request, token)
            if reason is None and not request.done.done():
                running.append(request)
            else:
                self._release(request, reason or "abort")
        self._running = running

    def _stops(self, request: _Request, token: int) -> StopReason | None:
        params = request.params
        if token in request.stop_ids:
            return "stop"
        if request.text is not None:
            text = request.text.add(request.tokens)
            if any(stop in text for stop in params.stop) or (params.stop_when is not None and params.stop_when(text)):
                return "stop"
        return "length" if len(request.tokens) >= params.max_tokens else None

    def _release(self, request: _Request, reason: StopReason) -> None:
        slot = request.slot
        self._idle[slot] = None
        key = tuple(self._ids[slot])
        self._found.setdefault(key, []).append(slot)
        self._lengths[len(key)] += 1
        if not request.done.done():
            ended = reason == "stop" and request.tokens[-1] in request.stop_ids
            said = request.tokens[:-1] if ended else request.tokens
            text = str(self.tokenizer.decode(said, skip_special_tokens=True))
            request.done.set_result(Completion(request.tokens, request.logprobs, text, reason, self.version))


def _shared(one: list[int], other: list[int]) -> int:
    """How many first tokens two sequences have in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
