"""Environments: what answers the model's words, and when a task is over. Nothing here knows about models or training.

Built in are `dialogue`, `twenty_questions`, `guess_my_city`, `wordle`, `guess_number`, `text_lock` and `maze`;
`load_env` finds those, games of TextArena, environments of Gymnasium and any class of yours, `check_env` tells what is
wrong with one, and `echelon.envs.players` plays them without a model.
"""

from echelon.envs._shared import EnvSpec
from echelon.envs.check import check_env
from echelon.envs.registry import load_env

__all__ = ["EnvSpec", "check_env", "load_env"]
