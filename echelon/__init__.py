"""Train language models that act on more than one level.

The public names. Each is imported when it is first used, so `import echelon` is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from echelon.data.packing import Batch, pack
    from echelon.data.replay import Replay, Transition, transitions
    from echelon.envs.check import check_env
    from echelon.envs.registry import load_env
    from echelon.errors import EchelonError
    from echelon.models.lm import load_lm, tiny, token_logprobs
    from echelon.rollout.plays import env_loop
    from echelon.rollout.roles import Role, collect
    from echelon.sampling.local import LocalSampler
    from echelon.text.chat import Renderer
    from echelon.train.learner import Learner
    from echelon.types import Completion, Env, Episode, Message, Sampler, SamplingParams, Step, Task, Turn

__all__ = [
    "Batch",
    "Completion",
    "EchelonError",
    "Env",
    "Episode",
    "Learner",
    "LocalSampler",
    "Message",
    "Renderer",
    "Replay",
    "Role",
    "Sampler",
    "SamplingParams",
    "Step",
    "Task",
    "Transition",
    "Turn",
    "__version__",
    "check_env",
    "collect",
    "env_loop",
    "load_env",
    "load_lm",
    "pack",
    "tiny",
    "token_logprobs",
    "transitions",
]

_HOMES = {
    "echelon.data.packing": ("Batch", "pack"),
    "echelon.data.replay": ("Replay", "Transition", "transitions"),
    "echelon.envs.check": ("check_env",),
    "echelon.envs.registry": ("load_env",),
    "echelon.errors": ("EchelonError",),
    "echelon.models.lm": ("load_lm", "tiny", "token_logprobs"),
    "echelon.rollout.plays": ("env_loop",),
    "echelon.rollout.roles": ("Role", "collect"),
    "echelon.sampling.local": ("LocalSampler",),
    "echelon.text.chat": ("Renderer",),
    "echelon.train.learner": ("Learner",),
    "echelon.types": ("Completion", "Env", "Episode", "Message", "Sampler", "SamplingParams", "Step", "Task", "Turn"),
}
_MODULE = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the module that a public name lives in, and keep the name here for the next time."""
    if name not in _MODULE:
        raise AttributeError(f"module 'echelon' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(_MODULE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
