// The frame around the views of views.js: tools, list, detail, keys.

const root = document.getElementById("browser");
const views = { thoughts, answers };
const tools = el("div", { className: "tools" });
const tabs = el("div", { className: "tabs", role: "group", "aria-label": "What to read" });
const list = el("ul", { className: "list", "aria-label": "Texts" });
const detail = el("article", { className: "detail", "aria-label": "One text" });
const status = el("span", { role: "status" });

/** Changes the state and shows it. Only a change of what can be chosen builds the tools anew. */
function set(change) {
  Object.assign(state, change);
  const { seed, view } = state;
  const loops = data.seeds[seed].loops;
  if (!loops[state.loop]) state.loop = 0;
  const steps = loops.length ? loops[state.loop].iterations.map(String) : [];
  if (!steps.includes(state.step)) state.step = steps.at(-1) ?? null;
  const models = data.seeds[seed].answers.models;
  if (!models[state.model]) state.model = String(Math.max(0, models.findLastIndex((name) => name.startsWith("EM,"))));
  if (!views[view].filters().some(([name]) => name === state.filter)) state.filter = "all";
  if (["view", "seed", "loop", "model"].some((name) => name in change)) showTools();
  showList();
}

function select(label, options, value, name) {
  const box = el("select", { id: `choose-${name}`, onchange: () => set({ [name]: box.value }) });
  box.append(...options.map(([key, shown]) => el("option", { value: key, textContent: shown })));
  box.value = value;
  return el("div", {}, el("label", { htmlFor: box.id, textContent: label }), box);
}

function showTools() {
  const had = root.contains(document.activeElement) ? document.activeElement : null;
  const seed = data.seeds[state.seed];
  const numbered = (items) => items.map((item, n) => [String(n), item.name ?? item]);
  const search = el("input", { id: "search", type: "search", value: state.query, oninput: () => set({ query: search.value }) });
  const found = el("div", { className: "grow" }, el("label", { htmlFor: "search", textContent: "Search" }), search);
  tabs.replaceChildren(
    ...Object.entries(views).filter(([, view]) => view.there()).map(([name, view]) =>
      el("button", { type: "button", textContent: view.name, "aria-pressed": name === state.view, onclick: () => set({ view: name }) }),
    ),
  );
  const filters = views[state.view].filters();
  const steps = el("fieldset", {}, el("legend", { textContent: "Iteration" }), el("div", { className: "steps" }));
  for (const n of seed.loops.length ? seed.loops[state.loop].iterations : []) {
    steps.lastChild.append(el("button", { type: "button", textContent: n, onclick: () => set({ step: String(n) }) }));
  }
  const reading = state.view === "thoughts";
  tools.replaceChildren(
    ...[
      data.seeds.length > 1 && select("Seed", numbered(data.seeds), state.seed, "seed"),
      reading && seed.loops.length > 1 && select("E-step", numbered(seed.loops), state.loop, "loop"),
      reading && steps,
      !reading && select("Model", numbered(seed.answers.models), state.model, "model"),
      select("Show", filters, state.filter, "filter"),
      found,
    ].filter(Boolean),
  );
  // What had the focus was rebuilt: give it to its successor.
  if (had && !had.isConnected) root.querySelector(had.id ? `#${had.id}` : '.tabs [aria-pressed="true"]')?.focus();
}

function shownItems() {
  const view = views[state.view];
  const keep = view.filters().find(([name]) => name === state.filter)[2];
  const query = state.query.trim().toLowerCase();
  return view.items().filter((item) => keep(item) && (!query || view.words(item).join("\n").toLowerCase().includes(query)));
}

function showList() {
  const view = views[state.view];
  const items = shownItems();
  if (!items.some((item) => item.id === state.id)) state.id = items.length ? items[0].id : null;
  for (const button of tools.querySelectorAll(".steps button")) {
    button.setAttribute("aria-pressed", button.textContent === state.step);
  }
  const top = list.scrollTop;
  const focused = list.contains(document.activeElement);
  list.replaceChildren(
    ...items.map((item) => {
      const [sign, className, meaning] = view.sign(item);
      const mark = el("span", { className: `sign ${className}`, textContent: sign, role: "img", "aria-label": meaning });
      const button = el("button", { type: "button", onclick: () => set({ id: item.id }) }, mark, text(view.title(item), "what"));
      button.setAttribute("aria-current", item.id === state.id);
      return el("li", {}, button);
    }),
  );
  list.scrollTop = top;
  const current = list.querySelector('[aria-current="true"]');
  if (focused && current) current.focus();
  showDetail(items);
}

function showDetail(items) {
  const at = items.findIndex((item) => item.id === state.id);
  status.textContent = items.length ? `${at + 1} of ${items.length}` : "Nothing matches";
  const item = items[at];
  const move = (label, by) =>
    el("button", { type: "button", textContent: label, disabled: !items[at + by], onclick: () => step(by) });
  const bar = el("div", { className: "bar" }, status);
  if (item) {
    bar.append(item.id);
    if (item.known === false) bar.append(tag("needs an unknown fact", "soft"));
    bar.append(el("span", { className: "to" }, move("Previous", -1), move("Next", 1)));
  }
  const label = document.activeElement && detail.contains(document.activeElement) ? document.activeElement.textContent : null;
  detail.replaceChildren(bar, ...(item ? views[state.view].detail(item).filter(Boolean) : []));
  // What had the focus was rebuilt: give it back to its successor.
  if (label !== null) [...detail.querySelectorAll("button")].find((b) => b.textContent === label)?.focus();
}

/** Moves the selection by so many texts, and keeps it in sight without moving the page. */
function step(by) {
  const items = shownItems();
  const next = items[items.findIndex((item) => item.id === state.id) + by];
  if (!next) return;
  set({ id: next.id });
  const row = list.querySelector('[aria-current="true"]');
  const [above, below] = [row.offsetTop - list.offsetTop, row.offsetTop - list.offsetTop + row.offsetHeight];
  if (above < list.scrollTop) list.scrollTop = above - 6;
  if (below > list.scrollTop + list.clientHeight) list.scrollTop = below - list.clientHeight + 6;
}

/** On to the next iteration, or the next model. */
function turn(by) {
  const [name, all] =
    state.view === "thoughts"
      ? ["step", (thoughts.loop() || { iterations: [] }).iterations.map(String)]
      : ["model", answers.all().models.map((_, n) => String(n))];
  const next = all[all.indexOf(state[name]) + by];
  if (next === undefined) return;
  set({ [name]: next });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, pre, .scroll")) return;
  const inside = root.contains(document.activeElement);
  const moves = { j: () => step(1), k: () => step(-1), h: () => turn(-1), l: () => turn(1) };
  // Arrows scroll the page, so they belong to the browser only where it has the focus.
  if (inside) Object.assign(moves, { ArrowDown: moves.j, ArrowUp: moves.k, ArrowLeft: moves.h, ArrowRight: moves.l });
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});

if (Object.values(views).some((view) => view.there())) {
  const key = (name) => el("kbd", { textContent: name });
  const keys = el("p", { className: "help keys" });
  keys.append(key("j"), " ", key("k"), " next, previous text \u2003", key("h"), " ", key("l"), " iteration or model");
  root.append(tabs, tools, el("div", { className: "panes" }, list, detail), keys);
  set({ view: thoughts.there() ? "thoughts" : "answers" });
}
