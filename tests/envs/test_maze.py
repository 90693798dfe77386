"""The rules of the maze, what one sees in it, and what chance and the best play earn."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.envs import check_env, load_env
from echelon.envs.maze import ILLEGAL, MOVES, Maze, bound, direction_in, distances, grid, moved, plan, possible, walls
from echelon.envs.players import corpus, make_player, measure, play
from echelon.errors import ConfigError, DataError
from echelon.types import Message, Task

BEFORE_THE_GOAL = Task("maze/9,8", {"start": [9, 8]})


def heard(step) -> str:
    (message,) = step.messages
    assert message["role"] == "user"
    return message["content"]


def test_a_walk_to_the_goal():
    env = Maze(Task("maze/9,7", {"start": [9, 7]}))
    (opening,) = env.start()
    assert opening["content"] == ("Find the goal. Say: move up, move down, move left or move right. Walls: up, down.")
    step = env.step("move down")  # into a wall: it stays
    assert (heard(step), step.reward, step.terminated, step.info) == ("Walls: up, down.", -4.0, False, {})
    step = env.step("move right")
    assert (heard(step), step.reward, step.terminated) == ("Walls: up, down.", -1.0, False)
    step = env.step("move right")
    assert (heard(step), step.reward, step.terminated, step.truncated) == ("You are there.", 0.0, True, False)
    assert step.info == {"win": 1.0, "turns": 3.0}


def test_with_observed_the_place_and_the_goal_are_told():
    env = Maze(BEFORE_THE_GOAL, observed=True)
    place = "You are at row 9, column {}, the goal is at row 9, column 9. "
    assert env.start()[0]["content"].endswith(place.format(8) + "Walls: up, down.")
    assert heard(env.step("left")) == place.format(7) + "Walls: up, down."


@pytest.mark.parametrize(
    ("text", "direction"),
    [
        *(("move up", "up"), ("UP!", "up"), ("I go to the right.", "right"), ("left", "left"), ("down\n", "down")),
        *(("", None), ("move", None), ("up or down", None), ("up up", None), ("upward", None), ("x" * 5000, None)),
        *(("very " * 100 + "up", None), ("上", None), ("\u202e\x00", None), ('{"a": [', None)),
    ],
)
def test_a_text_moves_when_it_names_exactly_one_direction(text, direction):
    assert direction_in(text) == direction


@pytest.mark.parametrize(
    "text", ["", "move", "up or down", "Is it a dog?", "7", "%s {} \\", "very long " * 2000, "東京 🙂"]
)
def test_a_text_that_is_no_move_costs_as_much_as_a_wall_and_moves_nobody(text):
    env = Maze(BEFORE_THE_GOAL)
    step = env.step(text)
    assert (heard(step), step.reward, step.terminated) == ("Walls: up, down.", ILLEGAL, False)
    assert env.step("move right").reward == 0.0


@given(st.text(max_size=300))
def test_any_text_is_answered(text):
    assert Maze(BEFORE_THE_GOAL).step(text).reward in (0.0, -1.0, ILLEGAL)


def test_the_last_turn_without_the_goal_is_the_end_by_the_rules():
    env = Maze(BEFORE_THE_GOAL, max_turns=3)
    steps = [env.step("move left"), env.step("blorp"), env.step("move left")]
    assert [(step.reward, step.terminated, step.truncated) for step in steps] == [
        (-1.0, False, False),
        (-4.0, False, False),
        (-1.0, True, False),
    ]
    assert steps[-1].info == {"win": 0.0, "turns": 3.0}


def test_arriving_at_the_last_turn_is_a_win():
    assert Maze(BEFORE_THE_GOAL, max_turns=1).step("move right").info == {"win": 1.0, "turns": 1.0}


@pytest.mark.parametrize(
    "settings",
    [{}, {"observed": True}, {"size": 2, "max_turns": 1}, {"size": 4, "layout": 3}, {"size": 3, "observed": True}],
)
def test_the_maze_keeps_every_rule(settings):
    check_env(load_env("maze", settings))


def test_both_splits_start_once_in_every_cell_but_the_goal():
    free, goal = grid(0, 0)
    tasks = Maze.tasks("train")
    assert tasks == Maze.tasks("test")
    assert sorted(tuple(task.data["start"]) for task in tasks) == sorted(free - {goal})
    assert len({task.id for task in tasks}) == len(tasks) == 29


def test_the_double_t_is_its_own_mirror_image():
    free, goal = grid(0, 0)
    assert free == {(row, 10 - column) for row, column in free}
    assert goal == (9, 9)


@pytest.mark.parametrize("size", [2, 3, 5, 9])
@pytest.mark.parametrize("layout", range(5))
def test_random_mazes_are_trees_over_all_cells(size, layout):
    """Connected, with one passage less than free cells; all size² cells are in it, and nothing touches the rim."""
    free, goal = grid(size, layout)
    passages = sum(moved(cell, way) in free for cell in free for way in ("down", "right"))
    assert passages == len(free) - 1 == 2 * (size**2 - 1)
    assert distances(size, layout).keys() == free
    assert {(2 * row + 1, 2 * column + 1) for row in range(size) for column in range(size)} <= free
    assert all(0 < row < 2 * size and 0 < column < 2 * size for row, column in free)
    assert goal in free


def test_another_layout_is_another_maze_and_the_same_one_the_same():
    mazes = [grid(5, layout)[0] for layout in range(8)]
    assert len(set(mazes)) == 8
    grid.cache_clear()
    assert [grid(5, layout)[0] for layout in range(8)] == mazes


def chance(size: int, layout: int, turns: int) -> float:
    """Exact mean return of a player who says any of the four moves: the chain over cells, turn by turn."""
    free, goal = grid(size, layout)
    there = {cell: 1 / (len(free) - 1) for cell in free - {goal}}
    reward = 0.0
    for _ in range(turns):
        after = dict.fromkeys(there, 0.0)
        for cell, probability in there.items():
            for direction in MOVES:
                now = moved(cell, direction)
                reward += probability / 4 * (ILLEGAL if now not in free else 0.0 if now == goal else -1.0)
                if now != goal:
                    after[now if now in free else cell] += probability / 4
        there = after
    return reward


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [({"max_turns": 20}, 30), ({"size": 3, "layout": 1}, 20), ({"size": 2, "observed": True}, 100)],
)
def test_chance_in_the_maze(settings, rounds):
    expected = chance(settings.get("size", 0), settings.get("layout", 0), settings.get("max_turns", 100))
    got = measure(load_env("maze", settings), "random", rounds=rounds)
    assert got.reward == pytest.approx(expected, abs=4 * got.error)


MAZES = [(0, 0), (2, 0), (3, 1), (4, 0), (5, 2), (7, 0), (10, 0)]


@pytest.mark.parametrize(("size", "layout"), MAZES)
def test_who_sees_the_place_walks_a_shortest_way(size, layout):
    """The move that arrives is free, so the return is one less than the way, from every single start."""
    spec = load_env("maze", {"size": size, "layout": layout, "observed": True, "max_turns": 1000})
    away = distances(size, layout)
    tasks = spec.tasks("test")
    for task in tasks:
        assert play(spec, task, make_player(spec, "optimal")).total == 1 - away[tuple(task.data["start"])]
    mean = sum(1 - away[tuple(task.data["start"])] for task in tasks) / len(tasks)
    assert bound(size, layout, observed=True) == pytest.approx(mean)


@pytest.mark.parametrize(("size", "layout"), MAZES)
def test_who_does_not_see_the_place_always_arrives_and_earns_the_bound(size, layout):
    got = measure(load_env("maze", {"size": size, "layout": layout, "max_turns": 1000}), "optimal")
    assert got.wins == 1.0
    assert got.reward == pytest.approx(bound(size, layout))
    assert got.reward <= bound(size, layout, observed=True) + 1e-9


def test_the_best_play_in_the_double_t():
    assert bound(observed=True) == pytest.approx(-255 / 29)  # -8.79
    assert bound() == pytest.approx(-269 / 29)  # -9.28


def brute_force(size: int, layout: int, cells: frozenset, depth: int) -> float:
    """Least moves to the goal summed over the cells, by trying every row of `depth` moves; from below after that."""
    free, goal = grid(size, layout)
    if depth == 0:
        return sum(distances(size, layout)[cell] for cell in cells)
    totals = []
    for direction in (way for way in MOVES if moved(min(cells), way) in free):
        seen: dict = {}
        for cell in (moved(cell, direction) for cell in cells):
            if cell != goal:
                seen.setdefault(walls(free, cell), set()).add(cell)
        totals.append(len(cells) + sum(brute_force(size, layout, frozenset(p), depth - 1) for p in seen.values()))
    return min(totals)


def test_the_plan_is_never_better_than_a_search_from_below_and_meets_it_when_deep_enough():
    checked = 0
    for cells, (moves, _) in plan(3, 1).items():
        shallow, deep = brute_force(3, 1, cells, 2), brute_force(3, 1, cells, 9)
        assert shallow <= deep <= moves
        checked += len(cells) > 1
        if moves <= 9 + len(cells):
            assert deep == moves
    assert checked > 3


def test_the_cells_one_may_be_in_hold_the_one_one_is_in():
    spec = load_env("maze", {"size": 4, "layout": 2})
    draw = random.Random(0)
    for task in spec.tasks("test"):
        env, cell = spec.make(task), tuple(task.data["start"])
        free, goal = grid(4, 2)
        messages = env.start()
        for _ in range(30):
            said = draw.choice(["move up", "move down", "move left", "move right", "blorp", "up or down"])
            direction = direction_in(said)
            cell = moved(cell, direction) if direction and moved(cell, direction) in free else cell
            if cell == goal:
                break
            messages += [Message(role="assistant", content=said), *env.step(said).messages]
            left = possible(4, 2, messages)
            assert cell in left
            assert len({walls(free, other) for other in left}) == 1
            assert left in plan(4, 2)


@pytest.mark.parametrize("kind", ["random", "optimal"])
def test_players_are_functions_of_seed_and_dialogue(kind):
    spec = load_env("maze")
    player = make_player(spec, kind, seed=5)
    first = play(spec, spec.tasks("train")[3], player)
    assert play(spec, spec.tasks("train")[3], player) == first


def test_the_corpus_holds_all_that_is_said():
    spec = load_env("maze", {"size": 2})
    texts = corpus(spec)
    assert set(Maze.utterances()) == {"move up", "move down", "move left", "move right"}
    assert {*Maze.utterances(), "You are there.", spec.make(spec.tasks("train")[0]).start()[0]["content"]} <= set(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1}, "maze: size = 1: a maze has cells to walk between. Use 2 or more."),
        (
            {"size": -1},
            "maze: size = -1: 0 is the double T, and other mazes have that many cells a side. Use 0 or more.",
        ),
        ({"max_turns": 0}, "maze: max_turns = 0: a game needs a turn. Use 1 or more."),
    ],
)
def test_settings_that_make_no_maze(settings, message):
    with pytest.raises(ConfigError) as error:
        load_env("maze", settings).tasks("train")
    assert str(error.value) == message


def test_a_task_of_other_settings_is_refused():
    with pytest.raises(DataError, match=r"maze: nobody can start at row 9, column 7. Use the task's own settings."):
        Maze(Task("maze/9,7", {"start": [9, 7]}), size=2)
    with pytest.raises(ConfigError, match="maze has no 'best' player"):
        make_player("maze", "best")
