"""Chat: talk to a model or a run, at the keyboard or through a pipe. Nothing is learned.

A policy answers as it is. In a run of rank the ranker picks every answer among several candidates, in a run of archer
the critic if more than one is asked for; all of them are shown with what each is thought to be worth. In a run of tosca
the strategist chooses how to reply, which is shown beside the values of the other strategies, and the responder writes
the reply. In a run of feedback every message is a problem: the solver attempts it, the coach says something about that,
and the answer is the solver's last attempt. Answers appear as they are written. Three lines are for the console: clear,
exit, save FILE.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from echelon.config import CommandConfig, ModelConfig, SamplingConfig, demand, require
from echelon.errors import ConfigError, EchelonError
from echelon.models.reward import most_positions
from echelon.rollout.candidates import step_record
from echelon.rollout.dialogue import RESPONDER, Dialogists, choice_record, fitted, named, reading
from echelon.rollout.feedback import COACH, SOLVER, Shape, feedback_tree
from echelon.rollout.levels import has_levels, open_dialogists
from echelon.rollout.players import env_of_run, open_policy
from echelon.rollout.roles import Role
from echelon.rollout.round_players import open_round_players, run_of, solver_path
from echelon.rollout.rounds import RoundPlayers
from echelon.rollout.setup import describe, set_threads
from echelon.sampling.candidates import Chooser
from echelon.seeds import derive_seed
from echelon.text.dialogue import ASSISTANT, USER, DialogueState, strategist_prompt
from echelon.train.checkpoint import Label
from echelon.types import Episode, Message, Play, SamplingParams, Step, Task, Turn

FOLDER = "model.path"
"""What a run directory or another model means that is named before the flags."""
EXAMPLES = """\
echelon chat runs/sft                                   the best model of a run, else its newest
echelon chat runs/archer --candidates 8                 the critic picks among eight answers
echelon chat runs/tosca                                 a strategist and a responder
echelon chat runs/sft < questions.txt > answers.txt     by pipe: a message in each line"""
MAX_TOKENS, MAX_PROMPT_TOKENS = 512, 4096
"""Lengths where neither the settings nor a run of feedback say them."""

Tell = Callable[[Mapping[str, Any]], None]
"""Told what a reply was chosen from, before it is said; or the turns that come before it, all of them every time, as
they grow."""
Show = Callable[[str], bool]
"""Shown the reply as it grows, all of it every time; False, so that it goes on."""


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of a conversation."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Who answers: a run directory, a checkpoint, a model folder or a hub id."""
    label: Label = "auto"
    """Which model of a run: that of a step, the latest, or the best that it kept; auto is the best, or else the
    latest."""
    strategist: str = ""
    """A run or folder of a strategist, which chooses how to reply; a run of tosca has its own."""
    candidates: int = 0
    """The ranker or critic of a run picks every answer among this many; 0 takes as many as a ranker was trained with,
    and 1 elsewhere: what the model draws."""
    system: str = ""
    """System message."""
    system_file: str = ""
    """File that the system message is read from."""
    start_file: str = ""
    """File whose text begins the conversation: it stands before the first message."""
    emotion: str = ""
    """What the user feels, where a strategist or responder is told; at a terminal it is asked for."""
    description: str = ""
    """What the conversation is about, likewise."""
    max_tokens: int = 0
    """Longest answer, in tokens; 0 is 512, and of a run of feedback what each level had in training."""
    max_prompt_tokens: int = 0
    """Most tokens of the conversation that are read, or what the model can read; the oldest exchange is dropped
    first. 0 is 4096, and of a run of feedback what each level had in training."""
    temperature: float = 0.2
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens only; 0 keeps all."""
    top_p: float = 0.9
    """Draw from the smallest set of tokens with at least this probability."""
    repetition_penalty: float = 1.2
    """Above 1, tokens that the conversation already has become less likely."""
    greedy: bool = False
    """Always take the most likely token, whatever the temperature."""
    stop: tuple[str, ...] = ()
    """An answer ends as soon as its text contains one of these."""
    json: bool = False
    """Through a pipe, a line of JSON for every message, with what its answer was chosen from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "model.path")
        for name in ("max_tokens", "max_prompt_tokens"):
            demand(self, name, getattr(self, name) >= 0, "tokens are counted. Give 1 or more, or 0 for the usual.")
        at = not isinstance(self.label, int) or self.label >= 0
        demand(self, "label", at, "steps are counted from 0. Give one of those in <run>/checkpoints.")
        demand(self, "candidates", self.candidates >= 0, "they are counted. Give 1 to let the model say what it draws.")
        one = not (self.system and self.system_file)
        demand(self, "system_file", one, "system says it already. Keep one of the two.")
        demand(self, "temperature", self.temperature >= 0, "probabilities would be turned around. Give 0 or more.")
        demand(self, "top_k", self.top_k >= 0, "it counts tokens. Give 0 to keep all.")
        demand(self, "top_p", 0 < self.top_p <= 1, "it is a probability that must be kept. Give 1 to keep all.")
        demand(self, "repetition_penalty", self.repetition_penalty > 0, "it divides. Give 1 to leave it out.")
        demand(self, "stop", "" not in self.stop, "every text contains the empty text. Leave it out.")


class Partner(Protocol):
    """Who answers."""

    modules: dict[str, nn.Module]
    roles: list[Role]
    """Those who speak."""

    async def answer(self, said: str, tell: Tell, show: Show) -> str:
        """The reply to a message; the conversation goes on with both."""
        ...

    def clear(self) -> None:
        """Begin a new conversation."""
        ...

    def transcript(self) -> dict[str, Any]:
        """The conversation so far, as a row of data: `messages`, and what else was known."""
        ...


class Policy:
    """One model, alone or with what picks among its candidates. It continues the exact tokens of the conversation."""

    def __init__(self, role: Role, module: nn.Module, *, opening: Sequence[Message], start: str, seed: int) -> None:
        self.role, self.modules, self.roles = role, {role.name: module}, [role]
        self._opening, self._start, self._seed, self._conversations = list(opening), start, seed, 0
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation, with random draws of its own."""
        self._episode = Episode("chat", seed=derive_seed(self._seed, "chat", self._conversations))
        self._last: Turn | None = None
        self._conversations += 1

    async def answer(self, said: str, tell: Tell, show: Show) -> str:
        """What the model says, as it is drawn; or the candidate that is picked, told with the others beforehand."""
        first = self._last is None
        heard = [*(self._opening if first else ()), _message("user", self._start + said if first else said)]
        chooser = self.role.sampler if isinstance(self.role.sampler, Chooser) else None
        turn = await self.role.act(self._episode, heard, self._last, stop_when=None if chooser else show)
        if chooser:
            tell(step_record(chooser.take()[turn.seed]))
        self._last = turn
        return turn.text

    def transcript(self) -> dict[str, Any]:
        """The messages, the system's included."""
        if self._last is None:
            return {"messages": []}
        return {"messages": [*self._episode.conversation(self._last), _message("assistant", self._last.text)]}


class Levels:
    """A strategist, if there is one, and a responder: both read the conversation anew at every turn."""

    def __init__(self, who: Dialogists, modules: dict[str, nn.Module], *, emotion: str, description: str, seed: int):
        self.who, self.modules, self.roles = who, modules, [who.responder]
        self.emotion, self.description = emotion, description
        self._seed, self._conversations = seed, 0
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation about the same."""
        self._episode = Episode("chat", seed=derive_seed(self._seed, "chat", self._conversations))
        self._last: Turn | None = None
        self._said: list[tuple[str, str]] = []
        self._conversations += 1

    async def answer(self, said: str, tell: Tell, show: Show) -> str:
        """The strategy that is chosen, told with the values of all, and the reply that follows it."""
        state = DialogueState(said, tuple(self._said), self.emotion, self.description)
        turn, label = self._last, None
        if self.who.strategist is not None:
            asked = fitted(self.who.strategist, state, lambda known: strategist_prompt(known, self.who.inventory))
            turn = await self.who.strategist.act(self._episode, asked, turn, afresh=True)
            label = named(self.who.inventory, turn.text)
            tell(choice_record(self.who.take()[turn.seed], self.who.inventory))
        heard = reading(self.who.responder, state, label)
        self._last = await self.who.responder.act(self._episode, heard, turn, afresh=True, stop_when=show)
        self._said += [(USER, said), (ASSISTANT, self._last.text)]
        return self._last.text

    def transcript(self) -> dict[str, Any]:
        """The messages, what was felt and what it was about."""
        roles = {USER: "user", ASSISTANT: "assistant"}
        messages = [_message(roles[speaker], text) for speaker, text in self._said]
        return {"emotion": self.emotion, "description": self.description, "messages": messages}


class Rounds:
    """A solver, and a coach if there is one. Every message is a problem of its own, played as in training: nobody
    knows the ones before. The answer is the solver's last attempt."""

    def __init__(self, who: RoundPlayers, *, rounds: int, opening: Sequence[Message], start: str, seed: int) -> None:
        self.who, self.modules = who, who.modules
        self.roles = [who.solver] if who.coach is None else [who.solver, who.coach]
        self._rounds, self._opening, self._start, self._seed = rounds, list(opening), start, seed
        self._conversations = 0
        self.clear()

    def clear(self) -> None:
        """Forget the problems so far; the next ones have random draws of their own."""
        self._drawn = derive_seed(self._seed, "chat", self._conversations)
        self._asked = 0
        self._said: list[Message] = []
        self._turns: list[list[dict[str, str]]] = []
        self._conversations += 1

    async def answer(self, said: str, tell: Tell, show: Show) -> str:
        """The last attempt, shown as it grows; the turns before it are told as they do."""
        problem = _message("user", self._start + said)
        episode = Episode("chat", seed=derive_seed(self._drawn, self._asked))
        self._asked += 1
        before = len(self.roles) * self._rounds if self.who.context != "example" else 1

        def grows(text: str) -> bool:
            *done, last = episode.turns
            if len(done) < before:
                tell({"turns": [*_spoken(done), {"role": last.role, "text": text}]})
                return False
            tell({"turns": _spoken(done)})
            return show(text)

        await self._play([*self._opening, problem], grows)(Task("chat"), episode)
        *done, last = episode.turns
        tell({"turns": _spoken(done)})
        self._said += [problem, _message("assistant", last.text)]
        self._turns.append(_spoken(done))
        return last.text

    def transcript(self) -> dict[str, Any]:
        """Problems and answers, and for each answer the turns that came before it."""
        return {"messages": [*(self._opening if self._said else ()), *self._said], "turns": self._turns}

    def _play(self, problem: Sequence[Message], grows: Show) -> Play:
        """How a problem is solved, one attempt and one remark at a time."""
        heard = [Role(r.name, r.sampler, r.renderer, replace(r.params, stop_when=grows)) for r in self.roles]
        return feedback_tree(
            lambda task: _Unjudged(problem),
            heard[0],
            heard[1] if len(heard) > 1 else None,
            shape=Shape(rounds=self._rounds),
            templates=self.who.templates,
            context=self.who.context,
            fixed=self.who.fixed,
        )


class _Unjudged:
    """A problem that somebody typed: nobody knows its answer, so no attempt earns anything."""

    def __init__(self, problem: Sequence[Message]) -> None:
        self.problem = problem

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        """None are known before they are typed."""
        return []

    def start(self) -> Sequence[Message]:
        """What was typed."""
        return self.problem

    def step(self, action: str) -> Step:
        """The end."""
        return Step(terminated=True)


def _spoken(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "text": turn.text} for turn in turns]


def main(cfg: Config) -> None:
    """Open who answers, and talk until the input ends or somebody says exit."""
    partner = open_partner(cfg)
    set_threads(cfg.threads, next(iter(partner.modules.values())))
    if cfg.dry_run:
        longest = max((role.renderer.max_tokens or 0) + role.params.max_tokens for role in partner.roles)
        return describe(partner.modules, tokens_per_step=longest)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stdin.isatty() and sys.stdout.isatty():
        at_terminal(cfg, partner)
    else:
        through_pipe(cfg, partner)


def open_partner(cfg: Config) -> Partner:
    """Who answers. Raises one line for whoever cannot."""
    params = SamplingParams(
        max_tokens=cfg.max_tokens,
        temperature=0.0 if cfg.greedy else cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        stop=cfg.stop,
    )
    system = _read("system_file", cfg.system_file) or cfg.system
    opening = [_message("system", system)] if system else []
    start = _read("start_file", cfg.start_file)
    folder = solver_path(cfg.model.path, cfg.label)
    if run := run_of(folder):
        return open_rounds(cfg, folder, run, params, opening=opening, start=start and f"{start}\n")
    params = replace(params, max_tokens=cfg.max_tokens or MAX_TOKENS)
    sampling = SamplingConfig(max_prompt_tokens=cfg.max_prompt_tokens or MAX_PROMPT_TOKENS)
    if cfg.strategist or has_levels(Path(folder).parent):
        if system or start:
            raise ConfigError("system and start_file: a responder's prompt has no place for them. Give description.")
        env = env_of_run(Path(folder).parent)
        who = open_dialogists(
            folder, model=cfg.model, sampling=sampling, params=params, env=env, strategist=cfg.strategist
        )
        modules = {RESPONDER: who.responder.sampler.module}  # type: ignore[attr-defined]
        _fit_budget(modules[RESPONDER], params, sampling, who.responder, *([who.strategist] if who.strategist else []))
        return Levels(who, modules, emotion=cfg.emotion, description=cfg.description, seed=cfg.seed)
    actor = open_policy(folder, cfg.model, sampling, params, candidates=cfg.candidates)
    _fit_budget(actor.module, params, sampling, actor.role)
    return Policy(actor.role, actor.module, opening=opening, start=start and f"{start}\n", seed=cfg.seed)


def open_rounds(
    cfg: Config, folder: str, run: Mapping[str, Any], params: SamplingParams, *, opening: Sequence[Message], start: str
) -> Rounds:
    """The solver in a folder of a run of feedback with these settings, and the coach beside it."""
    if cfg.candidates > 1:
        raise ConfigError(
            f"candidates = {cfg.candidates}: in a run of feedback nobody picks among answers. Leave it out."
        )
    if cfg.strategist:
        raise ConfigError(
            f"strategist = {cfg.strategist}: in a run of feedback problems are solved, and nobody chooses how to "
            "reply. Leave it out."
        )
    if run.get("context") == "stranger":
        raise ConfigError(
            f"{cfg.model.path}: its coach speaks about another problem than the one that is solved (context = "
            "stranger), and here there is no other. Use echelon evaluate with --rounds."
        )
    who = open_round_players(folder, model=cfg.model, params=params, max_prompt_tokens=cfg.max_prompt_tokens)
    for name, role in ((SOLVER, who.solver), (COACH, who.coach)):
        if role is not None:
            read = SamplingConfig(max_prompt_tokens=role.renderer.max_tokens or MAX_PROMPT_TOKENS)
            _fit_budget(who.modules.get(name, who.modules[SOLVER]), role.params, read, role)
    return Rounds(who, rounds=int(run.get("rounds") or 1), opening=opening, start=start, seed=cfg.seed)


def at_terminal(cfg: Config, partner: Partner) -> None:
    """Prompts, tables and replies that grow; ends with exit, Ctrl-D, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (editing and history of what is typed)
    console = Console(highlight=False)
    console.print(f"{cfg.model.path}: clear begins anew, save FILE keeps the conversation, exit leaves.", style="dim")
    try:
        if isinstance(partner, Levels):
            partner.emotion = partner.emotion or input("What do you feel (may be empty)? ").strip()
            partner.description = partner.description or input("What is it about (may be empty)? ").strip()
        for said in _messages(_typed(), partner, lambda text: console.print(Text(text, style="dim"))):
            growing = _Growing(console)
            try:
                growing(asyncio.run(partner.answer(said, growing.tell, growing)))
            except EchelonError as error:
                growing.end_line()
                console.print(Text(" ".join(str(error).split()), style="red"))
            except KeyboardInterrupt:  # while it writes: only this answer is given up
                console.print(Text(" (stopped)", style="dim"), end="")
            print()
    except (KeyboardInterrupt, EOFError):
        print()


def through_pipe(cfg: Config, partner: Partner) -> None:
    """A message in each line of the input, its answer on the output and nothing else; with `json` a line of JSON."""
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    for said in _messages(lines, partner, lambda text: print(text, file=sys.stderr)):
        notes: dict[str, Any] = {}
        if cfg.json:
            answered = asyncio.run(partner.answer(said, notes.update, lambda text: False))
            print(json.dumps({"user": said, "assistant": answered, **notes}, ensure_ascii=False), flush=True)
        else:
            growing = _Growing()
            growing(asyncio.run(partner.answer(said, notes.update, growing)))
            print(flush=True)


def _typed() -> Iterator[str]:
    while True:
        yield input("you> ")


def _messages(lines: Iterator[str], partner: Partner, note: Callable[[str], None]) -> Iterator[str]:
    """The lines that are messages; those that are for the console are done. A space in front makes a message of one."""
    for line in lines:
        word, _, rest = line.partition(" ")
        if line == "exit":
            return
        if line == "clear":
            partner.clear()
            note("The conversation begins anew.")
        elif word == "save" and rest.strip() and " " not in rest.strip():
            note(save(partner, Path(rest.strip()).expanduser()))
        elif line.strip():
            yield line.strip()


def save(partner: Partner, file: Path) -> str:
    """Write the conversation as a row of data (one line of JSON), and say so, or why it could not be written."""
    try:
        with file.open("x", encoding="utf-8", errors="backslashreplace") as out:
            out.write(json.dumps(partner.transcript(), ensure_ascii=False) + "\n")
    except FileExistsError:
        return f"{file} is there already, and it is never overwritten."
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}."
    return f"Saved to {file}."


class _Growing:
    """Prints what a text has more than before; on a console also what comes before it, dimmed."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._shown = 0
        self._told: list[int] = []
        self._open = False

    def tell(self, notes: Mapping[str, Any]) -> None:
        """Print a table of what was chosen from; or what the turns before the answer have more than when last told."""
        if "turns" not in notes:
            return self._console.print(_table(notes))
        for place, turn in enumerate(notes["turns"]):
            if place == len(self._told):
                self.end_line()
                self._told.append(0)
                self._dim(f"{turn['role']}> ")
            if more := turn["text"][self._told[place] :]:
                self._dim(more)
                self._told[place] += len(more)

    def end_line(self) -> None:
        """End the line of a turn that was told."""
        if self._open:
            self._console.print()
        self._open = False

    def _dim(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), end="", soft_wrap=True)
        self._open = True

    def __call__(self, text: str) -> bool:
        self.end_line()
        print(text[self._shown :], end="", flush=True)
        self._shown = max(self._shown, len(text))
        return False


def _table(notes: Mapping[str, Any]) -> Table:
    """What a reply was chosen from: strategies or candidates with their values, the chosen one marked."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "Q", "strategy" if "strategy" in notes else "candidate"):
        table.add_column(name, justify="right" if name == "Q" else "left")
    for place, option in enumerate(notes["candidates"]):
        value = "-" if option["q"] is None else f"{option['q']:.2f}"
        said = f"{option['text']} {option['strategy']}" if "strategy" in option else " ".join(option["text"].split())
        chosen = place == notes["chosen"]
        table.add_row(">" if chosen else "", value, Text(said), style="bold" if chosen else "dim")
    return table


def _fit_budget(module: nn.Module, params: SamplingParams, sampling: SamplingConfig, *roles: Role) -> None:
    """Read no more of a conversation than the model can besides its answer."""
    room = most_positions(module) - params.max_tokens
    if room < 1:
        raise ConfigError(
            f"max_tokens = {params.max_tokens}: the model reads {most_positions(module)} tokens in all, so no question "
            "would fit beside the answer. Give less."
        )
    for role in roles:
        role.renderer.max_tokens = min(sampling.max_prompt_tokens, room)


def _read(setting: str, path: str) -> str:
    """The text of a file, nothing without one."""
    if not path:
        return ""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(f"{setting} = {path}: it cannot be read ({reason}). Name a text file.") from error


def _message(role: str, content: str) -> Message:
    return Message(role=role, content=content)
