"use strict";
// Episodes: a list that is filtered, one of them as a thread or a tree of turns, two of them side by side.

const episodes = data.episodes, byId = new Map(), roles = [];

// What is looked up of episodes. A role keeps its place, and so its colour, when others come.
function index() {
  byId.clear();
  episodes.forEach((one, place) => {
    one.at = place;
    one.id = `${one.r}.${one.n}`;
    byId.set(one.id, one);
    for (const turn of one.t) if (!roles.includes(turn.r)) roles.push(turn.r);
  });
}
index();

const sifted = { run: "", role: "", ending: "", task: "", text: "", least: "", most: "", from: "", to: "", order: "told" };
const PAGE = 60, TURNS = 150;
let shade = "";
let tokensBy = "advantages";

const roleColor = (role) => `var(--c${roles.indexOf(role) % 8})`;
const outcome = (one) => (one.m && typeof one.m.win === "number" ? (one.m.win >= 1 ? "won" : "not won") : one.e || (one.x ? "failed" : "played"));
const worth = (one) => (one.w !== null && one.w !== undefined ? one.w : meanScore(one));

function meanScore(one) {
  const scores = one.t.map((turn) => turn.n && turn.n.score).filter((value) => value !== undefined);
  return scores.length ? scores[scores.length - 1] : null;
}

// The text of an episode in small letters, made when it is first searched.
const texts = new Map();
function textOf(one) {
  if (!texts.has(one.id)) texts.set(one.id, [one.k, ...one.t.map((turn) => plain(turn.x) + " " + (turn.g || "") + " " + plain(turn.s || ""))].join("\n").toLowerCase());
  return texts.get(one.id);
}

function sift() {
  const words = sifted.text.toLowerCase();
  const within = (value, low, high) => (low === "" || (value !== null && value >= Number(low))) && (high === "" || (value !== null && value <= Number(high)));
  const found = episodes.filter((one) =>
    (sifted.run === "" || String(one.r) === sifted.run) &&
    (sifted.ending === "" || outcome(one) === sifted.ending || one.e === sifted.ending) &&
    (sifted.task === "" || one.k === sifted.task) &&
    (sifted.role === "" || one.t.some((turn) => turn.r === sifted.role)) &&
    within(worth(one), sifted.least, sifted.most) && within(one.s, sifted.from, sifted.to) &&
    (words === "" || textOf(one).includes(words)));
  const by = { best: (a, b) => (worth(b) ?? -Infinity) - (worth(a) ?? -Infinity), worst: (a, b) => (worth(a) ?? Infinity) - (worth(b) ?? Infinity), last: (a, b) => b.s - a.s || a.at - b.at, long: (a, b) => b.t.length - a.t.length };
  return sifted.order === "told" ? found : found.sort(by[sifted.order]);
}

function saidText(text, kind = "said") {
  const shown = Array.isArray(text)
    ? [visible(text[0]), el("span", { class: "hole", text: `${text[1].toLocaleString("en")} characters are left out here` }), visible(text[2])]
    : [visible(text)];
  const size = Array.isArray(text) ? 9e9 : text.length;
  return el("div", { class: kind + (size > 2000 ? " long" : "") + (size ? "" : " empty"), dir: "auto", tabindex: size > 2000 ? "0" : null, role: size > 2000 ? "group" : null, "aria-label": size > 2000 ? "A long text" : null }, size ? shown : "nothing was said");
}

function tint(value, most) {
  if (value === null || value === undefined || !most) return null;
  return `rgb(var(--${value < 0 ? "minus" : "plus"}) / ${(0.05 + 0.4 * Math.min(1, Math.abs(value) / most)).toFixed(3)})`;
}

function chip(name, value, signed) {
  const kind = !signed || !value ? "" : value > 0 ? " plus" : " minus";
  return el("span", { class: "chip" + kind }, el("span", { text: `${name} ` }), typeof value === "number" ? number(value) : visible(String(value)));
}

// What a remark changed: the mean worth of the attempts after it, less that of the attempt before it.
function change(turn, tree) {
  const parent = tree.turns.get(turn.parent), after = tree.children.get(turn.index) || [];
  if (!parent || parent.r === turn.r || turn.r !== "coach") return null;
  const of = (one) => (one.n && one.n.score !== undefined ? one.n.score : one.w);
  const next = after.filter((child) => child.r === parent.r).map(of).filter((value) => typeof value === "number");
  return next.length && typeof of(parent) === "number" ? next.reduce((sum, value) => sum + value, 0) / next.length - of(parent) : null;
}

// Turns with their places in the tree. A parent that is not there makes a turn a root.
function grow(one) {
  const turns = new Map(), children = new Map(), top = [];
  one.t.forEach((turn, place) => {
    turn.index = turn.i !== undefined ? turn.i : place;
    turn.parent = turn.p !== undefined ? turn.p : turn.index ? turn.index - 1 : null;
    const known = turn.parent !== null && turns.has(turn.parent);
    if (known) children.set(turn.parent, [...(children.get(turn.parent) || []), turn]);
    else top.push(turn);
    turns.set(turn.index, turn);
  });
  return { turns, children, top };
}

function optionsOf(turn, folded) {
  if (!turn.c || !turn.c.length) return null;
  const strategies = turn.c.some(([, , strategy]) => strategy);
  const values = turn.c.map(([q]) => q).filter((q) => q !== null), low = Math.min(...values), span = Math.max(...values) - low || 1;
  const head = [strategies ? "strategy" : "candidate", "Q", "", ""];
  const body = turn.c.map(([q, text, strategy, count], place) => el("tr", { class: place === turn.k ? "taken" : null },
    el("td", { dir: "auto", text: visible(strategies ? strategy : text || "nothing") + (count > 1 ? ` ×${count}` : "") }),
    el("td", { class: "num", text: q === null ? "not offered" : number(q) }),
    el("td", {}, q === null ? "" : el("span", { class: "q", style: { width: `calc(${(0.15 + 0.85 * ((q - low) / span)).toFixed(3)} * var(--bar))` } })),
    el("td", { text: place === turn.k ? (turn.e ? "← taken, to explore" : "← taken") : "" })));
  const best = turn.k === 0 ? "the best" : turn.k === undefined ? "one" : `number ${turn.k + 1}`;
  return el("details", { class: "options", open: !folded && strategies && turn.c.length <= 10 ? true : null },
    el("summary", { text: `${plural(turn.c.length + (turn.cm || 0), strategies ? "strategy" : "different candidate", strategies ? "strategies" : undefined)}, ${best} taken` }),
    el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Values of the choices" }, el("table", {}, el("thead", {}, el("tr", {}, head.map((text, place) => (text ? el("th", { text, scope: "col", class: place === 1 ? "num" : null }) : el("td"))))), el("tbody", {}, body))),
    turn.cm ? el("p", { class: "muted", text: `${turn.cm} more are left out` }) : null);
}

function tokensOf(turn) {
  const { tokens, ids, ...columns } = turn.z, names = Object.keys(columns);
  const name = names.includes(tokensBy) ? tokensBy : undefined;
  const most = name ? Math.max(...columns[name].map((value) => Math.abs(value || 0))) : 0;
  return el("p", { class: "said", dir: "auto" }, tokens.map((token, place) => {
    const said = [ids && `id ${ids[place]}`, ...names.map((one) => `${one} ${number(columns[one][place])}`)].filter(Boolean).join(" · ");
    return el("span", { class: token ? "tok" : "tok special", title: said, style: name ? { background: tint(columns[name][place], most) || "none" } : {} }, visible(token) || "∎");
  }));
}

function turnCard(turn, tree, most, folded) {
  const numbers = Object.entries(turn.n || {}), delta = change(turn, tree);
  const value = shade === "reward" ? turn.w : shade && turn.n ? turn.n[shade] : undefined;
  return el("article", { class: "turn", style: { "--role": roleColor(turn.r), "background-image": tint(value, most) ? `linear-gradient(${tint(value, most)}, ${tint(value, most)})` : "none" } },
    el("header", {}, el("span", { class: "role", text: turn.r }), el("span", { class: "at", text: `turn ${turn.index}` }),
      el("span", { class: "chips" },
        turn.w !== undefined && chip("reward", turn.w, true),
        delta !== null && chip("Δ of the next attempts", delta, true),
        numbers.map(([name, number]) => chip(name, number, ["advantage", "credit", "gain"].includes(name))),
        turn.g && chip("strategy", turn.g),
        Object.entries(turn.o || {}).map(([name, said]) => chip(name, plain(said))))),
    !turn.s ? null : plain(turn.s).length < 280 ? el("div", { class: "told", role: "group", "aria-label": "what it was told" }, saidText(turn.s)) : el("details", { class: "told" }, el("summary", { text: "what it was told" }), saidText(turn.s)),
    turn.z ? tokensOf(turn) : saidText(turn.x),
    optionsOf(turn, folded));
}

// A chain is a list; where a turn has several answers, each begins a list of its own.
function thread(one, few) {
  const tree = grow(one), list = el("ol", { class: "thread" });
  const most = Math.max(0, ...one.t.map((turn) => Math.abs((shade === "reward" ? turn.w : turn.n && turn.n[shade]) || 0)));
  let left = few || TURNS;
  const add = (into, first) => {
    const waiting = [[into, first]];
    while (waiting.length) {
      const [box, turn] = waiting.pop();
      if (left-- <= 0) continue;
      const gap = one.gap && turn.index === one.gap[0] + one.gap[1];
      if (gap) box.append(el("li", {}, el("span", { class: "hole", text: `${one.gap[1].toLocaleString("en")} turns are left out here` })));
      const item = el("li", {}, turnCard(turn, tree, most, Boolean(few)));
      box.append(item);
      const next = tree.children.get(turn.index) || [];
      if (next.length === 1) waiting.push([box, next[0]]);
      else if (next.length) {
        const inner = el("ol");
        item.append(inner);
        [...next].reverse().forEach((child) => waiting.push([inner, child]));
      }
    }
  };
  tree.top.forEach((turn) => add(list, turn));
  if (one.t.length > (few || TURNS)) {
    const rest = one.t.length - (few || TURNS);
    list.append(el("li", {}, el("button", { type: "button", text: `Show ${plural(rest, "more turn")}`, onclick: () => { const all = thread(one, one.t.length); list.replaceWith(all); all.children[few || TURNS]?.scrollIntoView({ block: "nearest" }); } })));
  }
  return list;
}

function about(one) {
  const numbers = Object.entries(one.m || {}).filter(([, value]) => value !== null);
  return el("div", { class: "chips" },
    one.w !== null && one.w !== undefined && chip("return", one.w, true), chip("step", one.s), chip("outcome", outcome(one)),
    runs.length > 1 && chip("run", runs[one.r].name), numbers.map(([name, value]) => chip(name, value)), one.x && chip("error", one.x));
}

// The same task in the same run, long before or long after.
function sibling(one) {
  const same = episodes.filter((other) => other.r === one.r && other.k === one.k && other.s !== one.s);
  return same.sort((a, b) => Math.abs(b.s - one.s) - Math.abs(a.s - one.s))[0];
}

function controlsOf(one, again) {
  const names = [...new Set(one.t.flatMap((turn) => Object.keys(turn.n || {})))];
  const columns = [...new Set(one.t.flatMap((turn) => Object.keys(turn.z || {})))].filter((name) => name !== "tokens" && name !== "ids");
  const other = sibling(one);
  const copy = el("button", { type: "button", text: "Copy link", onclick: async () => {
    const link = location.href.split("#")[0] + `#episode=${one.id}`;
    try { await navigator.clipboard.writeText(link); copy.textContent = "Copied"; } catch { history.replaceState(null, "", `#episode=${one.id}`); copy.textContent = "See the address"; }
  } });
  return el("div", { class: "bar" },
    choice("Shade turns by", [["", "nothing"], ["reward", "reward"], ...names.map((name) => [name, name])], names.includes(shade) || shade === "reward" ? shade : "", (key) => { shade = key; again(); }),
    columns.length > 0 && choice("Shade tokens by", [["", "nothing"], ...columns.map((name) => [name, name])], columns.includes(tokensBy) ? tokensBy : "", (key) => { tokensBy = key; again(); }),
    other && el("button", { type: "button", text: `Beside step ${other.s}`, onclick: () => { const [a, b] = one.s < other.s ? [one, other] : [other, one]; location.hash = `compare=${a.id},${b.id}`; } }),
    copy);
}

function shownEpisode(one, found) {
  const box = el("section", { class: "card stack shown", "aria-label": "Episode" });
  const at = found.indexOf(one);
  const go = (place) => found[place] && el("a", { href: `#episode=${found[place].id}`, text: place < at ? "← previous" : "next →" });
  const fill = () => box.replaceChildren(
    el("a", { class: "back", href: "#episodes", text: "← all episodes" }),
    el("div", { class: "head" }, el("h2", { dir: "auto", text: visible(one.k) || "An episode" }), el("span", { class: "chips" }, go(at - 1), go(at + 1))),
    about(one), controlsOf(one, fill),
    one.t.length ? thread(one) : el("p", { class: "muted", text: "No words: who plays here acts in numbers, and the files say what they earned only." }));
  fill();
  return box;
}

function listed(found, current, count = PAGE) {
  const box = el("div", { class: "card list" });
  const items = found.slice(0, count).map((one) => {
    const words = one.t.find((turn) => !turn.g && turn.x.length) || one.t[0], last = words ? plain(words.x) : "";
    return el("a", { href: `#episode=${one.id}`, "aria-current": one === current ? "true" : null },
      el("span", { class: "row" }, el("b", { dir: "auto", text: visible(one.k) || "–" }), el("span", { class: "chip", text: number(worth(one)) })),
      el("span", { class: "row muted" }, el("span", { text: `${runs.length > 1 ? runs[one.r].name + " · " : ""}step ${one.s} · ${outcome(one)}` }), el("span", { text: plural(one.t.length, "turn") })),
      last && el("span", { class: "snip", dir: "auto", text: visible(last.slice(0, 120)) }));
  });
  box.append(...items);
  if (found.length > count) box.append(el("button", { type: "button", text: `Show ${Math.min(PAGE, found.length - count)} more`, onclick: () => { const next = listed(found, current, count + PAGE); box.replaceWith(next); next.querySelectorAll("a")[count].focus(); } }));
  if (!found.length) box.append(el("p", { class: "muted", text: "No episode is left: take some of the filters away." }));
  return box;
}

let browsing = null; // the view as it is on the page, so that a filter does not lose what is typed

function episodesView(id) {
  const current = id ? byId.get(id) : null;
  if (browsing && browsing.root.isConnected) { browsing.fill(current, Boolean(id)); return browsing.root; }
  if (!episodes.length) return el("p", { class: "card", text: "No episodes are in the files of these runs: stages that learn from rows play none." });
  const browse = el("div", { class: "browse" }), status = el("p", { class: "muted", role: "status" });
  let now = current;
  const fill = (one, open) => {
    now = one;
    const found = sift(), shown = one || found[0], keep = browse.firstElementChild ? browse.firstElementChild.scrollTop : 0;
    count(found);
    browse.dataset.shown = shown ? shown.id : "";
    browse.replaceChildren(listed(found, shown, Math.max(PAGE, found.indexOf(shown) + 10)), shown ? shownEpisode(shown, found) : el("div"));
    browse.firstElementChild.scrollTop = keep;
    browse.classList.toggle("open", Boolean(open));
  };
  const count = (found) => {
    const total = runs.reduce((sum, run) => sum + run.episodes, 0);
    status.textContent = `${found.length.toLocaleString("en")} of ${plural(episodes.length, "episode")} in this page` + (total > episodes.length ? `; the files hold ${total.toLocaleString("en")}, and those shown are spread over the steps` : "");
  };
  const control = (key, make) => make((value) => { sifted[key] = value; fill(null, false); });
  const typed = (label, key, kind, hint) => control(key, (then) => {
    const input = el("input", { type: kind, value: sifted[key], placeholder: hint, step: "any", id: key === "text" ? "search" : null, oninput: later(80, () => then(input.value)) });
    return field(label, input, label === "to" ? `${key === "most" ? "Return" : "Step"} to` : null);
  });
  const picked = (label, key, options) => options.length > 1 && control(key, (then) => choice(label, [["", "all"], ...options], sifted[key], then));
  const unique = (values) => [...new Set(values)].sort().map((value) => [value, value]);
  const order = control("order", (then) => choice("Order", [["told", "as recorded"], ["last", "latest first"], ["best", "best first"], ["worst", "worst first"], ["long", "longest first"]], sifted.order, then));
  const bar = el("div", { class: "bar" },
    picked("Run", "run", runs.map((run, place) => [String(place), run.name]).filter(([place]) => episodes.some((one) => String(one.r) === place))),
    picked("Role", "role", unique(roles)),
    picked("Outcome", "ending", unique(episodes.flatMap((one) => [outcome(one), one.e].filter(Boolean)))),
    typed("Return from", "least", "number", ""), typed("to", "most", "number", ""),
    typed("Step from", "from", "number", ""), typed("to", "to", "number", ""));
  const folded = el("details", { open: window.innerWidth > 768 ? true : null }, el("summary", { class: "muted", text: "Filters" }), bar);
  // What is new comes into the list; the episode that is read stays as it is.
  const renew = () => {
    const found = sift(), list = browse.firstElementChild, keep = list.scrollTop, held = list.contains(document.activeElement) && document.activeElement.hash;
    now = now && (byId.get(now.id) || now);
    const shown = now || byId.get(browse.dataset.shown) || found[0], read = browse.dataset.shown === (shown ? shown.id : "");
    if (!read) return fill(now, browse.classList.contains("open"));
    count(found);
    list.replaceWith(listed(found, shown, Math.max(PAGE, list.querySelectorAll("a").length, found.indexOf(shown) + 10)));
    browse.firstElementChild.scrollTop = keep;
    if (held) [...browse.firstElementChild.querySelectorAll("a")].find((link) => link.hash === held)?.focus({ preventScroll: true });
  };
  const root = el("div", { class: "stack" }, el("section", { class: "card stack filters", "aria-label": "Filters" }, el("div", { class: "bar" }, typed("Text", "text", "search", "what was said"), order), folded, el("div", { class: "head" }, status, el("span", { class: "muted keys", text: "Keys: j and k go on and back, / searches" }))), browse);
  browsing = { root, fill, renew, held: () => now || byId.get(browse.dataset.shown), step: (by) => { const found = sift(), at = found.indexOf(now || found[0]) + by; if (found[at]) location.hash = `episode=${found[at].id}`; } };
  fill(current, Boolean(id));
  return root;
}

// Two episodes side by side: the same task early and late.
function pair(first, second, few) {
  return el("div", { class: "pair" }, [first, second].map((one) =>
    el("section", { class: "stack", "aria-label": `Step ${one.s}` }, el("div", { class: "head" }, el("h3", { text: `Step ${one.s}` }), el("a", { href: `#episode=${one.id}`, text: "open" })), about(one), thread(one, few))));
}

// Tasks of a run that come early and late, those farthest apart first: [task, episodes in the order of their steps].
function returning(run) {
  const tasks = new Map();
  episodes.filter((one) => one.r === run && one.t.length).forEach((one) => tasks.set(one.k, [...(tasks.get(one.k) || []), one]));
  return [...tasks].map(([task, found]) => [task, found.sort((a, b) => a.s - b.s)])
    .filter(([, found]) => found[0].s < found[found.length - 1].s)
    .sort(([, a], [, b]) => b[b.length - 1].s - b[0].s - (a[a.length - 1].s - a[0].s));
}

// The two episodes of a run that say most about what changed: one task early and late, else the first and the last of
// the episodes in which something was said; null where there are no two steps of them.
function beforeAndAfter(run) {
  const [paired] = returning(run);
  if (paired) return [paired[1][0], paired[1].at(-1)];
  const said = episodes.filter((one) => one.r === run && one.t.length).sort((a, b) => a.s - b.s || a.n - b.n);
  return said.length && said[0].s < said.at(-1).s ? [said[0], said.at(-1)] : null;
}

function compareView(ids) {
  const [first, second] = ids.split(",").map((id) => byId.get(id));
  const able = runs.map((run, at) => [String(at), run.name]).filter(([at]) => beforeAndAfter(Number(at)));
  const [best] = able.filter(([at]) => returning(Number(at)).length).concat(able);
  if (!best && !(first && second)) return el("p", { class: "card", text: "Nothing was said in two different steps of a run, so nothing can be put side by side." });
  const [a, b] = first && second ? [first, second] : beforeAndAfter(Number(first ? first.r : best[0])) || [first, first];
  const tasks = returning(a.r), alike = a.k === b.k;
  const go = (x, y) => { location.hash = `compare=${x.id},${y.id}`; };
  const among = episodes.filter((one) => one.r === a.r && (!alike || one.k === a.k) && one.t.length).sort((x, y) => x.s - y.s || x.n - y.n);
  const steps = among.map((one) => [one.id, `step ${one.s}, ${number(worth(one))}${alike ? "" : ": " + visible(one.k)}`]);
  const bar = el("div", { class: "bar" },
    able.length > 1 && choice("Run", able, a.r, (at) => go(...beforeAndAfter(Number(at)))),
    alike && tasks.length > 0 && choice("Task", tasks.map(([task]) => [task, visible(task)]), a.k, (task) => { const found = tasks.find(([one]) => one === task)[1]; go(found[0], found.at(-1)); }),
    choice("Early", steps, a.id, (id) => go(byId.get(id), b)), choice("Late", steps, b.id, (id) => go(a, byId.get(id))),
    choice("Shade turns by", [["", "nothing"], ["reward", "reward"], ...new Set([...a.t, ...b.t].flatMap((turn) => Object.keys(turn.n || {})))].map((one) => (Array.isArray(one) ? one : [one, one])), shade, (key) => { shade = key; show(); }));
  return el("div", { class: "stack" }, el("section", { class: "card stack" }, el("h2", { dir: "auto", text: visible(alike ? a.k : `${a.k}, and later ${b.k}`) || "One task" }), bar), el("div", { class: "card" }, pair(a, b)));
}
