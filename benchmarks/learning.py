"""Learning curves: what methods return after how many episodes, and after how many seconds of a CPU.

    python benchmarks/learning.py --task text_lock_12 --out runs/learning
    python benchmarks/learning.py --task text_lock_12 --out runs/learning --resume
    python benchmarks/learning.py --task text_lock_12 --out runs/learning --report

All methods of a task begin as the same model, which has imitated random play. Each is first tried with every point of
its sweep, as many points for each method, on a seed that is not reported and for half of the episodes, and the point
with the highest mean return of the last three tests is taken; then it runs once for every seed. Every run is a process
of its own, on one thread. Curves are of test games that checkpoints played, each as its method plays in training but
without exploration, so that the tests of all methods are alike; seconds are CPU seconds of training, tests left out,
which other work on the machine hardly changes. Steps that were lost to a kill are not counted.

OUT/TASK.json has everything, OUT/TASK.png the curves, OUT/TASK.md the tables; the last line is JSON: `ratio` is how
many times fewer episodes ArCHer or rank, whichever is better, needed for the final return of the best baseline, 0 if
they did not get there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tyro
from _learning_report import best_point, report
from _learning_run import rows
from _learning_setup import FULL, METHODS, QUICK, SWEEP_PART, SWEEP_SEED, TASKS, Settings, per_step, run_settings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 30.0
WORKER = Path(__file__).with_name("_learning_run.py")


@dataclass(kw_only=True)
class Args:
    """What is compared."""

    task: str
    """text_lock_12, text_lock_24, twenty_questions, twenty_questions_all or guess_my_city."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare; all of them unless told."""
    seeds: int = 5
    """Runs of each method."""
    out: Path = Path("runs/learning")
    """Where runs, numbers and pictures go; the task has a folder in it."""
    parallel: int = 2
    """Runs at the same time, on one thread each."""
    resume: bool = False
    """Go on where an earlier command stopped; what is finished is not run again."""
    report: bool = False
    """Run nothing: numbers and picture from the runs that are finished."""
    dry_run: bool = False
    """Only list the runs."""
    quick: bool = False
    """A minute of the same code on next to nothing; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            stop(f"--task {self.task}: there is no such task here. There are: {', '.join(TASKS)}.")
        if unknown := [name for name in self.methods if name not in METHODS]:
            stop(f"--methods {unknown[0]}: there is no such method here. There are: {', '.join(METHODS)}.")
        for name in ("seeds", "parallel"):
            if getattr(self, name) < 1:
                stop(f"--{name} {getattr(self, name)}: it counts something there must be one of. Give 1 or more.")


@dataclass(slots=True)
class Job:
    """One process."""

    name: str
    out: Path
    what: dict[str, Any]
    """Its job file."""
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = field(default=None)

    @property
    def done(self) -> bool:
        """Whether nothing is left of it to do."""
        return (self.out / "done.json").exists()


def main(args: Args) -> None:
    """Run what is not finished, then report."""
    folder, console = args.out / args.task, Console(stderr=True)
    if args.dry_run:
        for job in [*start_jobs(args, folder), *sweep_jobs(args, folder)]:
            print(job.out)
        print(f"{folder / 'runs'}/METHOD/seed_0 … seed_{args.seeds - 1} of {', '.join(args.methods)}")
        return
    if not args.report:
        check_out(args, folder)
        run_jobs(start_jobs(args, folder), args, console)
        run_jobs(sweep_jobs(args, folder), args, console)
        run_jobs(seed_jobs(args, folder), args, console)
    elif not (folder / "start" / "done.json").exists():
        stop(f"{folder}: nothing has run there. Leave out --report.")
    print(json.dumps(report(args.task, args.methods, folder, args.out)), flush=True)


def check_out(args: Args, folder: Path) -> None:
    """End the program when there are runs that shall not be continued, or none that shall."""
    there = folder.exists() and any(folder.iterdir())
    if there and not args.resume:
        stop(f"{folder}: there are runs already. Continue them with --resume, or choose another --out.")
    if args.resume and not there:
        stop(f"{folder}: there is nothing to resume. Leave out --resume.")


def start_jobs(args: Args, folder: Path) -> list[Job]:
    """The model that all methods begin with."""
    return [job(args, "start", folder / "start", kind="start")]


def sweep_jobs(args: Args, folder: Path) -> list[Job]:
    """Every point of the sweep of every method, on the seed of sweeps."""
    few = (QUICK if args.quick else FULL).points
    tried = {name: sweep(args.task, name)[:few] for name in args.methods}
    return [
        run_job(args, folder, method, point, folder / "sweep" / method / f"point_{number}", seed=SWEEP_SEED)
        for number in range(max(map(len, tried.values())))
        for method in args.methods
        for point in tried[method][number : number + 1]
    ]


def sweep(task: str, method: str) -> tuple[Settings, ...]:
    """What is tried of a method."""
    return METHODS[method].sweep(TASKS[task])


def seed_jobs(args: Args, folder: Path) -> list[Job]:
    """Every method with its best point, seed after seed."""
    points = {name: sweep(args.task, name)[best_point(args.task, name, folder)[0]] for name in args.methods}
    return [
        run_job(args, folder, method, points[method], folder / "runs" / method / f"seed_{seed}", seed=seed)
        for seed in range(args.seeds)
        for method in args.methods
    ]


def run_job(args: Args, folder: Path, name: str, point: Mapping[str, Any], out: Path, *, seed: int) -> Job:
    """Training and tests of one method."""
    size, method, tried = QUICK if args.quick else FULL, METHODS[name], seed == SWEEP_SEED
    part = SWEEP_PART if tried else 1.0
    settings = run_settings(TASKS[args.task], method, point, folder / "start", seed=seed, size=size, part=part)
    more = {"recipe": method.recipe, "settings": settings, "candidates": settings.get("candidates", 1), "sweep": tried}
    more["recorded"] = (size.recorded or TASKS[args.task].recorded) if method.offline else 0
    return job(args, f"{name} {out.name}", out, kind="run", per_step=per_step(settings), **more)


def job(args: Args, name: str, out: Path, *, kind: str, **more: Any) -> Job:
    """A process with its job file. Ends the program if the same place was run with other settings."""
    size, task = QUICK if args.quick else FULL, TASKS[args.task]
    tests: Settings = {
        **{"env": task.env, "env_settings": dict(task.env_settings), "max_tokens": task.max_tokens},
        **{
            "max_prompt_tokens": task.prompt_tokens,
            "threads": 1,
            "seed": 1000 + more.get("settings", {}).get("seed", 0),
        },
    }
    what = {"kind": kind, "task": args.task, "quick": args.quick, "out": str(out), "tests": tests, **more}
    picks = more.get("candidates", 1) > 1
    what |= {"games": size.picked_games if picks else size.test_games}
    what["final_games"] = what["games"] * size.final_times
    what = json.loads(json.dumps(what))
    path = out / "job.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != what:
        stop(f"{out}: that was run with other settings. Choose another --out, or delete it to run it again.")
    return Job(name, out, what)


def run_jobs(jobs: Sequence[Job], args: Args, console: Console) -> None:
    """Run those that are not finished, some at a time, and show how far they are. Ends the program if one fails."""
    waiting, running = [job for job in jobs if not job.done], list[Job]()
    finished, said = len(jobs) - len(waiting), time.monotonic()
    with progress(console, len(jobs), finished) as show, stopping(running):
        while waiting or running:
            while waiting and len(running) < args.parallel:
                running.append(launch(waiting.pop(0)))
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if ended(job)]:
                running.remove(job)
                finished += 1
                if not console.is_terminal:
                    console.print(f"{job.name}: done, {finished} of {len(jobs)}", highlight=False)
            show(finished, "  ".join(map(far, running)))
            if not console.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                console.print("  ".join(map(far, running)), highlight=False, soft_wrap=True)


@contextmanager
def progress(console: Console, total: int, done: int) -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere; gives a function of how many are done and what is running."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=total, completed=done)
        yield lambda finished, text: bars.update(bar, completed=finished, description=text)


@contextmanager
def stopping(running: Sequence[Job]) -> Iterator[None]:
    """End what still runs when something goes wrong; each run can be resumed."""
    try:
        yield
    finally:
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
                job.process.wait()


def launch(job: Job) -> Job:
    """Write the job file and start the process, on one thread."""
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "job.json").write_text(json.dumps(job.what, indent=2) + "\n", encoding="utf-8")
    job.log = (job.out / "log").open("ab")
    root = str(WORKER.parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(WORKER), str(job.out / "job.json")]
    both = {"stdout": job.log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    job.process = subprocess.Popen(command, env=environment, **both)
    return job


def ended(job: Job) -> bool:
    """Whether a process has ended well. Ends the program when it has ended badly."""
    assert job.process is not None
    assert job.log is not None
    if (status := job.process.poll()) is None:
        return False
    job.log.close()
    if status or not job.done:
        lines = (job.out / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        stop(f"{job.name} ended with status {status}: {lines[-1] if lines else 'nothing was said'} See {job.out}/log.")
    return True


def far(job: Job) -> str:
    """How far a run is."""
    steps = job.what.get("settings", {}).get("steps")
    return f"{job.name} {rows(job.out / 'train' / 'metrics.jsonl')}/{steps}" if steps else job.name


def stop(message: str) -> None:
    """End the program with one line."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `stopping` ends the runs
    main(tyro.cli(Args))
