/* The step's time over the budget: the fastest plan found, the bound, where there is no plan, and known strategies. */

const SHAPES = {
  keep_all: "M-5,-5H5V5H-5Z", recompute_all: "M0,-6L6,5H-6Z", every_k: "M0,-6.5L6,0L0,6.5L-6,0Z", sqrt_n: "M-6,-5H6L0,6Z",
  revolve: "M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z", rotor: "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z",
  dtr: "M-6,0L5,-6V6Z", min_cut: "M6,0L-5,-6V6Z", knapsack: "M0,-6L1.8,-2H6L2.6,0.8L3.8,5.4L0,2.6L-3.8,5.4L-2.6,0.8L-6,-2H-1.8Z",
};
const INKS = ["#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#009E73"];
const CHOSEN = "M0,-8L8,0L0,8L-8,0Z";

function curveSection() {
  const curve = report.curve;
  const sub = "The step's time for every budget, predicted, with what known strategies reach at the smallest budget that each needs.";
  const plot = el("div", { class: "plot" });
  const reading = el("div", { class: "curve-reading", id: "curve-reading", role: "status" });
  const over = (time) => (curve.baseline_seconds ? time / curve.baseline_seconds - 1 : 0);
  const families = [...new Set(curve.strategies.map((one) => one.name.split("(")[0]))];
  const inkOf = (name) => INKS[families.indexOf(name.split("(")[0]) % INKS.length];
  const first = curve.points[0];
  const last = curve.points[curve.points.length - 1];
  const most = first.seconds + 0.5 * (first.seconds - last.seconds) || first.seconds;
  const right = Math.max(curve.baseline_budget, last.budget, curve.chosen[0] < 2 * last.budget ? curve.chosen[0] : 0);
  const inside = curve.strategies.filter((one) => one.seconds <= Math.max(most, curve.chosen[1]) && one.budget <= right);
  let marks = [];

  function say(parts) {
    reading.replaceChildren(...parts);
  }
  function fact(title, budget, time, more) {
    return [el("b", {}, title), `: budget ${bytes(budget)}, step ${seconds(time)} (${percent(over(time))} over everything kept)${more}`];
  }

  function draw(width) {
    const tall = width < 520 ? 290 : 390;
    const margin = { left: 52, right: width < 520 ? 12 : 54, top: 14, bottom: 40 };
    const inner = { w: width - margin.left - margin.right, h: tall - margin.top - margin.bottom };
    const low = Math.min(curve.floor, first.budget);
    const room = 0.06 * (right - low) || 0.1 * right;
    const span = [Math.max(0, low - room), right + room];
    const high = Math.max(first.seconds, curve.chosen[1], ...inside.map((one) => one.seconds));
    const tallness = high - last.seconds || 0.1 * high || 1;
    const heights = [Math.min(last.seconds, ...curve.bound.map(([, time]) => time)) - 0.08 * tallness, high + 0.12 * tallness];
    const x = (nbytes) => margin.left + ((nbytes - span[0]) / (span[1] - span[0])) * inner.w;
    const y = (time) => margin.top + inner.h * (1 - (time - heights[0]) / (heights[1] - heights[0]));
    const { unit, size } = unitOf(right);
    const scale = curve.baseline_seconds < 1 ? 1e3 : 1;
    const picture = sv("svg", { width, height: tall, viewBox: `0 0 ${width} ${tall}`, role: "group", "aria-label": "Time of the step over the budget", id: "curve-picture" },
      sv("defs", {}, sv("pattern", { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        sv("rect", { width: 7, height: 7, fill: "var(--card)" }), sv("line", { x1: 0, y1: 0, x2: 0, y2: 7, stroke: "var(--hatch)", "stroke-width": 3 })),
      sv("clipPath", { id: "curve-clip" }, sv("rect", { x: margin.left, y: margin.top, width: inner.w, height: inner.h }))));
    const add = (...nodes) => picture.append(...nodes);

    for (const tick of ticks(heights[0] * scale, heights[1] * scale, 5)) {
      const at = y(tick / scale);
      if (at < margin.top || at > margin.top + inner.h) continue;
      add(sv("line", { x1: margin.left, x2: width - margin.right, y1: at, y2: at, stroke: "var(--grid)" }),
        sv("text", { x: margin.left - 7, y: at + 4, "text-anchor": "end" }, trimmed(tick)));
      if (width >= 520) add(sv("text", { x: width - margin.right + 6, y: at + 4 }, percent(over(tick / scale), 0)));
    }
    for (const tick of ticks(span[0] / size, span[1] / size, Math.max(3, Math.floor(inner.w / 100)))) {
      add(sv("text", { x: x(tick * size), y: tall - 20, "text-anchor": "middle" }, trimmed(tick)));
    }
    add(sv("text", { x: width - margin.right, y: tall - 4, "text-anchor": "end" }, `budget, ${unit}`),
      sv("text", { x: margin.left - 46, y: 10 }, scale === 1 ? "s" : "ms"));

    const solid = Math.max(margin.left, x(curve.floor));
    add(sv("rect", { x: margin.left, y: margin.top, width: solid - margin.left, height: inner.h, fill: "var(--hatch)", "fill-opacity": 0.75, "data-layer": "infeasible" }));
    if (first.budget > curve.floor) {
      add(sv("rect", { x: solid, y: margin.top, width: x(first.budget) - solid, height: inner.h, fill: "url(#hatch)", "data-layer": "not-found" }));
    }
    const line = (points, step, attributes) => {
      const d = points.map(([budget, time], i) => `${i ? (step ? `H${x(budget).toFixed(1)}V` : `L${x(budget).toFixed(1)},`) : `M${x(budget).toFixed(1)},`}${y(time).toFixed(1)}`).join("");
      return sv("path", { d: points.length && step ? `${d}H${(width - margin.right).toFixed(1)}` : d, fill: "none", "clip-path": "url(#curve-clip)", ...attributes });
    };
    add(line(curve.bound, false, { stroke: "var(--ink)", "stroke-width": 1.2, "stroke-dasharray": "5 4", "data-layer": "bound" }),
      line(curve.stairs, true, { stroke: "var(--accent)", "stroke-width": 2, "data-layer": "fastest" }));
    add(sv("line", { x1: x(curve.chosen[0]), x2: x(curve.chosen[0]), y1: margin.top, y2: margin.top + inner.h, stroke: "var(--budget)", "stroke-dasharray": "7 4", "stroke-width": 1.4 }));

    marks = [];
    const mark = (at, time, title, words, ...shapes) => {
      const node = sv("g", { class: "mark", tabindex: marks.length ? -1 : 0, role: "img", "aria-label": `${title}: ${bytes(at)}, ${seconds(time)}`,
        transform: `translate(${x(at).toFixed(1)},${y(time).toFixed(1)})`, "data-name": title },
      sv("circle", { r: 12, fill: "transparent", stroke: "transparent", "stroke-width": 2, class: "halo" }), ...shapes);
      const show = () => {
        for (const other of marks) other.node.classList.toggle("on", other.node === node);
        say(fact(title, at, time, words));
      };
      node.addEventListener("focus", show);
      node.addEventListener("keydown", (event) => step(event, node));
      marks.push({ node, at, show, x: x(at), y: y(time) });
      return node;
    };
    curve.points.forEach((point, i) => {
      const title = i === curve.knee ? "knee" : i === 0 ? "smallest" : "on the curve";
      const shapes = [sv("circle", { r: 4, fill: "var(--accent)" })];
      if (i === curve.knee && curve.points.length > 2) shapes.unshift(sv("circle", { r: 9, fill: "none", stroke: "#009E73", "stroke-width": 2.2 }));
      add(mark(point.budget, point.seconds, title,
        `, at least ${percent(over(point.bound_seconds))} for any plan of its kind; ${whole(point.num_replays)} replays`, ...shapes));
    });
    for (const one of inside) {
      const shape = SHAPES[one.name.split("(")[0]] || "M-5,-5H5V5H-5Z";
      add(mark(one.budget, one.seconds, one.name, "", sv("path", { d: shape, fill: inkOf(one.name), stroke: "var(--card)", "stroke-width": 1 })));
    }
    add(mark(curve.chosen[0], curve.chosen[1], "this plan", "", sv("path", { d: CHOSEN, fill: "var(--budget)", stroke: "var(--card)", "stroke-width": 1.5 })));
    marks.sort((a, b) => a.at - b.at);
    const end = x(curve.chosen[0]) > margin.left + 0.6 * inner.w ? -1 : 1;
    add(label(x(curve.chosen[0]) + 12 * end, y(curve.chosen[1]) - 10, end < 0 ? "end" : "start", "this plan", "var(--budget)"));
    const knee = curve.points[curve.knee];
    if (curve.points.length > 2 && Math.abs(x(knee.budget) - x(curve.chosen[0])) + Math.abs(y(knee.seconds) - y(curve.chosen[1])) > 40) {
      add(label(x(knee.budget) + 11, y(knee.seconds) - 9, "start", "knee", "#009E73"));
    }
    picture.addEventListener("pointermove", (event) => nearest(event, picture, width));
    plot.replaceChildren(picture);
  }
  /** Marks stand close together: the nearest one is meant. */
  function nearest(event, picture, width) {
    const box = picture.getBoundingClientRect();
    const scale = width / box.width;
    const far = (one) => Math.hypot(one.x - (event.clientX - box.left) * scale, one.y - (event.clientY - box.top) * scale);
    const found = marks.reduce((best, one) => (best === null || far(one) < far(best) ? one : best), null);
    if (found && far(found) < 28) found.show();
  }
  function step(event, node) {
    const now = marks.findIndex((one) => one.node === node);
    const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: marks.length - 1 }[event.key];
    if (to === undefined || !marks[to]) return;
    event.preventDefault();
    node.setAttribute("tabindex", -1);
    marks[to].node.setAttribute("tabindex", 0);
    marks[to].node.focus();
  }

  const key = (text, child) => el("span", { class: "count" }, child, ` ${text}\u2003`);
  const small = (...nodes) => sv("svg", { width: 22, height: 14, viewBox: "-11 -7 22 14", style: { display: "inline-block", "vertical-align": "-2px" } }, nodes);
  const legend = el("div", { class: "legend" },
    key("fastest plan found", small(sv("line", { x1: -11, x2: 11, stroke: "var(--accent)", "stroke-width": 2 }), sv("circle", { r: 3.5, fill: "var(--accent)" }))),
    key("no plan of its kind is faster", small(sv("line", { x1: -11, x2: 11, stroke: "var(--ink)", "stroke-dasharray": "5 4" }))),
    key("no plan exists (proven)", el("i", { class: "swatch", style: { background: "var(--hatch)" } })),
    families.map((name) => key(name === "every_k" ? "every_k: each k-th block" : name, small(sv("path", { d: SHAPES[name] || SHAPES.keep_all, fill: inkOf(name) })))));
  const rows = curve.strategies.map((one) => {
    const here = [...curve.stairs].reverse().find(([budget]) => budget <= one.budget);
    return el("tr", {}, el("td", {}, one.name), el("td", { class: "num" }, bytes(one.budget)), el("td", { class: "num" }, percent(one.overhead)),
      el("td", { class: "num" }, here ? percent(over(here[1])) : "\u2013"));
  });
  const table = el("details", {}, el("summary", { class: "hint" }, `${curve.strategies.length} strategies as a table`),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "strategy"), el("th", { class: "num" }, "smallest budget"),
      el("th", { class: "num" }, "its time"), el("th", { class: "num" }, "the curve there"))), el("tbody", {}, rows))));
  say(fact("this plan", curve.chosen[0], curve.chosen[1], `; smallest budget found ${bytes(curve.smallest_budget)}, no plan needs less than ${bytes(curve.floor)}`));
  const node = section("curve", "Every budget", sub, plot, reading, legend, curve.strategies.length ? table : "");
  if (curve.is_ended_early) node.append(el("p", { class: "note" }, "The search was ended early: the curve is rougher than it can be."));
  return { node, start: () => whenWide(plot, draw) };
}
