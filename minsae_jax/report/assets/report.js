// The report's two views: all features (no hash) and one feature (#f=12), whose data are loaded as a script.
"use strict";

let meta; // from index_data.js
let features = []; // rows of the table, as objects
let byId = new Map();
let shown = []; // filtered features, in the table's order
let drawn = ""; // range of `shown` in the document
let current = null; // id of the open feature
let pack = { number: null, cards: new Map() }; // features of the data file that was loaded last
let indexScroll = 0;
const view = { group: "top", montage: false }; // kept from feature to feature
const table = { sort: "id", down: false, limits: {} };

const $ = (selector) => document.querySelector(selector);
const some = (list) => !missing(list) && list.length > 0;

/** Called by every data script: the index and packs of features. */
function receive(data) {
  if (data.meta) start(data);
  else unpack(data.cards).then((cards) => {
    pack = { number: data.pack, cards: new Map(cards.map((card) => [card.id, card])) };
    if (pack.cards.has(current)) showFeature(pack.cards.get(current));
  }, (error) => explain(current, `The data of this feature cannot be read: ${error.message}.`));
}

/** Return the value of gzipped JSON in base64. */
async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (byte) => byte.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Show a text in the place of a feature. */
const explain = (id, ...words) => $("#feature").replaceChildren(bar(id), ...words.map((one) => html("p", {}, one)));

function start(data) {
  history.scrollRestoration = "manual";
  meta = data.meta;
  features = data.rows.map((row) => Object.fromEntries(data.columns.map((name, i) => [name, row[i]])));
  byId = new Map(features.map((f) => [f.id, f]));
  for (const f of features) f.words = [f.id, f.label, f.suggestion, f.channel, f.band].join(" ").toLowerCase();
  drawIndex();
  filter();
  route();
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
  addEventListener("resize", () => requestAnimationFrame(redraw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

function redraw() {
  redrawFigures();
  drawRows();
}

function route() {
  const match = location.hash.match(/^#f=(\d+)$/);
  const id = match ? Number(match[1]) : null;
  if (current === null && id !== null) indexScroll = scrollY;
  current = id;
  $("#index").hidden = id !== null;
  $("#feature").hidden = id === null;
  if (id === null) {
    document.title = meta.title;
    redraw();
    scrollTo(0, indexScroll);
    return;
  }
  if (!byId.has(id)) {
    document.title = `Feature ${id}`;
    $("#feature").replaceChildren(bar(id), html("h1", {}, `There is no feature ${id}`));
    return;
  }
  const { pack: number } = byId.get(id);
  if (missing(number)) {
    document.title = `Feature ${id}`;
    const reason = byId.get(id).density ? meta.pages_rule : `Never active on ${count(meta.n_tokens, "token")}.`;
    $("#feature").replaceChildren(bar(id), html("p", { class: "eyebrow" }, `Feature ${id}`),
      html("h1", {}, byId.get(id).density ? "no page" : "never active"), html("p", { class: "lead" }, reason));
    return;
  }
  if (number === pack.number) {
    showFeature(pack.cards.get(id));
    return;
  }
  const src = `data/p${String(number).padStart(4, "0")}.js`;
  const script = html("script", { src });
  script.onload = () => script.remove();
  script.onerror = () => explain(id, `${src} is missing from the report.`);
  document.head.append(script);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (current !== null && step) open(neighbour(current, step));
  else if (current !== null && event.key === "Escape") location.hash = "";
  else if (current === null && event.key === "/") {
    event.preventDefault();
    $("#search").focus();
  }
}

function open(id) {
  if (id !== undefined) location.hash = `#f=${id}`;
}

/** Return the id of the previous or next feature, in the table's order; by id if the table does not show this one. */
function neighbour(id, step) {
  const all = shown.some((f) => f.id === id) ? shown : features;
  return all[all.findIndex((f) => f.id === id) + step]?.id;
}

const card = (title, note, ...content) =>
  html("section", { class: "card" }, html("h3", {}, title), content, note ? html("p", { class: "note" }, note) : null);

/** Return a link to a feature, with its name. */
function named(id) {
  const f = byId.get(id);
  const name = f?.label || f?.suggestion || "";
  const words = html("span", { class: f?.label ? "" : "suggestion" }, name);
  return html("a", { href: `#f=${id}`, title: name }, `${id} `, words);
}

// ---- all features

const COLUMNS = [
  { name: "id", title: "No.", hint: "index of the feature" },
  { name: "label", title: "Label or suggestion", hint: "your label, or a suggested one", words: true },
  { name: "density", title: "Density", hint: "share of tokens with the feature active, in %", share: true },
  { name: "mean", title: "Mean", hint: "mean activation when active" },
  { name: "max", title: "Max", hint: "largest activation" },
  { name: "channel", title: "Channel", hint: "channel with the highest activation", words: true },
  { name: "band", title: "Band", hint: "dominant frequency band", words: true },
  { name: "patients", title: "Patients", hint: "patients with any activation" },
  { name: "artefact", title: "Artefact", hint: "share of sampled examples with an artefact hint, in %", share: true },
];
const SCORES = [["auc", "Feature"], ["probe_auc", "Linear probe"], ["pca_auc", "PCA"], ["raw_auc", "Raw signal"]];
const ROW = 34; // px, as in report.css

function drawIndex() {
  $("#origin").textContent = [meta.run, meta.member, meta.encoder, `layer ${meta.layer}`].join(" · ");
  $("#title").textContent = meta.title;
  $("#corpus").textContent = `${count(meta.n_tokens, "token")} of ${count(meta.n_windows, "window")}, ` +
    `${count(meta.n_recordings, "recording")} and ${count(meta.n_patients, "patient")}, from the ${meta.split} split.`;
  if (meta.shifted_recordings) {
    const warning = `${count(meta.shifted_recordings, "recording")} may have shifted channel names: electrodes were ` +
      "missing, and the last channel is all zero.";
    $("#notes").append(html("li", { class: "warn" }, warning));
  }
  $("#notes").append(...(meta.notes ?? []).map((note) => html("li", {}, note)));
  if (meta.pages_rule) $("#notes").append(html("li", {}, meta.pages_rule));
  const silent = features.filter((f) => !f.density).length;
  const used = Object.keys(SPARSITY).filter((key) => meta.members.some((m) => !missing(m[key])));
  const symbols = used.map((key) => SPARSITY[key]).join(" or ");
  const summary = meta.summary.map(([key, value]) => [html("dt", {}, key), html("dd", {}, value)]);
  $("#overview").append(
    card("This autoencoder", null, html("dl", { class: "summary" }, summary)),
    card("The sweep", `Each point is an autoencoder, labelled by its ${symbols}; the circled one is shown here.`,
      figure(drawPareto(meta.members))),
    card("How often features are active", silent ? `${count(silent, "feature")} never active, not shown.` : null,
      figure(drawDensities(features.map((f) => f.density)))));
  drawEvents();
  drawTableHead();
  $("#labels").textContent = decodeURIComponent(new URL("labels.csv", location.href).pathname);
  $("#version").textContent = `Written by ${meta.created_with}.`;
}

function drawEvents() {
  const score = (value) => html("td", { class: "score", style: `--fill:${Math.max(0, 200 * (value ?? 0.5) - 100)}%` },
    missing(value) ? "–" : value.toFixed(2));
  const titles = ["Event", "Best feature", ...SCORES.map(([, title]) => title)];
  $("#events thead").append(html("tr", {}, titles.map((title) => html("th", { scope: "col" }, title))));
  $("#events tbody").append(...(meta.events ?? []).map((event) => html("tr", {}, html("td", {}, event.kind),
    html("td", {}, byId.has(event.feature) ? named(event.feature) : "–"), SCORES.map(([key]) => score(event[key])))));
  $("#events").hidden = !some(meta.events);
}

function drawTableHead() {
  const input = (c, end) => html("input", { placeholder: end, inputmode: "decimal", "aria-label": `${c.title}: ${end}`,
    oninput: (event) => limit(c, end, event.target.value) });
  const numeric = (c) => !c.words && c.name !== "id";
  $("#titles").append(...COLUMNS.map((c) => html("th", { scope: "col", class: c.name, title: c.hint },
    html("button", { type: "button", onclick: () => sortBy(c) }, c.title))));
  $("#filters").append(...COLUMNS.map((c) =>
    html("td", { class: c.name }, numeric(c) ? [input(c, "min"), input(c, "max")] : [])));
  for (const control of [$("#search"), $("#active")]) control.addEventListener("input", filter);
  $("#clear").addEventListener("click", () => {
    for (const field of document.querySelectorAll("#filters input, #search")) field.value = "";
    $("#active").checked = false;
    table.limits = {};
    filter();
  });
}

function sortBy(column) {
  const down = table.sort === column.name ? !table.down : !column.words && column.name !== "id";
  Object.assign(table, { sort: column.name, down });
  filter();
}

function limit(column, end, typed) {
  const value = typed.trim() === "" ? NaN : Number(typed.replace(",", "."));
  const key = `${column.name} ${end}`;
  if (Number.isNaN(value)) delete table.limits[key];
  else table.limits[key] = column.share ? value / 100 : value;
  filter();
}

/** Update `shown`: filtered and sorted features, those without a value last. */
function filter() {
  const words = $("#search").value.toLowerCase().split(/\s+/).filter((word) => word);
  const limits = Object.entries(table.limits).map(([key, value]) => [...key.split(" "), value]);
  const within = (f) =>
    limits.every(([name, end, value]) => !missing(f[name]) && (end === "min" ? f[name] >= value : f[name] <= value));
  const matches = (f) => (f.density > 0 || !$("#active").checked) && words.every((word) => f.words.includes(word));
  const value = table.sort === "label" ? (f) => (f.label || f.suggestion)?.toLowerCase() : (f) => f[table.sort];
  shown = features.filter((f) => matches(f) && within(f)).sort((a, b) => {
    const [u, v] = [value(a), value(b)];
    if (missing(u) || missing(v)) return missing(u) - missing(v) || a.id - b.id;
    return (u < v ? -1 : u > v ? 1 : 0) * (table.down ? -1 : 1) || a.id - b.id;
  });
  const all = shown.length === features.length;
  $("#count").textContent = `${all ? "" : `${whole(shown.length)} of `}${count(features.length, "feature")}`;
  $("#clear").hidden = all;
  COLUMNS.forEach((c, i) => {
    const order = c.name !== table.sort ? "none" : table.down ? "descending" : "ascending";
    $("#titles").children[i].setAttribute("aria-sort", order);
  });
  drawn = "";
  drawRows();
}

/** Put the visible rows into the document, between two spacers. */
function drawRows() {
  if (current !== null) return;
  const above = Math.floor(-$("#rows").getBoundingClientRect().top / ROW) - 10;
  const first = Math.max(0, Math.min(above, shown.length - 1));
  const last = Math.min(shown.length, first + Math.ceil(innerHeight / ROW) + 20);
  if (drawn === `${first} ${last}`) return;
  drawn = `${first} ${last}`;
  const spacer = (n) => html("tr", { class: "spacer", style: `height:${n * ROW}px` });
  const focused = $("#rows a:focus")?.hash;
  $("#rows").replaceChildren(spacer(first), ...shown.slice(first, last).map(tableRow), spacer(shown.length - last));
  if (focused) $(`#rows a[href="${focused}"]`)?.focus({ preventScroll: true });
  $("#nothing").hidden = shown.length > 0;
}

function tableRow(f) {
  const name = f.label || f.suggestion || (f.density ? "" : "never active");
  const cell = (c) => {
    if (c.name === "id") return html("a", { href: `#f=${f.id}` }, String(f.id));
    if (c.name === "label") return html("span", { class: f.label ? "" : "suggestion", title: name }, name);
    return c.words ? f[c.name] || "–" : c.share ? percent(f[c.name]) : number(f[c.name]);
  };
  const filled = f.density > 0 ? Math.max(2, 100 + 20 * Math.log10(f.density)) : 0; // five decades
  const style = (c) => (c.name === "density" ? `--fill:${filled}%` : null);
  return html("tr", { class: f.density ? "" : "dead", onclick: () => open(f.id) },
    COLUMNS.map((c) => html("td", { class: c.name, style: style(c) }, cell(c))));
}

// ---- one feature

/** Return the navigation bar of a feature. */
function bar(id) {
  const step = (by, name) => {
    const to = neighbour(id, by);
    return to === undefined ? html("span", { class: "off" }, name) : html("a", { href: `#f=${to}` }, name);
  };
  const place = shown.findIndex((f) => f.id === id) + 1;
  const where = place ? `${whole(place)} of ${whole(shown.length)}` : "not in the filtered table";
  return html("nav", {}, html("a", { href: "#" }, "← All features"),
    html("span", {}, step(-1, "‹ Previous"), html("span", { class: "off" }, where), step(1, "Next ›")));
}

function showFeature(f) {
  const name = f.label || f.suggestion;
  document.title = `Feature ${f.id}${name ? `: ${name}` : ""}`;
  const active = f.density > 0;
  const header = html("header", {},
    html("p", { class: "eyebrow" }, `Feature ${f.id}`),
    html("h1", { class: f.label ? "" : "suggestion" }, name || (active ? "no label" : "never active")),
    f.label && f.suggestion ? html("p", { class: "lead suggestion" }, f.suggestion) : null,
    f.note ? html("p", { class: "lead" }, f.note) : null,
    active ? facts(f) : html("p", { class: "lead" }, `Never active on ${count(meta.n_tokens, "token")}.`));
  const where = [scalpCard(f), spectrumCard(f)];
  const body = active ? [html("div", { class: "split" }, showExamples(f), html("aside", {}, where))] : [];
  $("#feature").replaceChildren(bar(f.id), header, ...body, html("div", { class: "columns" }, otherCards(f, active)));
  redraw();
  scrollTo(0, 0);
}

function facts(f) {
  const rows = [
    ["active on", `${percent(f.density)} of tokens`],
    ["mean, max when active", `${number(f.mean)}, ${number(f.max)}`],
    ["top channel", f.channel],
    ["dominant band", f.band],
    ["patients", `${number(f.patients)} of ${number(meta.n_patients)}, the largest with ${percent(f.patient_share)}`],
    ...(meta.has_cls ? [["on the CLS token", percent(f.cls)]] : []),
    ["artefact hints", `${percent(f.artefact)} of sampled, ${percent(f.artefact_top)} of the strongest examples`],
    ["examples that fit the suggestion", percent(f.support)],
  ];
  const row = ([key, value]) => html("div", {}, html("dt", {}, key), html("dd", {}, value || "–"));
  return html("dl", { class: "facts" }, rows.map(row));
}

const GROUPS = [
  ["top", "Strongest", "The largest activations, largest first."],
  ["q", "Weak to strong", "One from each tenth of the activations, largest first."],
  ["random", "Random", "A random sample of all activations."],
];

function showExamples(f) {
  const section = html("section", { class: "examples" }, html("h2", {}, "Examples"));
  const groups = GROUPS.map(([key, ...words]) => [key, ...words, f.examples.filter((e) => e.group[0] === key[0])])
    .filter(([, , , members]) => members.length);
  if (!groups.length) {
    section.append(html("p", { class: "empty" }, "No examples."));
    return section;
  }
  const [key, , words, members] = groups.find(([name]) => name === view.group) ?? groups[0];
  const examples = key === "q" ? [...members].sort((a, b) => b.activation - a.activation) : members;
  const possible = examples.some((e) => !missing(e.others));
  // Of all examples, so that the gain is the same on the whole page.
  const peaks = f.examples.map((e) => peak(decode(e.trace))).sort((a, b) => a - b);
  const look = {
    montage: view.montage && possible,
    usual: Math.max(2, peaks[Math.floor(0.75 * (peaks.length - 1))]),
    largest: Math.max(f.max ?? 0, ...examples.map((e) => e.activation)),
    channels: meta.channels, rate: meta.sampling_rate, seconds: meta.patch_seconds,
  };
  const choose = (change) => () => {
    Object.assign(view, change);
    section.replaceWith(showExamples(f));
    redraw();
  };
  const tab = (name, pressed, change) =>
    html("button", { type: "button", "aria-pressed": String(pressed), onclick: choose(change) }, name);
  const tabs = groups.map(([name, title, , all]) => tab(`${title} ${all.length}`, name === key, { group: name }));
  const layouts = [["One channel", false], ["All channels", true]]
    .map(([name, montage]) => tab(name, look.montage === montage, { montage }));
  section.append(
    html("div", { class: "controls" },
      html("div", { class: "tabs" }, tabs), possible ? html("div", { class: "tabs" }, layouts) : null),
    html("p", { class: "note" }, `${words} Shaded: the active patch. Bars: the activation on each patch. ` +
      (examples.some((e) => e.uv_per_sd) && !look.montage ? "Amplitudes in µV." : "Amplitudes in SD of the recording's channel.")),
    html("div", { class: "gallery" }, examples.map((e) => showExample(e, look))));
  return section;
}

function showExample(example, look) {
  const montage = look.montage && !missing(example.others);
  const seconds = example.patch?.map((second) => second.toFixed(2)).join("–");
  const when = seconds ? `${seconds} s` : "CLS token, the whole window";
  const tenth = example.group[0] === "q" ? html("span", { class: "chip" }, `decile ${example.group.slice(1)}`) : null;
  const shown = missing(example.trace_channel) ? null : html("span", {}, `shown: ${example.trace_channel}`);
  const hints = (example.hints ?? []).map((hint) => html("span", { class: "chip warn" }, hint));
  return html("figure", {},
    html("figcaption", {},
      html("div", {}, html("b", {}, example.channel), html("span", {}, when), shown, tenth, hints,
        html("span", { class: "value", title: "activation" }, number(example.activation))),
      html("div", { class: "where", title: `${example.recording}, patient ${example.patient}` }, example.recording),
      some(example.other_features) ? html("div", { class: "where" }, "also active: ",
        example.other_features.map(([id, value], i) => [i ? ", " : "", html("a", { href: `#f=${id}`,
          title: `${byId.get(id)?.label || byId.get(id)?.suggestion || ""} ${number(value)}` }, String(id))])) : null),
    figure(drawExample(example, { ...look, montage })));
}

function scalpCard(f) {
  if (!some(f.channel_ratio) || f.channel_ratio.length < 4) return null;
  const [note, of] = meta.channel_tokens
    ? ["Mean activation on each channel over the mean on all channels.", "the mean of all channels"]
    : ["Power of the EEG on each channel during active tokens, over its base rate. Tokens are over all channels.", "its base rate"];
  if (meta.positions.filter((p) => !missing(p[0])).length >= 4) {
    return card("Channels", note, figure(drawScalp(f.channel_ratio, f.channel, meta.channels, meta.positions, of)));
  }
  const rows = f.channel_ratio.map((ratio, i) => [meta.channels[i], ratio, number(ratio)]);
  return card("Channels", note, bars(rows.sort((a, b) => b[1] - a[1]).slice(0, 12)));
}

function spectrumCard(f) {
  const note = "Power of the EEG around active tokens over the base rate of the same channels (dotted: equal), with a 95 % interval.";
  return f.spectrum ? card("Spectrum", note, figure(drawSpectrum(f.spectrum, meta.bands))) : null;
}

function otherCards(f, active) {
  const related = (list) => bars(list.map(([id, share]) => [named(id), share, number(share, 2)]));
  const left = 1 - (f.patient_list ?? []).reduce((sum, [, share]) => sum + share, 0);
  const patients = [...(f.patient_list ?? []), ...(left > 0.002 ? [["all others", left]] : [])];
  const exact = meta.waveform_exact ? ""
    : " It is exact only after the last layer; this autoencoder is of an earlier one.";
  const cards = [
    [active && some(f.histogram?.counts), "Activations", "Number of active tokens by activation.",
      () => figure(drawHistogram(f.histogram))],
    [active && some(f.patient_list), "Patients", "Share of active tokens by patient.", () => bars(patients)],
    [active && some(f.position), "Position in the window", "Share of active tokens by patch (dotted: uniform).",
      () => figure(drawPosition(f.position, meta.patch_seconds))],
    [some(f.nearest), "Nearest features", "Cosine between decoder directions.", () => related(f.nearest)],
    [active && some(f.coactive), "Active together", "Jaccard index: tokens with both active over tokens with either.",
      () => related(f.coactive)],
    [some(f.waveform), "Waveform", `The feature's direction through the pretraining head.${exact}`,
      () => figure(drawWaveform(f.waveform, meta.sampling_rate))],
    [active && f.artefacts, "Artefact hints", "Share of sampled examples with each hint; a hint is not proof.",
      () => bars(Object.entries(f.artefacts))],
  ];
  return cards.filter(([there]) => there).map(([, title, note, content]) => card(title, note, content()));
}
