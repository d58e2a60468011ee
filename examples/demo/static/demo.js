// Keeps asking who answers while processes are killed. Without this script the buttons are plain forms.
"use strict";

const ask = document.getElementById("ask");
const answers = document.getElementById("answers");
const tally = document.getElementById("tally");
const workers = document.getElementById("workers");
const both = document.getElementById("both");
const outcome = document.getElementById("outcome");
const tiles = document.querySelectorAll("[data-live]");
const PERIOD = 400; // milliseconds between two requests
const SHOWN = 24; // answers
const LIMIT = 500; // requests without a click, then it stops

const colours = new Map(); // by worker
let known = [...workers.children].map((item) => Number(item.textContent)), killed = [];
let asked = 0, failed = 0, left = 0, asking = false;
const pending = new Set(); // requests that wait for their answers
let kill = Promise.resolve(); // the last request that kills a worker

function tell(text) {
  tally.textContent = text;
}

function hue(pid) {
  if (!colours.has(pid)) colours.set(pid, colours.size % 6);
  return `worker${colours.get(pid)}`;
}

function add(text, title, kind) {
  const item = document.createElement("li");
  item.className = kind;
  item.append(Object.assign(document.createElement("b"), {textContent: text}), ` ${title}`);
  answers.append(item);
  while (answers.children.length > SHOWN) answers.firstChild.remove();
  answers.hidden = false;
}

function show(facts) {
  for (const tile of tiles) {
    const before = tile.textContent;
    tile.textContent = facts[tile.dataset.live] || "none";
    if (tile.dataset.live === "server" && tile.textContent !== before) tile.dataset.before = before;
  }
  killed = [...killed, ...known.filter((pid) => !facts.workers.includes(pid))].slice(-2);
  known = facts.workers;
  workers.replaceChildren(
    ...killed.map((pid) => Object.assign(document.createElement("li"), {className: "killed", textContent: `${pid} killed`})),
    ...known.map((pid) => {
      const item = Object.assign(document.createElement("li"), {className: hue(pid), textContent: pid});
      if (pid === facts.pid) item.setAttribute("aria-current", "true");
      return item;
    }),
  );
}

async function receive(url, options) {
  const response = await fetch(url, {headers: {Accept: "application/json"}, ...options});
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).message || `Error ${response.status}`);
  return response.text();
}

async function send(url, options = {}) {
  await Promise.allSettled([kill]);
  const text = receive(url, options);
  pending.add(text);
  try {
    return await text;
  } finally {
    pending.delete(text);
  }
}

// A killed worker does not answer the request that it has begun. So no other request runs meanwhile.
function killWorker(url) {
  return kill = Promise.allSettled(pending).then(() => receive(url, {method: "POST"}));
}

async function once() {
  asked++;
  try {
    const facts = JSON.parse(await send(ask.dataset.url));
    show(facts);
    add(facts.visits, `worker ${facts.pid}`, hue(facts.pid));
    if (facts.lost) tell("Your session has ended: it expired, or another device or the admin page ended it. This is a new one.");
    return facts;
  } catch (error) {
    failed++;
    add("!", error.message, "failed");
  }
}

async function loop() {
  while (asking) {
    if (!document.hidden) {
      if (!left--) return stop();
      await once();
    }
    await new Promise((resolve) => setTimeout(resolve, PERIOD));
  }
}

function start() {
  left = LIMIT;
  if (asking) return;
  asking = true;
  ask.textContent = "Stop asking";
  loop();
}

function stop() {
  asking = false;
  ask.textContent = "Keep asking";
  tell(`Asked ${asked} times, ${colours.size} workers answered, ${failed} requests failed.`);
}

ask.addEventListener("click", () => {
  if (asking) return stop();
  tell("Each answer: your visits, and the worker that counted.");
  start();
});
ask.hidden = false;

for (const form of document.querySelectorAll("form[data-kill]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form.dataset.sent) return;
    form.dataset.sent = "yes";
    const worker = form.dataset.kill === "worker";
    if (!worker) start(); // requests are answered while there is no server
    try {
      const text = await (worker ? killWorker(form.action) : send(form.action, {method: "POST"}));
      const {killed, message} = JSON.parse(text);
      tell(message);
      if (killed) {
        add("kill -9", `${form.dataset.kill} ${killed}: the count goes on`, "killed");
        const facts = await once();
        if (facts) tell(`${message} Visit ${facts.visits} was counted by worker ${facts.pid}.`);
        start();
      }
    } catch (error) {
      tell(error.message);
    }
    delete form.dataset.sent;
  });
}

both.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (both.dataset.sent) return;
  both.dataset.sent = "yes";
  outcome.textContent = "Both requests are waiting ...";
  const body = new URLSearchParams({run: Date.now()});
  try {
    await Promise.all(["a", "b"].map((key) => send(both.action + key, {method: "POST", body})));
    outcome.innerHTML = await send(both.action); // escaped by the server
  } catch (error) {
    outcome.textContent = `A request failed: ${error.message}. Try again.`;
  }
  delete both.dataset.sent;
});
