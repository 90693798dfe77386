"""Several processes, the ranks, that train one set of weights: who does what share, and how the shares become one.

Every rank runs the whole recipe. Work is divided in three places, episodes (`collect`), rewards and micro-batches
(`Learner`), and put together in each, so that between them all ranks hold the same; rank 0 alone writes. Knows no
recipe and no algorithm. Without a launcher (torchrun, accelerate, `echelon launch`) one process does everything, and
nothing of torch.distributed is used.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from echelon.config import DistConfig
from echelon.errors import ConfigError, EchelonError
from echelon.models.lm import evaluating

Item = TypeVar("Item")
Found = TypeVar("Found")

BUCKET = 1 << 25
"""Most numbers that are summed over ranks at a time."""

LAUNCHED_BY_US = "ECHELON_LAUNCHED"
"""Set for ranks whose launcher says itself that one of them is gone."""

_SIGNS_OF_LOSS = ("closed by peer", "reset by peer", "gloo", "NCCL", "Timed out", "Broken pipe", "recvBytes")


class RankLost(EchelonError, RuntimeError):
    """Another rank is gone or does not answer, so this one cannot go on."""


class RanksDisagree(EchelonError, RuntimeError):
    """Ranks that should hold the same hold different things."""


class SaidElsewhere(EchelonError):
    """What ended this rank has been said by another one; its own message is empty."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """All ranks of a run, as one of them sees them."""

    rank: int
    """Its number, from 0."""
    size: int
    """How many there are."""
    neighbours: int
    """How many of them share its machine."""
    settings: DistConfig

    def gathered(self, value: Found) -> list[Found]:
        """This value of every rank, in their order. Everybody must call it."""
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over ranks, the same to the last bit on each."""
        from torch import distributed

        distributed.all_reduce(tensor)
        return tensor

    def deal(self, passes: Sequence[Item], *, alike: bool) -> list[tuple[Item, bool]]:
        """This rank's micro-batches, and whether each counts.

        With `alike` every rank gets as many: one that has fewer computes one of another rank again, which does not
        count. Layers of which every rank holds a part need all ranks at once.
        """
        mine = [(item, True) for item in passes[self.rank :: self.size]]
        most = -(-len(passes) // self.size)
        return mine + [(passes[0], False)] * (most - len(mine)) if alike else mine


_ranks: Ranks | None = None


def launched() -> bool:
    """Whether this process was started as one of several (torchrun's environment variables)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks() -> Ranks | None:
    """All ranks, once they have found each other; None in a process that works alone."""
    return _ranks


def writes() -> bool:
    """Whether this process writes the run's files: rank 0, or the only one."""
    return _ranks is None or _ranks.rank == 0


def neighbours() -> int:
    """How many ranks share this machine, this one included."""
    return 1 if _ranks is None else _ranks.neighbours


@contextlib.contextmanager
def joined(settings: DistConfig) -> Iterator[Ranks]:
    """Within, this process is one rank of those the launcher started: gloo on CPUs, nccl on GPUs, one GPU each.

    What ranks other than 0 print goes nowhere. An error is raised on by one rank only; on the others it becomes
    SaidElsewhere. Raises RankLost where another rank has ended without a word.
    """
    global _ranks
    from torch import distributed

    local = int(os.environ.get("LOCAL_RANK", 0))
    backend, device = "gloo", None
    if torch.cuda.is_available():
        _check_devices(local)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=timedelta(seconds=settings.timeout))
    around = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), around, settings)
    try:
        with _quiet(_ranks.rank > 0):
            yield _ranks
        distributed.barrier()
    except (EchelonError, RuntimeError) as error:
        raised = _lost(_ranks, error)
        if isinstance(raised, EchelonError) and not _first_to_say(_ranks):
            raise SaidElsewhere from error
        if raised is error:
            raise
        raise raised from error
    else:
        if not _vllm_has_groups():
            distributed.destroy_process_group()
    finally:
        _ranks = None


def _vllm_has_groups() -> bool:
    """Whether a vLLM of this process has groups of ranks, too. It leaves all of them when the process ends, and fails
    where that has been done."""
    state: Any = sys.modules.get("vllm.distributed.parallel_state")
    return state is not None and bool(state.model_parallel_is_initialized())


def wait() -> None:
    """Until all ranks are here."""
    if _ranks is not None:
        from torch import distributed

        distributed.barrier()


def share(count: int) -> slice:
    """Which of so many items, in a row, are this rank's."""
    if _ranks is None:
        return slice(0, count)
    return slice(_ranks.rank * count // _ranks.size, (_ranks.rank + 1) * count // _ranks.size)


def together(mine: Sequence[Item]) -> list[Item]:
    """The items of all ranks, in the order of `share`. This rank's are the very objects that it gave."""
    if _ranks is None:
        return list(mine)
    found = _ranks.gathered(list(mine))
    found[_ranks.rank] = list(mine)
    return [item for items in found for item in items]


def union(mine: Mapping[Any, Found]) -> dict[Any, Found]:
    """What any rank has, by its key."""
    return dict(together([*mine.items()]))


def agreed(choose: Callable[[], Found]) -> Found:
    """What rank 0 chooses, on all ranks."""
    if _ranks is None:
        return choose()
    return _ranks.gathered(choose() if _ranks.rank == 0 else None)[0]  # type: ignore[return-value]


def divided(batches: Sequence[Any], size: int) -> list[Any]:
    """Micro-batches, some split further so that so many ranks have as many each, where their rows allow it."""
    parts = list(batches)
    while len(parts) % size:
        longest = max(range(len(parts)), key=lambda place: _tokens(parts[place]))
        pieces = _halves(parts[longest])
        if len(pieces) < 2:
            break
        parts[longest : longest + 1] = pieces
    return parts


def parts_of(batch: Any, tokens_per_pass: int) -> list[Any]:
    """Micro-batches of a batch that is only read: within the budget, and small enough that every rank gets some."""
    if _ranks is None:
        return list(batch.split(tokens_per_pass))
    rows, columns = (*_shape(batch), 0, 0)[:2]
    return list(batch.split(min(tokens_per_pass, columns * -(-rows // _ranks.size))))


def check_alike(ranks: Ranks, what: str, batches: Sequence[Any]) -> None:
    """Raise RanksDisagree unless all ranks are about to learn from batches of the same shapes."""
    shapes = [_shape(batch) for batch in batches]
    for rank, others in enumerate(ranks.gathered(shapes)):
        if others != shapes:
            raise RanksDisagree(
                f"{what}: rank {rank} has micro-batches of shapes {others} and rank {ranks.rank} of {shapes}, so they "
                "would learn from different data. Look for an environment or a reward that does not follow its seed."
            )


def total(ranks: Ranks, logged: Mapping[str, float]) -> dict[str, float]:
    """What all ranks logged of their micro-batches: sums, and the largest of what ends in "/max"."""
    found: dict[str, float] = {}
    for stats in ranks.gathered(dict(logged)):
        for name, value in stats.items():
            largest = name.endswith("/max") and name in found
            found[name] = max(found[name], value) if largest else found.get(name, 0.0) + value
    return found


def sum_gradients(ranks: Ranks, weights: Sequence[Tensor]) -> None:
    """Give every rank the sum of all ranks' gradients, in float32; None stays None where all ranks have none."""
    if not weights:
        return
    there = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
    learned = [weight for weight, some in zip(weights, ranks.sum_(there).tolist(), strict=True) if some]
    for bucket in _buckets(learned):
        flat, start = ranks.sum_(torch.cat([_gradient(weight).float().flatten() for weight in bucket])), 0
        for weight in bucket:
            weight.grad = flat[start : start + weight.numel()].view_as(weight).to(weight.dtype)
            start += weight.numel()


class Sharded:
    """A copy of a module of which every rank holds a part of each weight (FSDP2, `torch.distributed.fsdp`).

    A layer's weights are whole only while it computes. The copy learns; `put` writes what it has learned into the whole
    module it was made from, which stays an ordinary one for all who read it. It is cut layer by layer, so that no rank
    ever holds a second whole one. Where some ranks have shapes alone (the meta device), rank 0 gives them their parts.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.settings = ranks.settings
        self.original = module
        self.device = device
        self.mesh = init_device_mesh(device.type, (ranks.size,))
        self._first_gives = _some_are_empty(ranks, module)
        copied = _empty_copy(module)
        self.root: Any = _Root(copied)
        self._parts: list[Any] = [*layers_of(copied), *_odd_ones(copied), self.root]
        for part in self._parts:
            self._fill(part)
            self._shard(part, self.settings.reshard_after_forward and part is not self.root)
        self.trained = [parameter for parameter in self.root.parameters() if parameter.requires_grad]

    def __call__(self, fn: Callable[..., Found], *args: Any) -> Found:
        """`fn(module, *args)`, with the weights it needs gathered. All ranks must call it, with the same `fn`."""
        found: Found = self.root(fn, *args)
        return found

    @torch.no_grad()
    def read(self, fn: Callable[..., Found], *args: Any) -> Found:
        """The same in evaluation mode, without gradient."""
        with evaluating(self.root):
            found = self(fn, *args)
        for part in self._parts:
            part.reshard()  # what stays whole for a backward pass would stay for good
        return found

    def before_pass(self, *, last: bool) -> None:
        """Whether the coming backward pass ends with the sum over ranks, or its gradient waits for the last one."""
        now = last or self.settings.reduce_every_pass
        self.root.set_requires_gradient_sync(now)
        if not self.settings.reshard_after_forward:
            self.root.set_reshard_after_backward(last)

    @torch.no_grad()
    def take(self) -> None:
        """This rank's parts of the whole module as it is now, also of what is frozen here and may learn elsewhere."""
        from torch.distributed.tensor import distribute_tensor

        for part, whole in self._pairs():
            mine = distribute_tensor(self._given(whole), self.mesh, part.placements, src_data_rank=None).to_local()
            part.to_local().copy_(mine)
        there = dict(self.original.named_buffers())
        for name, mine in self.root.module.named_buffers():
            mine.copy_(there[name])

    @torch.no_grad()
    def put(self) -> None:
        """Gather what has been learned into the whole module, one weight at a time. All ranks must call it."""
        for part, whole in self._pairs():
            if part.requires_grad:
                learned = part.full_tensor()
                if not whole.is_meta:
                    whole.copy_(learned)

    @torch.no_grad()
    def _fill(self, part: nn.Module) -> None:
        """Give numbers to the weights of a part that is about to be cut, and whose own parts are cut already."""
        for mine, whole in self._pairs():
            if mine.is_meta and any(mine is own for own in part.parameters()):
                there = nn.Parameter(self._given(whole).contiguous(), requires_grad=mine.requires_grad)
                torch.utils.swap_tensors(mine, there)  # type: ignore[no-untyped-call] # who shares it goes on sharing it

    def _given(self, whole: Tensor) -> Tensor:
        """A whole weight on this rank's device: its own, or that of rank 0 where not all have it."""
        from torch import distributed

        if not self._first_gives:
            return whole.detach().to(self.device)
        there = torch.empty_like(whole, device=self.device) if whole.is_meta else whole.detach().to(self.device)
        distributed.broadcast(there, 0)
        return there

    def _pairs(self) -> Iterator[tuple[Any, nn.Parameter]]:
        """The weights of the copy and those of the whole module, which may have got an adapter since that stays."""
        whole = dict(self.original.named_parameters())
        return ((part, whole[name]) for name, part in self.root.module.named_parameters())

    def _shard(self, part: nn.Module, reshard: bool) -> None:
        from torch.distributed import fsdp

        said = self.settings
        policy = fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if said.compute_dtype == "bfloat16" else None,
            reduce_dtype=torch.float32 if said.reduce_dtype == "float32" else None,
            cast_forward_inputs=part is not self.root,
        )
        offload = fsdp.CPUOffloadPolicy() if self._offloads else fsdp.OffloadPolicy()
        cut: Any = fsdp.fully_shard(
            part, mesh=self.mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload
        )
        cut.set_gradient_divide_factor(1.0)  # sums, not means: losses are divided by what counts in all ranks
        cut.set_force_sum_reduction_for_comms(True)

    @property
    def _offloads(self) -> bool:
        return self.settings.cpu_offload and self.mesh.device_type != "cpu"


class _Root(nn.Module):
    """Runs any function of a module as its forward pass, within which what lies outside of layers is whole."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(module, *args)`."""
        return fn(self.module, *args)


def check_shardable(module: nn.Module, optimizer: str, name: str) -> None:
    """Raise ConfigError for weights or an optimizer that cannot be held in parts."""
    if getattr(module, "is_quantized", False):
        raise ConfigError(
            f"dist.strategy = fsdp: the weights of {name} are quantized, and cannot be cut. Set dist.strategy to ddp."
        )
    if optimizer != "adamw":
        raise ConfigError(
            f"dist.strategy = fsdp: {optimizer} keeps sums over whole weights, or tables of them, which cannot be cut. "
            "Set optim.name to adamw, or dist.strategy to ddp."
        )


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of every Hugging Face model inside: what it says must not be split."""
    names = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    found = [part for part in module.modules() if type(part).__name__ in names]
    inner = {id(child) for part in found for child in part.modules() if child is not part}
    return [part for part in found if id(part) not in inner and any(True for _ in part.parameters())]


def _odd_ones(module: nn.Module) -> list[nn.Module]:
    """Modules outside of blocks whose weights are of another type than most: types do not share a message."""
    inside = {id(child) for layer in layers_of(module) for child in layer.modules()}
    learned = [parameter.dtype for parameter in module.parameters() if parameter.requires_grad]
    usual = max(set(learned), key=learned.count, default=torch.float32)
    return [
        part
        for part in module.modules()
        if id(part) not in inside
        and any(own.dtype != usual and own.requires_grad for own in part.parameters(recurse=False))
    ]


def _empty_copy(module: nn.Module) -> nn.Module:
    """A copy whose weights have shapes alone (the meta device); buffers are copied, and what is borrowed stays so."""
    like: dict[int, Any] = {id(body): body for part in module.modules() for body in getattr(part, "borrowed", ())}
    like |= {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for weight in module.parameters()
    }
    copied: nn.Module = copy.deepcopy(module, like)
    copied.zero_grad(set_to_none=True)
    return copied


def _some_are_empty(ranks: Ranks, module: nn.Module) -> bool:
    """Whether a rank has only the shapes of the weights. Raises RanksDisagree where those differ then."""
    told = [(tuple(weight.shape), str(weight.dtype)) for weight in module.parameters()]
    empty = any(ranks.gathered(any(weight.is_meta for weight in module.parameters())))
    if empty and any(others != told for others in ranks.gathered(told)):
        raise RanksDisagree("ranks have made different models of one folder. Load it with one version of everything.")
    return empty


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The weights in their order, some together."""
    bucket: list[Tensor] = []
    for weight in weights:
        if bucket and sum(map(Tensor.numel, bucket)) + weight.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _shape(batch: Any) -> tuple[int, ...]:
    """Rows and columns, where a batch says them."""
    tokens = getattr(getattr(batch, "batch", batch), "tokens", None)
    return () if tokens is None else tuple(tokens.shape)


def _tokens(batch: Any) -> int:
    rows, columns = (*_shape(batch), 0, 0)[:2]
    return rows * columns


def _halves(batch: Any) -> list[Any]:
    """Two or more batches of its rows, if it can be split."""
    rows, columns = (*_shape(batch), 0, 0)[:2]
    return list(batch.split(columns * -(-rows // 2))) if rows > 1 and hasattr(batch, "split") else [batch]


def _check_devices(local: int) -> None:
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}. Start as many ranks as "
            "there are GPUs, or hide them (CUDA_VISIBLE_DEVICES=) to train on the CPU."
        )


def _quiet(quiet: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(_Nowhere()) if quiet else contextlib.nullcontext()


class _Nowhere:
    """A file that forgets."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing is pending."""

    def isatty(self) -> bool:
        return False


def _lost(ranks: Ranks, error: Exception) -> Exception:
    """The error itself, or what it means where it says that another rank is gone."""
    from torch import distributed

    told = isinstance(error, distributed.DistError) or any(sign in str(error) for sign in _SIGNS_OF_LOSS)
    if isinstance(error, EchelonError) or not told:
        return error
    if os.environ.get(LAUNCHED_BY_US):
        return SaidElsewhere()
    return RankLost(
        f"rank {ranks.rank} of {ranks.size}: another rank is gone or does not answer, so the job ends. Start the same "
        "command again with --resume."
    )


def _first_to_say(ranks: Ranks) -> bool:
    """Whether no other rank has said yet why the run ends; True where nobody can be asked."""
    from torch.distributed import distributed_c10d

    try:
        store = distributed_c10d._get_default_store()
        return bool(store.add("echelon/failed", 1) == 1)
    except Exception:
        return True
