"use strict";
// What every view uses. All that runs say is text: it is written with textContent, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;

// An element: properties that begin with "on" are listeners, the others attributes; children are elements or text.
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (name === "value") made.value = value;
    else if (name === "style") for (const [key, one] of Object.entries(value)) made.style.setProperty(key, one);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// Control characters as the pictures that Unicode has for them; line ends and tabs stay.
const visible = (text) =>
  text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (one) => (one === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + one.charCodeAt(0))));

const plain = (text) => (Array.isArray(text) ? text[0] + " … " + text[2] : text);

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("-", "−").replace("e+", "e");
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 3;
  return Number(value.toFixed(digits)).toLocaleString("en").replace("-", "−");
}

function duration(seconds) {
  if (seconds < 90) return `${number(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const plural = (count, one, many = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

const STATES = { good: "✓ fine", warn: "! look", bad: "✗ wrong", none: "· noted" };
const LEARNED = { good: "✓ yes", warn: "? unclear", bad: "✗ no", none: "· not known" };
const badge = (state, said) => el("span", { class: `badge ${state}`, text: said || STATES[state] });

// A control under its label. `spoken` is what the control is called where the label alone would not say it.
function field(label, control, spoken) {
  control.setAttribute("aria-label", spoken || label);
  return el("label", { class: "field" }, el("span", { text: label }), control);
}

function choice(label, options, value, then) {
  const control = el("select", { onchange: () => then(control.value) });
  for (const [key, text] of options) control.append(el("option", { value: key, text }));
  control.value = String(value);
  return field(label, control);
}

// A row of buttons of which one is pressed.
function segments(label, options, value, then) {
  const buttons = options.map(([key, text]) =>
    el("button", { type: "button", "aria-pressed": String(key === value), text, onclick: () => {
      buttons.forEach((one, place) => one.setAttribute("aria-pressed", String(options[place][0] === key)));
      then(key);
    } }));
  return el("div", { class: "field", role: "group", "aria-label": label }, el("span", { text: label }), el("div", { class: "seg" }, buttons));
}

function later(wait, action) {
  let timer = 0;
  return (...words) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...words), wait);
  };
}

function table(caption, head, body, kinds = []) {
  const cell = (tag, content, place, scope) => {
    const made = el(tag, { class: kinds[place] || null, scope });
    made.append(content instanceof Node ? content : String(content));
    return made;
  };
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    el("table", {}, el("caption", {}, el("span", { text: caption })),
      el("thead", {}, el("tr", {}, head.map((text, place) => cell("th", text, place, "col")))),
      el("tbody", {}, body.map((row) => el("tr", {}, row.map((content, place) => cell(place ? "td" : "th", content, place, place ? null : "row")))))));
}

const color = (place) => getComputedStyle(document.documentElement).getPropertyValue(`--c${place % 8}`).trim();
const paint = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function verdict(one, big) {
  const [level, who] = one.title.includes(" level: ") ? one.title.split(" level: ") : ["", one.title];
  const mark = level ? el("span", { class: "badge none level", text: level }) : big ? badge(one.state, LEARNED[one.state]) : one.state === "none" ? el("span", { class: "badge none", text: "level" }) : badge(one.state);
  return el("li", { class: "verdict" }, mark, el("div", {}, el(big ? "h2" : "h3", { text: who[0].toUpperCase() + who.slice(1) }), el("p", { class: big ? "big" : null, text: one.text })));
}
