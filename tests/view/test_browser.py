"""The page in a real browser, without network: every view, every control, and whatever a model may say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.view.serve import Server, Watched
from tests.view.browser import VIEWS, Tab, axe, opened
from tests.view.conftest import Write, episode, lines, turn

pytestmark = pytest.mark.browser
WIDTHS = (390, 820, 1440)
LONG = 10_000_000
NASTY = [
    "<script>window.taken = 1</script>",
    "</script><script>window.taken = 1</script>",
    "<img src=x onerror='window.taken = 1'>",
    "&lt;b&gt; {{data}} ${1}",
    "\x00 bell \x07 escape \x1b[31m delete \x7f",
    "\u202eright to left\u202c שלום مرحبا",
    "one line " + "without" * 3000,
    "",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; tests skip where there is none."""
    with opened() as found:
        yield found


def choices(best: str) -> list[dict[str, Any]]:
    return [{"q": at / 3, "text": f"({at})", "strategy": name} for at, name in enumerate(("Ask", "Advise", best))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three runs: two levels with strategies, the same with another seed, and one with a coach."""
    folder = tmp_path_factory.mktemp("report")
    write: Write = _writer(folder)
    for seed in (0, 1):
        rows = [
            {
                "step": at,
                "seconds": at + 1.0,
                "reward/mean": at / 9 + seed,
                "critic/loss": 9 - at / 3,
                "policy/entropy": 1.0,
            }
            for at in range(20)
        ]
        talk = [
            episode(
                at,
                f"talk/{at % 2}",
                [
                    turn("(2)", "strategist", strategy="Comfort", candidates=choices("Comfort"), chosen=2, seen="sad"),
                    turn(f"I hear you, {at}.", "responder", reward=1.0, advantage=0.5 - at / 20, value=0.1),
                    turn("word", "responder", tokens=["wo", "rd"], ids=[5, 6], logprobs=[-0.1, -2.0]),
                ],
                reward=at / 10,
                metrics={"win": float(at > 9)},
            )
            for at in range(20)
        ]
        write(
            f"two/seed_{seed}",
            metrics=rows,
            episodes=talk,
            settings={"seed": seed, "steps": 20, "episodes_per_step": 4},
        )
    tree = [turn("1", "solver"), turn("no", "coach"), turn("2", "solver", reward=1.0), turn("hm", "coach", parent=0)]
    write("coached", episodes=[episode(0, "sum", tree, 1.0), episode(19, "sum", tree, 2.0)], settings={"remarks": 2})
    (folder / "coached" / "summary.json").write_text(
        json.dumps({"episodes": 2, "estimates": {"return": {"mean": 1.5}}})
    )
    assert cli.main(["report", str(folder)]) == 0
    return folder / "report.html"


def _writer(folder: Path) -> Write:
    from tests.view import conftest

    return conftest.write.__wrapped__(folder)  # type: ignore[attr-defined,no-any-return]


def test_every_view_opens_without_complaint_and_asks_no_network(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    for view in VIEWS:
        tab.go(view)
        assert tab.text.strip()
    assert tab.quiet(), (tab.complaints, tab.asked)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_view_is_wider_than_the_screen_and_none_has_a_serious_finding(
    browser: Any, report: Path, width: int, mode: str
) -> None:
    audited = (width, mode) in ((390, "light"), (1440, "dark"))  # each layout and each palette once
    tab, audit = Tab(browser, report, width=width, mode=mode, audit=audited), axe() if audited else ""
    for view in VIEWS:
        tab.go(view)
        assert tab.fits(), view
        tab.picture(f"{view.partition('=')[0]}_{width}_{mode}")
        if audit:
            assert tab.findings(audit) == [], view
    if audited and not audit:
        pytest.skip("no accessibility audit: pip install 'echelon[browser]'")


def test_a_browser_whose_language_is_none_draws_curves_too(browser: Any, report: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script("Object.defineProperty(navigator, 'language', {value: 'en-US@posix', configurable: true})")
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_selector(".uplot canvas", timeout=60_000)
    assert complaints == []


def test_filters_leave_what_was_asked_for(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    tab.go("episodes")
    count = "document.querySelectorAll('.list a').length"
    tab.until(count, 42)
    for label, value, left in [("Text", "i hear you, 7.", 2), ("Step from", "18", 5), ("Return from", "2", 1)]:
        tab.page.get_by_label(label, exact=True).fill(value)
        tab.until(count, left)
        tab.page.get_by_label(label, exact=True).fill("")
        tab.until(count, 42)
    tab.page.get_by_label("Role", exact=True).select_option("coach")
    tab.until(count, 2)
    tab.page.get_by_label("Role", exact=True).select_option("")
    tab.page.get_by_label("Outcome", exact=True).select_option("won")
    tab.until(count, 20)
    assert tab.quiet(), tab.complaints


def test_keys_go_from_episode_to_episode_and_an_address_names_one(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    tab.go("episode=1.3")
    assert "step 3" in tab.text
    assert "Comfort" in tab.text
    tab.page.keyboard.press("j")
    tab.until("location.hash", "#episode=1.4")
    tab.page.keyboard.press("k")
    tab.until("location.hash", "#episode=1.3")
    tab.page.keyboard.press("/")
    tab.until("document.activeElement.id", "search")
    tab.go("episode=9.9")  # one that is not in this page: the list is shown
    assert tab.quiet(), tab.complaints


def test_a_turn_shows_its_numbers_its_choices_and_what_feedback_changed(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    place = json.loads(tab.page.evaluate("JSON.stringify(runs.findIndex(run => run.name.includes('coached')))"))
    tab.go(f"episode={place}.0")
    assert "Δ of the next attempts 1" in tab.page.locator(".turn", has_text="no").first.inner_text().replace("\n", " ")
    other = 0 if place else 1
    tab.go(f"episode={other}.0")
    assert tab.page.locator("tr.taken").first.inner_text().split("\t")[0] == "Comfort"
    assert tab.page.locator(".tok").nth(1).get_attribute("title") == "id 6 · logprobs −2"
    tab.page.get_by_label("Shade turns by").select_option("advantage")
    assert tab.page.evaluate(
        "[...document.querySelectorAll('.turn')].some(one => one.style.backgroundImage.includes('--plus'))"
    )
    assert tab.quiet(), tab.complaints


def test_curves_follow_their_controls(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    tab.go("curves")
    tab.page.wait_for_selector(".uplot canvas")
    label = "document.querySelector('.plot').getAttribute('aria-label')"
    assert "reward/mean over steps" in tab.page.evaluate(label)
    assert tab.page.evaluate(label).count(": from") == 2  # two seeds are one line
    tab.page.get_by_role("button", name="each run").click()
    assert tab.page.evaluate(label).count(": from") == 3
    tab.page.get_by_role("button", name="seconds").click()
    assert "over seconds" in tab.page.evaluate(label)
    tab.page.locator(".legend button").first.click()
    assert tab.page.evaluate(label).count(": from") == 2
    tab.page.get_by_label("Find").fill("entropy")
    tab.until("document.querySelectorAll('figure').length", 1)
    assert tab.quiet(), tab.complaints


def test_the_overview_is_about_the_run_that_is_chosen(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    names = tab.page.evaluate("runs.map(run => run.name)")
    assert tab.page.inner_text("h1").endswith(" · 3 runs")
    place = next(at for at, name in enumerate(names) if "coached" in name)
    tab.page.get_by_label("About the run").select_option(str(place))
    assert "Feedback that is ignored" in tab.text
    tab.page.get_by_role("link", name=names[1 if place != 1 else 0], exact=True).click()
    said = tab.page.get_by_label("In one look").inner_text()
    assert "✓ yes" in said
    assert "It learned" not in said, "of its critic the files have a loss alone"
    assert tab.page.get_by_label("Before and after").locator(".pair > section").count() == 2
    assert tab.page.get_by_label("Health", exact=True).locator("li").count() > 0
    tab.page.get_by_role("link", name="more").click()
    tab.until("shown", "compare")
    assert tab.quiet(), tab.complaints


def test_colours_are_chosen_and_a_table_is_searched(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(15, 17, 22)'"
    seen = []
    for _ in range(3):
        tab.page.locator("#theme").click()
        seen.append((tab.page.inner_text("#theme"), tab.page.evaluate(dark)))
    assert seen == [("Colours: light", False), ("Colours: dark", True), ("Colours: auto", False)]
    tab.page.keyboard.press("Tab")
    tab.page.evaluate("document.getElementById('skip').click()")
    assert tab.page.evaluate("document.activeElement.id") == "main"
    tab.go("settings")
    tab.page.get_by_label("Find", exact=True).fill("episodes_per")
    rows = "document.querySelectorAll('[aria-label=Settings] tbody tr').length"
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate(rows) <= 1
    assert tab.quiet(), tab.complaints


def test_episodes_are_ordered_and_lead_to_what_came_of_their_task(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    tab.go("episodes")
    tab.page.get_by_label("Order", exact=True).select_option("best")
    worth = "[...document.querySelectorAll('.list .chip')].map(one => Number(one.textContent))"
    found = tab.page.evaluate(worth)
    assert found == sorted(found, reverse=True)
    tab.page.get_by_label("Run", exact=True).select_option("1")
    tab.page.get_by_label("Step to").fill("3")
    tab.page.get_by_label("Return to").fill("0.2")
    tab.until("document.querySelectorAll('.list a').length", 3)
    tab.page.get_by_role("button", name="Beside step 18").click()
    tab.until("location.hash", "#compare=1.2,1.18")
    tab.page.get_by_label("Late", exact=True).select_option("1.4")
    tab.until("location.hash", "#compare=1.2,1.4")
    assert "I hear you, 4." in tab.text
    tab.page.get_by_label("Task", exact=True).select_option("talk/1")
    tab.until("location.hash", "#compare=1.1,1.19")
    tab.page.get_by_role("link", name="open").first.click()
    tab.until("location.hash", "#episode=1.1")
    assert tab.quiet(), tab.complaints


def test_a_curve_is_looked_at_closer_and_told_in_numbers(browser: Any, report: Path) -> None:
    tab = Tab(browser, report)
    tab.go("curves")
    tab.page.wait_for_selector(".uplot canvas")
    tab.page.get_by_role("button", name="each run").click()
    tab.page.locator(".legend button").first.click(modifiers=["Shift"])
    label = "document.querySelector('.plot').getAttribute('aria-label')"
    assert tab.page.evaluate(label).count(": from") == 1
    tab.page.locator("figure summary").first.click()
    assert "most" in tab.page.locator("figure table").first.inner_text()
    box = tab.page.locator(".u-over").first.bounding_box()
    ticks = "document.querySelector('.plot canvas').toDataURL()"
    before = tab.page.evaluate(ticks)
    tab.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 40)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 40, steps=4)
    tab.page.mouse.up()
    tab.page.wait_for_timeout(200)
    closer = tab.page.evaluate(ticks)
    tab.page.locator(".u-over").first.dblclick()
    tab.page.wait_for_timeout(200)
    assert closer != before
    assert tab.page.evaluate(ticks) == before
    assert tab.quiet(), tab.complaints


PAINTED = """name => {
  const named = (figure) => figure.querySelector("figcaption span").textContent;
  const figure = [...document.querySelectorAll("figure")].find((one) => named(one) === name);
  const canvas = figure.querySelector("canvas");
  if (!canvas) return null;
  const { data: all, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const wanted = [1, 3, 5].map((from) => parseInt(color(0).slice(from, from + 2), 16));
  const columns = new Set();
  let count = 0;
  for (let at = 0; at < all.length; at += 4) {
    if (all[at + 3] < 200 || wanted.some((one, part) => Math.abs(one - all[at + part]) > 24)) continue;
    count++;
    columns.add((at / 4) % width);
  }
  return [count, columns.size / width, Math.max(...columns) / width];
}"""
"""Of a figure, in the colour of the first curve: pixels, the part of its columns that has some, where the last is."""


def drawn(browser: Any, folder: Path, name: str) -> Tab:
    """The page of the runs in a folder, its curves without smoothing and `name` drawn."""
    assert cli.main(["report", str(folder), "--out", str(folder / "page.html")]) == 0
    tab = Tab(browser, folder / "page.html")
    tab.go("curves")
    tab.page.get_by_label("Smoothing").evaluate("one => { one.value = 0; one.dispatchEvent(new Event('input')); }")
    tab.page.get_by_label("Find").fill(name)
    tab.until("document.querySelectorAll('figure').length", 1)
    tab.page.wait_for_selector("figure canvas")
    tab.page.wait_for_timeout(300)
    return tab


def seldom(values: dict[int, float | None], shift: float) -> list[dict[str, Any]]:
    """Forty steps, of which few have a test."""
    told = {at: {"eval/loss": None if value is None else value + shift} for at, value in values.items()}
    return [{"step": at, "seconds": at + 1.0 + shift, "loss": 1.0} | told.get(at, {}) for at in range(40)]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    ("values", "least", "most"),
    [
        ({9: 3.0, 19: 2.0, 29: 2.5, 39: 1.0}, 0.5, 1.0),  # a line over the figure
        ({39: 1.0}, 0.001, 0.1),  # a point
        ({9: 3.0, 19: None, 29: 2.5}, 0.001, 0.1),  # two, and no line over what is not finite
        ({9: 3.0, 19: 2.0, 29: None, 39: 2.5}, 0.2, 0.5),  # a line, and a point after the gap
    ],
)
def test_a_metric_that_few_steps_have_is_drawn(
    browser: Any, write: Write, values: dict[int, float | None], least: float, most: float, seeds: int
) -> None:
    for seed in range(seeds):
        settings = {"seed": seed, "steps": 40, "lr": 0.1}
        folder = write(f"many/seed_{seed}", metrics=seldom(values, seed / 10), settings=settings)
    tab = drawn(browser, folder.parent, "eval/loss")
    count, wide, end = tab.page.evaluate(PAINTED, "eval/loss")
    tab.picture(f"seldom_{'_'.join(map(str, values.values()))}_{seeds}")
    assert count > 10
    assert least < wide < most
    assert end > 0.9 or len(values) == 1
    tab.page.get_by_role("button", name="seconds").click()
    tab.page.wait_for_timeout(300)
    over_seconds = tab.page.evaluate(PAINTED, "eval/loss")
    assert over_seconds[0] > 10 or (seeds == 3 and None in values.values())
    assert tab.quiet(), tab.complaints


def test_the_table_of_runs_says_what_their_verdicts_say(browser: Any, write: Write) -> None:
    for name in ("a", "b"):
        folder = write(f"many/{name}", metrics=[{"step": at, "reward/mean": float(at * at)} for at in range(7)])
    (folder / "checkpoints" / "step_000020" / "config.yaml").write_text("{env: wordle, steps: 20}")
    assert cli.main(["report", str(folder.parent)]) == 0
    tab = Tab(browser, folder.parent / "report.html")
    assert "from 1.67 in the first fifth of the steps to 25.7 in the last" in tab.text
    cells = tab.page.locator("[aria-label=Runs] tbody tr").first.locator("td").all_inner_texts()
    assert cells[:4] == ["✓ yes", "1.667", "25.67", "reward/mean"]
    assert tab.quiet(), tab.complaints


def test_a_run_that_says_nothing_of_what_it_is_for_shows_the_curves_of_its_parts(browser: Any, write: Write) -> None:
    rows = [{"step": at, "critic/loss": 9.0 - at / 3, "policy/loss": 0.1 * (at % 2)} for at in range(20)]
    folder = write(metrics=rows)
    assert cli.main(["report", str(folder)]) == 0
    tab = Tab(browser, folder / "report.html")
    assert "Nothing that is recorded says what the run is for" in tab.text
    assert "· not known" in tab.text
    tab.until("document.querySelectorAll('figure').length", 2)
    assert tab.quiet(), tab.complaints


def test_episodes_without_a_task_that_returns_are_the_first_and_the_last(browser: Any, write: Write) -> None:
    rows = [episode(at, f"task {at}", [turn(f"word {at}")], at) for at in range(5)]
    folder = write(episodes=rows)
    assert cli.main(["report", str(folder)]) == 0
    tab = Tab(browser, folder / "report.html")
    assert "The first episode and the last: no task comes twice." in tab.text
    tab.go("compare")
    assert "task 0, and later task 4" in tab.text
    tab.page.get_by_label("Late", exact=True).select_option("0.2")
    tab.until("location.hash", "#compare=0.0,0.2")
    assert "word 2" in tab.text
    assert tab.quiet(), tab.complaints


def test_whatever_a_model_says_is_text(browser: Any, write: Write) -> None:
    rows = [
        episode(at, text, [turn(text, role=text[:40] or "x", seen=text, note=text)], error=text)
        for at, text in enumerate(NASTY)
    ]
    folder = write(
        episodes=[*rows, episode(9, "long", [turn("x" * LONG)])], settings={"env": NASTY[1], NASTY[0]: NASTY[2]}
    )
    with (folder / "episodes.jsonl").open("ab") as file:
        file.write(
            b'{"step": 10, "task": "bytes", "turns": [{"role": "a", "text": "\xff\xfe\\ud800"}]}\n{"step": 11, "ta'
        )
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size < 1_000_000
    tab = Tab(browser, folder / "report.html")
    for view in ("overview", "settings", "episodes", *(f"episode=0.{place}" for place in range(len(NASTY) + 2))):
        tab.go(view)
        assert tab.fits(), view
        assert tab.page.evaluate("[window.taken, document.images.length, document.scripts.length]") == [None, 0, 6]
    tab.go("episode=0.1")
    assert NASTY[1] in tab.text
    tab.go(f"episode=0.{len(NASTY)}")
    assert f"{LONG - 6000:,} characters are left out here" in tab.text
    assert tab.quiet(), tab.complaints


def test_a_run_that_has_only_begun_has_a_page(browser: Any, write: Write) -> None:
    folder = write(metrics=[])
    assert cli.main(["report", str(folder)]) == 0
    tab = Tab(browser, folder / "report.html")
    for view in VIEWS:
        tab.go(view)
    assert tab.quiet(), tab.complaints


def test_a_watched_page_follows_the_run_and_the_reader_keeps_the_place(browser: Any, write: Write) -> None:
    def talk(step: int) -> dict[str, Any]:
        return episode(step, f"task {step}", [turn(f"word {step} {at}", seen="x" * 400) for at in range(9)], step)

    folder = write(episodes=[talk(at) for at in range(20)], settings={"steps": 40, "episodes_per_step": 4})
    server = Server(Watched([str(folder)], every=0.2, room=3_000_000), 0)
    tab = Tab(browser, server.address)
    tab.go("episode=0.3")
    tab.page.get_by_label("Text", exact=True).fill("word")
    tab.until("document.querySelectorAll('.list a').length", 20)
    tab.go("episode=0.3")
    unfolded = tab.page.locator(".shown details.told").nth(2)
    unfolded.evaluate("one => { one.open = true; one.scrollIntoView({ behavior: 'instant' }); }")
    place = tab.page.evaluate("window.scrollY")
    assert place > 100
    with (folder / "episodes.jsonl").open("a") as file:
        file.write(lines([talk(20)]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines([{"step": 20, "seconds": 42.0, "reward/mean": 9.0}]) + '{"step": 21, "sec')
    tab.until("document.querySelectorAll('.list a').length", 21)
    assert tab.page.evaluate("[location.hash, document.getElementById('search').value, scrollY]") == [
        "#episode=0.3",
        "word",
        place,
    ]
    assert unfolded.evaluate("one => one.open")
    assert "word 3 0" in tab.text

    tab.go("overview")
    tab.page.get_by_label("Smoothing").evaluate("one => { one.value = 0; one.dispatchEvent(new Event('input')); }")
    label = "document.querySelector('.plot').getAttribute('aria-label').includes('to 9')"
    tab.until(label, True)
    tab.page.evaluate("document.querySelector('.plot').marked = true")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines(['onds": 1}', {"step": 22, "seconds": 46.0, "reward/mean": 11.0}]))
    tab.until(label.replace("9", "11"), True)
    assert tab.page.evaluate("document.querySelector('.plot').marked"), "the curve is the same, with more of it"
    assert tab.quiet(), (tab.complaints, tab.asked)
    server.close()
    tab.until("document.getElementById('live').textContent.startsWith('The server has ended')", True)
