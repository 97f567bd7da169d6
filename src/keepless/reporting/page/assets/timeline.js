/* Bytes on the device over the step: stacked by category, with budget, phases, replays, everything kept, measured. */

function timelineSection() {
  const line = report.timeline;
  const track = line.predicted;
  const verdict = report.verdict;
  const names = Object.keys(track.categories);
  const hidden = new Set();
  const layers = { kept: true, measured: Boolean(line.measured) };
  const peakAt = track.peaks.reduce((best, peak, i) => (peak > track.peaks[best] ? i : best), 0);
  let at = peakAt;
  let view = [0, Math.max(track.seconds, line.kept.seconds) || 1];
  const all = view.slice();
  let width = 0;
  let moveTo = () => {};

  const plot = el("div", { class: "plot" });
  const reading = el("div", { class: "reading", id: "reading" });
  const reset = el("button", { type: "button", on: { click: () => zoom(all) } }, "whole step");
  const toPeak = el("button", { type: "button", on: { click: () => { zoom(all); go(peakAt); } } }, "to the peak");
  const bar = el("div", { class: "bar" },
    toPeak, reset,
    el("button", { type: "button", "aria-label": "Zoom in", on: { click: () => zoomBy(0.5) } }, "+"),
    el("button", { type: "button", "aria-label": "Zoom out", on: { click: () => zoomBy(2) } }, "\u2212"),
    el("span", { class: "count" }, "drag to zoom; arrow keys step, Home, End, P (peak), + and \u2212"));

  function zoom(range) {
    const least = all[1] / 5000;
    let [low, high] = range;
    if (high - low < least) high = low + least;
    view = [Math.max(0, low), Math.min(all[1], high)];
    draw();
  }
  function zoomBy(factor) {
    const middle = track.starts[at] || 0;
    const half = ((view[1] - view[0]) * factor) / 2;
    const low = Math.max(0, Math.min(middle - half, all[1] - 2 * half));
    zoom([low, low + 2 * half]);
  }
  function go(index) {
    at = Math.max(0, Math.min(track.starts.length - 1, index));
    const start = track.starts[at];
    if (start < view[0] || start > view[1]) {
      const half = (view[1] - view[0]) / 2;
      zoom([start - half, start + half]);
    }
    moveTo();
    read();
  }
  function measuredAt(index) {
    const seen = line.measured;
    if (!seen || !seen.starts.length) return null;
    const k = indexAt(seen.starts, track.starts[index] + 1e-12);
    return { peak: seen.peaks[k], duration: seen.instructions[k] === track.instructions[index] ? seen.durations[k] : null };
  }
  function placeOf(index) {
    return line.places[track.places[index]] || { op: "the start of the step", module: "", source: "", phase: "" };
  }
  function words(index) {
    const place = placeOf(index);
    return `${seconds(track.starts[index])}: ${bytes(track.peaks[index])}, ${place.op} ${place.module} ${place.source}`;
  }
  function read() {
    if (!track.starts.length) return;
    const place = placeOf(at);
    const seen = measuredAt(at);
    const beside = seen && seen.duration !== null ? `, measured ${seconds(seen.duration)}` : "";
    const rows = names.slice().reverse().filter((name) => track.categories[name][at])
      .map((name) => el("tr", {}, el("td", {}, el("i", { class: "swatch", style: { background: COLOURS[name] } }), ` ${name}`),
        el("td", {}, bytes(track.categories[name][at]))));
    rows.push(el("tr", { class: "total" }, el("td", {}, "predicted"), el("td", {}, bytes(track.peaks[at]))));
    if (seen) rows.push(el("tr", {}, el("td", {}, "measured"), el("td", {}, bytes(seen.peak))));
    const room = verdict.budget - track.peaks[at];
    rows.push(el("tr", {}, el("td", {}, room >= 0 ? "below the budget" : "ABOVE the budget"), el("td", {}, bytes(Math.abs(room)))));
    reading.replaceChildren(
      el("div", { class: "when" }, `${seconds(track.starts[at])} of ${seconds(track.seconds)}`,
        place.phase ? `, ${place.phase}` : "", at === peakAt ? ", the peak" : ""),
      el("div", { class: "op" }, place.op),
      track.replays[at] ? el("div", { class: "again" }, "runs again: recomputed") : "",
      place.module ? el("div", {}, place.module) : "",
      place.source ? el("div", { class: "mono" }, place.source) : "",
      el("div", { class: "when" }, `instruction ${track.instructions[at]}, ${took(track.durations[at])}${beside}`),
      el("table", {}, el("tbody", {}, rows)));
  }

  function draw() {
    if (!width) return;
    const tall = width < 520 ? 270 : 370;
    const margin = { left: 52, right: 10, top: 26, bottom: 40 };
    const inner = { w: width - margin.left - margin.right, h: tall - margin.top - margin.bottom };
    const highest = Math.max(...track.peaks, ...(layers.kept ? line.kept.peaks : [0]), ...(line.measured ? line.measured.peaks : [0]), 1);
    const top = 1.06 * Math.max(highest, verdict.budget < 1.5 * highest ? verdict.budget : 0);
    const { unit, size } = unitOf(top);
    const x = (time) => margin.left + ((time - view[0]) / (view[1] - view[0])) * inner.w;
    const y = (nbytes) => margin.top + inner.h * (1 - nbytes / top);
    const clip = sv("clipPath", { id: "clip" }, sv("rect", { x: margin.left, y: 0, width: inner.w, height: tall }));
    const body = sv("g", { "clip-path": "url(#clip)" });
    const axes = sv("g", {});
    const labels = sv("g", {});

    for (const tick of ticks(0, top / size, 5)) {
      const at = y(tick * size);
      axes.append(sv("line", { x1: margin.left, x2: width - margin.right, y1: at, y2: at, stroke: "var(--grid)" }),
        sv("text", { x: margin.left - 7, y: at + 4, "text-anchor": "end" }, trimmed(tick)));
    }
    axes.append(sv("text", { x: margin.left - 7, y: 11, "text-anchor": "end" }, unit));
    const scale = all[1] < 1 ? 1e3 : 1;
    for (const tick of ticks(view[0] * scale, view[1] * scale, Math.max(2, Math.floor(inner.w / 110)))) {
      axes.append(sv("text", { x: x(tick / scale), y: tall - 20, "text-anchor": "middle" }, trimmed(tick)));
    }
    axes.append(sv("text", { x: width - margin.right, y: tall - 4, "text-anchor": "end" },
      `${scale === 1 ? "seconds" : "milliseconds"} of the step, predicted`));

    bands(axes, body, x, margin, inner, tall);
    if (layers.kept) {
      body.append(sv("path", { d: stairs(line.kept, line.kept.peaks, x, y, 0), fill: "var(--ghost)", "data-layer": "kept-area" }));
    }
    let base = new Array(track.starts.length).fill(0);
    for (const name of names) {
      if (hidden.has(name)) continue;
      const next = base.map((low, i) => low + track.categories[name][i]);
      body.append(sv("path", { d: between(track, base, next, x, y), fill: COLOURS[name], "fill-opacity": 0.92, "data-category": name }));
      base = next;
    }
    body.append(sv("path", { d: outline(track, base, x, y), fill: "none", stroke: "var(--ink)", "stroke-width": 0.9 }));
    if (layers.kept) {
      body.append(sv("path", { d: outline(line.kept, line.kept.peaks, x, y), fill: "none", stroke: "var(--kept)", "stroke-width": 1.5, "data-layer": "kept" }));
    }
    if (line.measured && layers.measured) {
      body.append(sv("path", { d: outline(line.measured, line.measured.peaks, x, y), fill: "none", stroke: "var(--measured)",
        "stroke-width": 1.5, "stroke-dasharray": "5 2.5", "data-layer": "measured" }));
    }
    for (const [begin, end] of line.replays) {
      body.append(sv("rect", { x: x(begin), y: margin.top + inner.h, width: Math.max(0.7, x(end) - x(begin)), height: 5, fill: "var(--accent)", "data-layer": "replay" }));
    }
    if (verdict.budget <= top) {
      const level = y(verdict.budget);
      body.append(sv("line", { x1: margin.left, x2: width - margin.right, y1: level, y2: level, stroke: "var(--budget)",
        "stroke-width": 1.6, "stroke-dasharray": "7 4", "data-layer": "budget" }));
      labels.append(label(width - margin.right - 4, level - 6, "end", `budget ${bytes(verdict.budget)}`, "var(--budget)"));
    }
    const cross = sv("line", { y1: margin.top, y2: margin.top + inner.h, stroke: "var(--ink)", "stroke-opacity": 0.65 });
    const dot = sv("circle", { r: 4.5, fill: "var(--card)", stroke: "var(--ink)", "stroke-width": 2 });
    const veil = sv("rect", { y: margin.top, height: inner.h, fill: "var(--accent)", "fill-opacity": 0.18, width: 0 });
    body.append(cross, dot, veil);
    const picture = sv("svg", { width, height: tall, viewBox: `0 0 ${width} ${tall}`, tabindex: 0, role: "slider", id: "timeline-picture",
      "aria-label": "Bytes over the step. Arrow keys go from instruction to instruction.", "aria-valuemin": 0,
      "aria-valuemax": Math.max(0, track.starts.length - 1) }, sv("defs", {}, clip), axes, body, labels);
    moveTo = () => {
      const place = x(track.starts[at]);
      cross.setAttribute("x1", place);
      cross.setAttribute("x2", place);
      dot.setAttribute("cx", place);
      dot.setAttribute("cy", y(track.peaks[at]));
      picture.setAttribute("aria-valuenow", at);
      picture.setAttribute("aria-valuetext", words(at));
    };
    listen(picture, veil, x, margin, inner);
    const focused = document.activeElement && document.activeElement.id === "timeline-picture";
    plot.replaceChildren(picture);
    if (focused) picture.focus({ preventScroll: true });
    if (track.starts.length) moveTo();
  }

  function bands(axes, body, x, margin, inner, tall) {
    const spans = Object.entries(line.phases);
    let free = 0;
    spans.forEach(([name, [begin, end]], number) => {
      const left = Math.max(margin.left, x(begin));
      const right = Math.min(margin.left + inner.w, x(end));
      if (right <= left) return;
      if (number % 2) body.append(sv("rect", { x: left, y: margin.top, width: right - left, height: inner.h, fill: "var(--ink)", "fill-opacity": 0.035 }));
      axes.append(sv("line", { x1: left, x2: Math.max(left + 1, right - 2), y1: margin.top - 5, y2: margin.top - 5, stroke: "var(--faint)", "stroke-width": 3, "data-phase": name }));
      if (number) axes.append(sv("line", { x1: left, x2: left, y1: margin.top - 8, y2: margin.top + inner.h, stroke: "var(--line)", "stroke-dasharray": "2 3" }));
      const wide = name.length * 6.2;
      const room = right - left > wide;
      if (!room && right - left < 4) return;
      const middle = room ? (left + right) / 2 : Math.min(right, margin.left + inner.w) ;
      const from = room ? middle - wide / 2 : middle - wide;
      if (from < free) return;
      free = from + wide + 6;
      axes.append(sv("text", { x: middle, y: margin.top - 11, "text-anchor": room ? "middle" : "end" }, name));
    });
  }

  function listen(picture, veil, x, margin, inner) {
    const timeAt = (event) => {
      const box = picture.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * width;
      return view[0] + ((place - margin.left) / inner.w) * (view[1] - view[0]);
    };
    let from = null;
    picture.addEventListener("pointermove", (event) => {
      const time = timeAt(event);
      if (from !== null) {
        const left = Math.min(x(from), x(time));
        veil.setAttribute("x", left);
        veil.setAttribute("width", Math.abs(x(time) - x(from)));
      }
      if (time >= view[0] && time <= view[1] && track.starts.length) go(indexAt(track.starts, time));
    });
    picture.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse") return;
      from = timeAt(event);
      picture.setPointerCapture(event.pointerId);
    });
    picture.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const range = [from, timeAt(event)].sort((a, b) => a - b);
      const begin = from;
      from = null;
      if (Math.abs(x(range[1]) - x(range[0])) > 6) zoom(range);
      else if (track.starts.length) { veil.setAttribute("width", 0); go(indexAt(track.starts, begin)); }
    });
    picture.addEventListener("dblclick", () => zoom(all));
    picture.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const acts = {
        ArrowRight: () => go(at + far), ArrowLeft: () => go(at - far), ArrowUp: () => go(at + 10), ArrowDown: () => go(at - 10),
        PageUp: () => go(at + 50), PageDown: () => go(at - 50), Home: () => go(0), End: () => go(track.starts.length - 1),
        p: () => go(peakAt), "+": () => zoomBy(0.5), "-": () => zoomBy(2), 0: () => zoom(all), Escape: () => zoom(all),
      };
      const act = acts[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
  }

  const legend = el("div", { class: "legend", role: "group", "aria-label": "What is shown" });
  const most = Math.max(...track.peaks, 1);
  for (const name of names.slice().reverse()) {
    if (Math.max(...track.categories[name]) < 0.002 * most) continue;
    legend.append(toggle(name, COLOURS[name], false, true, (on) => { if (on) hidden.delete(name); else hidden.add(name); draw(); }));
  }
  legend.append(toggle("everything kept", "var(--kept)", false, true, (on) => { layers.kept = on; draw(); }));
  if (line.measured) legend.append(toggle("measured", "var(--measured)", true, true, (on) => { layers.measured = on; draw(); }));
  if (line.replays.length) legend.append(el("span", { class: "count" }, el("i", { class: "swatch", style: { background: "var(--accent)" } }), " recomputing (strip below)"));

  const sub = `Bytes on the device, predicted${line.measured ? " and measured" : ""}. Each instruction stands where it is predicted to run` +
    (line.num_hidden ? `; of ${whole(line.num_hidden)} more the highest of neighbours is shown.` : ".");
  const node = section("step", "The step", sub, bar, el("div", { class: "split" }, el("div", {}, plot, legend), reading));
  read();
  return { node, start: () => whenWide(plot, (wide) => { width = wide; draw(); }) };
}

/** A filled step line from the axis. */
function stairs(track, levels, x, y, base) {
  if (!track.starts.length) return "";
  return `${outline(track, levels, x, y)}V${y(base).toFixed(1)}H${x(track.starts[0]).toFixed(1)}Z`;
}

/** A step line. */
function outline(track, levels, x, y) {
  const parts = [];
  levels.forEach((level, i) => parts.push(`${i ? "H" : "M"}${x(track.starts[i]).toFixed(1)}${i ? "V" : ","}${y(level).toFixed(1)}`));
  return parts.length ? `${parts.join("")}H${x(track.seconds).toFixed(1)}` : "";
}

/** The area between two step lines. */
function between(track, low, high, x, y) {
  if (!track.starts.length) return "";
  const back = [];
  for (let i = low.length - 1; i >= 0; i -= 1) back.push(`V${y(low[i]).toFixed(1)}H${x(track.starts[i]).toFixed(1)}`);
  return `${outline(track, high, x, y)}${back.join("")}Z`;
}

/** Text in a picture that stays legible over what is behind it. */
function label(x, y, anchor, text, colour) {
  return sv("text", { x, y, "text-anchor": anchor, style: { fill: colour, "font-weight": 600, "paint-order": "stroke", stroke: "var(--card)", "stroke-width": "4px", "stroke-linejoin": "round" } }, text);
}

