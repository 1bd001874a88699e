"use strict";
// What every part of the reader uses: elements, numbers in words, and the blocks of compressed data.
// Strings from data reach the page through textContent alone.

/** An element. `props` are properties, or attributes where the name has a dash or is a role; falsy children are left out. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An SVG element, whose props are attributes. */
function draw(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const LONG = 1600; // characters of one text that are shown before the reader asks for more

/** A text from data, isolated in its own direction. What is very long opens at a click. */
function text(value, className = "") {
  const node = el("span", { className: `text ${className}`, dir: "auto", textContent: value });
  if (value.length <= LONG) return node;
  node.textContent = value.slice(0, LONG);
  const more = `… ${(value.length - LONG).toLocaleString("en")} more characters`;
  const button = el("button", { type: "button", className: "more", textContent: more });
  button.onclick = (event) => {
    event.stopPropagation();
    node.textContent = value;
  };
  node.append(button);
  return node;
}

const LEFTWARD = /^\P{L}*[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

/** The direction of a text by its first letter; dir=auto passes over parts that have a dir of their own. */
const direction = (value) => (LEFTWARD.test(value) ? "rtl" : "ltr");

const tag = (label, className = "") => el("span", { className: `tag ${className}`, textContent: label });
const number = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 2 : 0)} %`;
const count = (value) => value.toLocaleString("en");
// A thought that differs from the data's own need not be wrong, so it is not called so.
const compared = (same) => (same === null ? null : tag(same ? "✓ data’s own" : "≠ differs", same ? "right" : "wrong"));

const FULL = 0.6; // nats a token that have the full colour

/** Tints a node by gain per token: green where the text got likelier, amber where it did not. */
function tint(node, gain) {
  if (gain === null || gain === undefined) return node;
  node.classList.add("tinted", gain < 0 ? "loss" : "gain");
  node.style.setProperty("--strength", `${Math.round(Math.min(1, Math.sqrt(Math.abs(gain) / FULL)) * 100)}%`);
  return node;
}

const overview = JSON.parse(document.getElementById("overview").textContent);
const read = new Map();

/** The value of a block: base64, gzip, JSON. The last few stay in memory. */
function block(name) {
  if (!read.has(name)) {
    read.set(name, unpack(document.getElementById(`block-${name}`).textContent));
    if (read.size > 40) read.delete(read.keys().next().value);
  }
  return read.get(name);
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
