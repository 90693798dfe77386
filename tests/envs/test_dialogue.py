"""The rules of the simulated user, what words do, what chance and the best play earn, and models in place of rules."""

import asyncio
import json
import random
from dataclasses import replace

import pytest

from echelon.envs import check_env, load_env
from echelon.envs.dialogue import SMALL, Dialogue, Plan, best, bound
from echelon.envs.dialogue_models import parse_reaction, user_prompt
from echelon.envs.dialogue_user import PLANS, Mood, Persona, hear, rate, react
from echelon.envs.dialogue_words import (
    ACT,
    AFFIRMATION,
    BLAND,
    COMFORT,
    DISCLOSURE,
    EXPLORE,
    FEELINGS,
    INFORMATION,
    OTHERS,
    QUESTION,
    REFLECTION,
    RESTATEMENT,
    SENSITIVE,
    SUGGESTIONS,
    TOPICS,
    act_of,
    fluent,
    say,
    wordings,
)
from echelon.envs.players import corpus, make_player, measure, play
from echelon.errors import ConfigError, ParseError, RolloutError
from echelon.rollout.roles import collect
from echelon.text.dialogue import DIMENSIONS, INVENTORIES, DialogueState
from echelon.text.endpoint import Unanswered
from echelon.types import Task

SAD = {"topic": "job", "feeling": "sad", "intensity": 3}
ASK, SEE, SOOTHE, ADVISE = (
    "What happened with your job?",
    "You feel sad, I can see that.",
    "It is all right to be sad.",
    "You could make a plan for your job.",
)


def dialogue(need: str = "exploration", **settings) -> Dialogue:
    return Dialogue(Task("t", data={"need": need, **SAD}), **settings)


def rewards(env: Dialogue, *replies: str) -> list[float]:
    return [env.step(reply).reward for reply in replies]


@pytest.mark.parametrize("settings", [{}, {"strategies": "small"}, {"patience": 1}, {"patience": 2}])
def test_it_keeps_every_rule_of_environments(settings):
    check_env("dialogue", settings=settings)


@pytest.mark.parametrize(
    ("need", "replies", "earned"),
    [
        ("exploration", [ASK, "Can you tell me about your job?", SEE, ADVISE], [3, 3, 4, 5]),
        ("validation", [ASK, SEE, SOOTHE, ADVISE], [3, 4, 4, 5]),
        ("advice", [ASK, "Most people have trouble with their job.", ADVISE], [3, 4, 5]),
    ],
)
def test_every_need_is_met_by_its_own_order(need, replies, earned):
    env = dialogue(need)
    steps = [env.step(reply) for reply in replies]
    assert [step.reward for step in steps] == earned
    assert [step.terminated for step in steps] == [False] * (len(replies) - 1) + [True]
    assert not any(step.truncated for step in steps)
    info = steps[-1].info
    assert (info["win"], info["left"], info["intensity"], info["turns"]) == (1, 0, 0, len(replies))
    assert info["satisfaction"] == pytest.approx(sum(earned) / len(replies))


def test_the_same_replies_in_another_order_lose():
    assert sum(rewards(dialogue("validation"), ASK, SEE, SOOTHE, ADVISE)) == 16
    assert sum(rewards(dialogue("validation"), ADVISE, SOOTHE)) == 5
    assert sum(rewards(dialogue("validation"), SOOTHE, SEE, ASK, ADVISE)) == 1 + 1 + 2 + 2


def test_advice_that_comes_too_early_pleases_more_than_a_question_and_makes_the_user_leave():
    assert rewards(dialogue(), ASK) < rewards(dialogue(), ADVISE)
    env = dialogue()
    first, second = env.step(ADVISE), env.step(ASK)
    assert (first.reward, first.terminated, first.info["emotion_improvement"]) == (4, False, 1)
    assert (second.reward, second.terminated, second.info["left"]) == (1, True, 1)
    assert rewards(dialogue(), ADVISE, "Try to take your job in small steps.", ASK) == [4, 3, 1]


def test_what_does_not_help_costs_patience_and_trust():
    env = dialogue(patience=3)
    assert rewards(env, SEE, ASK) == [1, 2]  # the question would have been accepted, and earned 3
    assert [env.step(reply).terminated for reply in ("Hello there.", "Good day to you.")] == [False, True]
    assert dialogue(patience=1).step("Hello there.").terminated


def test_the_emotion_follows_the_strategy_and_the_wording():
    env = dialogue("validation")
    assert env.state.emotion == "very sad"
    env.step(ASK)
    env.step("You feel something, I can see that.")
    assert env.state.emotion == "terribly sad"
    env.step(SEE)
    assert env.state.emotion == "very sad"


def test_comfort_must_name_the_feeling_and_the_rest_the_topic():
    for act in (*EXPLORE, *ACT):
        assert all("{topic}" in wording for wording in SENSITIVE[act])
    for act in COMFORT:
        assert all("{feeling}" in wording for wording in SENSITIVE[act])
    assert rewards(dialogue(), "What happened?") == [1]
    assert rewards(dialogue(), "What happened with your exam?") == [1]
    assert rewards(dialogue(), "What happened at work?") == [3]
    assert rewards(dialogue("validation"), ASK, "You feel angry, I can see that.") == [3, 1]


def test_what_was_said_before_or_stutters_is_not_fluent():
    assert rewards(dialogue(), ASK, ASK) == [3, 2]
    assert rewards(dialogue(), "What happened with your your job?") == [2]
    assert not fluent("Job?")
    assert not fluent("What happened with your job")
    assert rewards(dialogue(), " ".join(["What happened with your job?"] * 4)) == [0]


@pytest.mark.parametrize("act", list(SENSITIVE))
def test_every_wording_is_recognised_as_the_strategy_it_carries_out(act):
    for wording in (*SENSITIVE[act], *BLAND[act]):
        for topic in TOPICS:
            for feeling in FEELINGS:
                text = wording.format(topic=topic, feeling=feeling)
                assert (act_of(text), fluent(text)) == (act, True), text


@pytest.mark.parametrize(
    ("reply", "act"),
    [
        ("How are you?", QUESTION),
        ("So you mean that it is over?", RESTATEMENT),
        ("YOU SEEM  down.", REFLECTION),
        ("Me too!", DISCLOSURE),
        ("You will get there.", AFFIRMATION),
        ("Have you tried a walk?", SUGGESTIONS),
        ("Studies show that it passes.", INFORMATION),
        ("You feel sad. You could make a plan.", OTHERS),
        ("?", OTHERS),
        ("", OTHERS),
        ("Blorp?", OTHERS),
    ],
)
def test_strategies_are_recognised_by_their_cues_and_two_at_once_are_muddled(reply, act):
    assert act_of(reply) == act


def test_scripted_replies_follow_their_strategy_as_often_as_asked():
    state, draw = dialogue().state, random.Random(0)
    replies = [say(SUGGESTIONS, state, draw, follows=0.7, sensitive=0.5) for _ in range(2000)]
    followed = [reply for reply in replies if act_of(reply) == SUGGESTIONS]
    assert {act_of(reply) for reply in replies} == {SUGGESTIONS, OTHERS}
    assert len(followed) / 2000 == pytest.approx(0.7, abs=0.04)
    assert sum("job" in reply for reply in followed) / len(followed) == pytest.approx(0.5, abs=0.05)
    assert all(fluent(reply) and set(replies) <= set(wordings()) for reply in set(replies))


def test_scripted_replies_do_not_repeat_what_was_said():
    state = dialogue().state
    said = say(QUESTION, state, random.Random(0))
    after = replace(state, history=(("User", state.query), ("Assistant", said)))
    assert said not in {say(QUESTION, after, random.Random(seed)) for seed in range(50)}
    with pytest.raises(ConfigError, match="Did you mean 'Question'"):
        say("question", state, random.Random(0))
    assert say(REFLECTION, DialogueState(query="Hello."), random.Random(0))


def test_the_need_is_hidden():
    """Users who differ only in their need say the same until one stage is done, and never what the need is called."""
    for first, *others in zip(*(Dialogue.tasks("train")[place::3] for place in range(3)), strict=True):
        envs = [Dialogue(task) for task in (first, *others)]
        assert len({json.dumps(env.start()) for env in envs}) == 1
        told = [[env.step(reply).messages for reply in ("Hello there.", SEE)] for env in envs]
        assert told[0] == told[1] == told[2]
    spec = load_env("dialogue")
    texts = corpus(spec)
    assert not [text for text in texts for need in PLANS if need in text.lower()]


def test_one_good_question_tells_the_need():
    envs = [dialogue(need) for need in PLANS]
    assert len({env.step(ASK).messages[0]["content"] for env in envs}) == 3


def test_the_splits_share_no_situation_and_each_has_all_needs():
    train, test = (Dialogue.tasks(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (144, 36)

    def situations(tasks):
        return {tuple(task.data[key] for key in ("topic", "feeling", "intensity")) for task in tasks}

    assert situations(train).isdisjoint(situations(test))
    assert [sum(task.data["need"] == need for task in test) for need in PLANS] == [12, 12, 12]


def test_the_state_is_what_both_levels_may_know():
    env = dialogue()
    opening = env.state
    assert (opening.description, opening.emotion, opening.history) == ("Trouble with my job.", "very sad", ())
    env.step(f"  {ASK}\n")
    assert env.state.history == (("User", opening.query), ("Assistant", ASK))
    assert env.step(ADVISE).messages[0]["content"] == f"Emotion: {env.state.emotion}\nUser: {env.state.query}"


def test_the_best_play_earns_what_its_three_plans_pay():
    """12, 15 and 16 for the three needs: asking, which all of them need first, tells them apart for nothing."""
    spec = load_env("dialogue")
    got = measure(spec, "optimal")
    assert (got.reward, got.wins) == (pytest.approx((15 + 16 + 12) / 3), 1.0)
    assert got.reward == pytest.approx(bound())
    assert measure(load_env("dialogue", {"strategies": "small"}), "optimal").reward == pytest.approx(bound())


def test_discounted_best_play_is_worth_what_a_hand_computes():
    def worth(*earned: float) -> float:
        return sum(0.85**turn * reward for turn, reward in enumerate(earned))

    by_hand = (worth(3, 3, 4, 5) + worth(3, 4, 4, 5) + worth(3, 4, 5)) / 3
    assert bound(gamma=0.85) == pytest.approx(by_hand)


def test_who_takes_the_best_next_turn_loses_to_who_plans_and_beats_chance():
    spec = load_env("dialogue")
    greedy = measure(spec, "optimal", gamma=0.0)
    chance = measure(spec, "random", rounds=20)
    assert (greedy.reward, greedy.wins, greedy.turns) == (8.0, 0.0, 3.0)
    assert measure(spec, "optimal", gamma=0.85).reward - greedy.reward > 6
    assert greedy.reward - chance.reward > 1
    assert chance.wins is not None
    assert chance.wins < 0.06


def test_planning_pays_with_clumsy_replies_too():
    spec = load_env("dialogue")
    planned, hasty = (
        measure(spec, "optimal", rounds=8, gamma=gamma, follows=0.7, sensitive=0.65) for gamma in (0.85, 0.0)
    )
    assert planned.reward - hasty.reward > 1.5


def exhaustive(need: str, mood: Mood, patience: int) -> float:
    """The best return by trying everything, for somebody who knows the need."""
    values = []
    for act in SENSITIVE:
        for sensitive in (True, False):
            after = react(need, mood, act, sensitive, patience=patience)
            value = float(sum(rate(mood, after, act, fluently=True).values()))
            values.append(value + (exhaustive(need, after, patience) if after.status == "stays" else 0.0))
    return max(values)


@pytest.mark.parametrize("need", list(PLANS))
def test_no_play_whatsoever_earns_more_than_the_bound(need):
    strategies = INVENTORIES["esconv"].strategies
    top = {"exploration": 15, "validation": 16, "advice": 12}[need]
    assert exhaustive(need, Mood(3), 2) == top
    assert best(strategies, 2).move(((need, Mood(3)),))[0] == top
    assert best(strategies, 3).move(((need, Mood(4)),))[0] == top


def test_chance_agrees_with_its_exact_value():
    """Every strategy alike, in sensitive words and never the same twice: a sum over all ways it can go."""

    def worth(need: str, mood: Mood) -> float:
        total = 0.0
        for act in SENSITIVE:
            after = react(need, mood, act, True, patience=3)
            total += sum(rate(mood, after, act, fluently=True).values())
            total += worth(need, after) if after.status == "stays" else 0.0
        return total / len(SENSITIVE)

    exact = sum(worth(need, Mood(intensity)) for need in PLANS for intensity in (3, 4)) / 6
    got = measure(load_env("dialogue"), "random", rounds=20)
    assert got.reward == pytest.approx(exact, abs=4 * got.error)


def test_the_optimal_player_does_not_know_what_it_was_not_told():
    """It tells needs apart by what it hears alone, and before a stage is done that is the same for all of them."""
    plan = Plan(INVENTORIES["esconv"].strategies, 3, 1.0)
    plan.move(tuple((need, Mood(3)) for need in PLANS))
    unasked = [beliefs for beliefs in plan._moves if beliefs[0][1].done == 0]
    assert len(unasked) > 2
    assert all([need for need, _ in beliefs] == list(PLANS) for beliefs in unasked)


def test_unneeded_turns_never_pay():
    """Nothing is gained by lingering: patience lost costs as much as the idle turn earned, or more."""
    for need, plan in PLANS.items():
        moves = best(INVENTORIES["esconv"].strategies, 3)
        assert moves.move(((need, Mood(3)),))[1] == len(plan)


def test_a_scripted_player_is_the_same_each_time_it_is_asked():
    spec = load_env("dialogue")
    task = spec.tasks("test")[4]
    first, again, other = (play(spec, task, make_player(spec, "random", seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_small_inventory_has_five_strategies_the_other_eight():
    assert Dialogue.inventory(strategies="small") == SMALL
    assert len(SMALL) == 5
    assert Dialogue.inventory() == INVENTORIES["esconv"]
    small = load_env("dialogue", {"strategies": "small"})
    played = [play(small, task, make_player(small, "random", seed=1)) for task in small.tasks("test")[:9]]
    said = [message["content"] for one in played for message in one.messages if message["role"] == "assistant"]
    assert {act_of(reply) for reply in said} <= set(SMALL.strategies)


def test_the_vocabulary_is_small_and_utterances_are_short():
    spec = load_env("dialogue")
    texts = corpus(spec)
    assert len({word for text in texts for word in text.lower().replace(".", " ").replace("?", " ").split()}) < 250
    assert max(len(text.split()) for text in wordings()) <= 12


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategies": "daily_dialog"}, "strategies = daily_dialog"),
        ({"patience": 0}, "1 to 3 wasted turns"),
        ({"user": "robot"}, "user = 'robot'"),
        ({"judge": "endpoint"}, "endpoint: url is missing"),
        ({"judge": "endpoint", "endpoint_modle": "m"}, "Did you mean 'endpoint_model'"),
        ({"judge": "endpoint", "endpoint_url": "http://localhost:1/v1"}, "endpoint: model is missing"),
        ({"endpoint_url": "http://localhost:1/v1"}, "nobody is asked there"),
        ({"patiense": 2}, "Did you mean 'patience'"),
    ],
)
def test_settings_that_cannot_work_say_why(settings, says):
    with pytest.raises(ConfigError, match=says):
        load_env("dialogue", settings).tasks("train")


def test_hearing_needs_the_words_alone():
    persona = Persona("exploration", **SAD)
    reaction = hear(persona, Mood(3), ASK, (), patience=3)
    assert tuple(reaction.judgement) == DIMENSIONS
    assert reaction.mood == Mood(3, done=1)


JUDGED = "acceptance: yes\neffectiveness: no\nsensitivity: yes\nfluency: yes\nemotion improvement: no"
REACTED = "says: Well, maybe.\nfeels: a bit\naccepts: yes\nhelps: no\nstatus: stays"


class Model:
    """A language model that says what it is told to, in turn, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    async def __call__(self, messages) -> str:
        self.asked.append(list(messages))
        return self.answers.pop(0)


def test_a_model_may_judge():
    judge = Model(JUDGED)
    step = asyncio.run(dialogue(judge=judge).step(ADVISE))
    assert (step.reward, step.info["sensitivity"], step.info["effectiveness"], step.info["unreadable"]) == (3, 1, 0, 0)
    ((prompt,),) = judge.asked
    assert ADVISE in prompt["content"]
    assert "exploration" not in prompt["content"]


def test_what_a_judge_says_out_of_form_is_asked_for_again_and_counted():
    judge = Model("4 out of 5!", JUDGED.replace("fluency: yes", "fluency: rather"), JUDGED)
    step = asyncio.run(dialogue(judge=judge).step(ADVISE))
    assert (step.reward, step.info["unreadable"]) == (3, 2)
    assert [len(asked) for asked in judge.asked] == [1, 3, 3]
    assert judge.asked[1][1] == {"role": "assistant", "content": "4 out of 5!"}


def test_a_judge_that_never_says_fails_the_episode_and_rewards_nothing():
    async def play_once(task, episode):
        env = Dialogue(task, judge=Model(*["garbage"] * 3))
        await env.step(ADVISE)
        raise AssertionError("a turn without a reward must not go on")

    tasks = [Task("t", data={"need": "advice", **SAD})]
    (episode,) = asyncio.run(collect(tasks, play_once, seed=0, error_budget=1.0))
    assert episode.ending == "failed"
    assert episode.error is not None
    assert episode.error.startswith("Unanswered: the judge gave no answer that can be read in 3 tries.")
    with pytest.raises(RolloutError, match="the judge"):
        asyncio.run(collect(tasks, play_once, seed=0))


def test_a_model_may_be_the_user():
    user = Model(REACTED, REACTED.replace("stays", "solved").replace("helps: no", "helps: yes"))
    env = dialogue(user=user)
    first, second = asyncio.run(env.step(ASK)), asyncio.run(env.step(ADVISE))
    # accepted, names the job, fluent, and from very sad to a bit
    assert (first.reward, first.terminated, first.info["intensity"]) == (4, False, 1)
    assert first.messages[0]["content"] == "Emotion: a bit sad\nUser: Well, maybe."
    assert (second.reward, second.terminated, second.info["win"]) == (4, True, 1)
    assert "asked about it twice" in user.asked[0][0]["content"]
    assert ASK in user.asked[1][0]["content"]


def test_a_model_in_the_role_of_the_user_has_patience_too():
    refused = REACTED.replace("accepts: yes", "accepts: no")
    env = dialogue(user=Model(refused, REACTED, refused), patience=2)
    steps = [asyncio.run(env.step("Hello there.")) for _ in range(3)]
    assert [step.terminated for step in steps] == [False, False, True]
    assert steps[-1].info["left"] == 1


def test_a_model_reads_no_more_of_a_reply_than_a_person_would():
    judge = Model(JUDGED)
    asyncio.run(dialogue(judge=judge).step("very long " * 2000))
    assert len(judge.asked[0][0]["content"]) < 4000


def test_every_user_that_follows_rules_is_gone_within_seven_turns():
    def longest(need: str, mood: Mood) -> int:
        after = {react(need, mood, act, sensitive, patience=3) for act in SENSITIVE for sensitive in (True, False)}
        return 1 + max((longest(need, each) for each in after if each.status == "stays"), default=0)

    assert max(longest(need, Mood(4)) for need in PLANS) == 7


def test_user_and_judge_may_both_be_models():
    user, judge = Model(REACTED), Model(JUDGED)
    step = asyncio.run(dialogue(user=user, judge=judge).step(ASK))
    assert step.reward == 3
    assert "Well, maybe." in judge.asked[0][0]["content"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "says nothing of says, feels"),
        (REACTED.replace("accepts: yes", "accepts: maybe"), "neither yes nor no"),
        (REACTED.replace("feels: a bit", "feels: so-so"), "none of calm"),
        (REACTED.replace("status: stays", "status: gone"), "none of stays"),
        (f"{REACTED}\nstatus: stays", "not one of the five lines"),
        (f"Sure!\n{REACTED}", "not one of the five lines"),
        (REACTED.replace("says: Well, maybe.", "says:"), "not one of the five lines"),
    ],
)
def test_a_reaction_out_of_form_is_not_read(text, says):
    with pytest.raises(ParseError, match=says):
        parse_reaction(text)
    with pytest.raises(Unanswered, match="the user gave no answer"):
        asyncio.run(dialogue(user=Model(text, text, text)).step(ASK))


def test_a_reaction_in_form_is_read():
    heard = parse_reaction(f"\n{REACTED.replace('yes', 'Yes.')}\n")
    assert (heard.says, heard.intensity, heard.accepts, heard.helps, heard.status) == (
        "Well, maybe.", 1, True, False, "stays"
    )  # fmt: skip
    (message,) = user_prompt(Persona("advice", **SAD), dialogue().state, ASK)
    assert [line.split(":")[0] for line in message["content"].splitlines()[-5:]] == [
        "says", "feels", "accepts", "helps", "status"
    ]  # fmt: skip
