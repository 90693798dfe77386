"use strict";
// Curves: what is drawn over what, smoothed, each run by itself or the median of the runs that differ in their seed only.

const drawing = { x: "steps", smooth: 0.5, by: data.groups.some((group) => group.runs.length > 1) ? "groups" : "runs", off: new Set(), find: "" };
const live = new Map(); // figure -> how it is drawn again when a setting, the theme or what is known changes

const AXES = { steps: "steps", episodes: "episodes", seconds: "seconds" };

// The horizontal places of a run's points: null where its files do not say.
function places(run) {
  const curve = data.curves[run];
  if (drawing.x === "seconds") return curve.columns.seconds || null;
  if (drawing.x === "episodes") return runs[run].perStep ? curve.steps.map((step) => (step + 1) * runs[run].perStep) : null;
  return curve.steps;
}

// An exponential mean that does not begin at zero; gaps stay gaps.
function smooth(values, weight) {
  let sum = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

// Points whose rows do not have the metric are none of the curve; those with a number that is not finite are gaps.
function curveOf(run, name) {
  const { columns, sparse } = data.curves[run], x = places(run), y = columns[name];
  if (!x || !y) return null;
  const kept = (sparse[name] || [...x.keys()]).filter((place) => x[place] !== null);
  return { x: kept.map((place) => x[place]), raw: kept.map((place) => y[place]) };
}

function quantile(sorted, share) {
  const at = (sorted.length - 1) * share, low = Math.floor(at);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low);
}

// Median, low and high of several curves at the places where at least half of them are.
function median(curves) {
  if (curves.every((curve) => curve.x.length === 1)) { // over seconds no two of them are at one place
    const at = quantile(curves.map((curve) => curve.x[0]).sort((a, b) => a - b), 0.5);
    curves = curves.map((curve) => ({ ...curve, x: [at] }));
  }
  let grid = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  if (grid.length > 400 || (drawing.x === "seconds" && grid.length > 1)) {
    const [low, high] = [grid[0], grid[grid.length - 1]];
    grid = Array.from({ length: 200 }, (_, place) => low + ((high - low) * place) / 199);
  }
  const read = curves.map((curve) => {
    let next = 0;
    return grid.map((at) => {
      while (next < curve.x.length && curve.x[next] < at) next++;
      if (next >= curve.x.length) return null;
      const here = curve.y[next];
      if (curve.x[next] === at || here === null) return here;
      const before = next ? curve.y[next - 1] : null;
      return before === null ? null : before + ((here - before) * (at - curve.x[next - 1])) / (curve.x[next] - curve.x[next - 1]);
    });
  });
  const rows = grid.map((_, place) => read.map((curve) => curve[place]).filter((value) => value !== null).sort((a, b) => a - b));
  const enough = rows.map((row) => row.length * 2 >= curves.length && row.length > 0);
  const share = curves.length >= 5 ? 0.25 : 0;
  const at = (part) => rows.map((row, place) => (enough[place] ? quantile(row, part) : null));
  return { x: grid, y: at(0.5), low: at(share), high: at(1 - share) };
}

// Everything that can be switched on and off: a run, or a group of runs.
function subjects() {
  const all = drawing.by === "runs" ? runs.map((run, place) => ({ name: run.name, runs: [place] })) : data.groups;
  return all.filter((subject) => subject.runs.some((run) => runs[run].steps));
}

function lines(name) {
  const found = [];
  subjects().forEach((subject, place) => {
    if (drawing.off.has(drawing.by + subject.name)) return;
    const curves = subject.runs.map((run) => curveOf(run, name)).filter((curve) => curve && curve.x.length);
    for (const curve of curves) curve.y = smooth(curve.raw, drawing.smooth);
    if (!curves.length) return;
    const one = curves.length > 1 ? median(curves) : curves[0];
    found.push({ ...one, subject, color: color(place), dash: place >= 8 ? [8, 4] : null, count: curves.length });
  });
  return found;
}

const faint = (value, alpha) => {
  const part = (from) => parseInt(value.slice(from, from + 2), 16);
  return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${alpha})`;
};

// Places of the values that no line comes to: before and after them is a gap, or nothing. Where other curves have points
// and this one has none, uPlot writes undefined.
function alone(plot, place) {
  const column = plot.data[place], there = [...column.keys()].filter((at) => column[at] !== undefined);
  const empty = (at) => at === undefined || column[at] === null;
  const found = there.filter((at, order) => column[at] !== null && empty(there[order - 1]) && empty(there[order + 1]));
  return found.length ? found : null;
}

// The curves of one metric as uPlot wants them: one horizontal column, joined, and bands between low and high.
function prepare(found) {
  const tables = [], series = [{ label: AXES[drawing.x] }], bands = [];
  for (const line of found) {
    const base = { label: line.subject.name, stroke: line.color, width: 2, dash: line.dash, points: { show: false, filter: alone, fill: line.color }, spanGaps: false };
    if (line.low) {
      tables.push([line.x, line.y, line.high, line.low]);
      const at = series.length;
      series.push(base, ...[1, 2].map(() => ({ stroke: "transparent", width: 0, points: { show: false } })));
      bands.push({ series: [at + 1, at + 2], fill: faint(line.color, 0.18) });
    } else if (drawing.smooth > 0 && found.length <= 3) {
      tables.push([line.x, line.y, line.raw]);
      series.push(base, { stroke: faint(line.color, 0.28), width: 1, points: { show: false } });
    } else {
      tables.push([line.x, line.y]);
      series.push(base);
    }
  }
  return { columns: tables.length > 1 ? uPlot.join(tables) : tables[0], series, bands };
}

function axis(extra) {
  return { stroke: paint("muted"), font: "12px system-ui, sans-serif", grid: { stroke: paint("line"), width: 1 }, ticks: { stroke: paint("line"), width: 1, size: 4 }, ...extra };
}

const compactNumber = (value) => (value === null ? "" : Math.abs(value) >= 1e4 ? value.toLocaleString("en", { notation: "compact" }) : number(value));

function chart(name, tall) {
  const read = el("span", { class: "read" });
  const plot = el("div", { class: tall ? "plot tall" : "plot" });
  const numbers = el("details", {}, el("summary", { text: "Numbers" }));
  const figure = el("figure", {}, el("figcaption", {}, el("span", { text: name }), read), plot, numbers);
  let drawn = null, found = [], seen = false;

  const ends = (line) => {
    const there = line.y.filter((value) => value !== null);
    return [there[0], there[there.length - 1]];
  };
  const rest = () => {
    read.textContent = found.length === 1 ? `${number(ends(found[0])[0])} → ${number(ends(found[0])[1])}` : "";
  };
  const point = (self) => {
    const at = self.cursor.idx;
    if (at === null || at === undefined) return rest();
    const said = found.slice(0, 4).map((line, place) => {
      const value = self.data[self.series.findIndex((one) => one.label === line.subject.name)][at];
      return value === null || value === undefined ? "" : found.length > 1 ? `${line.subject.name} ${number(value)}` : number(value);
    });
    read.textContent = `${AXES[drawing.x].slice(0, -1)} ${number(self.data[0][at])}: ${said.filter(Boolean).join(" · ")}`;
  };
  // With `keep` the same lines with more points stay as they are looked at: a part of them that is looked at closer stays.
  const draw = (keep) => {
    if (!seen || !plot.isConnected) return;
    const before = found.map((line) => [line.subject.name, line.color, Boolean(line.low)]).join();
    found = lines(name);
    if (keep && drawn && found.length && before === found.map((line) => [line.subject.name, line.color, Boolean(line.low)]).join()) {
      const { columns, series } = prepare(found), x = drawn.data[0], { min, max } = drawn.scales.x;
      if (series.length === drawn.series.length) {
        const closer = x.length && (min > x[0] || max < x[x.length - 1]);
        drawn.setData(columns, !closer);
        label();
        return;
      }
    }
    if (drawn) drawn.destroy();
    drawn = null;
    plot.replaceChildren();
    if (!found.length) return plot.append(el("p", { class: "muted", text: drawing.x === "steps" ? "Nothing is switched on that has it." : `Nothing that is switched on has it over ${AXES[drawing.x]}.` }));
    const { columns, series, bands } = prepare(found);
    const width = Math.max(160, plot.clientWidth);
    drawn = new uPlot({
      width, height: tall ? 300 : 160, series, bands, legend: { show: false }, padding: [8, 12, 0, 0],
      scales: { x: { time: false } },
      axes: [axis({ space: 64, size: 30, values: (_, ticks) => ticks.map(compactNumber) }), axis({ size: 58, values: (_, ticks) => ticks.map(compactNumber) })],
      cursor: { points: { size: 6 }, drag: { x: true, y: false }, sync: { key: "curves" } },
      hooks: { setCursor: [point] },
    }, columns, plot);
    plot.setAttribute("role", "img");
    label();
  };
  const label = () => {
    plot.setAttribute("aria-label", `${name} over ${AXES[drawing.x]}. ` + found.slice(0, 12).map((line) => `${line.subject.name}: from ${number(ends(line)[0])} to ${number(ends(line)[1])}`).join("; "));
    rest();
    if (numbers.open) tell();
  };
  const tell = () => {
    const last = numbers.lastElementChild;
    if (last && last.tagName !== "SUMMARY") last.remove();
    const body = found.map((line) => {
      const there = line.y.filter((value) => value !== null);
      return [line.subject.name, number(there[0]), number(Math.min(...there)), number(Math.max(...there)), number(there[there.length - 1])];
    });
    numbers.append(table(`${name}, ${drawing.smooth ? "smoothed" : "as recorded"}`, ["", "first", "least", "most", "last"], body, ["", "num", "num", "num", "num"]));
  };
  numbers.addEventListener("toggle", () => numbers.open && tell());
  new IntersectionObserver((entries, watcher) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen = true;
    watcher.disconnect();
    draw();
  }, { rootMargin: "300px" }).observe(figure);
  new ResizeObserver(later(80, () => drawn && drawn.setSize({ width: Math.max(160, plot.clientWidth), height: tall ? 300 : 160 }))).observe(plot);
  live.set(figure, draw);
  return figure;
}

const redraw = (keep) => live.forEach((draw) => draw(keep === true));

function legend() {
  const box = el("div", { class: "legend", role: "group", "aria-label": "Runs that are drawn" });
  const fill = () => {
    box.replaceChildren(...subjects().map((subject, place) => {
      const key = drawing.by + subject.name;
      const line = el("i", { style: { "border-color": `var(--c${place % 8})`, "border-top-style": place >= 8 ? "dashed" : "solid" } });
      const count = subject.runs.length > 1 ? ` (${subject.runs.length})` : "";
      const button = el("button", { type: "button", "aria-pressed": String(!drawing.off.has(key)), onclick: (event) => {
        if (event.shiftKey) subjects().forEach((other) => drawing.off.add(drawing.by + other.name));
        if (drawing.off.has(key)) drawing.off.delete(key);
        else drawing.off.add(key);
        fill();
        box.children[place].focus();
        redraw();
      } }, line, subject.name + count);
      return button;
    }));
  };
  fill();
  box.refill = fill;
  return box;
}

function curveControls(box) {
  const axes = Object.entries(AXES).filter(([key]) => key === "steps" || runs.some((run, place) => (key === "seconds" ? data.curves[place].columns.seconds : run.perStep)));
  const slider = el("input", { type: "range", min: "0", max: "0.95", step: "0.05", value: drawing.smooth, oninput: later(60, () => {
    drawing.smooth = Number(slider.value);
    redraw();
  }) });
  const several = data.groups.some((group) => group.runs.length > 1);
  return el("div", { class: "bar" },
    segments("Over", axes, drawing.x, (key) => { drawing.x = key; redraw(); }),
    several && segments("Draw", [["groups", "median of seeds"], ["runs", "each run"]], drawing.by, (key) => { drawing.by = key; box.refill(); redraw(); }),
    field("Smoothing", slider));
}

function curvesView() {
  live.clear();
  const box = legend(), groups = el("div", { class: "stack" });
  const fill = () => {
    live.clear();
    const words = drawing.find.toLowerCase();
    groups.replaceChildren(...data.headings.map(([heading, , names], place) => {
      const found = names.filter((name) => name.toLowerCase().includes(words));
      if (!found.length) return "";
      const shown = words ? found : found.slice(0, 6), rest = words ? [] : found.slice(6);
      const charts = el("div", { class: "charts" }, shown.map((name) => chart(name)));
      const more = rest.length && el("button", { type: "button", class: "more", text: `${rest.length} more`, onclick: (event) => {
        event.target.remove();
        charts.append(...rest.map((name) => chart(name)));
      } });
      return el("details", { class: "group", open: true }, el("summary", { text: heading }), charts, more || null);
    }).filter(Boolean));
    if (!groups.children.length) groups.append(el("p", { class: "muted", text: words ? "No curve has such a name." : "No step is recorded, so there are no curves." }));
  };
  const search = el("input", { type: "search", placeholder: "entropy", value: drawing.find, oninput: later(120, () => { drawing.find = search.value; fill(); }) });
  const controls = curveControls(box);
  controls.append(field("Find", search));
  fill();
  const interval = drawing.by === "groups" || data.groups.some((group) => group.runs.length > 1);
  const thinned = Math.max(1, ...data.curves.map((curve) => curve.every));
  return el("div", { class: "stack" },
    el("section", { class: "card stack", "aria-label": "What is drawn" }, controls, box,
      el("p", { class: "muted", text: "Drag over a curve to look closer, double-click to go back. Shift-click a name to see it alone." +
        (interval ? " Bands of several seeds hold the middle half of them, with fewer than five all of them." : "") +
        (thinned > 1 ? ` Long runs are thinned: a point is the mean of up to ${thinned} steps.` : "") })),
    el("section", { class: "card", "aria-label": "Curves" }, groups));
}
