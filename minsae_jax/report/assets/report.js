// The report's overview, and the way from an address to a page: no hash is the overview, whose filters are in the hash
// too; #f=12 is a feature, whose data are loaded as a script; #event=, #label= and #members are the other pages.
"use strict";

let meta; // from index_data.js
let features = []; // rows of the table, as objects, by id
let byDensity = []; // the same, the most active first, which orders rows with equal values
let byId = new Map();
let columns = []; // of the table, those that have data
let shown = []; // filtered features, in the table's order
let drawn = ""; // range of `shown` in the document
let current = ""; // name of the open page: "index", "f", "event", "label" or "members"
let awaited = null; // the feature whose data are being loaded: {id, use, explain}
let pack = { number: null, cards: new Map() }; // features of the data file that was loaded last
let indexScroll = 0;
let indexHash = "#"; // with the filters
const view = { group: "top", montage: false, reference: "stored" }; // kept from feature to feature
const table = { sort: "density", down: true };

/** Called by every data script: the index and packs of features. */
function receive(data) {
  if (data.meta) start(data);
  else inflate(data.cards).then((stream) => stream.json()).then((cards) => {
    pack = { number: data.pack, cards: new Map(cards.map((card) => [card.id, card])) };
    if (pack.cards.has(awaited?.id)) awaited.use(pack.cards.get(awaited.id));
  }, (error) => awaited?.explain(`The data of this feature cannot be read: ${error.message}.`));
}

/**
 * Load the data of a feature that has a page, and call `use` with them, unless another page is opened before.
 *
 * If that fails, `explain` is called with the reason.
 */
function loadFeature(id, use, explain) {
  const { pack: number } = byId.get(id);
  if (number === pack.number) {
    use(pack.cards.get(id));
    return;
  }
  awaited = { id, use, explain };
  const src = `data/p${String(number).padStart(4, "0")}.js`;
  const script = html("script", { src });
  script.onload = () => script.remove();
  script.onerror = () => explain(`${src} is missing from the report.`);
  document.head.append(script);
}

const hasPage = (id) => !missing(byId.get(id)?.pack);

function start(data) {
  history.scrollRestoration = "manual";
  meta = data.meta;
  features = data.rows.map((row) => Object.fromEntries(data.columns.map((name, i) => [name, row[i]])));
  byDensity = sortRows(features, (f) => f.density, true);
  byId = new Map(features.map((f) => [f.id, f]));
  for (const f of features) f.words = [f.id, f.label, f.suggestion, f.channel, f.band, ...f.detects].join(" ").toLowerCase();
  for (const { kind } of meta.pages.events) eventColour(kind);
  drawIndex();
  restoreFilters(new URLSearchParams());
  filter();
  // Not for the address of a page, which says what is shown.
  if (pageOf(parameters()) === "index") view.reference = rememberedReference();
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

// ---- addresses

const address = (page, name) => `#${page}=${encodeURIComponent(name)}`;

const PAGES = { f: (value) => openFeature(value), event: showEvent, label: showLabel, members: showMembers };

const pageOf = (address) => Object.keys(PAGES).find((name) => address.has(name)) ?? "index";

function route() {
  const now = parameters();
  const page = pageOf(now);
  if (current === "index" && page !== "index") indexScroll = scrollY;
  current = page;
  awaited = null;
  $("#index").hidden = page !== "index";
  $("#feature").hidden = page !== "f";
  $("#page").hidden = page === "index" || page === "f";
  if (page === "index") {
    document.title = meta.title;
    indexHash = location.hash || "#";
    restoreFilters(now);
    filter();
    redraw();
    scrollTo(0, indexScroll);
    return;
  }
  if (now.has("show")) view.group = now.get("show");
  if (now.has("montage")) view.montage = now.get("montage") === "1";
  if (now.has("reference")) view.reference = now.get("reference");
  PAGES[page](now.get(page));
}

function openFeature(value) {
  const id = Number(value);
  document.title = `Feature ${value}`;
  const explain = (...content) => $("#feature").replaceChildren(featureBar(id), ...content);
  if (!byId.has(id)) explain(html("h1", {}, `There is no feature ${value}`));
  else if (hasPage(id)) {
    setParameters(viewParameters());
    loadFeature(id, showFeature, (words) => explain(html("p", {}, words)));
  } else {
    const { density } = byId.get(id);
    explain(html("p", { class: "eyebrow" }, `Feature ${id}`), html("h1", {}, density ? "no page" : "never active"),
      html("p", { class: "lead" }, density ? meta.pages_rule : `Never active on ${count(meta.n_tokens, "token")}.`));
  }
}

/** Show a page that is not of a feature, with its navigation. */
function showPage(title, ...content) {
  document.title = title;
  $("#page").replaceChildren(...content.filter((node) => node));
  redraw();
  scrollTo(0, 0);
}

/** Return a navigation bar: the way back, and links to the pages before and after. */
function bar(back, previous = null, where = "", next = null) {
  const step = (to, kind, name) =>
    (to === null ? html("span", { class: "off" }, name) : html("a", { href: to, class: kind }, name));
  const steps = where ? html("span", {}, step(previous, "previous", "‹ Previous"), html("span", {}, where), step(next, "next", "Next ›")) : null;
  return html("nav", {}, html("a", { href: indexHash, class: "back" }, back), steps);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const link = { ArrowLeft: ".previous", ArrowRight: ".next", Escape: ".back" }[event.key];
  if (link) $(`main:not([hidden]) > nav ${link}`)?.click();
  else if (event.key === "?") $("#help").showModal();
  else if (event.key === "m") location.hash = "#members";
  else if (event.key === "r") nextReference();
  else if (event.key === "/") {
    event.preventDefault();
    if (current !== "index") location.hash = indexHash;
    // Not before the overview is shown.
    setTimeout(() => $("#search").focus());
  }
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
  { name: "channel", title: "Channel", hint: "channel with the highest mean activation, or the largest rise of power if tokens are over all channels", words: true },
  { name: "band", title: "Band", hint: "dominant frequency band", words: true },
  { name: "patients", title: "Patients", hint: "patients with any activation" },
  { name: "artefact", title: "Artefact", hint: "share of sampled examples with the most frequent artefact hint, in %", share: true },
  { name: "seeds", title: "Seeds", hint: "seeds in which the same feature is found" },
  { name: "event", title: "Event", hint: "kind of event with the highest AUC, and the number of others that the feature detects", words: true },
  { name: "event_auc", title: "AUC", hint: "AUC for that kind of event, on test patients" },
];
const ROW = 34; // px, as in report.css

function drawIndex() {
  $("#origin").textContent = [meta.run, meta.member, `encoder ${meta.encoder}`, `layer ${meta.layer}`].join(" · ");
  $("#title").textContent = meta.title;
  $("#corpus").textContent = `${count(meta.n_tokens, "token")} of ${count(meta.n_windows, "window")}, ` +
    `${count(meta.n_recordings, "recording")} and ${count(meta.n_patients, "patient")}, from ${meta.split === "all" ? "all splits" : `the ${meta.split} split`}.`;
  if (meta.shifted_recordings) {
    const warning = `${count(meta.shifted_recordings, "recording")} may have shifted channel names, since electrodes were ` +
      `missing and the last channel is all zero. ${meta.shifted_recordings === 1 ? "It is" : "They are"} left out of activations by channel.`;
    $("#notes").append(html("li", { class: "warn" }, warning));
  }
  if (meta.pages_rule) $("#notes").append(html("li", {}, meta.pages_rule));
  drawRecommended();
  const silent = features.filter((f) => !f.density).length;
  const summary = meta.summary.map(([key, value]) => [html("dt", {}, key), html("dd", {}, value)]);
  $("#overview").append(
    card("This autoencoder", null, html("dl", { class: "summary" }, summary)),
    card("The sweep", ["Each point is an autoencoder; the ringed one is recommended. ",
      html("a", { href: "#members" }, "Compare all members")],
    figure(drawMembers(meta.pages.members, L0, FVU, 210))),
    card("How often features are active", silent ? `${count(silent, "feature")} never active, not shown.` : null,
      figure(drawDensities(features.map((f) => f.density)))));
  drawEvents();
  drawLabels();
  columns = COLUMNS.filter((c) => ["id", "label", "density"].includes(c.name) || features.some((f) => !missing(f[c.name])));
  drawTableHead();
  $("#labels").textContent = decodeURIComponent(new URL("labels.csv", location.href).pathname);
  $("#version").textContent = `Written by ${meta.created_with}.`;
}

/** Draw the recommendation: one sentence, the runners-up and the warnings. */
function drawRecommended() {
  const { recommendation, rule, as_good: events } = meta.pages;
  $("#recommended").hidden = !recommendation;
  if (!recommendation) return;
  const { member, reason, runners_up: next } = recommendation;
  const rows = [
    member === meta.member ? [] : ["This report is about", meta.member],
    some(next) ? ["Runners-up", next.join(" · ")] : [],
    some(warningsOf(member)) ? ["Warnings", warningsOf(member).join("; ")] : [],
    some(events) ? ["Events", events] : [],
    rule ? ["Rule", rule] : [],
  ].filter(some);
  $("#recommended").append(html("h2", {}, "Recommended"), html("p", {}, reason),
    html("dl", {}, rows.map(([key, value]) => [html("dt", {}, key), html("dd", {}, value)])));
}

function drawTableHead() {
  const input = (c, end) => html("input", { placeholder: end, inputmode: "decimal", "aria-label": `${c.title}: ${end}`,
    name: `${c.name}.${end}`, oninput: filter });
  const numeric = (c) => !c.words && c.name !== "id";
  $("#titles").append(...columns.map((c) => html("th", { scope: "col", class: c.name, title: c.hint },
    html("button", { type: "button", onclick: () => sortBy(c) }, c.title))));
  $("#filters").append(...columns.map((c) =>
    html("td", { class: c.name }, numeric(c) ? [input(c, "min"), input(c, "max")] : [])));
  for (const control of [$("#search"), $("#active")]) control.addEventListener("input", filter);
  // The address follows when an input is left: browsers limit how often it changes.
  $("#features").addEventListener("change", saveFilters);
  $("#clear").addEventListener("click", () => {
    restoreFilters(new URLSearchParams());
    filter();
    saveFilters();
  });
}

const filterInputs = () => [$("#search"), ...document.querySelectorAll("#filters input")];

/** Return the order without one in the address: the best detectors of events first, or else the most active features. */
const defaultOrder = () => (columns.some((c) => c.name === "event_auc") ? "-event_auc" : "-density");

const order = () => `${table.down ? "-" : ""}${table.sort}`;

/** Set search, filters and order from the parameters of an address. */
function restoreFilters(now) {
  for (const input of filterInputs()) input.value = now.get(input.name) ?? "";
  $("#active").checked = now.has("active");
  const sort = now.get("sort") ?? defaultOrder();
  Object.assign(table, { sort: sort.replace(/^-/, ""), down: sort.startsWith("-") });
}

function saveFilters() {
  const changes = Object.fromEntries(filterInputs().map((input) => [input.name, input.value.trim()]));
  const sort = order() === defaultOrder() ? null : order();
  setParameters({ ...changes, active: $("#active").checked ? "1" : null, sort });
  indexHash = location.hash || "#";
}

function sortBy(column) {
  const down = table.sort === column.name ? !table.down : !column.words && column.name !== "id";
  Object.assign(table, { sort: column.name, down });
  filter();
  saveFilters();
}

/** Return the limits that are typed into the filters: {name, end, value}. */
function typedLimits() {
  const limits = [...document.querySelectorAll("#filters input")].map((input) => {
    const [name, end] = input.name.split(".");
    const typed = input.value.trim() === "" ? NaN : Number(input.value.replace(",", "."));
    return { name, end, value: COLUMNS.find((c) => c.name === name).share ? typed / 100 : typed };
  });
  return limits.filter(({ value }) => !Number.isNaN(value));
}

/** Update `shown`: filtered and sorted features, those without a value last; of equal ones, the most active first. */
function filter() {
  const words = $("#search").value.toLowerCase().split(/\s+/).filter((word) => word);
  const limits = typedLimits();
  const within = (f) =>
    limits.every(({ name, end, value }) => !missing(f[name]) && (end === "min" ? f[name] >= value : f[name] <= value));
  const matches = (f) => (f.density > 0 || !$("#active").checked) && words.every((word) => f.words.includes(word));
  const value = table.sort === "label" ? (f) => (f.label || f.suggestion)?.toLowerCase() : (f) => f[table.sort];
  shown = sortRows(byDensity.filter((f) => matches(f) && within(f)), value, table.down);
  const all = shown.length === features.length;
  $("#count").textContent = `${all ? "" : `${whole(shown.length)} of `}${count(features.length, "feature")}`;
  $("#clear").hidden = all;
  columns.forEach((c, i) => {
    const direction = c.name !== table.sort ? "none" : table.down ? "descending" : "ascending";
    $("#titles").children[i].setAttribute("aria-sort", direction);
  });
  drawn = "";
  drawRows();
}

/** Put the visible rows into the document, between two spacers. */
function drawRows() {
  if (current !== "index") return;
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

/** Return "+2", with their names in its tooltip, for the kinds of events beside the best one. */
const otherKinds = ([, ...others]) => (others.length ? html("span", { class: "more", title: others.join(", ") }, ` +${others.length}`) : null);

function tableRow(f) {
  const name = f.label || f.suggestion || (f.density ? "" : "never active");
  const cell = (c) => {
    if (c.name === "id") return html("a", { href: `#f=${f.id}` }, String(f.id));
    if (c.name === "label") return html("span", { class: f.label ? "" : "suggestion", title: name }, name);
    if (c.name === "seeds") return seedDots(f.seeds, meta.pages.n_seeds);
    if (c.name === "event_auc") return fixed(f.event_auc);
    if (c.name === "event" && f.event) return [swatch(f.event), f.event, otherKinds(f.detects)];
    return c.words ? f[c.name] || "–" : c.share ? percent(f[c.name]) : number(f[c.name]);
  };
  const filled = f.density > 0 ? Math.max(2, 100 + 20 * Math.log10(f.density)) : 0; // five decades
  const style = (c) => (c.name === "density" ? `--fill:${filled}%` : null);
  return html("tr", { class: f.density ? "" : "dead", onclick: () => { location.hash = `#f=${f.id}`; } },
    columns.map((c) => html("td", { class: c.name, style: style(c) }, cell(c))));
}
