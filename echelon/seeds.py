"""Where randomness comes from: names in, seeds out. Nothing here reads a clock or a global generator."""

from __future__ import annotations

import hashlib


def derive_seed(*names: int | str) -> int:
    """A 63-bit seed for the thing with this name, e.g. `derive_seed(run_seed, "rollout", step, task, sibling)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
