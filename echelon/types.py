"""The nouns every layer shares: messages, turns, episodes, requests, and the two protocols at the edges.

Plain data. No tensors are made here and nothing heavy is imported, so `import echelon` stays instant.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

StopReason = Literal["stop", "length", "abort"]
Ending = Literal["terminated", "truncated", "failed"]


class Message(TypedDict):
    """One chat message: who speaks (`system`, `user`, `assistant`, …) and what is said."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one episode is about. An environment is deterministic given its task and the actions it receives."""

    id: str
    """Sibling episodes share it; it is the comparison key of group baselines."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the environment needs to set the task up (a secret, a question and its answer, …). JSON types."""
    seed: int = 0
    """Seeds the environment's own randomness, if it has any."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment answers to one action."""

    messages: Sequence[Message] = ()
    """What the actor sees next. May be empty only when the episode ends here."""
    reward: float = 0.0
    terminated: bool = False
    """The task is over: nothing follows, so nothing is bootstrapped."""
    truncated: bool = False
    """Cut off from outside (a time limit that is not part of the task): the value of the next state still counts."""
    info: Mapping[str, float] = field(default_factory=dict)
    """Numbers to log; the last step's end up in `Episode.metrics`."""


@dataclass(slots=True)
class Turn:
    """One model call by one role."""

    index: int
    """Position in `Episode.turns`."""
    role: str
    prompt: list[int]
    """The exact tokens the model saw."""
    action: list[int]
    """The exact tokens it sampled, the stop token included when there was one."""
    logprobs: list[float]
    """Of each action token, under the distribution it was sampled from."""
    text: str
    """The action decoded, without stop tokens: what environments, other roles and other tokenizers read."""
    parent: int | None = None
    """Index of the turn this one answers; several children make the episode a tree."""
    stop: StopReason = "stop"
    version: int = 0
    """Version of the weights that sampled it."""
    reward: float = 0.0
    """Received right after this turn."""
    seed: int = 0
    """Names the random stream it was drawn from; its answers derive theirs from it."""
    starts: tuple[int, ...] = ()
    """Where this role's earlier actions begin in the prompt: the places at which an over-long prompt is cut."""
    heard: Sequence[Message] = ()
    """What was said to this role since it last spoke on this branch: the messages behind the new part of the prompt."""
    afresh: bool = False
    """Its role began a new conversation with it: the prompt is `heard` alone, whatever it had said before."""
    info: dict[str, float] = field(default_factory=dict)
    """Numbers to log about this turn alone."""


@dataclass(slots=True)
class Episode:
    """One play of one task: a tree of turns by any number of roles."""

    task: str
    """`Task.id`: sibling episodes share it."""
    seed: int = 0
    """Every random draw of this episode derives from it."""
    turns: list[Turn] = field(default_factory=list)
    ending: Ending = "truncated"
    """Only `terminated` stops bootstrapping; `failed` episodes are counted and never trained on."""
    final: list[int] | None = None
    """Tokens of the state after the last turn: what a truncated episode bootstraps from."""
    unanswered: Sequence[Message] = ()
    """What was said after the last turn of a truncated episode: the messages behind the new part of `final`."""
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """`Task.data`: what reward functions read besides the words."""

    def of(self, role: str) -> list[Turn]:
        """The turns of one role, in the order they were taken."""
        return [turn for turn in self.turns if turn.role == role]

    def children(self, turn: Turn | None) -> list[Turn]:
        """The turns that answer `turn`; the roots for `None`."""
        parent = None if turn is None else turn.index
        return [child for child in self.turns if child.parent == parent]

    def path(self, turn: Turn | None) -> list[Turn]:
        """From the root of its branch to `turn`, both included; empty for `None`."""
        path: list[Turn] = []
        while turn is not None:
            path.append(turn)
            turn = None if turn.parent is None else self.turns[turn.parent]
        return path[::-1]

    def conversation(self, turn: Turn) -> list[Message]:
        """The prompt of `turn` as messages: what its role had heard and said on its branch before it, since it last
        began afresh. Utterances between which it heard nothing are one message.
        """
        messages: list[Message] = []
        for own in (other for other in self.path(turn) if other.role == turn.role):
            if own.afresh:
                messages.clear()
            messages += own.heard
            if own is turn:
                break
            if messages and messages[-1]["role"] == "assistant":
                messages[-1] = Message(role="assistant", content=messages[-1]["content"] + own.text)
            else:
                messages.append(Message(role="assistant", content=own.text))
        return messages

    def value(self, turn: Turn) -> float:
        """What followed from a turn: its own reward plus the mean value of its children (the return, in a chain)."""
        values = [0.0] * len(self.turns)
        sums, counts = [0.0] * len(self.turns), [0] * len(self.turns)
        for node in reversed(self.turns):  # a child always comes after its parent
            values[node.index] = node.reward + (sums[node.index] / counts[node.index] if counts[node.index] else 0.0)
            if node.parent is not None:
                sums[node.parent] += values[node.index]
                counts[node.parent] += 1
        return values[turn.index]

    @property
    def reward(self) -> float:
        """Sum of all rewards. In a tree, branches that exclude each other are all counted: use `value` there."""
        return sum(turn.reward for turn in self.turns)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw one completion; the same for every sampler."""

    max_tokens: int = 32
    temperature: float = 1.0
    """0 takes the most likely token (log-probs are then those of the untempered distribution)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this mass."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the prompt or the completion already has become less likely."""
    stop_ids: tuple[int, ...] = ()
    """Sampling one of these ends the completion; it is part of the action."""
    stop: tuple[str, ...] = ()
    """The completion ends as soon as its text contains one of these."""
    stop_when: Callable[[str], bool] | None = None
    """The completion ends as soon as this is true of its text."""
    seed: int = 0
    """Names this request's own random stream: what else is in the batch does not change what it draws."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler returns."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    stop: StopReason
    version: int = 0


class Sampler(Protocol):
    """Where tokens come from: the local engine, a server, a script, a person."""

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion of `prompt`. Concurrent calls may be batched; the result does not depend on it."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights. Samplers that read the live module only note the version."""
        ...


@runtime_checkable
class Env(Protocol):
    """One object plays one episode: made with a task (and settings), started once, stepped until it ends.

    `start` and `step` may be plain functions or coroutines. `tasks` and the constructor receive the same
    keyword settings.
    """

    @classmethod
    def tasks(cls, split: str) -> Sequence[Task]:
        """The tasks of a split, `train` or `test`, always in the same order."""
        ...

    def start(self) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """The first messages the actor sees: the instruction and the first observation."""
        ...

    def step(self, action: str) -> Step | Awaitable[Step]:
        """Answer one action. Any text must be accepted; bad text is answered within the task."""
        ...


Play = Callable[[Task, Episode], Awaitable[None]]
"""How the levels interact: fills the episode with turns, rewards, and an ending."""

Weights = Iterator[tuple[str, "Tensor"]]
