/* The verdict, the bytes at the peak, what fits, accuracy, metrics, engines, environment. */

function heroSection() {
  const v = report.verdict;
  const card = (title, value, more) => el("div", {}, el("dt", {}, title), el("dd", {}, value, more ? el("small", {}, more) : ""));
  const above = v.measured_peak ? v.measured_peak / v.predicted_peak - 1 : null; // as in the verdict's line
  const saved = v.baseline_peak ? 1 - v.predicted_peak / v.baseline_peak : 0;
  const fitsKept = v.baseline_peak <= v.budget;
  const cards = el("dl", { class: "cards" },
    card("Budget", bytes(v.budget), v.smallest_budget ? `smallest possible ${bytes(v.smallest_budget)}` : ""),
    card("Predicted peak", bytes(v.predicted_peak), `${bytes(Math.abs(v.budget - v.predicted_peak))} ${v.predicted_peak <= v.budget ? "below" : "ABOVE"} the budget`),
    card("Measured peak", v.measured_peak ? bytes(v.measured_peak) : "not measured", above === null ? "" : `${percent(above, 2)} against the predicted peak${report.peak.phase === "optimizer" ? "; the optimizer's step is predicted" : ""}`),
    card("Step", percent(v.overhead), `predicted: ${seconds(v.predicted_seconds)}, ${seconds(v.baseline_seconds)} with everything kept`),
    card("Without a plan", bytes(v.baseline_peak), fitsKept ? "would fit, too" : "would not fit"));
  const headline = v.fits ? (saved >= 0.005 ? `${Math.round(100 * (1 - saved))} % of the memory for ${percent(v.overhead)} time` : "Everything kept fits") : "The peak is above the budget";
  const gauge = el("div", { class: "gauge" });
  const bits = report.bits;
  const facts = [`engine: ${v.engine}`, `${whole(v.num_replays)} replays`];
  if (v.gap !== null) facts.push(`at most ${share(v.gap)} slower than any plan of its kind`);
  const node = el("section", { id: "verdict", class: "hero", "aria-label": "Verdict" },
    el("div", { class: "head" },
      el("span", { class: `pill ${v.fits ? "good" : "bad"}`, id: "pill" }, v.fits ? "\u2713 fits the budget" : "\u2717 does not fit"),
      bits ? el("span", { class: `pill ${bits.equal ? "good" : "bad"}` }, bits.equal ? "\u2713 same gradients, bit for bit" : "\u2717 bits differ") : "",
      el("span", { class: "count" }, facts.join("  \u00b7  "))),
    el("p", { class: "big" }, headline), gauge, cards);
  return { node, start: () => whenWide(gauge, (width) => drawGauge(gauge, width)) };
}

/** Budget, peaks and the peak of everything kept on one line. */
function drawGauge(gauge, width) {
  const v = report.verdict;
  const most = 1.04 * Math.max(v.baseline_peak, v.budget < 2 * v.baseline_peak ? v.budget : 0, v.predicted_peak, v.measured_peak || 0, 1);
  const x = (nbytes) => (nbytes / most) * (width - 2) + 1;
  const tall = 46;
  const bar = 20;
  const picture = sv("svg", { width, height: tall, viewBox: `0 0 ${width} ${tall}`, role: "img", "aria-label": report.verdict.line },
    sv("rect", { x: 1, y: bar, width: x(v.baseline_peak) - 1, height: 14, rx: 4, fill: "var(--ghost)", stroke: "var(--line)" }));
  let left = 1;
  const peak = report.peak;
  for (const [name, nbytes] of Object.entries(peak.categories)) {
    const wide = (nbytes / most) * (width - 2);
    picture.append(sv("rect", { x: left, y: bar, width: wide, height: 14, fill: COLOURS[name] || "var(--accent)" },
      sv("title", {}, `${name}: ${bytes(nbytes)} at the peak`)));
    left += wide;
  }
  if (v.measured_peak) {
    const at = x(v.measured_peak);
    picture.append(sv("path", { d: `M${at},${bar + 15}l4,7h-8z`, fill: "var(--measured)" }, sv("title", {}, `measured ${bytes(v.measured_peak)}`)));
  }
  if (v.budget <= most) {
    const at = x(v.budget);
    picture.append(sv("line", { x1: at, x2: at, y1: bar - 6, y2: bar + 20, stroke: "var(--budget)", "stroke-width": 2 }));
    const side = at > width / 2 ? "end" : "start";
    picture.append(label(at + (side === "end" ? -5 : 5), bar - 8, side, `budget ${bytes(v.budget)}`, "var(--budget)"));
  }
  if (width - x(v.budget) > 230 || v.budget > most) {
    picture.append(sv("text", { x: Math.min(width - 2, x(v.baseline_peak)), y: bar - 8, "text-anchor": "end" }, `everything kept ${bytes(v.baseline_peak)}`));
  }
  gauge.replaceChildren(picture);
}

function stackedBar(row, most) {
  return el("div", { class: "stack" }, Object.entries(row).map(([name, nbytes]) =>
    el("i", { title: `${name}: ${bytes(nbytes)}`, style: { width: `${((100 * nbytes) / most).toFixed(2)}%`, background: COLOURS[name] || "var(--accent)" } })));
}

function peakSection() {
  const peak = report.peak;
  const all = Object.values(peak.categories).reduce((sum, one) => sum + one, 0) || 1;
  const categories = el("div", { class: "rows" }, Object.entries(peak.categories).filter(([, n]) => n).sort((a, b) => b[1] - a[1]).map(([name, nbytes]) => el("div", {},
    el("span", { class: "name" }, el("i", { class: "swatch", style: { background: COLOURS[name] } }), ` ${name}`),
    stackedBar({ [name]: nbytes }, all),
    el("span", { class: "n" }, bytes(nbytes), el("span", { class: "part" }, share(nbytes / all))))));
  const totals = Object.entries(peak.modules).map(([name, row]) => [name, row, Object.values(row).reduce((sum, one) => sum + one, 0)]).sort((a, b) => b[2] - a[2]);
  const shownRows = totals.slice(0, 14);
  const rest = totals.slice(14).reduce((sum, row) => sum + row[2], 0);
  const most = Math.max(1, ...totals.map((row) => row[2]));
  const modules = el("div", { class: "rows" }, shownRows.map(([name, row, sum]) => el("div", {},
    el("span", { class: "name" }, named(name)), stackedBar(row, most), el("span", { class: "n" }, bytes(sum)))));
  const steps = el("table", {}, el("thead", {}, el("tr", {}, ["step", "predicted peak", "where"].map((name, i) => el("th", { class: i === 1 ? "num" : null }, name)))),
    el("tbody", {}, report.steps.map((one) => el("tr", {}, el("td", {}, one.kind), el("td", { class: "num" }, bytes(one.peak)),
      el("td", { class: "place" }, one.where, one.is_planned ? "" : "; planned for itself when it comes")))));
  const node = section("peak", "At the peak", `${bytes(peak.nbytes)} on the device at ${peak.where}${peak.phase ? `, in the ${peak.phase}` : ""}.`,
    el("div", { class: "two" }, el("div", {}, el("h3", {}, "By category"), categories),
      el("div", {}, el("h3", {}, "By module"), modules, rest ? el("p", { class: "hint" }, `${totals.length - 14} others hold ${bytes(rest)}.`) : "")),
    el("h3", {}, "First, steady and accumulating step"), el("div", { class: "scroll" }, steps));
  return { node, start: () => {} };
}

function fitsSection() {
  const parts = [];
  for (const grid of report.grids) {
    const cells = new Map(grid.cells.map((cell) => [`${cell.length}/${cell.batch}`, cell]));
    const rows = grid.lengths.map((length) => el("tr", {}, el("th", { scope: "row", class: "num" }, whole(length)), grid.batches.map((batch) => {
      const cell = cells.get(`${length}/${batch}`);
      const words = { kept: "\u2713 all kept", fits: "\u2713 recomputing", "too large": "\u2717 too large", refused: "\u2717 refused" }[cell.state] || cell.state;
      return el("td", { class: cell.state.replace(" ", "") }, words, el("small", {}, cell.smallest_budget ? `needs ${bytes(cell.smallest_budget)}` : "\u00a0"));
    })));
    parts.push(el("h3", {}, `Batch by length in ${bytes(grid.budget)}`), el("div", { class: "scroll" }, el("table", { class: "fitgrid" },
      el("thead", {}, el("tr", {}, el("th", { class: "num" }, "length"), grid.batches.map((batch) => el("th", { scope: "col" }, `batch ${whole(batch)}`)))), el("tbody", {}, rows))));
  }
  for (const found of report.sizes) {
    const rows = found.tried.map((row) => el("tr", {}, el("td", { class: "num" }, whole(row.size)), el("td", {}, row.fits ? "\u2713 fits" : "\u2717 no"),
      el("td", { class: "num" }, row.smallest_budget ? bytes(row.smallest_budget) : "\u2013"), el("td", { class: "num" }, row.baseline_budget ? bytes(row.baseline_budget) : "\u2013"),
      el("td", { class: "num" }, row.overhead === null ? "\u2013" : percent(row.overhead)), el("td", { class: "why" }, row.reason)));
    parts.push(el("h3", {}, `Largest ${found.axis} in ${bytes(found.budget)}: ${whole(found.size)}`), el("p", { class: "hint" }, found.reason), el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, [found.axis, "", "smallest budget", "everything kept", "overhead", ""].map((name, i) => el("th", { class: [0, 2, 3, 4].includes(i) ? "num" : null }, name)))), el("tbody", {}, rows))));
  }
  const sub = "Which steps have a plan within the budget: with everything kept, by recomputing, or none.";
  return { node: section("fits", "What fits", sub, parts), start: () => {} };
}

function accuracySection() {
  const rows = report.accuracy.map((row) => el("tr", {}, el("td", { class: "name" }, row.name, row.note ? el("span", { class: "under" }, row.note) : ""),
    el("td", { class: "num", "data-label": "predicted" }, row.predicted === null ? "\u2013" : shown(row.predicted, row.unit)), el("td", { class: "num", "data-label": "measured" }, shown(row.measured, row.unit)),
    el("td", { class: "num", "data-label": "off by" }, row.error === null ? "\u2013" : percent(row.error, 2))));
  const bits = report.bits;
  const words = bits ? el("p", {}, bits.equal ? "Loss, gradients, buffers and random streams are bit for bit those of " : "Not the same bits as ", el("b", {}, bits.reference),
    ` (two runs of it differ by ${bits.noise}). ${bits.note}`, bits.differences.length ? el("span", { class: "err" }, ` Different: ${bits.differences.join(", ")}.`) : "") : "";
  const table = rows.length ? el("div", { class: "scroll" }, el("table", { class: "as-cards" }, el("thead", {}, el("tr", {}, ["what", "predicted", "measured", "off by"].map((name, i) =>
    el("th", { class: i ? "num" : null }, name)))), el("tbody", {}, rows))) : "";
  return { node: section("accuracy", "Predicted and measured", "How far predictions are from what a run on this batch showed: predicted over measured, less one.", words, table), start: () => {} };
}

function metricsSection() {
  const cards = el("dl", { class: "cards" }, report.metrics.map((one) => el("div", {}, el("dt", {}, one.name),
    el("dd", {}, shown(one.value, one.unit), one.note ? el("small", {}, one.note) : ""))));
  return { node: section("metrics", "Metrics", "", cards), start: () => {} };
}

/** How to get what is not there. */
function missingSection() {
  const names = { measured: "Measured bytes, seconds and bits", curve: "The curve over every budget", fits: "What fits: batch by length" };
  const rows = Object.entries(report.missing).map(([name, words]) => [el("dt", {}, names[name] || name), el("dd", {}, words)]);
  return { node: section("missing", "Not in this report", "What was not asked for, and how to get it.", el("dl", { class: "kv hint" }, rows)), start: () => {} };
}

function environmentSection() {
  const pairs = el("dl", { class: "kv" }, Object.entries(report.environment).map(([name, words]) => [el("dt", {}, name), el("dd", {}, words)]));
  const parts = el("table", {}, el("thead", {}, el("tr", {}, ["part", "engine", "calls", "why it is not captured"].map((name, i) => el("th", { class: i === 2 ? "num" : null }, name)))),
    el("tbody", {}, report.parts.map((part) => el("tr", {}, el("td", { class: "name" }, part.name), el("td", {}, part.engine), el("td", { class: "num" }, whole(part.calls)), el("td", { class: "why" }, part.reason)))));
  return { node: section("environment", "What ran, and where", "", el("div", { class: "two" }, el("div", { class: "scroll" }, el("h3", {}, "Engines"), parts), el("div", {}, el("h3", {}, "Environment"), pairs))), start: () => {} };
}
