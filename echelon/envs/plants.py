"""What the values of well-known control tasks mean: names and units, in the order of their vectors. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plant:
    """The words of one environment; empty where nothing is known of it."""

    about: str = ""
    """Goes on "You control …": what it is, and what is wanted."""
    observation: tuple[str, ...] = ()
    observation_units: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    """Names of the values of a box, or of the choices."""
    action_units: tuple[str, ...] = ()


_LANDER = Plant(
    "a lunar lander: come down softly on the pad at the origin, on both legs, with little fuel",
    ("x", "y", "velocity in x", "velocity in y", "angle", "angular velocity", "left leg down", "right leg down"),
    ("", "", "", "", "rad", "", "", ""),
    ("nothing", "left engine", "main engine", "right engine"),
)

_CHEETAH_JOINTS = ("back thigh", "back shin", "back foot", "front thigh", "front shin", "front foot")

PLANTS: Mapping[str, Plant] = {
    "CartPole": Plant(
        "a cart with a pole on it: keep the pole upright and the cart near the middle",
        ("cart position", "cart velocity", "pole angle", "pole angular velocity"),
        ("m", "m/s", "rad", "rad/s"),
        ("left", "right"),
    ),
    "Acrobot": Plant(
        "two links that hang from a fixed joint, with a motor between them: swing the free end one link above "
        "the joint",
        ("cos(joint 1)", "sin(joint 1)", "cos(joint 2)", "sin(joint 2)", "velocity of joint 1", "velocity of joint 2"),
        ("", "", "", "", "rad/s", "rad/s"),
        ("negative torque", "no torque", "positive torque"),
    ),
    "MountainCar": Plant(
        "a car in a valley whose motor is too weak for the slope: swing up to the flag on the right, at position 0.5",
        ("position", "velocity"),
        ("m", "m/step"),
        ("left", "nothing", "right"),
    ),
    "MountainCarContinuous": Plant(
        "a car in a valley whose motor is too weak for the slope: swing up to the flag on the right with little force",
        ("position", "velocity"),
        ("m", "m/step"),
        ("force to the right",),
        ("",),
    ),
    "Pendulum": Plant(
        "a pendulum with a weak motor: swing it up and hold it upright, at angle 0, with little torque",
        ("cos(angle)", "sin(angle)", "angular velocity"),
        ("", "", "rad/s"),
        ("torque",),
        ("N m",),
    ),
    "LunarLander": _LANDER,
    "LunarLanderContinuous": Plant(
        _LANDER.about, _LANDER.observation, _LANDER.observation_units, ("main engine", "side engine"), ("", "")
    ),
    "HalfCheetah": Plant(
        "a running robot with two legs, in a plane: run forward as fast as it can, with little torque",
        (
            *("height of the body", "pitch"),
            *(f"angle of the {joint}" for joint in _CHEETAH_JOINTS),
            *("forward velocity", "vertical velocity", "pitch velocity"),
            *(f"angular velocity of the {joint}" for joint in _CHEETAH_JOINTS),
        ),
        ("m", *["rad"] * 7, "m/s", "m/s", *["rad/s"] * 7),
        tuple(f"torque of the {joint}" for joint in _CHEETAH_JOINTS),
        ("",) * 6,
    ),
    "InvertedPendulum": Plant(
        "a cart with a pole on it: keep the pole upright",
        ("cart position", "pole angle", "cart velocity", "pole angular velocity"),
        ("m", "rad", "m/s", "rad/s"),
        ("force on the cart",),
        ("N",),
    ),
}
"""By the environment's id without its version."""
