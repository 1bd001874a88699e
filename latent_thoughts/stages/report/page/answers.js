// Answers to held-out questions: every model's, one below the other.

class Answers {
  name = "Held-out answers";
  what = "questions";
  asked = "asked";
  whole = true; // the search has all there is from the start
  ranges = [];

  static there = () => overview.seeds.some((seed) => seed.answers !== null);

  constructor(seed) {
    this.block = overview.seeds[seed].answers;
  }

  async load() {
    const none = { models: [], texts: [], total: 0 };
    const { models, texts, total } = this.block === null ? none : await block(this.block);
    Object.assign(this, { models, texts, total: () => total });
    this.turns = models.map((_, n) => String(n));
    return this;
  }

  label = (turn) => this.models[turn];
  id = (n) => this.texts[n].id;

  /** The model that is shown first: the last iteration of EM, where there is one. */
  last = () => String(Math.max(0, this.models.findLastIndex((name) => name.startsWith("EM,"))));

  filters() {
    const answer = (n, turn) => this.texts[n].by[turn];
    const own = this.texts.some((item) => item.oracle !== null);
    const knows = this.texts.some((item) => item.known !== null);
    return [
      ["all", "All questions", () => true],
      ["right", "Right answer", (n, turn) => answer(n, turn).right],
      ["wrong", "Wrong answer", (n, turn) => !answer(n, turn).right],
      own && ["lucky", "Right, thought differs", (n, turn) => answer(n, turn).right && answer(n, turn).same === false],
      knows && ["known", "Known facts only", (n) => this.texts[n].known === true],
      knows && ["unknown", "Needs an unknown fact", (n) => this.texts[n].known === false],
    ].filter(Boolean);
  }

  all(turn) {
    return [...this.texts.keys()].filter((n) => this.texts[n].by[turn]);
  }

  searched(n, turn) {
    const { id, question, gold, by } = this.texts[n];
    return [id, question, gold, by[turn].text, by[turn].thought].join("\n").toLowerCase();
  }

  row(node, n, turn) {
    const { question, by } = this.texts[n];
    const { right, text: said } = by[turn];
    node.append(
      el("span", { className: right ? "mark right" : "mark wrong" }),
      el("span", { className: "title", dir: "auto", textContent: question.trim() }),
      el("span", { className: right ? "figure right" : "figure wrong", textContent: right ? "right" : "wrong" }),
      el("span", { className: "under", dir: "auto", textContent: said || "(nothing)" }),
    );
  }

  async detail(n, turn) {
    const item = this.texts[n];
    const rows = Object.entries(item.by).map(([model, answer]) => answered(this.models[model], answer, model === turn));
    return [
      item.known === false && el("p", { className: "tags" }, tag("needs an unknown fact", "soft")),
      el("div", { className: "document", dir: direction(item.question) }, text(item.question, "chunk")),
      el("p", { className: "own" }, el("b", { textContent: "Right answer " }), text(item.gold)),
      item.oracle !== null && el("p", { className: "own" }, el("b", { textContent: "The data’s own thought " }), text(item.oracle)),
      el("h3", { textContent: "What every model thought, and answered" }),
      el("ul", { className: "models" }, rows),
    ];
  }
}

function answered(model, answer, now) {
  const thought = answer.thought === null ? "no thought" : answer.thought || "(empty thought)";
  const said = [text(thought, "soft"), text(answer.text || "(nothing)", "answer")];
  const graded = tag(answer.right ? "✓ right" : "✗ wrong", answer.right ? "right" : "wrong");
  return el(
    "li",
    { className: now ? "now" : "" },
    el("span", { className: "model", textContent: model }),
    el("span", { className: "said" }, said),
    el("span", { className: "tags" }, graded),
  );
}
