// Live figures and their charts, and that a double click sends a form once. All else works without this script.
"use strict";

const WINDOW = 5 * 60; // seconds that a chart shows, at most
const PERIOD = 2; // seconds between two looks
const AGAIN = 5; // seconds after which a form that brought no answer may be sent again
const IDLE = 30 * 60; // seconds without a sign of life after which it stops: looking shall keep no admin logged in
const WIDTH = 300, HEIGHT = 56;

const live = document.getElementById("live");
const state = document.getElementById("state");
const pause = document.getElementById("pause");
const down = document.getElementById("stopped");
const updated = document.getElementById("updated");
const since = document.getElementById("since");
const memory = "shmstore " + live.dataset.url;

const percent = (value) => (100 * value).toFixed(value % 1 ? 1 : 0) + "%";
const whole = (value) => Math.round(value).toLocaleString("en");
const rate = (value) => value.toLocaleString("en", {maximumFractionDigits: 1}) + "/s";

// Each chart: its title, the value between two looks (null: there is none), its words, the ends of its axis (null: those
// of the values).
const charts = {
  sessions: {title: "Sessions", value: (now) => now.sessions, words: whole, from: null, to: null},
  // A server may have no limit.
  memory: {
    title: "Memory in use",
    value: (now) => (now.memory ? now.bytes / now.memory : now.bytes),
    words: (value) => (limited() ? percent(value) : (value / 2 ** 20).toFixed(1) + " MiB"),
    from: 0,
    get to() { return limited() ? 1 : null; },
  },
  hits: {title: "Hit rate", value: (now, then) => (now.gets > then.gets ? (now.hits - then.hits) / (now.gets - then.gets) : null), words: percent, from: 0, to: 1},
  // Memory that was made anew counts from zero.
  evicted: {title: "Evictions per second", value: (now, then) => Math.max(0, now.evicted - then.evicted) / (now.at - then.at), words: rate, from: 0, to: null},
};

let samples = [];
const limited = () => samples.at(-1).memory > 0;
try {
  samples = JSON.parse(sessionStorage.getItem(memory)) || [];
} catch { /* no storage, or not ours: the charts begin anew */ }

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  return element;
}

function paragraph(kind, ...texts) {
  const element = Object.assign(document.createElement("p"), {className: kind});
  for (const text of texts) element.append(Object.assign(document.createElement("span"), {textContent: text}));
  return element;
}

function points(chart) {
  const found = [];
  for (let i = 1; i < samples.length; i++) {
    const now = samples[i], then = samples[i - 1];
    // After a pause there is nothing to tell of the time between.
    found.push({at: now.at, value: now.at - then.at > 5 * PERIOD ? null : chart.value(now, then)});
  }
  return found;
}

function draw(box, chart) {
  const all = points(chart);
  const values = all.flatMap((point) => (point.value === null ? [] : [point.value]));
  const last = samples.at(-1).at, seconds = Math.max(last - samples[0].at, 10 * PERIOD);
  const low = Math.min(...values), high = Math.max(...values);
  // A value that does not change is in the middle, but not below 0.
  const from = chart.from ?? (low < high ? low : Math.max(0, low - 1)), to = chart.to ?? (low < high ? high : high + 1);
  const x = (point) => (WIDTH * (1 - (last - point.at) / seconds)).toFixed(1);
  const y = (point) => (HEIGHT * (1 - (point.value - from) / (to - from))).toFixed(1);

  const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img"});
  picture.append(svg("path", {class: "base", d: `M0 0V${HEIGHT}H${WIDTH}`}));
  for (let i = 0; i < all.length; i++) {
    const piece = [];
    for (; i < all.length && all[i].value !== null; i++) piece.push(all[i]);
    if (!piece.length) continue;
    const path = "M" + piece.map((point) => `${x(point)} ${y(point)}`).join("L");
    picture.append(svg("path", {class: "area", d: `${path}V${HEIGHT}H${x(piece[0])}Z`}));
    picture.append(svg("path", {class: "curve", d: piece.length > 1 ? path : `${path}h0.1`}));
  }
  const past = seconds < 60 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
  const range = !values.length ? "nothing yet" : low === high ? chart.words(low) : `${chart.words(low)} to ${chart.words(high)}`;
  picture.setAttribute("aria-label", `${chart.title}, last ${past}: ${range}`);
  const ends = values.length ? [to, from] : [chart.to, chart.from].filter((end) => end !== null);
  box.replaceChildren(
    paragraph("title", chart.title),
    paragraph("axis y", ...ends.map(chart.words)),
    picture,
    paragraph("axis x", `${past} ago`, values.length ? "now" : "no data"),
  );
  box.hidden = false;
}

function show(answer) {
  for (const element of document.querySelectorAll("[data-shown]")) element.textContent = answer.shown[element.dataset.shown];
  const at = Date.now() / 1000;
  samples.push({at, ...answer.counts});
  samples = samples.filter((sample) => at - sample.at <= WINDOW);
  try {
    sessionStorage.setItem(memory, JSON.stringify(samples));
  } catch { /* then they are gone with the page */ }
  down.hidden = answer.running;
  listed ??= answer.counts.sessions; // the session of a first visit is stored after the list was made
  const more = answer.counts.sessions - listed;
  since.textContent = more ? `, ${Math.abs(more).toLocaleString("en")} ${more > 0 ? "more" : "fewer"} since` : "";
  for (const name in charts) draw(document.querySelector(`[data-chart=${name}]`), charts[name]);
}

let timer = 0, listed = null, stopped = false, moved = Date.now(), failures = 0;

function say(text) {
  if (state.textContent !== text) state.textContent = text;
}

function later() {
  clearTimeout(timer);
  if (!stopped && !document.hidden) timer = setTimeout(look, 1000 * Math.min(PERIOD * 2 ** failures, 30));
}

function stop(text) {
  stopped = true;
  clearTimeout(timer);
  pause.textContent = "Go on";
  say(text);
}

async function look() {
  if (Date.now() - moved > 1000 * IDLE) return stop("Paused after half an hour without activity.");
  try {
    const response = await fetch(live.dataset.url, {headers: {Accept: "application/json"}, redirect: "manual"});
    if (response.type === "opaqueredirect" || response.status === 401 || response.status === 403) {
      return stop("You may not see this any more: log in again, and reload the page.");
    }
    if (response.status === 503) throw new Error("The store cannot be reached. Trying again.");
    if (!response.ok) throw new Error("No answer. Trying again.");
    show(await response.json());
    failures = 0;
    if (!stopped) say("Live, every 2 seconds");
  } catch (error) {
    failures++;
    if (!stopped) say(error instanceof TypeError ? "No answer. Trying again." : error.message);
  }
  later();
}

pause.addEventListener("click", () => {
  if (!stopped) return stop("Paused");
  stopped = false;
  moved = Date.now();
  pause.textContent = "Pause";
  look();
});
for (const sign of ["pointermove", "keydown", "scroll"]) {
  addEventListener(sign, () => { moved = Date.now(); }, {passive: true});
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && !stopped) look(); else clearTimeout(timer); });
pause.hidden = false;
updated.textContent = new Date(updated.dateTime).toLocaleTimeString();
look();

// Focus tells a screen reader what was done, and is where a keyboard goes on. The address names the same place: browsers
// move focus there when the page is complete, which is after this.
document.getElementById("said")?.focus();

for (const form of document.querySelectorAll("form[method=post]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) return event.preventDefault();
    form.dataset.sent = "yes";
    event.submitter?.setAttribute("aria-disabled", "true");
    setTimeout(() => {
      delete form.dataset.sent;
      event.submitter?.removeAttribute("aria-disabled");
    }, 1000 * AGAIN);
  });
}
// Back in the browser's history, the page may be shown as it was left.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
