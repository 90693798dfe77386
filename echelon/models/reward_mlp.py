"""What an action earns in a state, as a small network reads it off their numbers: r(s, a).

It holds how its inputs and rewards were scaled, so what is saved is all that is needed to score. It knows no text; the
codec that came with the data is kept for whoever reads completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from echelon.errors import DataError

KIND = "reward_mlp"


class RewardMLP(nn.Module):
    """The reward of (observation, action), from two hidden layers of `width` on normalised inputs.

    An action is a vector of `actions` numbers or, with `choices`, one of so many, numbered from `first`. What comes out
    is in the unit of the reward.
    """

    observation_mean: Tensor
    observation_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor
    lowest: Tensor

    def __init__(
        self,
        observations: int,
        actions: int,
        *,
        choices: int = 0,
        first: int = 0,
        width: int = 256,
        dropout: float = 0.1,
        codec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = {
            "observations": observations,
            "actions": actions,
            "choices": choices,
            "first": first,
            "width": width,
            "dropout": dropout,
        }
        self.codec = dict(codec or {})
        done = choices or actions
        # Layers are normalised within a row, not over the batch, so that micro-batches do not change the gradient.
        self.layers = nn.Sequential(
            *(nn.Linear(observations + done, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(width, 1),
        )
        scales = {"observation": observations, "action": done, "reward": 1}
        for name, size in scales.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("lowest", torch.zeros(()))

    @torch.no_grad()
    def measure(self, observations_NO: Tensor, actions_N: Tensor, rewards_N: Float[Tensor, "N"]) -> None:
        """Take the mean and the deviation of inputs and rewards from data; choices are left as they are.

        What never changes keeps the deviation 1: nothing is divided by zero, and noise is not blown up.
        """
        self._set_scale("observation", observations_NO)
        if not self.settings["choices"]:
            self._set_scale("action", actions_N.reshape(len(actions_N), -1))
        self._set_scale("reward", rewards_N[:, None])
        self.lowest.copy_(rewards_N.min())

    def forward(self, observations_BO: Tensor, actions_B: Tensor) -> Float[Tensor, "B"]:
        """The reward of each row, normalised: mean 0 and deviation 1 over the data. Actions as (B, A), or (B,) numbers
        of choices."""
        seen_BO = (observations_BO - self.observation_mean) / self.observation_std
        done_BA = (self._vector(actions_B) - self.action_mean) / self.action_std
        rewards_B: Tensor = self.layers(torch.cat([seen_BO, done_BA], 1))[:, 0]
        return rewards_B

    def normalised(self, rewards_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Rewards in the unit of `forward`."""
        return (rewards_N - self.reward_mean) / self.reward_std

    @torch.no_grad()
    def score(self, observations_BO: Tensor, actions_B: Tensor) -> Float[Tensor, "B"]:
        """The reward of each row in its own unit; in evaluation mode, whatever mode it is in."""
        learning = self.training
        self.eval()
        try:
            scores_B: Tensor = self(observations_BO, actions_B) * self.reward_std + self.reward_mean
            return scores_B
        finally:
            self.train(learning)

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights, scales, shape and codec, as safetensors and JSON."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_model(self, str(place / "model.safetensors"))
        described = {"model_type": KIND, "settings": self.settings, "codec": self.codec}
        (place / "config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")

    def _vector(self, actions_B: Tensor) -> Float[Tensor, "B A"]:
        if not (choices := int(self.settings["choices"])):
            return actions_B.reshape(len(actions_B), -1).float()
        index_B = actions_B.reshape(-1).long() - int(self.settings["first"])
        return nn.functional.one_hot(index_B, choices).float()

    def _set_scale(self, name: str, values_NX: Tensor) -> None:
        std_X = values_NX.float().std(0, correction=0)
        getattr(self, f"{name}_mean").copy_(values_NX.float().mean(0))
        getattr(self, f"{name}_std").copy_(torch.where(std_X > 1e-6, std_X, 1.0))


def is_reward_mlp(folder: Path) -> bool:
    """Whether a folder holds one, by its config.json."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") == KIND


def load_reward_mlp(folder: Path) -> RewardMLP:
    """The reward model of a folder, ready to score. Raises DataError for anything else, whole or not."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        module = RewardMLP(**described["settings"], codec=described["codec"])
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{folder}: no reward model could be loaded ({line}). Train one with control-reward."
        ) from error
    return module.eval()
