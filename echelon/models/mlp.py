"""Policies and values over rows of numbers: multilayer perceptrons that carry the scale of their inputs with them.

Knows observations as vectors and actions as one of n choices or a point in a box. Refuses to know environments and
algorithms.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from echelon.errors import CheckpointError
from echelon.ops import losses
from echelon.text.codec import Space

MODEL_TYPE = "echelon_mlp_policy"
LARGEST_INPUT = 10.0
"""Normalised observations are cut off this many deviations from the mean."""


class RunningNorm(nn.Module):
    """Rows of numbers with mean 0 and deviation 1 over everything that `see` was shown; unchanged before it saw any.

    A number that never varies is only moved. What comes out lies within ±`LARGEST_INPUT`.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def see(self, rows_BD: Float[Tensor, "B D"]) -> None:
        """Take these rows into mean and deviation, as if all rows so far had come at once (Chan, Golub, LeVeque)."""
        rows = rows_BD.double()
        if not len(rows):
            return
        mean, count = rows.mean(0), self.count + len(rows)
        apart = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + apart.square() * self.count * len(rows) / count
        self.mean += apart * len(rows) / count
        self.count.copy_(count)

    def forward(self, rows_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The rows on their common scale, in float32."""
        if self.count < 1:
            return rows_BD.float()
        std = (self.squares / self.count).sqrt()
        # Below that it is the rounding of float32 that varies.
        std = torch.where(std > 1e-6 * (1 + self.mean.abs()), std, 1.0)
        return ((rows_BD.double() - self.mean) / std).clamp(-LARGEST_INPUT, LARGEST_INPUT).float()


def perceptron(sizes: Sequence[int], *, last_gain: float, seed: int) -> nn.Sequential:
    """Linear layers of these sizes with tanh between them, orthogonal to begin with, the last one times `last_gain`.

    A small last layer makes a policy start close to indifferent. https://arxiv.org/abs/2006.05990, section 3.2
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(len(sizes) - 1):
            layer = nn.Linear(sizes[number], sizes[number + 1])
            last = number == len(sizes) - 2
            nn.init.orthogonal_(layer.weight, last_gain if last else math.sqrt(2))
            nn.init.zeros_(layer.bias)
            layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


class MlpPolicy(nn.Module, ABC):
    """A distribution over actions for every row of observations.

    What was chosen (`chosen`) is in the policy's own units: the number of the choice counted from 0, (B,), or a point
    in which ±1 are the ends of the box, (B, A). `to_env` and `from_env` translate. Log-probabilities are of what was
    chosen, before the box cuts anything off.

    `about` says in plain JSON what it was trained for and is kept beside the weights.
    """

    def __init__(
        self,
        width: int,
        actions: Space,
        *,
        hidden: Sequence[int] = (64, 64),
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.actions, self.hidden, self.about = width, actions, tuple(hidden), dict(about or {})
        self.norm = RunningNorm(width)
        outputs = actions.n if actions.kind == "discrete" else actions.size
        self.body = perceptron([width, *hidden, outputs], last_gain=0.01, seed=seed)

    def forward(self, observations_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of the choices, or the middle of the distribution over points."""
        out: Tensor = self.body(self.norm(observations_BD))
        return out

    @abstractmethod
    def logprobs(self, observations_BD: Float[Tensor, "B D"], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability of what was chosen, entropy in nats) of every row, (B,) each."""

    @abstractmethod
    def imitation_loss(self, observations_BD: Float[Tensor, "B D"], chosen: Tensor) -> Float[Tensor, "B"]:
        """What behaviour cloning minimises in each row."""

    @abstractmethod
    def sample(
        self, observations_BD: Float[Tensor, "B D"], generator: torch.Generator
    ) -> tuple[Tensor, Float[Tensor, "B"]]:
        """(chosen, its log-probability), drawn with this generator; without gradient."""

    @abstractmethod
    def best(self, observations_BD: Float[Tensor, "B D"]) -> Tensor:
        """The likeliest choice, or the middle; without gradient."""

    @abstractmethod
    def to_env(self, chosen: Tensor) -> NDArray[Any]:
        """What was chosen as the environment takes it, one row each: (B,) int64, or (B, A) float32 within the box."""

    @abstractmethod
    def from_env(self, actions: NDArray[Any]) -> Tensor:
        """Recorded actions of the environment in the policy's units. Undoes `to_env` where nothing was cut off."""

    def act(self, observations: NDArray[Any], generator: torch.Generator | None = None) -> NDArray[Any]:
        """Actions of the environment for rows of its observations: the best ones, or drawn with `generator`."""
        rows_BD = torch.as_tensor(np.asarray(observations, dtype=np.float32))
        return self.to_env(self.best(rows_BD) if generator is None else self.sample(rows_BD, generator)[0])

    def described(self) -> dict[str, Any]:
        """Everything but the weights, as JSON."""
        sizes = {"width": self.width, "hidden": list(self.hidden)}
        return {"model_type": MODEL_TYPE, **sizes, "actions": _plain(self.actions), "about": self.about}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which `load_policy` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.described(), indent=1), encoding="utf-8")
        save_model(self, str(folder / "model.safetensors"))


class CategoricalMlp(MlpPolicy):
    """A policy over choices: the perceptron's outputs are their logits."""

    def logprobs(self, observations_BD: Float[Tensor, "B D"], chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = self(observations_BD)
        return logits_BK.log_softmax(-1).gather(-1, chosen[:, None])[:, 0], losses.entropy(logits_BK)

    def imitation_loss(self, observations_BD: Float[Tensor, "B D"], chosen: Tensor) -> Float[Tensor, "B"]:
        """Negative log-likelihood."""
        return losses.nll(self.logprobs(observations_BD, chosen)[0])

    @torch.no_grad()
    def sample(
        self, observations_BD: Float[Tensor, "B D"], generator: torch.Generator
    ) -> tuple[Tensor, Float[Tensor, "B"]]:
        logprobs_BK = self(observations_BD).log_softmax(-1)
        chosen_B1 = torch.multinomial(logprobs_BK.exp(), 1, generator=generator)
        return chosen_B1[:, 0], logprobs_BK.gather(-1, chosen_B1)[:, 0]

    @torch.no_grad()
    def best(self, observations_BD: Float[Tensor, "B D"]) -> Tensor:
        chosen: Tensor = self(observations_BD).argmax(-1)
        return chosen

    def to_env(self, chosen: Tensor) -> NDArray[Any]:
        numbers: NDArray[Any] = chosen.numpy() + self.actions.start
        return numbers

    def from_env(self, actions: NDArray[Any]) -> Tensor:
        return torch.as_tensor(np.asarray(actions).reshape(-1).astype(np.int64)) - self.actions.start


class GaussianMlp(MlpPolicy):
    """A policy over points: the perceptron's outputs are the middle of a normal distribution with independent parts.

    The deviations learn too and are the same in every state. One unit is half the width of the box, so that a policy
    of one environment starts as bold as that of any other; where the box has no end, a unit is a unit.
    """

    def __init__(self, width: int, actions: Space, *, initial_std: float = 0.5, **rest: Any) -> None:
        super().__init__(width, actions, **rest)
        self.log_std = nn.Parameter(torch.full((len(actions.low),), math.log(initial_std)))
        low, high = np.asarray(actions.low, dtype=np.float64), np.asarray(actions.high, dtype=np.float64)
        bounded = np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):
            self._middle = np.where(bounded, (low + high) / 2, 0.0)
            self._half = np.where(bounded, (high - low) / 2, 1.0)

    def logprobs(self, observations_BD: Float[Tensor, "B D"], chosen: Tensor) -> tuple[Tensor, Tensor]:
        mean_BA = self(observations_BD)
        return _normal_logprobs(chosen, mean_BA, self.log_std), self._entropy().expand(len(chosen))

    def imitation_loss(self, observations_BD: Float[Tensor, "B D"], chosen: Tensor) -> Float[Tensor, "B"]:
        """Squared distance of the middle, summed over the parts of an action.

        The deviations are left alone: experts hardly vary, and a policy that goes on learning has to explore.
        """
        return losses.squared_error(self(observations_BD), chosen).sum(-1)

    @torch.no_grad()
    def sample(
        self, observations_BD: Float[Tensor, "B D"], generator: torch.Generator
    ) -> tuple[Tensor, Float[Tensor, "B"]]:
        mean_BA = self(observations_BD)
        chosen_BA = mean_BA + self.log_std.exp() * torch.randn(mean_BA.shape, generator=generator)
        return chosen_BA, _normal_logprobs(chosen_BA, mean_BA, self.log_std)

    @torch.no_grad()
    def best(self, observations_BD: Float[Tensor, "B D"]) -> Tensor:
        mean: Tensor = self(observations_BD)
        return mean

    def to_env(self, chosen: Tensor) -> NDArray[Any]:
        points = self._middle + self._half * chosen.double().numpy()
        inside: NDArray[Any] = points.clip(self.actions.low, self.actions.high)
        return inside.astype(np.float32)

    def from_env(self, actions: NDArray[Any]) -> Tensor:
        points = np.asarray(actions, dtype=np.float64).reshape(len(actions), -1)
        return torch.as_tensor((points - self._middle) / self._half).float()

    def _entropy(self) -> Float[Tensor, ""]:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


def make_policy(width: int, actions: Space, *, initial_std: float = 0.5, **rest: Any) -> MlpPolicy:
    """An untrained policy for observations of `width` numbers: categorical over choices, Gaussian over points."""
    if actions.kind == "discrete":
        return CategoricalMlp(width, actions, **rest)
    return GaussianMlp(width, actions, initial_std=initial_std, **rest)


def load_policy(folder: Path) -> MlpPolicy:
    """The policy that `save_pretrained` wrote. Raises CheckpointError if there is none, or only parts of one."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if described.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{folder}: a model of type {described.get('model_type')} is no MLP policy. Give the run directory of "
                "control-mlp, or a checkpoint's folder 'actor' in it."
            )
        policy = make_policy(
            described["width"],
            _space(described["actions"]),
            hidden=described["hidden"],
            about=described["about"],
        )
        policy.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: no MLP policy can be read there ({error}). Give another run.") from error
    return policy.eval()


class ValueMlp(nn.Module):
    """What is still to be earned from a state, computed on the scale of what was earned so far.

    The perceptron learns numbers of mean 0 and deviation 1 (`compared`); `values` is in the unit of the reward. When
    the scale moves, the last layer is changed so that no value does: PopArt, https://arxiv.org/abs/1602.07714
    """

    mean: Tensor
    square: Tensor

    def __init__(self, width: int, *, hidden: Sequence[int] = (64, 64), seed: int = 0) -> None:
        super().__init__()
        self.norm = RunningNorm(width)
        self.body = perceptron([width, *hidden, 1], last_gain=1.0, seed=seed)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("square", torch.ones((), dtype=torch.float64))

    def forward(self, observations_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Values on the scale that is learned on."""
        out: Tensor = self.body(self.norm(observations_BD))[:, 0]
        return out

    def values(self, observations_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Values in the unit of the reward."""
        learned_B: Tensor = self(observations_BD)
        return (learned_B.double() * self.std + self.mean).float()

    def compared(self, values_B: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Values in the unit of the reward, on the scale that is learned on."""
        return ((values_B.double() - self.mean) / self.std).float()

    @property
    def std(self) -> Float[Tensor, ""]:
        """The unit of the scale: deviation of the returns, never below a thousandth of their mean."""
        variance = (self.square - self.mean.square()).clamp(min=0)
        smallest = max(1e-6, 1e-3 * abs(float(self.mean)))
        return torch.clamp(variance.sqrt(), min=smallest)

    @torch.no_grad()
    def rescale_(self, returns_B: Float[Tensor, "B"], *, forget: float) -> None:
        """Move the scale towards these returns, by the part `forget` of the way; every value stays what it was."""
        mean, std = self.mean.clone(), self.std.clone()
        self.mean.lerp_(returns_B.double().mean(), forget)
        self.square.lerp_(returns_B.double().square().mean(), forget)
        last = self.body[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(std / self.std)
        last.bias.copy_((last.bias.double() * std + mean - self.mean) / self.std)


def _plain(space: Space) -> dict[str, Any]:
    """A space as JSON, in which an end that is infinite is null."""
    ends = {name: [end if math.isfinite(end) else None for end in getattr(space, name)] for name in ("low", "high")}
    return {**asdict(space), **ends}


def _space(plain: Mapping[str, Any]) -> Space:
    """The space that `_plain` wrote."""
    ends = {
        name: tuple(sign * math.inf if end is None else end for end in plain[name])
        for name, sign in (("low", -1), ("high", 1))
    }
    return Space(**{**plain, **{name: tuple(plain[name]) for name in ("names", "units")}, **ends})


def _normal_logprobs(
    points_BA: Float[Tensor, "B A"], mean_BA: Float[Tensor, "B A"], log_std_A: Float[Tensor, "A"]
) -> Float[Tensor, "B"]:
    """Log-density of each row, its parts independent."""
    units_BA = (points_BA - mean_BA) * (-log_std_A).exp()
    return (-0.5 * units_BA.square() - log_std_A - 0.5 * math.log(2 * math.pi)).sum(-1)
