// Asks again and again who answers, and kills meanwhile. Without this script the buttons are plain forms.
"use strict";

const ask = document.getElementById("ask");
const answers = document.getElementById("answers");
const tally = document.getElementById("tally");
const SHOWN = 24;

const colours = new Map(); // by worker
let asked = 0, failed = 0, asking = false, killing = false;

function tell(text) {
  tally.textContent = text;
}

function add(text, title, kind) {
  const item = document.createElement("li");
  item.className = kind;
  item.append(Object.assign(document.createElement("b"), {textContent: text}), ` ${title}`);
  answers.append(item);
  while (answers.children.length > SHOWN) answers.firstChild.remove();
  answers.hidden = false;
}

async function once() {
  asked++;
  try {
    const response = await fetch(ask.dataset.url, {headers: {Accept: "application/json"}});
    if (!response.ok) throw new Error(response.status);
    const {visits, pid} = await response.json();
    if (!colours.has(pid)) colours.set(pid, colours.size % 6);
    add(visits, pid, `worker${colours.get(pid)}`);
  } catch (error) {
    failed++;
    add("!", error.message, "failed");
  }
}

async function loop() {
  while (asking) {
    if (!killing) await once();
    await new Promise((resolve) => setTimeout(resolve, 400));
  }
}

ask.addEventListener("click", () => {
  asking = !asking;
  ask.textContent = asking ? "Stop asking" : "Keep asking";
  if (asking) {
    tell("Each answer: your visits, and the worker that counted.");
    loop();
  } else {
    tell(`Asked ${asked} times, ${colours.size} workers answered, ${failed} requests failed.`);
  }
});
ask.hidden = false;

for (const form of document.querySelectorAll("form[data-kill]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (killing) return;
    killing = true;
    try {
      const response = await fetch(form.action, {method: "POST", headers: {Accept: "application/json"}});
      if (!response.ok) throw new Error("That was refused.");
      const {killed, message} = await response.json();
      tell(message);
      if (killed) add("kill -9", killed, "killed");
    } catch (error) {
      tell(error.message);
    }
    killing = false;
    if (!asking) await once();
  });
}
