/* The page, top to bottom. */

theme();
const main = document.getElementById("main");
const parts = [
  heroSection(),
  timelineSection(),
  decisionSection(),
  report.curve && curveSection(),
  peakSection(),
  (report.grids.length || report.sizes.length) && fitsSection(),
  (report.accuracy.length || report.bits) && accuracySection(),
  metricsSection(),
  environmentSection(),
  Object.keys(report.missing).length && missingSection(),
].filter(Boolean);
const after = document.getElementById("verdict-line");
main.append(...parts.map((part) => part.node));
main.querySelector("#verdict").after(...report.notes.map((note) => el("p", { class: "note" }, note)));
main.querySelector("#verdict .head").after(after);
for (const part of parts) part.start();
document.getElementById("foot").append("One file, no network: everything that this page shows is in it, and the browser is told to load nothing else. ",
  "Bytes are in binary units (1 GiB is 2", el("sup", {}, "30"), " bytes).");
document.documentElement.setAttribute("data-ready", "yes");
