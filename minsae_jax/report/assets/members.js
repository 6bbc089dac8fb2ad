// The comparison of the sweep's members and of PCA (#members).
"use strict";

// A measure has `value` and, if it has one, `interval`. Axes from 0, or logarithmic ones, say so; the others span the values.
const MEMBER_MEASURES = [
  { key: "l0", title: "L0", hint: "active features per token", axis: "log", format: (v) => number(v), value: (m) => m.l0 },
  { key: "fvu", title: "FVU", hint: "fraction of variance unexplained", axis: "log", format: (v) => number(v), value: (m) => m.fvu },
  { key: "loss_recovered", title: "Loss recovered", format: (v) => fixed(100 * v, 1), unit: "%",
    value: (m) => m.loss?.loss_recovered, interval: (m) => m.loss?.loss_recovered_interval },
  { key: "description_bits", title: "Bits", hint: "description length per token", axis: "zero", format: (v) => whole(v), value: (m) => m.description_bits },
  { key: "event_auc", title: "Event AUC", hint: "of the best feature, mean over kinds of event", format: (v) => fixed(v),
    value: (m) => m.events?.auc, interval: (m) => m.events?.auc_interval },
  { key: "tpp", title: "TPP", hint: "targeted probe perturbation: drop of the AUC of a kind's probe when its five features are ablated, less that of the other kinds", format: (v) => fixed(v, 2),
    value: (m) => m.events?.tpp, interval: (m) => m.events?.tpp_interval },
  { key: "pure_features", title: "Pure", hint: "features whose strongest tokens nearly all touch one kind of event", axis: "zero", format: (v) => whole(v),
    value: (m) => m.events?.pure_features },
  { key: "stability", title: "Stability", hint: "share of the live features found again with other seeds", axis: "zero", format: (v) => fixed(100 * v, 1), unit: "%",
    value: (m) => m.stability },
  { key: "never_active", title: "Never active", hint: "share of the features, on the test patients", axis: "zero", format: (v) => fixed(100 * v, 1), unit: "%",
    value: (m) => m.tokens?.never_active_fraction },
  { key: "twins", title: "Twins", hint: "share of decoder rows with a cosine above 0.9 with another", axis: "zero", format: (v) => fixed(100 * v, 1), unit: "%",
    value: (m) => m.decoder?.over_0_9 },
];
const [L0, FVU] = MEMBER_MEASURES;
const measureTitle = ({ title, unit }) => (unit ? `${title}, ${unit}` : title);
const isPca = (m) => m.kind === "pca";
const isRecommended = (m) => m.name === meta.pages.recommendation?.member;
const warningsOf = (name) => meta.pages.recommendation?.warnings[name] ?? [];

function showMembers() {
  const { members } = meta.pages;
  const scatter = html("div", {});
  const drawScatter = () => {
    scatter.replaceChildren(memberScatter(members, drawScatter));
    redraw();
  };
  showPage("Members", bar("← Overview"),
    html("header", {}, html("p", { class: "eyebrow" }, meta.run), html("h1", {}, "Members"),
      html("p", { class: "lead" }, `All on the same test patients.${members.some(isPca) ? " PCA keeps the principal components of largest magnitude of every token." : ""}`)),
    html("div", { class: "pair" }, scatter, sideBySide(members)),
    html("section", {}, html("h2", {}, "All members"), memberTable(members)));
  drawScatter();
}

/** Return a member's name and warnings, marked if it is recommended or if this report is about it. */
function memberName(m) {
  const chip = isRecommended(m) ? html("span", { class: "chip fire" }, "recommended") : null;
  const here = m.name === meta.member ? html("a", { class: "chip", href: "#" }, "this report") : null;
  const warnings = warningsOf(m.name);
  return [m.name, " ", chip, " ", here, some(warnings) ? html("span", { class: "remark" }, warnings.join("; ")) : null];
}

/** Return a member's measure with its interval, or "–". */
const measured = (m, { value, interval, format }) => (missing(value(m)) ? "–" : withInterval(value(m), interval?.(m), format));

function memberTable(members) {
  const measures = MEMBER_MEASURES.map((measure) => ({
    name: measure.key, title: measureTitle(measure), hint: measure.hint, value: measure.value, cell: (m) => measured(m, measure),
  }));
  const name = { name: "name", title: "Member", words: true, value: (m) => m.name, cell: memberName };
  return dataTable([name, ...measures], members, "", isRecommended);
}

// ---- the scatter plot

function memberScatter(members, change) {
  const enough = Math.min(2, members.length);
  const known = MEMBER_MEASURES.filter(({ value }) => members.filter((m) => !missing(value(m))).length >= enough);
  const address = parameters();
  const of = (name, other) => known.find(({ key }) => key === (address.get(name) ?? other)) ?? known[0];
  const [x, y] = [of("x", "l0"), of("y", some(known.filter(({ key }) => key === "event_auc")) ? "event_auc" : "fvu")];
  const choose = (name, chosen) => html("label", {}, `${name} `, html("select", {
    "data-axis": name,
    onchange: (event) => {
      setParameters({ [name]: event.target.value });
      change();
    },
  }, known.map((m) => html("option", { value: m.key, selected: m === chosen ? "" : null }, m.title))));
  return html("section", { class: "card" },
    html("div", { class: "controls" }, html("h3", {}, "Trade-offs"), choose("x", x), choose("y", y)),
    figure(drawMembers(members, x, y), `members ${x.title} ${y.title}`),
    html("p", { class: "note" }, `Lines join members that differ in sparsity alone${members.some(isPca) ? ", and PCA (dashed)" : ""}. Whiskers: 95 % intervals. Ringed: recommended.`));
}

/** Return an axis from 0, or a logarithmic one if the values span more than a decade. */
function axisFromZero(label, least, most) {
  const log = least > 0 && most > 10 * least;
  return { label, log, from: log ? 0.8 * least : 0, to: (log ? 1.5 : 1.12) * most };
}

/** Return the axis of a measure that spans its values and intervals. */
function memberAxis(measure, members, width) {
  const values = members.flatMap((m) => [measure.value(m), ...(measure.interval?.(m) ?? [])]).filter((v) => !missing(v));
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const format = measure.unit ? (v) => short(100 * v) : short;
  const explained = `${measureTitle(measure)}: ${measure.hint}`;
  const label = measure.hint && 6 * explained.length < width - 60 ? explained : measureTitle(measure);
  if (measure.axis === "log") return { ...axisFromZero(label, least, most), format };
  if (measure.axis === "zero") return { label, format, from: 0, to: 1.12 * (most || 1) };
  const room = 0.1 * (most - least || 0.1);
  return { label, format, from: least - room, to: most + room };
}

// With the colours of KIND_COLOURS in sae/figures.py, so that a kind has one colour in all plots; others share one.
const KNOWN_KINDS = ["relu", "topk", "batchtopk", "jumprelu", "matryoshka", "gated"];
const kindColour = ({ kind }) => (kind === "pca" ? "pca" : KNOWN_KINDS.includes(kind) ? `kind-${kind}` : "kind-4");

const LETTER = 6.2; // pixels of a letter, about

const lineOf = (m) => `${m.kind} ${m.line}`;

/** Return places of words one after the other, in rows of a width: {x, row}. */
function flow(words, left, width) {
  let [x, row] = [left, 0];
  return words.map((word) => {
    const wide = LETTER * word.length + 32;
    if (x + wide > width && x > left) [x, row] = [left, row + 1];
    const place = { x, row };
    x += wide;
    return place;
  });
}

/** Draw two measures of members and PCA against each other; lines join members that differ in sparsity alone. */
function drawMembers(all, xMeasure, yMeasure, height = 340) {
  const members = all.filter((m) => !missing(xMeasure.value(m)) && !missing(yMeasure.value(m)));
  if (!members.length) return () => "";
  const kinds = [...new Set(members.filter((m) => !isPca(m)).map((m) => m.kind))];
  return (width) => {
    const names = [...kinds.map((kind) => [kind, kindColour({ kind })]), ...(members.some(isPca) ? [["PCA, dashed", "pca"]] : [])];
    const places = flow(names.map(([name]) => name), 44, width);
    const [x, y] = [xMeasure, yMeasure].map((measure) => memberAxis(measure, members, width));
    const { root, sx, sy, box } = axes(width, height, x, y);
    const at = (m) => [sx(xMeasure.value(m)), sy(yMeasure.value(m))];
    for (const name of new Set(members.map(lineOf))) {
      const path = members.filter((m) => lineOf(m) === name).sort((a, b) => a.l0 - b.l0);
      root.append(svg("path", { class: `curve ${isPca(path[0]) ? "" : "faint"} ${kindColour(path[0])}`, d: line(path.map(at)) }));
    }
    const labels = [];
    for (const m of members.toSorted((a, b) => isRecommended(b) - isRecommended(a))) {
      const [cx, cy] = at(m);
      const [across, up] = [xMeasure, yMeasure].map((measure) => measure.interval?.(m));
      if (across) root.append(svg("path", { class: `whisker ${kindColour(m)}`, d: `M${sx(across[0])} ${cy}H${sx(across[1])}` }));
      if (up) root.append(svg("path", { class: `whisker ${kindColour(m)}`, d: `M${cx} ${sy(up[0])}V${sy(up[1])}` }));
      if (isRecommended(m)) root.append(svg("circle", { cx, cy, r: 8.5, class: "ring" }));
      const tip = `${m.name}: ${[xMeasure, yMeasure].map(({ title, format, value }) => `${title} ${format(value(m))}`).join(", ")}`;
      root.append(svg("circle", { cx, cy, r: 4.5, class: `point ${kindColour(m)}` }, svg("title", {}, tip)));
      const wide = LETTER * m.setting.length;
      const fitsRight = cx + 10 + wide < box.right + 14; // into the margin
      const [from, to] = fitsRight ? [cx + 10, cx + 10 + wide] : [cx - 10 - wide, cx - 10];
      const y = [cy - 6, cy + 15].find((at) => labels.every((l) => l.to < from || to < l.from || Math.abs(l.y - at) > 11));
      if (y === undefined) continue;
      const node = text(fitsRight ? from : to, y, fitsRight ? "start" : "end", m.setting, isRecommended(m) ? "halo strong" : "halo");
      labels.push({ from, to, y, node });
    }
    root.append(...labels.map(({ node }) => node)); // above all lines
    for (const [i, [name, kind]] of names.entries()) {
      const [x, y] = [places[i].x, height + 16 * (places[i].row + 1)];
      root.append(svg("circle", { class: `point ${kind}`, cx: x + 4, cy: y - 4, r: 4 }), text(x + 13, y, "start", name));
    }
    root.setAttribute("height", height + 16 * (places.at(-1).row + 1) + 8);
    return root;
  };
}

// ---- two members side by side

function sideBySide(members) {
  const byName = new Map(members.map((m) => [m.name, m]));
  const address = parameters();
  const first = byName.get(address.get("a")) ?? byName.get(meta.member) ?? members[0];
  const rival = meta.pages.recommendation?.runners_up.find((name) => name !== first.name);
  const second = byName.get(address.get("b")) ?? byName.get(rival) ?? members.find((m) => m !== first) ?? first;
  const choose = (name, chosen) => html("select", {
    "aria-label": name === "a" ? "first member" : "second member", "data-member": name,
    onchange: (event) => {
      setParameters({ [name]: event.target.value });
      section.replaceWith(sideBySide(members));
    },
  }, members.map((m) => html("option", { value: m.name, selected: m === chosen ? "" : null }, m.name)));
  const known = MEMBER_MEASURES.filter(({ value }) => !missing(value(first)) || !missing(value(second)));
  const cell = (m, measure) => html("td", { class: "num" }, measured(m, measure));
  const row = (measure) => html("tr", {}, html("th", { scope: "row", title: measure.hint ?? null }, measureTitle(measure)),
    cell(first, measure), cell(second, measure));
  const warnings = [first, second].map((m) => warningsOf(m.name));
  const remarks = warnings.map((of) => html("td", { class: "remark" }, of.join("; ") || "–"));
  const section = html("section", { class: "card" }, html("h3", {}, "Side by side"),
    html("div", { class: "scroll" }, html("table", { class: "data compact two" },
      html("thead", {}, html("tr", {}, html("th", {}), html("th", { class: "num" }, choose("a", first)), html("th", { class: "num" }, choose("b", second)))),
      html("tbody", {}, known.map(row), warnings.some(some) ? html("tr", {}, html("th", { scope: "row" }, "Warnings"), remarks) : null))));
  return section;
}
