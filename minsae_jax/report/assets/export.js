// Figures as SVG files, and the examples of a feature as a CSV file.
"use strict";

function download(name, type, content) {
  const href = URL.createObjectURL(new Blob([content], { type }));
  html("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

/** Copy a text to the clipboard; where the browser refuses, select it in its element. */
async function copyText(content, node) {
  getSelection().selectAllChildren(node);
  try {
    await navigator.clipboard.writeText(content);
  } catch {
    // The text is selected, so that Ctrl-C copies it.
  }
}

const fileName = (words, end) => `${words.toLowerCase().replace(/[^\p{L}\p{N}=.]+/gu, "-").replace(/^-|-$/g, "").slice(0, 100)}.${end}`;

// Style that the page's CSS gives to parts of a figure.
const STYLE = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap",
  "stroke-linejoin", "opacity", "paint-order", "font-family", "font-size", "font-weight"];

/** Return a drawn figure as the text of an SVG file that looks the same without the page's CSS. */
function figureText(drawn) {
  const copy = drawn.cloneNode(true);
  const parts = [...drawn.querySelectorAll("*")];
  for (const [i, part] of [...copy.querySelectorAll("*")].entries()) {
    const style = getComputedStyle(parts[i]);
    part.setAttribute("style", STYLE.map((name) => `${name}:${style.getPropertyValue(name)}`).join(";"));
  }
  const paper = getComputedStyle(document.documentElement).getPropertyValue("--card").trim();
  copy.prepend(svg("rect", { width: "100%", height: "100%", style: `fill:${paper}` }));
  copy.setAttribute("viewBox", `0 0 ${drawn.getAttribute("width")} ${drawn.getAttribute("height")}`);
  return new XMLSerializer().serializeToString(copy);
}

/** Save a figure under its name, or the title of its card. */
function saveFigure(node, name) {
  const title = name ?? node.closest(".card")?.querySelector("h3")?.textContent ?? "figure";
  download(fileName(`${document.title} ${title}`, "svg"), "image/svg+xml", figureText(node.querySelector("svg")));
}

const EXAMPLE_COLUMNS = {
  feature: (_e, f) => f.id,
  group: (e) => e.group,
  activation: (e) => e.activation,
  recording: (e) => e.recording,
  patient: (e) => e.patient,
  channel: (e) => e.channel,
  patch_start_s: (e) => e.patch?.[0],
  patch_stop_s: (e) => e.patch?.[1],
  artefact_hints: (e) => (e.hints ?? []).join("; "),
  events: (e) => (e.events ?? []).map((event) => `${event.kind} ${event.start}-${event.stop} s`).join("; "),
  other_features: (e) => (e.other_features ?? []).map(([id]) => id).join(" "),
};

function examplesCsv(f) {
  const quoted = (value) => {
    const words = missing(value) ? "" : String(value);
    return /[",\r\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
  };
  const rows = f.examples.map((e) => Object.values(EXAMPLE_COLUMNS).map((value) => quoted(value(e, f))));
  return [Object.keys(EXAMPLE_COLUMNS), ...rows].map((row) => `${row.join(",")}\r\n`).join("");
}

function saveExamples(f) {
  download(`feature-${f.id}-examples.csv`, "text/csv;charset=utf-8", examplesCsv(f));
}
