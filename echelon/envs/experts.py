"""Controllers of the classic tasks, written down: from an observation to an action, a few lines of arithmetic each.

Know the plants and nothing of Gymnasium; where no one has written one, an expert has to be learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from echelon.errors import ConfigError, did_you_mean
from echelon.text.codec import Action

Expert: TypeAlias = Callable[[Any], Action]
"""From a flat observation, in the environment's own units, to an action."""


def expert(env_id: str) -> Expert:
    """The controller of an environment, by Gymnasium's id. ConfigError, with what there is, for one without."""
    bare = env_id.rpartition(":")[2]
    if bare not in EXPERTS:
        raise ConfigError(
            f"there is no scripted expert for '{bare}'.{did_you_mean(bare, EXPERTS)} There is one for "
            f"{', '.join(EXPERTS)}; for any other environment an expert has to be learned."
        )
    return EXPERTS[bare]


def cart_pole(observation: Any) -> Action:
    """Push towards where the pole falls, a little less where the cart is on that side already: a linear law."""
    position, velocity, angle, spin = np.asarray(observation, dtype=np.float64)
    return int(0.1 * position + 0.3 * velocity + 3.0 * angle + 1.0 * spin > 0)


def mountain_car(observation: Any) -> Action:
    """Push along the velocity, but for the states from which it pays to swing back first."""
    position, velocity = np.asarray(observation, dtype=np.float64)
    below = min(-0.09 * (position + 0.25) ** 2 + 0.03, 0.3 * (position + 0.9) ** 4 - 0.008)
    above = -0.07 * (position + 0.38) ** 2 + 0.07
    return 2 if below < velocity < above else 0


def acrobot(observation: Any) -> Action:
    """Pump energy in, roughly along the velocity of the joint with the motor; gains from a cross-entropy search."""
    cosine1, sine1, cosine2, sine2, velocity1, velocity2 = np.asarray(observation, dtype=np.float64)
    outer = sine1 * cosine2 + cosine1 * sine2  # of the outer link against the vertical
    drive = -0.8 * velocity1 + 1.4 * velocity2 - 0.2 * sine1 - 0.9 * sine2 - 2.5 * outer
    return 2 if drive > 0 else 0


def pendulum(observation: Any) -> Action:
    """Pump energy in, up to what standing upright has; near the top hold it there by a linear law."""
    cosine, sine, velocity = np.asarray(observation, dtype=np.float64)
    if cosine > 0.85:
        torque = -8 * np.arctan2(sine, cosine) - 2 * velocity
    else:
        missing = 5 * (1 - cosine) - velocity**2 / 6
        torque = 2 * missing * np.copysign(1, velocity)
    return np.array([min(max(torque, -2.0), 2.0)], dtype=np.float32)


EXPERTS = {
    "Acrobot-v1": acrobot,
    "CartPole-v1": cart_pole,
    "MountainCar-v0": mountain_car,
    "Pendulum-v1": pendulum,
}
