/* Decisions as a table: by block, by module, by value; sorted by any column, filtered by words and by way. */

const WAYS = ["kept", "recomputed", "fetched", "decoded", "inverted"];

function decisionSection() {
  const made = report.decisions;
  const levels = { blocks: "Blocks", modules: "Modules", values: "Values" };
  const ways = WAYS.filter((way) => way === "kept" || way === "recomputed" || made.blocks.some((row) => row.ways[way]));
  const columns = [
    { key: "name", title: "module", get: (row) => named(row.name), text: true },
    ...ways.map((way) => ({ key: way, title: way, get: (row) => row.ways[way] || 0, show: bytes, fill: way })),
    { key: "replays", title: "replays", get: (row) => row.replays, show: String },
    { key: "seconds", title: "time", get: (row) => row.seconds, show: seconds, fill: "time" },
    { key: "reason", title: "why", get: (row) => row.reason, text: true },
  ];
  const state = { level: "blocks", words: "", way: "all", inside: null, sort: null, down: true };
  const count = el("span", { class: "count", role: "status" });
  const body = el("tbody", {});
  const foot = el("tfoot", {});
  const heads = columns.map((column) => el("th", { scope: "col", class: column.text ? null : "num", "aria-sort": "none", "data-key": column.key },
    el("button", { type: "button", on: { click: () => sortBy(column) } }, column.title)));
  const table = el("table", { class: "as-cards", id: "decisions-table" }, el("thead", {}, el("tr", {}, heads)), body, foot);
  const input = el("input", { type: "search", placeholder: "filter: module, op, source, reason", "aria-label": "Filter rows", id: "filter",
    on: { input: () => { state.words = input.value; fill(); } } });
  const select = el("select", { "aria-label": "Way", id: "way", on: { change: () => { state.way = select.value; fill(); } } },
    el("option", { value: "all" }, "all ways"), ways.map((way) => el("option", { value: way }, `only ${way}`)));
  const level = choice("Rows", Object.entries(levels), "blocks", (name) => { state.level = name; state.inside = null; fill(); });
  const chip = el("button", { type: "button", id: "inside", hidden: true, on: { click: () => { state.inside = null; fill(); } } });

  function sortBy(column) {
    if (state.sort === column) {
      if (state.down !== !column.text) { state.sort = null; state.down = true; }
      else state.down = !state.down;
    } else {
      state.sort = column;
      state.down = !column.text;
    }
    fill();
  }
  function chosen() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = made[state.level].filter((row) => {
      if (state.inside !== null && row.module !== state.inside) return false;
      if (state.way !== "all" && !row.ways[state.way]) return false;
      const text = `${named(row.name)} ${row.module} ${row.op} ${row.source} ${row.reason}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (!state.sort) return rows;
    const { get, text } = state.sort;
    const sign = state.down ? -1 : 1;
    return rows.map((row, i) => [row, i]).sort(([a, i], [b, j]) => {
      const order = text ? get(a).localeCompare(get(b), "en", { numeric: true }) : get(a) - get(b);
      return sign * order || i - j;
    }).map(([row]) => row);
  }
  function drill(row) {
    if (state.level === "values") return;
    input.value = state.words = "";
    level.set(state.level === "blocks" ? "modules" : "values");
    state.inside = row.name;
    fill();
  }
  function cells(row, most) {
    return columns.map((column) => {
      const value = column.get(row);
      if (column.key === "name") {
        const under = state.level === "values" ? [named(row.module), row.op, row.source].filter(Boolean).join("  \u00b7  ") : "";
        return el("td", { class: "name" }, value, under ? el("span", { class: "under" }, under) : "");
      }
      if (column.text) return el("td", { class: "why" }, value);
      const wide = column.fill && most[column.key] ? (100 * value) / most[column.key] : 0;
      const style = { width: `${wide.toFixed(1)}%` };
      return el("td", { class: `num ${column.fill || ""}`, "data-label": column.title }, value ? column.show(value) : "\u2013",
        wide >= 4 ? el("i", { class: "fill", style }) : "");
    });
  }
  function fill() {
    const rows = chosen();
    const most = {};
    for (const column of columns) if (!column.text) most[column.key] = Math.max(0, ...rows.map(column.get));
    heads.forEach((head, i) => head.setAttribute("aria-sort", state.sort !== columns[i] ? "none" : state.down ? "descending" : "ascending"));
    body.replaceChildren(...rows.map((row, i) => el("tr", { tabindex: i ? -1 : 0, class: state.level === "values" ? null : "drill",
      on: { click: () => drill(row), keydown: (event) => keys(event, row) } }, cells(row, most))));
    const sums = columns.map((column) => {
      if (column.key === "name") return el("td", {}, "sum");
      if (column.text) return el("td", {}, "");
      return el("td", { class: "num" }, column.show(rows.reduce((sum, row) => sum + column.get(row), 0)));
    });
    foot.replaceChildren(el("tr", {}, sums));
    const hidden = state.level === "values" && made.num_hidden ? `; the ${whole(made.num_hidden)} smallest values are left out` : "";
    chip.hidden = state.inside === null;
    chip.textContent = `in ${named(state.inside)} \u2715`;
    count.textContent = `${whole(rows.length)} of ${whole(made[state.level].length)} rows${hidden}`;
  }
  function keys(event, row) {
    const to = { ArrowDown: event.currentTarget.nextElementSibling, ArrowUp: event.currentTarget.previousElementSibling,
      Home: body.firstElementChild, End: body.lastElementChild }[event.key];
    if (event.key === "Enter") { drill(row); const first = body.firstElementChild; if (first) first.focus(); event.preventDefault(); }
    if (event.key === "Escape") { input.value = state.words = ""; level.set("blocks"); body.firstElementChild.focus(); }
    if (!to) return;
    event.preventDefault();
    event.currentTarget.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  fill();
  const bar = el("div", { class: "bar" }, level.node, chip, input, select, el("span", { class: "space" }), count);
  const sub = "How the backward gets what the forward made. Choose a row to see what is in it; a heading sorts.";
  const node = section("decisions", "Decisions", sub, bar, el("div", { class: "tall scroll" }, table));
  node.classList.add("long");
  return { node, start: () => {} };
}
