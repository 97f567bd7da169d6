/* The page, top to bottom. */

theme();
const main = document.getElementById("main");
const parts = [heroSection(), timelineSection(), decisionSection(), curveSection(), peakSection(), fitsSection(), accuracySection(), metricsSection(), environmentSection()];
const after = document.getElementById("verdict-line");
main.append(...report.notes.map((note) => el("p", { class: "note" }, note)), ...parts.map((part) => part.node));
main.querySelector("#verdict").append(after);
for (const part of parts) part.start();
document.getElementById("foot").append("One file, no network: everything that this page shows is in it, and the browser is told to load nothing else. ",
  "Bytes are in binary units (1 GiB is 2", el("sup", {}, "30"), " bytes).");
document.documentElement.setAttribute("data-ready", "yes");
