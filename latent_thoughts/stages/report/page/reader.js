// The frame around the views: what is chosen, the tools that choose it, keys.

const root = document.getElementById("reader");
const VIEWS = { thoughts: Thoughts, answers: Answers };
const state = { view: null, seed: 0, loop: 0, turn: null, filter: "all", sort: "order", query: "", ranges: {}, text: null };
let view = null;
let asked = 0; // numbers the details that were asked for, so that a late one is not shown
let scrolled = null; // the text that the detail was last scrolled for

const tabs = el("div", { className: "tabs", role: "group", "aria-label": "What to read" });
const tools = el("div", { className: "tools" });
const filters = el("div", { className: "filters", id: "filters", hidden: true });
const status = el("p", { className: "status", role: "status" });
const turner = el("div", { className: "turner" });
const place = el("p", { className: "place" });
const body = el("div", { className: "body" });
const detail = el("article", { className: "detail", "aria-label": "One text" }, place, turner, body);
const list = new List("Texts", (row, n) => view.row(row, n, state.turn), (at) => show({ text: list.items[at] }));
const legend = el("p", { className: "legend" });
const help = el("dialog", { className: "help", "aria-label": "Keys" });

/** Another view, seed or EM run: reads its index, and builds the tools anew. */
async function open(change) {
  Object.assign(state, change);
  const seed = overview.seeds[state.seed];
  if (!seed.loops[state.loop]) state.loop = 0;
  if (state.view === "thoughts" && !seed.loops.length) state.view = "answers";
  view = await new VIEWS[state.view](state.seed, state.loop).load();
  Object.assign(state, { ranges: {}, sort: "order" });
  if (!view.filters().some(([name]) => name === state.filter)) state.filter = "all";
  if (!view.turns.includes(state.turn)) state.turn = view.last();
  legend.hidden = state.view === "answers"; // whose colours mean right and wrong
  showTabs();
  showTools();
  showFilters();
  await show({});
}

/** Another text, iteration, filter or search within the view; ends when it can be read. */
function show(change) {
  Object.assign(state, change);
  const items = sorted(matching());
  if (!items.includes(state.text)) state.text = items.length ? items[0] : null;
  searchWhole();
  status.textContent = told(items.length, view.all(state.turn).length);
  const at = items.indexOf(state.text);
  list.show(items, at);
  if ("turn" in change) showHistograms();
  showTurner();
  return showDetail(items, at);
}

/** How many there are, of how many the page carries, of how many there were. */
function told(found, carried) {
  const total = view.total(state.turn);
  const here = total > carried ? ` here, of ${count(total)} ${view.asked}` : "";
  const searching = state.query.trim() && !view.whole ? " · still searching" : "";
  return `${count(found)} of ${count(carried)} ${view.what}${here}${searching}`;
}

/** The first search of a view reads all of its texts; what is found in their beginnings is shown meanwhile. */
async function searchWhole() {
  const searched = view;
  if (!state.query.trim() || searched.whole || searched.reading) return;
  await searched.readWhole();
  if (searched === view) show({});
}

function matching() {
  const keep = view.filters().find(([name]) => name === state.filter)[2];
  const query = state.query.trim().toLowerCase();
  const ranges = Object.entries(state.ranges);
  const within = ([name, [low, high]], n) => {
    const value = view.value(name, n, state.turn);
    return value !== null && value >= low && value <= high;
  };
  return view
    .all(state.turn)
    .filter((n) => keep(n, state.turn) && ranges.every((range) => within(range, n)))
    .filter((n) => !query || view.searched(n, state.turn).includes(query));
}

function sorted(items) {
  if (state.sort === "order") return items;
  const [name, way] = state.sort.split(" ");
  const by = way === "up" ? 1 : -1;
  const value = (n) => view.value(name, n, state.turn) ?? by * Infinity;
  return items.sort((a, b) => by * (value(a) - value(b)) || a - b);
}

function select(label, options, value, change) {
  const id = `choose-${label.toLowerCase().replace(/\W+/g, "-")}`;
  const box = el("select", { id, onchange: () => change(box.value) });
  box.append(...options.map(([key, shown]) => el("option", { value: key, textContent: shown })));
  box.value = value;
  return el("div", { className: "field" }, el("label", { htmlFor: id, textContent: label }), box);
}

function showTabs() {
  const there = Object.entries(VIEWS).filter(([, kind]) => kind.there());
  const had = tabs.contains(document.activeElement);
  const buttons = there.map(([name, kind]) => {
    const pressed = name === state.view;
    const label = new kind(0, 0).name;
    return el("button", { type: "button", textContent: label, "aria-pressed": pressed, onclick: () => open({ view: name, turn: null, text: null }) });
  });
  const keys = el("button", { type: "button", className: "keys", "aria-label": "Keys", title: "Keys (?)", textContent: "?", onclick: () => help.showModal() });
  tabs.replaceChildren(...buttons, status, keys);
  if (had) tabs.querySelector('[aria-pressed="true"]').focus();
}

function showTools() {
  const { loops } = overview.seeds[state.seed];
  const numbered = (items) => items.map((item, n) => [String(n), item.name]);
  const search = el("input", { id: "search", type: "search", value: state.query, placeholder: "Text, thought or id", oninput: () => show({ query: search.value }) });
  const found = el("div", { className: "field grow" }, el("label", { htmlFor: "search", textContent: "Search" }), search);
  const several = overview.seeds.length > 1;
  const had = tools.contains(document.activeElement) ? document.activeElement.id : null;
  const more = el("button", { type: "button", className: "toggle", textContent: "Filters", "aria-controls": "filters", "aria-expanded": !filters.hidden });
  more.onclick = () => {
    filters.hidden = !filters.hidden;
    more.setAttribute("aria-expanded", !filters.hidden);
    list.draw();
  };
  const nodes = [
    several && select("Seed", numbered(overview.seeds), String(state.seed), (seed) => open({ seed: Number(seed), text: null })),
    state.view === "thoughts" && loops.length > 1 && select("E-step", numbered(loops), String(state.loop), (loop) => open({ loop: Number(loop), turn: null })),
    select("Show", view.filters(), state.filter, (filter) => show({ filter })),
    found,
    view.ranges.length > 0 && more,
  ];
  tools.replaceChildren(...nodes.filter(Boolean));
  if (had) document.getElementById(had)?.focus();
}

/** Ranges with a histogram each, and the order. */
function showFilters() {
  const orders = [["order", "As in the corpus"]];
  for (const [name, label] of view.ranges) orders.push([`${name} down`, `${label}: most first`], [`${name} up`, `${label}: least first`]);
  const clear = el("button", { type: "button", textContent: "Clear", onclick: () => open({ filter: "all", query: "" }) });
  const ranges = view.ranges.map(([name, label]) => range(name, label));
  filters.replaceChildren(...ranges, el("div", { className: "last" }, select("Order", orders, state.sort, (sort) => show({ sort })), clear));
  if (!view.ranges.length) filters.hidden = true;
  showHistograms();
}

function range(name, label) {
  const [low, high] = ["least", "most"].map((end) => el("input", { type: "number", step: "any", "aria-label": `${label}, at ${end}` }));
  const change = () => {
    const chosen = { ...state.ranges, [name]: [low.value === "" ? -Infinity : Number(low.value), high.value === "" ? Infinity : Number(high.value)] };
    if (low.value === "" && high.value === "") delete chosen[name];
    show({ ranges: chosen });
  };
  low.oninput = high.oninput = change;
  const node = el("fieldset", {}, el("legend", { textContent: label }), draw("svg"), el("div", { className: "ends" }, low, "to", high));
  node.dataset.name = name;
  return node;
}

/** How the figures of this iteration are spread, with their ends where a range may be typed. */
function showHistograms() {
  for (const node of filters.querySelectorAll("fieldset")) {
    const values = view.all(state.turn).map((n) => view.value(node.dataset.name, n, state.turn)).filter((value) => value !== null);
    const ends = values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0, 0];
    node.querySelector("svg").replaceWith(histogram(values, ...ends));
    const digits = values.every(Number.isInteger) ? 0 : 2;
    node.querySelectorAll("input").forEach((input, n) => (input.placeholder = number(ends[n], digits)));
  }
}

function histogram(values, low, high) {
  const [bars, height] = [32, 30];
  const counts = new Array(bars).fill(0);
  for (const value of values) counts[Math.min(bars - 1, Math.floor((bars * (value - low)) / (high - low || 1)))] += 1;
  const most = Math.max(1, ...counts);
  const columns = counts.map((n, at) => {
    const tall = n ? Math.max(1, (height * n) / most) : 0;
    return draw("rect", { x: at * 6, width: 5, y: height - tall, height: tall });
  });
  return draw("svg", { viewBox: `0 0 ${bars * 6} ${height}`, class: "histogram", "aria-hidden": "true", preserveAspectRatio: "none" }, ...columns);
}

/** The iterations as a slider, the models as a list. It is kept while it is dragged. */
function showTurner() {
  const at = view.turns.indexOf(state.turn);
  let slider = turner.querySelector("input");
  if (state.view === "answers" || view.turns.length < 2) {
    const models = view.turns.map((turn) => [turn, view.label(turn)]);
    turner.replaceChildren(...(models.length > 1 ? [select("Model", models, state.turn, (turn) => show({ turn }))] : []));
    return;
  }
  if (!slider || slider.max !== String(view.turns.length - 1)) {
    slider = el("input", { type: "range", id: "turn", min: "0", max: String(view.turns.length - 1), step: "1" });
    slider.oninput = () => show({ turn: view.turns[Number(slider.value)] });
    const marks = view.turns.map((turn) => el("span", { textContent: turn }));
    const scale = el("div", { className: "scale" }, slider, el("div", { className: "marks", "aria-hidden": "true" }, marks));
    turner.replaceChildren(el("label", { htmlFor: "turn", textContent: "Iteration" }), scale);
  }
  slider.value = String(at);
  slider.setAttribute("aria-valuetext", view.label(state.turn));
  showMarks([...turner.querySelectorAll(".marks span")], at);
}

/** All of a few; of many the ends and the one that is shown, apart. */
function showMarks(marks, at) {
  const last = marks.length - 1;
  const room = (n) => last < 10 || n === at || (n % last === 0 && Math.abs(n - at) > last / 10);
  marks.forEach((mark, n) => {
    mark.classList.toggle("now", n === at);
    mark.classList.toggle("off", !room(n));
  });
}

async function showDetail(items, at) {
  const mine = (asked += 1);
  const move = (label, by) => el("button", { type: "button", textContent: label, disabled: !(at + by in items), onclick: () => list.move(by) });
  const where = items.length ? `${count(at + 1)} of ${count(items.length)}` : "Nothing matches";
  const had = place.contains(document.activeElement) ? document.activeElement.textContent : null;
  const id = state.text === null ? null : el("span", { className: "id", dir: "auto", textContent: view.id(state.text) });
  place.replaceChildren(el("b", { textContent: where }), ...(id ? [id] : []), el("span", { className: "to" }, move("← Previous", -1), move("Next →", 1)));
  if (had) [...place.querySelectorAll("button")].find((button) => button.textContent === had)?.focus();
  if (state.text === null) return body.replaceChildren();
  const turnTo = (turn) => show({ turn });
  const nodes = await view.detail(state.text, state.turn, turnTo, (n) => show({ text: n, ...(list.items.includes(n) ? {} : { filter: "all", query: "", ranges: {} }) }));
  if (mine !== asked) return undefined;
  const focused = body.contains(document.activeElement) ? document.activeElement.querySelector(".number")?.textContent : null;
  body.replaceChildren(...nodes.flat(Infinity).filter(Boolean));
  if (focused) [...body.querySelectorAll(".through button")].find((b) => b.querySelector(".number").textContent === focused)?.focus();
  if (scrolled !== state.text) detail.scrollTop = 0;
  scrolled = state.text;
  return undefined;
}

/** On to the next iteration, or the next model. */
function turn(by) {
  const next = view.turns[view.turns.indexOf(state.turn) + by];
  if (next !== undefined) show({ turn: next });
}

const KEYS = [
  ["j", "next text", () => list.move(1)],
  ["k", "previous text", () => list.move(-1)],
  ["l", "next iteration, or model", () => turn(1)],
  ["h", "previous iteration, or model", () => turn(-1)],
  ["g", "first text", () => list.move(-Infinity)],
  ["G", "last text", () => list.move(Infinity)],
  ["/", "search", () => document.getElementById("search").focus()],
  ["f", "filters", () => tools.querySelector(".toggle")?.click()],
  ["t", "thoughts, or answers", () => [...tabs.querySelectorAll('[aria-pressed="false"]')][0]?.click()],
  ["?", "these keys", () => help.showModal()],
];

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target.id === "search") {
    event.target.value = "";
    show({ query: "" });
    list.node.focus();
    return;
  }
  if (view === null || help.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=range]), select, textarea")) return;
  const known = KEYS.find(([key]) => key === event.key);
  if (!known) return;
  event.preventDefault();
  if (event.key !== "?") root.scrollIntoView({ block: "nearest" });
  known[2]();
});

function begin() {
  const there = Object.keys(VIEWS).find((name) => VIEWS[name].there());
  if (!there) return;
  const keys = KEYS.flatMap(([key, meaning]) => [el("dt", {}, el("kbd", { textContent: key })), el("dd", { textContent: meaning })]);
  const close = el("button", { type: "button", textContent: "Close", onclick: () => help.close() });
  help.append(el("h3", { textContent: "Keys" }), el("dl", {}, keys), close);
  const steps = [-FULL, -FULL / 8, null, FULL / 8, FULL].map((gain) => tint(el("i"), gain));
  legend.append(...steps, el("span", { textContent: "colour: gain, nats a token of the text, from −0.6 to +0.6" }));
  root.append(tabs, tools, filters, el("div", { className: "panes" }, list.node, detail), legend, help);
  // when it could be read: milliseconds from the beginning of the page
  open({ view: there }).then(() => root.setAttribute("data-ready", performance.now().toFixed(1)));
}

begin();
