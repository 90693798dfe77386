"use strict";
// The views and the way between them: the part of the address after # says what is shown.

const FEW_TURNS = 4; // of an episode in the overview
let looked = Math.max(0, runs.findIndex((run) => run.learned)); // the run that the overview is about

function overview() {
  live.clear();
  const run = runs[looked], trained = runs.some((one) => one.learned);
  const box = legend();
  const outcomes = [...new Set(runs.map((one) => one.outcome).filter(Boolean))];
  const drawn = outcomes.length ? outcomes : data.headings.flatMap(([, , names]) => names); // without an outcome, what says most
  const ends = beforeAndAfter(looked);
  const parts = [];
  if (runs.length > 1) parts.push(el("section", { class: "card", "aria-label": "Runs" }, runsTable()));
  const judged = el("section", { class: "card stack", "aria-label": "In one look" });
  if (runs.length > 1) judged.append(choice("About the run", runs.map((one, place) => [String(place), one.name]), looked, (place) => { looked = Number(place); show(); }));
  if (run.learned) judged.append(el("ul", { class: "plain" }, verdict(run.learned, true), run.levels.map((one) => verdict(one))));
  else judged.append(el("p", { class: "big", text: data.evaluations.some((one) => one.run === looked) ? "An evaluation: nothing was learned here." : "Nothing is recorded yet." }));
  const left = el("div", { class: "stack" }, judged), right = el("div", { class: "stack" });
  if (trained) left.append(el("section", { class: "card stack", "aria-label": "Learning curves" }, el("h2", { text: "Learning curves" }), curveControls(box), runs.length > 1 ? box : null, drawn.slice(0, 2).map((name) => chart(name, true))));
  if (ends) {
    const [first, last] = ends, same = first.k === last.k;
    right.append(el("section", { class: "card stack", "aria-label": "Before and after" },
      el("div", { class: "head" }, el("h2", { text: "What it said, before and after" }), el("a", { href: `#compare=${first.id},${last.id}`, text: "more" })),
      el("p", { class: "muted", dir: "auto", text: same ? `The same task, ${visible(first.k)}, as early and as late as there is one.` : "The first episode and the last: no task comes twice." }), pair(first, last, FEW_TURNS)));
  }
  const tested = data.evaluations.filter((one) => one.run === looked), [said] = episodes.filter((one) => one.r === looked && one.t.length);
  if (!run.learned && tested.length) left.append(el("section", { class: "card", "aria-label": "Numbers" }, estimates(tested)));
  if (!run.learned && said) right.append(el("section", { class: "card stack", "aria-label": "What it said" },
    el("div", { class: "head" }, el("h2", { text: "What it said" }), el("a", { href: `#episode=${said.id}`, text: "more" })),
    el("p", { class: "muted", dir: "auto", text: `The first episode, ${visible(said.k)}.` }), about(said), thread(said, FEW_TURNS)));
  parts.push(el("div", { class: right.children.length ? "cols two" : "cols" }, left, right));
  if (run.checks.length) parts.push(el("section", { class: "card stack", "aria-label": "Health" }, el("h2", { text: "Health" }), el("ul", { class: "plain several" }, run.checks.map((one) => verdict(one)))));
  const notes = runs.flatMap((one) => one.notes.map((note) => (runs.length > 1 ? `${one.name}: ` : "") + note));
  const missing = runs.filter((one) => one.shown < one.episodes);
  if (missing.length) notes.unshift(`Not all episodes fit: ${missing.slice(0, 8).map((one) => `${runs.length > 1 ? one.name + ": " : ""}${one.shown.toLocaleString("en")} of ${one.episodes.toLocaleString("en")} shown`).join("; ")}${missing.length > 8 ? `; and ${missing.length - 8} more runs` : ""}. They are spread over all steps; --size makes room for more.`);
  if (notes.length) parts.push(el("section", { class: "card stack", "aria-label": "What is missing" }, el("h2", { text: "What is missing or could not be read" }), el("ul", { class: "plain" }, notes.map((note) => el("li", { text: visible(note) })))));
  return el("div", { class: "stack" }, parts);
}

function runsTable() {
  const states = (one) => {
    const counts = ["bad", "warn"].map((state) => [state, one.checks.filter((check) => check.state === state).length]).filter(([, count]) => count);
    return el("span", { class: "chips" }, counts.length ? counts.map(([state, count]) => badge(state, `${STATES[state]} ${count}`)) : one.checks.length ? badge("good") : "–");
  };
  const body = runs.map((one, place) => {
    const tested = !one.steps && data.evaluations.find((found) => found.run === place && !found.name);
    const mean = tested ? tested.estimates.return || tested.estimates.accuracy || {} : {};
    const [first, last] = tested ? [null, mean.mean] : [one.first, one.last];
    const interval = tested && mean.low !== null && mean.low !== undefined ? el("span", { class: "muted interval", text: ` [${number(mean.low)}, ${number(mean.high)}]` }) : "";
    const learned = one.learned ? badge(one.learned.state, LEARNED[one.learned.state]) : tested ? el("span", { class: "badge none", text: "· test" }) : "–";
    const open = el("a", { href: "#overview", text: one.name, onclick: (event) => { event.preventDefault(); looked = place; show(); } });
    return [open, learned, number(first), el("span", {}, el("b", { text: number(last) }), interval), el("span", { class: "metric", text: one.outcome || (tested ? (tested.estimates.return ? "return" : "accuracy") : "–") }), one.recipe || "–", one.steps ? one.steps.toLocaleString("en") : "–", tested ? (tested.episodes ?? 0).toLocaleString("en") : one.perStep && one.steps ? (one.perStep * one.steps).toLocaleString("en") : "–", one.seconds ? duration(one.seconds) : "–", states(one)];
  });
  const made = table("What each run is for, as the mean over the first fifth of its steps and the last; of a test with its 95 % interval", ["run", "learned?", "first", "last", "of", "recipe", "steps", "episodes", "time", "health"], body, ["", "", "num", "num", "", "", "num", "num", "num", ""]);
  if (runs.length > 12) made.classList.add("limit");
  return made;
}

function settingsView() {
  const { common, differing } = data.settings, names = Object.keys(common);
  const parts = [];
  if (runs.length > 1) {
    const cells = (row) => [el("code", { text: row.name }), ...row.values.map((value) => (value === null ? "–" : visible(value)))];
    const whole = differing.filter((row) => !row.partial), partial = differing.filter((row) => row.partial);
    const head = ["setting", ...runs.map((run) => run.name)];
    parts.push(el("section", { class: "card stack", "aria-label": "Differences" }, el("h2", { text: "Where the runs differ" }),
      whole.length ? table("Settings that all have, with different values", head, whole.map(cells)) : el("p", { class: "muted", text: "In nothing that all of them have." }),
      partial.length ? el("details", {}, el("summary", { text: `${plural(partial.length, "setting")} that only some have` }), table("Settings that only some have", head, partial.map(cells))) : null));
  }
  const body = el("div"), input = el("input", { type: "search", placeholder: "lr", oninput: later(80, () => fill()) });
  const source = runs.length > 1 ? names.map((name) => [name, common[name]]) : [...names.map((name) => [name, common[name]]), ...differing.map((row) => [row.name, row.values[0]])];
  const fill = () => {
    const found = source.filter(([name, value]) => `${name} ${value}`.toLowerCase().includes(input.value.toLowerCase()));
    body.replaceChildren(found.length ? table(`${found.length} of ${plural(source.length, "setting")}`, ["setting", "value"], found.map(([name, value]) => [el("code", { text: name }), visible(String(value))])) : el("p", { class: "muted", text: source.length ? "None has such a name or value." : "The files do not say any." }));
  };
  fill();
  parts.push(el("section", { class: "card stack", "aria-label": "Settings" }, el("h2", { text: runs.length > 1 ? "What all of them share" : "Settings" }), field("Find", input), body));
  return el("div", { class: "stack" }, parts);
}

function evaluationsView() {
  return el("section", { class: "card" }, estimates(data.evaluations));
}

function estimates(all) {
  const names = [...new Set(all.flatMap((one) => Object.keys(one.estimates)))];
  const title = (one) => [runs[one.run].name, one.name].filter(Boolean).join(" · ");
  const body = names.map((name) => [el("code", { text: name }), ...all.map((one) => {
    const found = one.estimates[name];
    if (!found || found.mean === null) return "–";
    return el("span", {}, el("b", { text: number(found.mean) }), found.low === null ? "" : el("span", { class: "muted", text: ` [${number(found.low)}, ${number(found.high)}]` }));
  })]);
  const counts = all.map((one) => `${one.episodes ?? "–"}${one.failed ? `, ${one.failed} failed` : ""}`);
  body.unshift(["episodes", ...counts]);
  return table("Means over episodes that did not fail, with 95 % intervals", ["", ...all.map(title)], body, ["", ...all.map(() => "num")]);
}

function budgetView() {
  const body = [];
  runs.forEach((run) => run.phases.forEach((phase) => {
    const share = run.seconds ? `${Math.round((100 * phase.seconds) / run.seconds)} %` : "–";
    const who = phase.who === "none" ? "playing only" : phase.who === "loss" ? "the model" : phase.who;
    body.push([run.name, who, number(phase.steps), duration(phase.seconds), share, phase.steps ? duration(phase.seconds / phase.steps) : "–", phase.episodes ? number(phase.episodes) : "–", phase.tokens ? number(phase.tokens) : "–", phase.tokens && phase.seconds ? number(phase.tokens / phase.seconds) : "–"]);
  }));
  if (!body.length) return el("p", { class: "card", text: "No step is recorded, so there is nothing to add up." });
  return el("section", { class: "card stack" },
    table("Where time and tokens went, by what was learning", ["run", "learning", "steps", "time", "share", "a step", "episodes", "tokens", "tokens a second"], body, ["", "", "num", "num", "num", "num", "num", "num", "num"]),
    timesTable(),
    el("p", { class: "muted", text: "Time is that between two rows of metrics.jsonl; of older runs the files do not say what was done in it. A checkpoint counts with the step after it, and what no row follows with none. Tokens are those sampled, from their mean per turn; in stages that learn from rows, those learned from." }));
}

function timesTable() {
  const told = runs.filter((run) => Object.keys(run.times).length);
  if (!told.length) return null;
  const names = ["rollout", "learning", "evaluation", "saving", ...new Set(told.flatMap((run) => Object.keys(run.times)))].filter((name, place, all) => name !== "rest" && all.indexOf(name) === place && told.some((run) => run.times[name]));
  const body = told.map((run) => [run.name, ...[...names, "rest"].map((name) => {
    const spent = run.times[name] || 0;
    return el("span", {}, el("b", { text: duration(spent) }), el("span", { class: "muted", text: run.seconds ? ` ${Math.round((100 * spent) / run.seconds)} %` : "" }));
  })]);
  return table("What was done in that time", ["run", ...names, "the rest"], body, ["", ...names.map(() => "num"), "num"]);
}

const VIEWS = {
  overview: ["Overview", overview],
  curves: ["Curves", curvesView],
  episodes: ["Episodes", () => episodesView("")],
  compare: ["Side by side", compareView],
  evaluations: ["Evaluations", evaluationsView],
  settings: ["Settings", settingsView],
  budget: ["Time and tokens", budgetView],
};

function show() {
  const [name, rest = ""] = location.hash.slice(1).split("=");
  const view = name === "episode" ? "episodes" : VIEWS[name] ? name : "overview";
  document.querySelectorAll("#nav a").forEach((link) => (link.hash === `#${view}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current")));
  document.querySelector("#nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  const main = document.getElementById("main");
  const made = name === "episode" ? episodesView(rest) : VIEWS[view][1](rest);
  if (made !== main.firstElementChild || main.children.length !== 1) main.replaceChildren(made);
  if (view !== shown) window.scrollTo(0, 0);
  else if (name === "episode" && window.innerWidth < 896) window.scrollTo(0, 0);
  shown = view;
}
let shown = "";

function theme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const names = ["auto", "light", "dark"];
  let now = "auto";
  try { now = localStorage.getItem("echelon-theme") || "auto"; } catch { /* a page from a disk may have no storage */ }
  const set = (name) => {
    now = name;
    if (name === "auto") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", name);
    button.textContent = `Colours: ${name}`;
    try { localStorage.setItem("echelon-theme", name); } catch { /* as above */ }
    redraw();
  };
  button.addEventListener("click", () => set(names[(names.indexOf(now) + 1) % 3]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  set(names.includes(now) ? now : "auto");
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "/") {
    event.preventDefault();
    if (shown !== "episodes") location.hash = "episodes";
    setTimeout(() => document.getElementById("search")?.focus(), 0);
  } else if (shown === "episodes" && browsing && (event.key === "j" || event.key === "k")) browsing.step(event.key === "j" ? 1 : -1);
}

function head() {
  const first = runs[0], name = runs.length === 1 ? first.name : [data.folder, plural(runs.length, "run")].filter(Boolean).join(" · ");
  const versions = [...new Set(runs.map((run) => run.version).filter(Boolean))];
  const about = [[...new Set(runs.map((run) => run.recipe).filter(Boolean))].join(", "), versions.length ? `echelon ${versions.join(", ")}` : ""].filter(Boolean).join(" · ");
  const what = [...new Set(runs.map((run) => run.about.env || String(run.about["data.path"] || "").split("/").pop()).filter(Boolean))].slice(0, 2).join(", ");
  const steps = Math.max(...runs.map((run) => run.steps)), seconds = runs.reduce((sum, run) => sum + run.seconds, 0);
  document.title = `${name} · run report`;
  document.getElementById("title").textContent = name;
  document.getElementById("subtitle").textContent = [about, what, steps ? plural(steps, "step") : "", seconds ? `${duration(seconds)} of training` : ""].filter(Boolean).join(" · ");
  document.getElementById("footer").textContent = `Made ${data.made} by echelon ${data.version}. ${window.asking ? "It asks the server that it came from, on this machine, and nothing else." : "Nothing in this page asks the network for anything."} Curves are drawn by uPlot 1.6.32 (MIT licence, © Leon Sorokin).`;
  const absent = { evaluations: !data.evaluations.length, episodes: !episodes.length, compare: !runs.some((_, place) => beforeAndAfter(place)), curves: !runs.some((run) => run.steps), budget: !runs.some((run) => run.steps) };
  const views = Object.entries(VIEWS).filter(([key]) => !absent[key]), nav = document.getElementById("nav");
  if (nav.children.length !== views.length) nav.replaceChildren(...views.map(([key, [text]]) => el("a", { href: `#${key}`, text })));
}

function begin() {
  head();
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); });
  theme();
  addEventListener("hashchange", show);
  addEventListener("keydown", keys);
  show();
}
begin();
