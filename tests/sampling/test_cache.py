"""Where conversations' keys and values lie: found by ids, bounded in memory, the longest unused dropped first."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.sampling.cache import SMALLEST, Cache, Resident


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 99, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def opened(cache: Cache, prompt: list[int], length: int = 0, *, must: bool = False) -> Resident | None:
    source, shared = cache.find(prompt)
    return cache.open(prompt, length or len(prompt) + 1, source, shared, must=must)


def read(resident: Resident) -> None:
    """What a pass does: one layer of keys and values in which every token leaves its id."""
    new = torch.tensor(resident.ids[resident.known :], dtype=torch.float32)[None, None, :, None]
    for store in resident.shelf.layer(0, new, new):
        store[resident.place, 0, resident.known : len(resident.ids), 0] = new[0, 0, :, 0]
    resident.known = len(resident.ids)


def stored(resident: Resident) -> list[int]:
    return resident.shelf.keys[0][resident.place, 0, : resident.known, 0].int().tolist()


def rested(cache: Cache, prompt: list[int]) -> Resident:
    resident = opened(cache, prompt)
    assert resident is not None
    read(resident)
    cache.rest(resident)
    return resident


def test_a_prompt_that_continues_an_idle_conversation_takes_it_over() -> None:
    cache = Cache(10_000)
    first = rested(cache, ids(40))
    again = opened(cache, [*ids(40), 1, 2, 3])
    assert again is first
    assert again.known == 40


def test_a_conversation_that_outgrows_its_shelf_moves_with_what_it_knows() -> None:
    cache = Cache(10_000)
    first = rested(cache, ids(40))
    again = opened(cache, ids(40) + ids(SMALLEST, 1))
    assert again is first
    assert again.shelf.capacity == 2 * SMALLEST
    assert stored(again) == ids(40)
    assert cache.used == again.shelf.places * again.shelf.capacity, "the shelf it left is empty and gone"


def test_others_copy_what_they_have_in_common_and_leave_the_source_alone() -> None:
    cache = Cache(10_000)
    first = rested(cache, ids(40))
    branch = opened(cache, [*ids(25), *ids(9, 1)])
    assert branch is not None
    assert branch is not first
    assert stored(branch) == ids(25)
    same = opened(cache, ids(40))
    assert same is not None
    assert same.known == 39, "the last token is read again: its logits are wanted"
    assert opened(cache, [*ids(40), 1]) is first


def test_a_conversation_under_way_is_copied_as_far_as_it_is_read() -> None:
    cache = Cache(10_000)
    first = opened(cache, ids(60))
    assert first is not None
    assert cache.find(ids(60)) == (first, 60)
    assert opened(cache, ids(60)).known == 0  # type: ignore[union-attr]
    read(first)
    assert stored(opened(cache, [*ids(60), 1])) == ids(60)  # type: ignore[arg-type]


def test_of_conversations_with_the_same_beginning_the_one_that_is_continued_is_found() -> None:
    """They differ only in tokens that do not fill a block."""
    cache = Cache(100_000)
    residents = [rested(cache, [*ids(32), reply, reply]) for reply in range(20)]
    for reply, resident in enumerate(residents):
        assert opened(cache, [*ids(32), reply, reply, 7, 7, 7]) is resident


def test_the_conversation_unused_for_longest_makes_room() -> None:
    cache = Cache(3 * SMALLEST)
    for seed in (1, 2, 3):
        rested(cache, ids(30, seed))
    assert opened(cache, [*ids(30, 1), 5]) is not None, "1 is in use now, so 2 is the oldest that is idle"
    rested(cache, ids(30, 4))
    assert cache.find(ids(30, 2)) == (None, 0)
    assert cache.find(ids(30, 3))[1] == 30
    assert cache.used == 3 * SMALLEST


def test_without_room_there_is_none_unless_there_must_be() -> None:
    cache = Cache(SMALLEST)
    assert opened(cache, ids(30, 1)) is not None
    assert opened(cache, ids(30, 2)) is None
    assert opened(cache, ids(30, 2), must=True) is not None
    assert cache.used == 2 * SMALLEST


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300), st.booleans()), max_size=40), st.integers(1, 4000))
def test_the_budget_holds_and_what_is_found_is_what_was_stored(asked: list[tuple[int, int, bool]], budget: int) -> None:
    cache = Cache(budget)
    open_ones: list[Resident] = []
    for family, length, leave in asked:
        prompt = ids(300, family)[:length]
        resident = opened(cache, prompt, must=False)
        if resident is None:
            continue
        assert stored(resident) == prompt[: resident.known] if resident.known else True
        read(resident)
        open_ones.append(resident)
        if leave:
            cache.rest(open_ones.pop(0))
        assert cache.used <= budget
    assert all(stored(resident) == resident.ids for resident in open_ones)
