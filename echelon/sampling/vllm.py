"""vLLM in this process: the engine for models that ask for more than the local one, behind the same two methods.

Whether its weights are whole ones of its own, or an adapter beside others on a base that all of them share, is settled
here. Knows nothing of how weights are trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from echelon.errors import ConfigError, need
from echelon.models import lora
from echelon.sampling.cache import default_budget
from echelon.sampling.copied import check_adapter, check_copyable, within
from echelon.sampling.vllm_engine import BLOCK, Engine, Voice, ranks, undisturbed, width
from echelon.types import Completion, SamplingParams


class VllmSampler:
    """Samples from a copy of a Hugging Face causal LM that vLLM holds. Concurrent calls of `sample` are batched.

    vLLM starts, with the weights of the module or those it is given, when it is first asked or loaded. `longest` is how
    many tokens a prompt and its answer may have together, at most as many as the model has positions; `concurrency` and
    `cache_tokens` are those of the local engine. With `sleep`, vLLM gives its memory on the accelerator back when the
    event loop that it served ends, until it is asked or loaded again. Several ranks have one each, and these start
    together: all ranks must load theirs before one asks.

    With `apart`, vLLM reads the base of a model with adapters once, and is then given the adapter alone: the one that
    speaks, the one that `adapter` names, or with the empty name none. `beside` is another such sampler on the same base
    (`shares`), whose vLLM this one then asks too.

    Raises MissingExtra without vLLM, and ConfigError for what cannot be: weights of few bits, a device
    that this vLLM was not built for, sleep on a CPU, adapters that vLLM does not know.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        longest: int,
        concurrency: int = 256,
        cache_tokens: int | None = None,
        version: int = 0,
        sleep: bool = False,
        apart: bool = False,
        adapter: str | None = None,
        beside: VllmSampler | None = None,
    ) -> None:
        with undisturbed():
            need("vllm", "vllm")
            _check(module, sleep)
        speaks = lora.speaking(module) if adapter is None else adapter
        if apart:
            check_adapter(module)
            _check_width(module, speaks)
        longest = within(module, longest)
        wanted = cache_tokens or min(default_budget(module), concurrency * (longest + BLOCK))
        room = max(wanted, longest + 2 * BLOCK)
        self._voice = Voice(module, tokenizer, speaks if apart else None, version, longest, room)
        if beside is None:
            self.engine = Engine(self._voice, concurrency=concurrency, sleep=sleep)
        else:
            assert apart, "whole weights need a vLLM of their own"
            assert beside.shares(module), "only adapters of one base share a vLLM"
            self.engine = beside.engine
            self.engine.join(self._voice, sleep=sleep)

    @property
    def module(self) -> nn.Module:
        """The model whose weights vLLM has a copy of."""
        return self._voice.module

    @property
    def version(self) -> int:
        """Of the weights that were last loaded."""
        return self._voice.version

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._voice.longest

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values vLLM has room for."""
        return self.engine.cache_tokens

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered, nor what was given up still being dropped."""
        return not self.engine.running

    def shares(self, module: nn.Module) -> bool:
        """Whether adapters of this module can be asked through the same vLLM: they are on the same base."""
        return self.engine.apart and lora.has_adapters(module) and lora.same_base(self.module, module)

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion. `params.seed` alone decides what is drawn, given the prompt and the weights; it is not what
        the local engine draws from that seed.

        Raises RolloutError for more tokens than fit, and ConfigError for parameters that vLLM does not know.
        """
        return await self.engine.ask(self._voice, prompt, params)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Put full weights, by the names that the module's files have, in place of vLLM's, and forget all keys and
        values. With `apart` only the adapter is read, from the module itself, whose weights these are. Without any
        weights, only the version changes."""
        self.engine.load(self._voice, weights, version)


def _check(module: nn.Module, sleep: bool) -> None:
    """Raise ConfigError for what this engine cannot serve."""
    platform = need("vllm.platforms", "vllm").current_platform
    device = next(module.parameters()).device
    check_copyable(module, "vllm")
    if device.type != platform.device_type:
        raise ConfigError(
            f"sampling.sampler = vllm: the vLLM that is installed runs on {platform.device_type} and the model "
            f"is on {device.type}. Install the other build, set model.device, or use --sampler local."
        )
    if sleep and not platform.is_sleep_mode_available():
        raise ConfigError(
            f"sampling.sleep = True: on {device.type} there is no accelerator whose memory vLLM could give back. "
            "Leave it out."
        )


def _check_width(module: nn.Module, adapter: str) -> None:
    """Raise ConfigError for an adapter with more numbers than vLLM takes."""
    if width(module, adapter) > max(ranks()):
        raise ConfigError(
            f"sampling.adapters = apart: the adapter has rank {width(module, adapter)}, and vLLM takes at most "
            f"{max(ranks())}. Leave it out, or merge the adapter first."
        )
