"use strict";

const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18) + "px";
}

function hideTip() {
  tip.hidden = true;
}

// What has something to say says it when it is pointed at, touched, or has the focus.
for (const part of document.querySelectorAll("[data-tip]")) {
  part.addEventListener("pointermove", (event) => showTip(part.dataset.tip, event.clientX, event.clientY));
  part.addEventListener("pointerleave", hideTip);
  part.addEventListener("focus", () => {
    const box = part.getBoundingClientRect();
    showTip(part.dataset.tip, box.left + box.width / 2, box.top + box.height / 2);
  });
  part.addEventListener("blur", hideTip);
}
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", hideTip, true);

// What is wider than the screen says so, and fades where more of it lies to the right.
const wide = [...document.querySelectorAll(".scroll")];
const measure = (part) => {
  part.toggleAttribute("data-wide", part.scrollWidth > part.clientWidth + 1);
  part.toggleAttribute("data-more", part.scrollWidth > part.clientWidth + part.scrollLeft + 1);
};
for (const part of wide) part.addEventListener("scroll", () => measure(part), { passive: true });
addEventListener("toggle", () => wide.forEach(measure), true);
new ResizeObserver(() => wide.forEach(measure)).observe(document.body);

// Tables are sorted by their heads: a number by its value, a word by the alphabet, what is empty last.
function compare(a, b) {
  if (a === b) return 0;
  if (a === "" || b === "") return a === "" ? 2 : -2;
  const [x, y] = [Number(a), Number(b)];
  const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  return Math.sign(order);
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      const key = (row) => row.children[column].dataset.key ?? "";
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((one, other) => {
        const order = compare(key(one), key(other));
        return Math.abs(order) === 2 ? order : down * order;
      });
      body.append(...rows);
    });
  });
}

// Samples: one model at a time beside the baseline.
for (const viewer of document.querySelectorAll(".viewer")) {
  const slides = [...viewer.querySelectorAll(".slide")];
  const control = document.getElementById(viewer.dataset.control);
  const slider = control.querySelector("input");
  const name = control.querySelector("output");
  const show = () => {
    slides.forEach((slide, k) => (slide.hidden = k !== Number(slider.value)));
    name.textContent = slides[slider.value].dataset.label;
    slider.setAttribute("aria-valuetext", name.textContent);
  };
  slider.addEventListener("input", show);
  viewer.classList.add("one");
  control.hidden = slides.length < 2;
  show();
}

// Heat maps: the cell under the pointer, or under a cursor that the arrow keys move.
for (const map of document.querySelectorAll(".heat")) {
  const data = JSON.parse(map.querySelector("script").textContent);
  const readout = map.querySelector(".readout");
  const chart = map.querySelector(".chart");
  const area = document.createElement("div");
  const cursor = document.createElement("div");
  const [left, top, width, height] = data.axes.map((share) => 100 * share + "%");
  const [first, last] = data.span;
  let [row, column] = [0, 0];
  area.className = "cells";
  area.tabIndex = 0;
  area.setAttribute("role", "application");
  area.setAttribute("aria-label", "Cells of the heat map: arrow keys move, Page Up and Page Down by ten timesteps shown");
  Object.assign(area.style, { left, top, width, height });
  cursor.className = "cursor";
  cursor.hidden = true;
  area.append(cursor);
  chart.querySelector(".frame").append(area);
  const say = () => {
    const value = data.values[row][column];
    const text = `${data.rows[row]}, t = ${data.timesteps[column]}: ${value === 0 ? "0" : value.toExponential(2)}`;
    readout.textContent = text;
    return text;
  };
  const nearest = (t) =>
    data.timesteps.reduce((best, one, k) => (Math.abs(one - t) < Math.abs(data.timesteps[best] - t) ? k : best), 0);
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    row = Math.min(data.rows.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * data.rows.length)));
    column = nearest(first + ((event.clientX - box.left) / box.width) * (last - first));
    cursor.hidden = true;
    showTip(say(), event.clientX, event.clientY);
  });
  area.addEventListener("pointerleave", hideTip);
  const move = () => {
    const [count, size] = [data.rows.length, 100 / data.rows.length];
    cursor.hidden = false;
    cursor.style.top = (100 * row) / count + "%";
    cursor.style.height = size + "%";
    cursor.style.left = `calc(${(100 * (data.timesteps[column] - first)) / (last - first)}% - 4px)`;
    cursor.style.width = "8px";
    say();
  };
  area.addEventListener("focus", () => area.matches(":focus-visible") && move());
  area.addEventListener("blur", () => (cursor.hidden = true));
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [0, -10], PageDown: [0, 10] };
  area.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    row = Math.min(data.rows.length - 1, Math.max(0, row + step[0]));
    column = Math.min(data.timesteps.length - 1, Math.max(0, column + step[1]));
    move();
  });
}

// Curves: what all of them say at the point nearest to the pointer, or at a line that the arrow keys move.
for (const part of document.querySelectorAll(".curves")) {
  const data = JSON.parse(part.querySelector("script").textContent);
  const readout = part.querySelector(".readout");
  const area = document.createElement("div");
  const cursor = document.createElement("div");
  const [left, top, width, height] = data.axes.map((share) => 100 * share + "%");
  const last = data.places.length - 1;
  let chosen = 0;
  area.className = "places";
  area.tabIndex = 0;
  area.setAttribute("role", "application");
  area.setAttribute("aria-label", data.label);
  Object.assign(area.style, { left, top, width, height });
  cursor.className = "line";
  cursor.hidden = true;
  area.append(cursor);
  part.querySelector(".frame").append(area);
  const choose = (number) => {
    chosen = Math.min(last, Math.max(0, number));
    cursor.hidden = false;
    cursor.style.left = 100 * data.places[chosen] + "%";
    readout.textContent = data.texts[chosen].replaceAll("\n", "; ");
    return data.texts[chosen];
  };
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const distance = data.places.map((place) => Math.abs(place - share));
    showTip(choose(distance.indexOf(Math.min(...distance))), event.clientX, event.clientY);
  });
  area.addEventListener("pointerleave", () => (hideTip(), (cursor.hidden = true)));
  area.addEventListener("focus", () => area.matches(":focus-visible") && choose(chosen));
  area.addEventListener("blur", () => (cursor.hidden = true));
  const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
  area.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    choose(chosen + step);
  });
}

const theme = document.getElementById("theme");
const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const label = () => (theme.textContent = dark() ? "Light" : "Dark");
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  label();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
theme.hidden = false;
label();

for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(document.getElementById(button.dataset.of));
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details.printed").forEach((part) => (part.open = true)));
