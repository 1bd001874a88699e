// Thoughts of the E-steps: every text with its draws, in every iteration.

const AROUND = 10; // chunks shown before and behind the one that is read

class Thoughts {
  name = "Thoughts";
  what = "texts";
  asked = "thought about";
  whole = null; // of every text what the search looks into, once it is read
  reading = false;

  static there = () => overview.seeds.some((seed) => seed.loops.length);

  constructor(seed, loop) {
    this.loop = overview.seeds[seed].loops[loop];
  }

  async load() {
    const { documents, texts, steps } = await block(this.loop.index);
    Object.assign(this, { documents, texts, steps, words: {} });
    this.turns = this.loop.iterations.map(String);
    const there = Object.values(steps);
    this.changing = texts.text.map((_, n) => new Set(there.map((s) => (s.accepted[n] ? s.thought[n] : null))).size > 1);
    this.own = there.some((s) => s.same.some((same) => same !== null));
    this.knows = documents.known.some((known) => known !== null);
    this.ranges = [
      ["gain", "Gain, nats a token"],
      ["ess", "Effective draws"],
      ["length", "Thought, tokens"],
    ];
    return this;
  }

  label = (turn) => `Iteration ${turn}`;
  last = () => this.turns.at(-1);
  id = (n) => this.documents.id[this.texts.document[n]];
  total = (turn) => this.loop.totals[turn];
  value = (name, n, turn) => this.steps[turn][name][n];

  filters() {
    const known = (n) => this.documents.known[this.texts.document[n]];
    const now = (n, turn) => this.steps[turn].accepted[n] && this.steps[turn].same[n];
    return [
      ["all", "All texts", () => true],
      ["accepted", "Thought accepted", (n, turn) => this.steps[turn].accepted[n]],
      ["rejected", "No thought accepted", (n, turn) => !this.steps[turn].accepted[n]],
      this.own && ["same", "Thought is the data’s own", (n, turn) => now(n, turn) === true],
      this.own && ["differs", "Thought differs from it", (n, turn) => now(n, turn) === false && this.steps[turn].accepted[n]],
      this.turns.length > 1 && ["changed", "Changes over iterations", (n) => this.changing[n]],
      this.knows && ["known", "Known facts only", (n) => known(n) === true],
      this.knows && ["unknown", "Needs an unknown fact", (n) => known(n) === false],
    ].filter(Boolean);
  }

  /** Numbers of the texts that were thought about in this iteration. */
  all(turn) {
    const gains = this.steps[turn].accepted;
    return [...gains.keys()].filter((n) => gains[n] !== null);
  }

  /** What the search looks into: id, text and this iteration's thought; their beginnings until all is read. */
  searched(n, turn) {
    if (this.whole) return this.whole[n][turn];
    this.words[turn] ??= [];
    this.words[turn][n] ??= [this.id(n), this.texts.before[n], this.texts.text[n], this.value("thought", n, turn)]
      .join("\n")
      .toLowerCase();
    return this.words[turn][n];
  }

  /** Reads all blocks for the search: what the index has of a long text is its beginning. */
  async readWhole() {
    this.reading = true;
    const found = [];
    for (const [n, document] of this.texts.document.entries()) {
      const { chunks } = (await block(this.documents.block[document]))[this.documents.place[document]];
      const chunk = chunks[this.texts.at[n]];
      const text = [this.id(n), this.texts.before[n], chunk.text].join("\n").toLowerCase();
      const steps = Object.entries(chunk.steps);
      found.push(Object.fromEntries(steps.map(([turn, step]) => [turn, `${text}\n${shown(step).text.toLowerCase()}`])));
    }
    this.whole = found;
  }

  row(node, n, turn) {
    const [gain, accepted] = [this.value("gain", n, turn), this.value("accepted", n, turn)];
    const before = this.texts.before[n];
    const title = before.length < 120 ? before + this.texts.text[n] : this.texts.text[n];
    const figure = gain === null ? "–" : signed(gain);
    node.append(
      tint(el("span", { className: accepted ? "mark" : "mark none" }), accepted ? gain : null),
      el("span", { className: "title", dir: "auto", textContent: title.trim() }),
      el("span", { className: "figure", textContent: accepted ? figure : "none" }),
      el("span", { className: "under", dir: "auto", textContent: this.value("thought", n, turn) || "(empty thought)" }),
    );
  }

  async detail(n, turn, turnTo, goTo) {
    const document = this.texts.document[n];
    const found = (await block(this.documents.block[document]))[this.documents.place[document]];
    const chunk = found.chunks[this.texts.at[n]];
    const step = chunk.steps[turn];
    return [
      found.known === false && el("p", { className: "tags" }, tag("needs an unknown fact", "soft")),
      this.document(n, found, turn, goTo),
      chunk.oracle !== null && el("p", { className: "own" }, el("b", { textContent: "The data’s own thought " }), text(chunk.oracle)),
      this.turns.length > 1 && [
        el("h3", { textContent: "Through the iterations" }),
        el("ol", { className: "through" }, through(chunk, turn, turnTo)),
      ],
      el("h3", { textContent: `All ${step.k} draws of iteration ${turn}` }),
      el("p", { className: "facts", textContent: facts(step) }),
      el("ul", { className: "draws" }, step.draws.map((draw) => drawn(draw, chunk.tokens))),
    ];
  }

  /** The document, its thoughts between its chunks, around the one that is read. */
  document(n, found, turn, goTo) {
    const at = this.texts.at[n];
    const first = n - found.chunks.slice(0, at).filter((chunk) => Object.keys(chunk.steps).length).length;
    let number = first - 1;
    const numbers = found.chunks.map((chunk) => (Object.keys(chunk.steps).length ? (number += 1) : null));
    const [from, to] = [Math.max(0, at - AROUND), Math.min(found.chunks.length, at + AROUND + 1)];
    const parts = [];
    if (from > 0) parts.push(el("p", { className: "cut", textContent: `${from} chunks before` }));
    for (let place = from; place < to; place += 1) {
      const chunk = found.chunks[place];
      const step = chunk.steps[turn];
      if (step) parts.push(inserted(step, chunk.tokens, place === at ? null : () => goTo(numbers[place])));
      parts.push(text(chunk.text, place === at ? "chunk now" : "chunk"));
    }
    if (to < found.chunks.length) parts.push(el("p", { className: "cut", textContent: `${found.chunks.length - to} chunks more` }));
    return el("div", { className: "document", dir: direction(found.chunks[at].text) }, parts);
  }
}

const chosen = (step) => step.draws.find((draw) => draw.chosen);
const shown = (step) => chosen(step) || step.draws[0]; // as the list does
const perToken = (draw, tokens) => (draw.gain === null ? null : draw.gain / Math.max(1, tokens));

/** The chosen thought where it stands in its document. `go` reads its chunk; null where that is read already. */
function inserted(step, tokens, go) {
  const draw = chosen(step);
  const gain = draw ? perToken(draw, tokens) : null;
  const label = draw ? (gain === null ? "thought" : `thought · ${signed(gain)} nats a token`) : "no thought accepted";
  const parts = [el("span", { className: "label", textContent: label }), draw && text(draw.text || "(empty)")];
  if (go) parts[0].append(el("button", { type: "button", className: "go", textContent: "Read its draws", onclick: go }));
  const kind = `thought${go ? "" : " now"}${draw ? "" : " none"}`;
  return tint(el("div", { className: kind, dir: "ltr" }, parts), gain);
}

function facts(step) {
  const parts = [`${step.distinct} distinct`, `effective sample size ${number(step.ess, 1)}`];
  if (step.raw !== null) parts.push(`without a thought the text has ${number(step.raw, 1)} nats`);
  return parts.join(" · ");
}

/** A chunk's thought in every iteration; words that the iteration before did not have are marked. */
function through(chunk, turn, turnTo) {
  let before = null;
  return Object.entries(chunk.steps).map(([iteration, step]) => {
    const draw = chosen(step);
    const { text: thought } = shown(step);
    const kind = draw ? "text" : "text soft";
    const words = el("span", { className: kind, dir: "auto" }, changes(before, thought || "(empty)"));
    before = thought;
    const gain = perToken(shown(step), chunk.tokens);
    const now = iteration === turn;
    const button = tint(
      el(
        "button",
        { type: "button", className: now ? "now" : "", onclick: () => turnTo(iteration) },
        el("span", { className: "number", textContent: iteration }),
        words,
        el("span", { className: "tags" }, draw ? compared(draw.same) : tag("rejected", "soft")),
      ),
      draw ? gain : null,
    );
    if (now) button.setAttribute("aria-current", "step");
    return el("li", {}, button);
  });
}

/** The words of `after`, those in <mark> that are not in `before` in the same order. What is very long is cut. */
function changes(before, after) {
  const begin = after.slice(0, LONG);
  const same = before === null || before === after;
  const rest = ` … ${count(after.length - LONG)} more characters${same ? "" : ", not compared"}`;
  const more = after.length > LONG && el("span", { className: "soft", textContent: rest });
  if (same) return [begin, more];
  // of the one before twice as much, so that a word that has come nearer is found
  const [a, b] = [before.slice(0, 2 * LONG).split(/(\s+)/), begin.split(/(\s+)/)];
  const kept = common(a, b);
  return [...b.map((word, n) => (kept.has(n) || !word.trim() ? word : el("mark", { textContent: word }))), more];
}

/** The places in `b` of a longest common subsequence of two lists. */
function common(a, b) {
  const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const places = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) [places.add(j), (i += 1), (j += 1)];
    else if (best[i + 1][j] >= best[i][j + 1]) i += 1;
    else j += 1;
  }
  return places;
}

function drawn(draw, tokens) {
  const bar = el("i");
  bar.style.width = `${100 * draw.share}%`;
  const gain = draw.finished ? perToken(draw, tokens) : null;
  const from = Object.entries(draw.from).map(([proposal, times]) => `${times} × ${proposal}`);
  if (gain !== null) from.push(`${signed(gain)} nats a token (${signed(draw.gain, 1)})`);
  from.push(draw.length === 1 ? "1 token" : `${count(draw.length)} tokens`);
  return tint(
    el(
      "li",
      { className: draw.chosen ? "draw chosen" : "draw" },
      el("span", { className: "share", title: "Share of the weight" }, percent(draw.share), el("span", { className: "track" }, bar)),
      el("span", { className: "said" }, text(draw.text || "(empty)"), el("span", { className: "origin", textContent: from.join(" · ") })),
      el("span", { className: "tags" }, draw.chosen && tag("chosen", "strong"), draw.finished ? compared(draw.same) : tag("unfinished", "soft")),
    ),
    gain,
  );
}
