// A list of any length: rows of one height, of which only those in sight are in the document.

const ROW = 58; // pixels, as .row in reader.css
const SPARE = 8; // rows drawn beyond either end of what is in sight

class List {
  /** `fill(row, item)` puts an item into an empty row, `pick(place)` is called with the place that was chosen. */
  constructor(label, fill, pick) {
    this.fill = fill;
    this.pick = pick;
    this.items = [];
    this.place = -1;
    this.room = el("div", { className: "room", role: "presentation" });
    this.node = el("div", { className: "list", role: "listbox", tabIndex: 0, "aria-label": label }, this.room);
    this.node.addEventListener("scroll", () => this.draw());
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.room.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.pick(Number(row.dataset.place));
    });
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  /** Shows other items, and marks the one at `place`. */
  show(items, place) {
    this.items = items;
    this.place = place;
    this.room.style.height = `${items.length * ROW}px`;
    this.reveal();
    this.draw();
  }

  /** Brings the marked row into sight, without moving the page. */
  reveal() {
    if (this.place < 0) return;
    const [top, height] = [this.place * ROW, this.node.clientHeight];
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    if (top + ROW > this.node.scrollTop + height) this.node.scrollTop = top + ROW - height;
  }

  draw() {
    const from = Math.max(0, Math.floor(this.node.scrollTop / ROW) - SPARE);
    const to = Math.min(this.items.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW) + SPARE);
    const rows = [];
    for (let place = from; place < to; place += 1) rows.push(this.row(place));
    this.room.replaceChildren(...rows);
    const marked = this.place >= from && this.place < to;
    if (marked) this.node.setAttribute("aria-activedescendant", `row-${this.place}`);
    else this.node.removeAttribute("aria-activedescendant");
  }

  row(place) {
    const row = el("div", { className: "row", role: "option", id: `row-${place}` });
    row.dataset.place = place;
    row.style.top = `${place * ROW}px`;
    row.setAttribute("aria-selected", place === this.place);
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-setsize", this.items.length);
    this.fill(row, this.items[place]);
    return row;
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in moves)) return;
    event.preventDefault();
    this.move(moves[event.key]);
  }

  move(by) {
    if (this.items.length) this.pick(Math.max(0, Math.min(this.items.length - 1, this.place + by)));
  }
}
