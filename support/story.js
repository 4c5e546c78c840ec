"use strict";
// Steps through the turns: shows the bank after a turn by replaying the edits in the table of turns.

const rows = [...document.querySelectorAll("#talk tbody tr")];
const banks = [...document.querySelectorAll(".bank")];
const [back, slider, forward, where, when, now, talk] =
  ["back", "slider", "forward", "where", "when", "now", "talk"].map(id => document.getElementById(id));

// {id, event, old, text, time} of each edit of bank b in turn i: steps[b][i]
const steps = banks.map((_, b) => rows.map(row =>
  [...row.querySelectorAll(".edits")[b].querySelectorAll("li[data-id]")].map(item => ({
    id: Number(item.dataset.id), event: item.className, old: textOf(item, "del"), text: textOf(item, "ins"),
    time: textOf(row, "time")}))));

function textOf(element, selector) {
  const found = element.querySelector(selector);
  return found ? found.textContent : "";
}

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);  // strings become text, never HTML
  return element;
}

// The memories of bank b after turn i, {id: edit that wrote it}. Edits of turn i itself have a mark.
function bankAfter(b, i) {
  const bank = new Map();
  steps[b].slice(0, i + 1).flatMap((edits, turn) => edits.map(edit => ({...edit, mark: turn === i ? edit.event : ""})))
    .forEach(edit => edit.event === "delete" && !edit.mark ? bank.delete(edit.id) : bank.set(edit.id, edit));
  return bank;
}

function memoryItem(memory) {
  const item = make("li", {value: memory.id, class: memory.mark});
  if (memory.mark && memory.old) item.append(make("del", {}, memory.old), " ");
  if (memory.text) item.append(make("ins", {}, memory.text), " ", make("time", {}, memory.time));
  return item;
}

function copyOf(element) {
  return [...element.cloneNode(true).childNodes];
}

function show(i) {
  const row = rows[i];
  rows.forEach(other => other.removeAttribute("aria-current"));
  row.setAttribute("aria-current", "step");
  talk.scrollTop = row.offsetTop - (talk.clientHeight - row.offsetHeight) / 2;
  slider.value = i + 1;
  when.textContent = `after turn ${i + 1}`;
  slider.setAttribute("aria-valuetext", `turn ${i + 1} of ${rows.length}`);
  back.disabled = i === 0;
  forward.disabled = i === rows.length - 1;
  now.replaceChildren(...copyOf(row.querySelector(".said")));
  banks.forEach((bank, b) => {
    const memories = [...bankAfter(b, i).values()];
    bank.querySelector(".now").replaceChildren(...copyOf(row.querySelectorAll(".edits")[b]));
    bank.querySelector(".size").textContent = memories.filter(memory => memory.mark !== "delete").length;
    const list = bank.querySelector(".memories");
    list.replaceChildren(...memories.map(memoryItem));
    const marked = list.querySelector(".add, .update, .delete");
    if (marked) list.scrollTop = marked.offsetTop - list.clientHeight / 3;
  });
  const spoken = [now, ...banks.map(bank => bank.querySelector(".now"))].map((part, b) =>
    `${b ? banks[b - 1].dataset.of : ""} ${part.innerText}`);  // for screen readers, which read an output that changes
  where.replaceChildren(`turn ${i + 1} of ${rows.length}`, make("span", {class: "spoken"}, spoken.join(". ")));
}

const turn = () => slider.value - 1;
const step = by => show(Math.max(0, Math.min(rows.length - 1, turn() + by)));
const addresses = rows.map(row => `#${row.id}`);
const showAddressed = () => show(Math.max(0, addresses.indexOf(location.hash)));

if (rows.length) {
  document.documentElement.className = "js";
  document.querySelectorAll("#talk, .memories").forEach(box => { box.tabIndex = 0; });  // they scroll
  rows.forEach(row => row.removeAttribute("id"));  // an address shows a turn, and does not scroll the page to its row
  document.getElementById("steps").hidden = false;
  slider.addEventListener("input", () => show(turn()));
  back.addEventListener("click", () => step(-1));
  forward.addEventListener("click", () => step(1));
  document.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target === slider) return;
    event.preventDefault();
    step(by);
  });
  window.addEventListener("hashchange", showAddressed);
  let before = 0;
  window.addEventListener("beforeprint", () => { before = turn(); show(rows.length - 1); });
  window.addEventListener("afterprint", () => show(before));
  showAddressed();
  if (turn()) window.scrollTo(0, 0);
}
