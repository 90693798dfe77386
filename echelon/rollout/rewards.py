"""What completions earn: Python functions, reward models, tests of programs, and checks against the right answer.

It adds to what the environment gave and knows nothing of credit: every episode's last turn gets the weighted sum.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, get_args

import numpy as np
from torch import nn

from echelon.config import PlayConfig
from echelon.data.datasets import load_rows
from echelon.envs._shared import EnvSpec, run_sync, settle
from echelon.envs.prompts import prompts_env
from echelon.envs.registry import import_code
from echelon.errors import ConfigError, DataError, EchelonError, did_you_mean
from echelon.models.reward import load_reward_model
from echelon.models.reward_mlp import is_reward_mlp, load_reward_mlp
from echelon.rollout.control_rewards import (
    ActionJudge,
    Control,
    RewardMLPJudge,
    codec_beside,
    need_codec,
    recorded_action,
)
from echelon.rollout.setup import model_path, open_env, usable_cores
from echelon.rollout.verifiers import VERIFIERS, Answer, AnswerVerifier, JudgeVerifier, Kind, Verifier, gold_for
from echelon.sandbox import Exam, Examiner, Grade, Limits, read_exam
from echelon.sandbox.grading import LIMITS, Reason
from echelon.text.chat import Renderer
from echelon.text.codec import Codec
from echelon.text.endpoint import shared_endpoint
from echelon.text.parse import program_in
from echelon.train import dist
from echelon.types import Episode, Message, Turn

RESERVED = ("mean", "std")
"""Names under "reward/" that belong to the sum of all rewards."""

_OWN = "path/to/file.py:function, package.module:function, the folder of a reward model, or a check"
CHECKS = ("code", *VERIFIERS, *get_args(Control))
"""Rewards that are built in."""

MOST_CHILDREN = 4
"""Processes that compare formulas at a time; each takes some 100 MiB."""


class Judge(Protocol):
    """Says what answers are worth, one number for each; None abstains."""

    async def __call__(self, answers: Sequence[Answer]) -> list[float | None]: ...


@dataclass(frozen=True, slots=True)
class Reward:
    """One source of reward."""

    name: str
    """What its metrics are called."""
    judge: Judge
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one answer was judged to be worth by all sources together."""

    reward: float
    """Weighted sum of what every source gave; one that abstained adds nothing."""
    parsed: bool | None = None
    """Whether every verifier could read an answer in it; None where no verifier was asked."""
    why: str = ""
    """Why one could not."""


class Rewards:
    """Everything that completions earn on top of what the environment gives."""

    def __init__(self, rewards: Sequence[Reward] = ()) -> None:
        self.rewards = tuple(rewards)
        self._one_at_a_time = threading.Lock()

    def add(self, episodes: Sequence[Episode], *, role: str = "") -> dict[str, float]:
        """Add weight · reward, of every source, to the last turn of every episode that did not fail; with `role` to
        each turn of that role instead: every attempt of a tree is judged, whatever follows it.

        `info["parsed"]` of a turn becomes 0 where a verifier could read no answer in it, and 1 where all could. Returns
        "reward/<name>", the mean of what that source gave before weighing, and "reward/<name>/std" (0 where it
        abstained throughout). Raises DataError, naming the source and the task, for anything but finite numbers. Of
        several ranks each judges its share.
        """
        played = [episode for episode in episodes if episode.ending != "failed" and episode.turns]
        pairs = [(e, turn) for e in played for turn in (e.of(role) if role else e.turns[-1:])]
        if not self.rewards or not pairs:
            return {}
        asked = [answer_in(episode, turn) for episode, turn in pairs[dist.share(len(pairs))]]
        by_answer = [list(one) for one in zip(*self._judge_alone(asked), strict=True)] if asked else []
        given = [list(each) for each in zip(*dist.together(by_answer), strict=True)]
        for (_, turn), verdict in zip(pairs, self._verdicts(given), strict=True):
            turn.reward += verdict.reward
            if verdict.parsed is not None:
                turn.info["parsed"] = float(verdict.parsed)
        return self._metrics(given)

    def modules(self) -> dict[str, nn.Module]:
        """The models that judge, by the names of their rewards."""
        held = {reward.name: getattr(reward.judge, "model", reward.judge) for reward in self.rewards}
        found = {name: getattr(model, "module", model) for name, model in held.items()}
        return {name: module for name, module in found.items() if isinstance(module, nn.Module)}

    def score(self, answers: Sequence[Answer]) -> list[Verdict]:
        """What single answers are worth, in their order, whether or not they are turns of an episode; adds nothing to
        any. `answer_in(episode, turn)` is the answer that a turn gave; for one that is no turn, say
        `Answer(task.id, messages, text, task.data)`. Raises DataError as `add` does.
        """
        return self._verdicts(self._judge_alone(answers)) if self.rewards else [Verdict(0.0) for _ in answers]

    async def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The same inside an event loop."""
        return self._verdicts(await self._judge(answers)) if self.rewards else [Verdict(0.0) for _ in answers]

    def _judge_alone(self, answers: Sequence[Answer]) -> list[list[_Given]]:
        """Judges need not know that several steps may be played side by side."""
        with self._one_at_a_time:
            return run_sync(self._judge(answers))

    async def _judge(self, answers: Sequence[Answer]) -> list[list[_Given]]:
        return list(await asyncio.gather(*(_given(reward.judge, answers) for reward in self.rewards)))

    def _verdicts(self, given: Sequence[Sequence[_Given]]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for each in zip(*given, strict=True):
            pairs = list(zip(self.rewards, each, strict=True))
            earned = sum(reward.weight * (one.number or 0.0) for reward, one in pairs)
            verified = [one for reward, one in pairs if isinstance(reward.judge, Verifier)]
            unread = [one.why for one in verified if one.number is None]
            verdicts.append(Verdict(earned, not unread if verified else None, "; ".join(unread)))
        return verdicts

    def _metrics(self, given: Sequence[Sequence[_Given]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for reward, each in zip(self.rewards, given, strict=True):
            numbers = [one.number for one in each]
            verified = isinstance(reward.judge, Verifier)
            known = np.array([number or 0.0 for number in numbers if number is not None or verified] or [0.0])
            metrics |= {f"reward/{reward.name}": float(known.mean()), f"reward/{reward.name}/std": float(known.std())}
            if verified:
                metrics[f"reward/{reward.name}/unparsed"] = sum(n is None for n in numbers) / len(numbers)
            if isinstance(reward.judge, CodeJudge | ActionJudge | RewardMLPJudge):
                metrics |= {f"reward/{reward.name}/{reason}": n for reason, n in reward.judge.counts.items()}
        return metrics


@dataclass(frozen=True, slots=True)
class _Given:
    """What one source gave for one answer, and why it gave nothing."""

    number: float | None
    why: str = ""


async def _given(judge: Judge, answers: Sequence[Answer]) -> list[_Given]:
    if isinstance(judge, Verifier):
        found = await judge.check(answers)
        return [_Given(None if one.right is None else float(one.right), one.why) for one in found]
    return [_Given(number) for number in await judge(answers)]


def open_tasks(cfg: PlayConfig, renderer: Renderer | None = None) -> EnvSpec:
    """What there is to do: the environment, checked by playing a little, or the prompts of a data set as one.

    With the renderer of the role that will answer them, prompts that are too long are found before any training.
    Raises ConfigError and DataError.
    """
    if cfg.env:
        env = open_env(cfg.env, cfg.env_settings, trust_code=cfg.trust_task_code)
        check_answers(cfg.reward, [(f"task '{task.id}'", task.data) for task in env.tasks("train")])
        return env
    rows = load_rows(cfg.data, "prompt", seed=cfg.seed)
    listed = [(row.where, row.columns) for row in (*rows.train, *rows.held_out)]
    check_answers(cfg.reward, listed)
    check_actions(cfg.reward, listed, codec_beside(cfg.data.path))
    env = prompts_env(rows.train, rows.held_out, name=", ".join(cfg.data.path))
    if renderer is not None:
        _check_lengths(env, renderer)
    return env


def open_rewards(cfg: PlayConfig, *, device: str = "auto", tokens_per_pass: int = 4096) -> Rewards:
    """The rewards that are asked for, with their weights; none is fine, where the environment gives them.

    Raises ConfigError for a name that means nothing, DataError for code or a folder that cannot be used.
    """
    weights = cfg.reward_weights or (1.0,) * len(cfg.reward)
    names, codec = _names(cfg.reward), codec_beside(cfg.data.path)
    open_one = partial(open_judge, device=device, tokens_per_pass=tokens_per_pass, endpoint=cfg.judge, codec=codec)
    judges = [open_one(spec) for spec in cfg.reward]
    return Rewards([Reward(*parts) for parts in zip(names, judges, weights, strict=True)])


def check_answers(names: Sequence[str], rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise DataError for the first row, given as its place and its columns, whose right answer a check could not use:
    before anything is played. Raises MissingExtra where a library is needed to read it.
    """
    checks = [name for name in names if name in VERIFIERS]
    for where, columns in rows if checks else ():
        for name in checks:
            gold_for(name, columns, where)


def check_actions(names: Sequence[str], rows: Iterable[tuple[str, Mapping[str, Any]]], codec: Codec | None) -> None:
    """Raise DataError for the first row whose recorded action a reward of actions could not compare with."""
    for name in names:
        if name in get_args(Control) and name != "format":
            for where, columns in rows:
                recorded_action(columns, need_codec(name, codec), where, f"reward {name}")


def open_judge(
    spec: str,
    *,
    device: str = "auto",
    tokens_per_pass: int = 4096,
    endpoint: Mapping[str, Any] | None = None,
    codec: Codec | None = None,
) -> Judge:
    """A function, a reward model, or one of `CHECKS`, by how it was named on the command line. `codec` reads the
    actions of recorded control."""
    if spec == "code":
        return CodeJudge()
    if spec == "judge":
        return JudgeVerifier(shared_endpoint(endpoint or {}))
    if spec in get_args(Kind):
        return AnswerVerifier(spec, workers=min(usable_cores(), MOST_CHILDREN))  # type: ignore[arg-type]
    if spec in get_args(Control):
        return ActionJudge(spec, need_codec(spec, codec))  # type: ignore[arg-type]
    where, colon, function = spec.rpartition(":")
    if not colon and spec.endswith(".py"):
        raise ConfigError(f"reward {spec}: which function of the file? Give {spec}:function.")
    if not colon or Path(spec).is_dir():
        folder = Path(model_path(spec, "reward"))
        if is_reward_mlp(folder):
            return RewardMLPJudge(spec, load_reward_mlp(folder), codec)
        return ModelJudge(spec, device=device, tokens_per_pass=tokens_per_pass)
    if not where or not function:
        raise ConfigError(f"reward {spec}: expected {_OWN}.")
    module = import_code(f"reward {spec}", where)
    found = getattr(module, function, None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise DataError(f"reward {spec}: {where} has no function '{function}'.{did_you_mean(function, known)}")
    return FunctionJudge(spec, found)


class FunctionJudge:
    """A Python function `fn(prompts, completions, **columns) -> list of numbers`, plain or async.

    `prompts` are lists of messages, `completions` texts without stop tokens; a function that calls the latter so may
    leave out the former and have its parameters in any order. Each column of the data set (each entry of
    `Task.data` where an environment is played) comes as a list, with None where a task does not have it; a function
    that names its columns gets those only. None in what it returns means that it has nothing to say there.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function
        self._by_name = "completions" in inspect.signature(function).parameters
        self._takes, self._required = _columns_of(function)

    async def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """What each answer is worth."""
        try:
            returned = await self._call(answers)
        except EchelonError:
            raise
        except Exception as error:
            task, raised = await self._culprit(answers, error)
            raise DataError(f"reward {self.name}: raised {_line(raised)} on {task}.") from raised
        return self._numbers(returned, answers)

    async def _call(self, answers: Sequence[Answer]) -> Any:
        there = {key: None for answer in answers for key in answer.columns}  # a dictionary keeps their order
        if missing := [name for name in self._required if name not in there]:
            has = ", ".join(there) or "none"
            raise DataError(f"reward {self.name}: it needs the column '{missing[0]}', and the columns are: {has}.")
        columns = {
            key: [answer.columns.get(key) for answer in answers]
            for key in there
            if self._takes is None or key in self._takes
        }
        prompts, completions = [answer.prompt for answer in answers], [answer.completion for answer in answers]
        if not self._by_name:
            return await settle(self._function(prompts, completions, **columns))
        words = {"prompts": prompts} if self._takes is None or "prompts" in self._takes else {}
        return await settle(self._function(completions=completions, **words, **columns))

    async def _culprit(self, answers: Sequence[Answer], error: Exception) -> tuple[str, Exception]:
        """The task whose answer the function cannot judge, found by asking again one at a time, and what it raises."""
        for answer in answers:
            try:
                await self._call([answer])
            except Exception as raised:
                return f"task '{answer.task}'", raised
        return f"the {len(answers)} completions of a step together, and on none of them alone", error

    def _numbers(self, returned: Any, answers: Sequence[Answer]) -> list[float | None]:
        listed = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise DataError(f"reward {self.name}: returned {_short(listed)}. It must return a list of numbers.")
        if len(listed) != len(answers):
            raise DataError(
                f"reward {self.name}: returned {len(listed)} numbers for {len(answers)} completions. "
                "It must return one for each, in their order."
            )
        for answer, number in zip(answers, listed, strict=True):
            if number is not None and not (isinstance(number, Real) and math.isfinite(number)):
                raise DataError(
                    f"reward {self.name}: gave {_short(number)} on task '{answer.task}'. "
                    "It must be a finite number, or None to say nothing."
                )
        return [None if number is None else float(number) for number in listed]


class ModelJudge:
    """A reward model: the score of the whole conversation, the completion included."""

    def __init__(self, path: str, *, device: str = "auto", tokens_per_pass: int = 4096) -> None:
        self.name = path
        try:
            self.model = load_reward_model(model_path(path, "reward"), device=device)
        except DataError as error:
            raise DataError(f"reward {path}: {error}") from error
        self._tokens_per_pass = tokens_per_pass

    async def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """The model's score of each answer."""
        conversations = [_answered(answer) for answer in answers]
        scores = self.model.score(conversations, tokens_per_pass=self._tokens_per_pass).tolist()
        for answer, score in zip(answers, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"reward {self.name}: the model scored {score} on task '{answer.task}'. "
                    "Its weights are not finite, or its dtype is too small for it: train it again, or load float32."
                )
        return list(scores)


class CodeJudge:
    """The share of its row's tests that the program in a completion passes, in the sandbox.

    The program is its last block of Python between fences, or all of it. The column `tests` holds a list of tests, or
    one text with asserts in it, and `entry_point`, if there is one, the function that they call `candidate`
    (`read_exam`). A row without tests is not judged. A program that crashes, hangs, or takes too much earns 0, and
    `counts` says how many of the completions judged last ended so, and why.
    """

    def __init__(self, *, limits: Limits = LIMITS, workers: int = 0) -> None:
        self.counts: dict[str, float] = {}
        self._limits, self._workers = limits, workers or usable_cores()

    async def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """What each program is worth, from 0 to 1."""
        if not any("tests" in answer.columns for answer in answers):
            has = ", ".join(dict.fromkeys(name for answer in answers for name in answer.columns)) or "none"
            raise DataError(f"reward code: it needs the column 'tests', and the columns are: {has}.")
        papers = [(program_in(answer.completion), _exam(answer)) for answer in answers]
        different = list(dict.fromkeys((program, exam) for program, exam in papers if exam is not None))
        grades = dict(zip(different, await asyncio.to_thread(self._grade, different), strict=True))
        found = [None if exam is None else grades[program, exam] for program, exam in papers]
        ended = Counter(grade.reason for grade in found if grade is not None)
        self.counts = {reason: float(ended[reason]) for reason in get_args(Reason)}
        return [None if grade is None else grade.rate for grade in found]

    def _grade(self, papers: Sequence[tuple[str, Exam]]) -> list[Grade]:
        examiners = SimpleQueue[Examiner]()
        for _ in range(self._workers):
            examiners.put(Examiner(self._limits))

        def grade(paper: tuple[str, Exam]) -> Grade:
            examiner = examiners.get()
            try:
                return examiner.grade(*paper)
            finally:
                examiners.put(examiner)

        with ThreadPoolExecutor(self._workers) as pool:
            grades = list(pool.map(grade, papers))
        while not examiners.empty():
            examiners.get().close()
        return grades


def _exam(answer: Answer) -> Exam | None:
    """The tests of a row."""
    tests, entry_point = answer.columns.get("tests"), answer.columns.get("entry_point") or ""
    if tests is None:
        return None
    if not isinstance(tests, str | list | tuple) or not isinstance(entry_point, str):
        raise DataError(
            f"reward code: the tests of task '{answer.task}' are {_short(tests)}, and the entry point "
            f"{_short(entry_point)}. Give a text or a list of texts, and the name of a function."
        )
    try:
        return read_exam(tests, entry_point)
    except ValueError as error:
        raise DataError(f"reward code: the tests of task '{answer.task}': {error}.") from error


def answer_in(episode: Episode, turn: Turn) -> Answer:
    """What a turn said, with the conversation before it and the columns of its task."""
    taken = ("messages", "prompts", "completions")
    columns = {key: value for key, value in episode.data.items() if key not in taken}
    prompt, said = episode.conversation(turn), turn.text
    given = bool(turn.heard) and turn.heard[-1]["role"] == "assistant"  # the beginning of the message is the prompt's
    if prompt and prompt[-1]["role"] == "assistant" and not given:  # the last utterance of a message that began earlier
        said = prompt.pop()["content"] + said
    return Answer(episode.task, prompt, said, columns)


def _answered(answer: Answer) -> list[Message]:
    """The conversation with the answer, which may go on with a message that the prompt begins."""
    prompt, said = list(answer.prompt), answer.completion
    if prompt and prompt[-1]["role"] == "assistant":
        said = prompt.pop()["content"] + said
    return [*prompt, Message(role="assistant", content=said)]


def _check_lengths(env: EnvSpec, renderer: Renderer) -> None:
    """Raise DataError for prompts that the budget of tokens has no room for."""
    budget, lengths, tasks = renderer.max_tokens or math.inf, dict[str, int](), env.tasks("train")
    for task in tasks:
        messages: list[Message] = task.data["messages"]
        if sum(len(message["content"].encode()) for message in messages) > budget / 2:  # others fit: spare the time
            parts = renderer.segments(messages)
            lengths[task.id] = len(parts[0]) + (len(parts[-1]) if len(parts) > 1 else 0)
    if long := {ident: length for ident, length in lengths.items() if length > budget}:
        longest = max(long, key=lambda ident: long[ident])
        raise DataError(
            f"{env.name}: {len(long)} of {len(tasks)} prompts take more than sampling.max_prompt_tokens = {budget} "
            f"tokens; the longest, {longest}, takes {long[longest]}. Raise it, or leave those rows out."
        )


def _columns_of(function: Callable[..., Any]) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """The columns a function takes, None for all of them, and those it cannot do without."""
    signature = inspect.signature(function).parameters
    parameters = list(signature.values())[0 if "completions" in signature else 2 :]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    words = ("prompts", "completions")
    required = tuple(p.name for p in named if p.default is p.empty and p.name not in words)
    return None if everything else frozenset(p.name for p in named), required


def _names(specs: Sequence[str]) -> list[str]:
    """What each reward is called in the metrics: the function or the folder; all of it where that is not unique."""
    short = [spec.rpartition(":")[2] if ":" in spec else Path(spec).name for spec in specs]
    unclear = {name for name in short if short.count(name) > 1} | set(RESERVED)
    return [spec if name in unclear else name for name, spec in zip(short, specs, strict=True)]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
