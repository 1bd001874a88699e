"use strict";
// What there is to read: thoughts of the E-step, and held-out answers. What each view lists, how it
// marks and filters it, and what it shows of one text. Strings from data reach the page through
// textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { view: "thoughts", seed: 0, loop: 0, step: null, model: null, filter: "all", query: "", id: null };

/** An element. `props` are properties, or attributes where the name has a dash; falsy children are left out. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const text = (value, className = "") => el("span", { className: `text ${className}`, dir: "auto", textContent: value });
const tag = (label, className) => el("span", { className: `tag ${className}`, textContent: label });
const nats = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)} nats`;
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 2 : 0)} %`;
const graded = (right) => tag(right ? "✓ right" : "✗ wrong", right ? "right" : "wrong");
// A thought that differs from the data's own need not be wrong, so it is not called so.
const compared = (same) => (same === null ? null : tag(same ? "✓ data’s own" : "≠ differs", same ? "right" : "wrong"));

const chosen = (step) => step.draws.find((draw) => draw.chosen);

function changed(item) {
  const thoughts = Object.values(item.steps).map((step) => (chosen(step) || { text: null }).text);
  return new Set(thoughts).size > 1;
}

const thoughts = {
  name: "Thoughts for the corpus",
  loop: () => data.seeds[state.seed].loops[state.loop],
  there: () => data.seeds.some((seed) => seed.loops.length),
  items() {
    return this.loop() ? this.loop().texts.filter((item) => item.steps[state.step]) : [];
  },
  words: (item) => [item.id, item.question, item.answer, ...item.steps[state.step].draws.map((draw) => draw.text)],
  title: (item) => `${item.question}${item.answer}`,
  sign(item) {
    const draw = chosen(item.steps[state.step]);
    if (!draw) return ["–", "soft", "rejected"];
    if (draw.same === null) return ["●", "soft", "accepted"];
    return draw.same ? ["✓", "right", "accepted, the data’s own thought"] : ["≠", "wrong", "accepted, differs"];
  },
  filters() {
    const draw = (item) => chosen(item.steps[state.step]);
    const own = this.items().some((item) => item.oracle !== null);
    return [
      ["all", "All texts", () => true],
      ["accepted", "Thought accepted", (item) => draw(item)],
      ["rejected", "No thought accepted", (item) => !draw(item)],
      own && ["same", "Thought is the data’s own", (item) => draw(item) && draw(item).same],
      own && ["differs", "Thought differs from it", (item) => draw(item) && draw(item).same === false],
      ["changed", "Changes over iterations", changed],
      ...knownFilters(this.items()),
    ].filter(Boolean);
  },
  detail(item) {
    const step = item.steps[state.step];
    const figures = [`K = ${step.k}`, `${step.distinct} distinct`, `effective sample size ${step.ess.toFixed(1)}`];
    if (step.raw !== null) figures.push(`log p(text) without a thought ${step.raw.toFixed(2).replace("-", "−")} nats`);
    return [
      el("p", { className: "document" }, text(item.question, "question"), text(item.answer, "answer")),
      ownThought(item),
      el("h4", { textContent: "The thought through the iterations" }),
      el("ol", { className: "through" }, Object.entries(item.steps).map(([n, s]) => through(n, s))),
      el("h4", { textContent: `Draws of iteration ${state.step}` }),
      el("p", { className: "bar", textContent: figures.join(" · ") }),
      el("ul", { className: "draws" }, step.draws.map(drawn)),
    ];
  },
};

function through(number, step) {
  const draw = chosen(step) || step.draws[0];
  const accepted = Boolean(chosen(step));
  const now = number === state.step;
  const button = el(
    "button",
    { type: "button", className: now ? "now" : "", onclick: () => set({ step: number }) },
    el("span", { className: "number", textContent: number }),
    text(draw.text || "(empty)", accepted ? "" : "soft"),
    el("span", { className: "tags" }, accepted ? compared(draw.same) : tag("rejected", "soft")),
  );
  if (now) button.setAttribute("aria-current", "step");
  return el("li", {}, button);
}

function drawn(draw) {
  const bar = el("b");
  bar.style.width = `${100 * draw.share}%`;
  const from = Object.entries(draw.from).map(([proposal, count]) => `${count} × ${proposal}`);
  if (draw.gain !== null && draw.finished) from.push(`gain ${nats(draw.gain)}`);
  return el(
    "li",
    { className: draw.chosen ? "chosen" : "" },
    el("span", { className: "share", title: "Share of the weight" }, percent(draw.share), el("span", {}, bar)),
    el("span", {}, text(draw.text || "(empty)"), el("span", { className: "origin" }, el("br"), from.join(" · "))),
    el(
      "span",
      { className: "tags" },
      draw.chosen && tag("chosen", ""),
      draw.finished ? compared(draw.same) : tag("unfinished", "soft"),
    ),
  );
}

const answers = {
  name: "Held-out answers",
  all: () => data.seeds[state.seed].answers,
  there: () => data.seeds.some((seed) => seed.answers.texts.length),
  items() {
    return this.all().texts.filter((item) => item.by[state.model]);
  },
  words: (item) => [item.id, item.question, item.gold, item.by[state.model].text, item.by[state.model].thought || ""],
  title: (item) => item.question,
  sign: (item) => (item.by[state.model].right ? ["✓", "right", "right"] : ["✗", "wrong", "wrong"]),
  filters() {
    const answer = (item) => item.by[state.model];
    const own = this.items().some((item) => item.oracle !== null && answer(item).thought !== null);
    return [
      ["all", "All questions", () => true],
      ["right", "Right answer", (item) => answer(item).right],
      ["wrong", "Wrong answer", (item) => !answer(item).right],
      own && ["lucky", "Right, thought differs", (item) => answer(item).right && answer(item).same === false],
      ...knownFilters(this.items()),
    ].filter(Boolean);
  },
  detail(item) {
    return [
      el("p", { className: "document" }, text(item.question, "question")),
      el("p", { className: "own" }, "Right answer: ", text(item.gold, "answer")),
      ownThought(item),
      el("h4", { textContent: "What every model thought, and answered" }),
      el(
        "ul",
        { className: "through wide" },
        Object.entries(item.by).map(([n, answer]) => answered(this.all().models[n], answer, n === state.model)),
      ),
    ];
  },
};

function answered(model, answer, now) {
  const thought = answer.thought === null ? "no thought" : answer.thought || "(empty thought)";
  return el(
    "li",
    {},
    el(
      "div",
      { className: now ? "row now" : "row" },
      el("span", { className: "number", textContent: model }),
      el("span", {}, text(thought, "soft"), el("br"), text(answer.text || "(nothing)")),
      el("span", { className: "tags" }, graded(answer.right)),
    ),
  );
}

function ownThought(item) {
  if (item.oracle === null) return null;
  return el("p", { className: "own" }, "The data’s own thought: ", text(item.oracle));
}

function knownFilters(items) {
  if (!items.some((item) => typeof item.known === "boolean")) return [];
  return [
    ["known", "Known facts only", (item) => item.known === true],
    ["unknown", "Needs an unknown fact", (item) => item.known === false],
  ];
}
