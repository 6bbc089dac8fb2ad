// The pages of a kind of event (#event=spindle) and of a label of recordings (#label=age), and their tables in the overview.
"use strict";

const SETS = [["sae", "SAE feature"], ["raw", "raw dimension"], ["pca", "principal component"], ["random", "feature of the random encoder"]];
const SIGNIFICANT = 0.05; // LEVEL in label_tests.py

const MEASURES = [
  { key: "recall", title: "Recall", hint: "share of the events found at a precision of 90 %", format: percent },
  { key: "token_auc", title: "Token AUC", hint: "AUC over single tokens instead of spans" },
  { key: "precision", title: "Precision", hint: "share of the 50 strongest tokens, of recordings with labelled events, that touch one of this kind", format: percent },
  { key: "pure_features", title: "Pure", hint: "features of the set whose strongest tokens nearly all touch an event of this kind", format: whole },
  { key: "probe_2_auc", title: "Probe, 2", hint: "AUC of a logistic regression on the best two of the set, chosen on val", interval: "probe_2_auc_interval" },
  { key: "probe_auc", title: "Probe, 5", hint: "AUC of a logistic regression on the best five of the set, chosen on val", interval: "probe_auc_interval" },
];

/** Return a table of scores, with the rows of each group together: {first, which, scores}. */
function scoreTable(groups, firstTitle = null) {
  const all = groups.flatMap((group) => Object.values(group.scores).filter((scores) => scores));
  const measures = MEASURES.filter(({ key }) => all.some((scores) => !missing(scores[key])));
  const head = [...(firstTitle ? [[firstTitle]] : []), ["Best of"], ["", null, "which-title"], ["AUC", "of the largest activation within an event, against spans without one", "num"],
    ["0.5 to 1", `with a 95 % interval over ${meta.n_patients > 1 ? "patients" : "the recordings of the only patient"}`, "plot"], ...measures.map((m) => [m.title, m.hint, "num"])];
  const row = (group, [key, title], i, rows) => {
    const scores = group.scores[key];
    const isLargest = rows.every(([other]) => !(group.scores[other].auc > scores.auc));
    const first = i || !firstTitle ? null : html("th", { scope: "rowgroup", rowspan: rows.length }, group.first);
    return html("tr", { class: `${key}${i ? "" : " first"}` }, first, html("td", {}, title), html("td", { class: "which" }, key === "sae" ? group.which : null),
      html("td", { class: `num ${isLargest ? "strong" : ""}` }, withInterval(scores.auc, scores.auc_interval)),
      html("td", { class: "plot" }, track(scores.auc, { interval: scores.auc_interval, kind: key, width: 108 })),
      measures.map((m) => html("td", { class: "num" }, withInterval(scores[m.key], scores[m.interval], m.format))));
  };
  const body = groups.flatMap((group) => {
    const rows = SETS.filter(([key]) => group.scores[key]);
    return rows.map((set, i) => row(group, set, i, rows));
  });
  return html("div", { class: "scroll" }, headedTable("data scores", head, body));
}

/** Return a link to the best feature of a kind, or the number of features that could be it. */
function bestFeature({ kind, scores: { sae } }) {
  if (sae.n_ties > 1) return html("a", { href: address("event", kind) }, `${whole(sae.n_ties)} tied`);
  return byId.has(sae.feature) ? named(sae.feature) : "–";
}

/** Draw the overview's table of events. */
function drawEvents() {
  const { events } = meta.pages;
  $("#events").hidden = !events.length;
  if (!events.length) return;
  const groups = events.map((event) => ({
    first: [kindLink(event.kind), html("small", {}, count(event.scores.sae.test_events, "test event"))],
    which: bestFeature(event),
    scores: event.scores,
  }));
  const means = meta.pages.event_means;
  if (means) groups.push({ first: ["mean over kinds"], which: null, scores: means });
  $("#events .place").replaceChildren(scoreTable(groups, "Event"));
}

/** Draw the overview's table of labels. */
function drawLabels() {
  const { labels } = meta.pages;
  $("#by-label").hidden = !labels.length;
  if (!labels.length) return;
  const columns = [
    { name: "name", title: "Label", words: true, value: (l) => l.name, cell: (l) => html("a", { href: address("label", l.name) }, l.name) },
    { name: "values", title: "Values", words: true, value: (l) => l.values },
    { name: "patients", title: "Patients", value: (l) => l.patients, cell: (l) => whole(l.patients) },
    { name: "n_significant", title: `Features with q < ${SIGNIFICANT}`, value: (l) => l.n_significant, cell: (l) => (l.n_tested ? `${whole(l.n_significant)} of ${whole(l.n_tested)}` : "not tested") },
    { name: "probe", title: "Probe on features", value: (l) => l.probe?.features.score, cell: (l) => probeText(l.probe, l.probe?.features.score) },
    { name: "raw", title: "On raw dimensions", value: (l) => l.probe?.raw.score, cell: (l) => probeText(l.probe, l.probe?.raw.score) },
    { name: "permuted", title: "Labels permuted", hint: "the same probe on features with labels exchanged between patients", value: (l) => l.probe?.features.permuted, cell: (l) => probeText(l.probe, l.probe?.features.permuted) },
  ];
  $("#by-label .place").replaceChildren(dataTable(columns, labels, ""));
}

const probeText = (probe, score) => (missing(score) ? "–" : `${probe.score_name} ${fixed(score, 2)}`);

// ---- the page of a kind of event

function showEvent(kind) {
  const { events } = meta.pages;
  const place = events.findIndex((event) => event.kind === kind);
  const link = (step) => (events[place + step] ? address("event", events[place + step].kind) : null);
  const navigation = place < 0 ? bar("← Overview") : bar("← Overview", link(-1), `${place + 1} of ${events.length} kinds`, link(1));
  if (place < 0) return showPage(`Event ${kind}`, navigation, html("h1", {}, `There is no event ${kind}`));
  const event = events[place];
  const examples = html("div", {});
  showPage(`Event: ${kind}`, navigation,
    html("header", {}, html("p", { class: "eyebrow" }, "Kind of event"),
      html("h1", {}, swatch(kind), kind),
      html("p", { class: "lead" }, eventSentence(event)), eventFacts(event.scores.sae)),
    html("section", {}, html("h2", {}, "Against baselines"),
      html("p", { class: "note" }, "All are chosen on val patients and measured on test patients by the same rules. Raw dimensions and " +
        "principal components count with both signs."),
      scoreTable([{ which: bestFeature(event), scores: event.scores }])),
    rankedFeatures(event), steeringSection(event), examples);
  const { feature } = event.scores.sae;
  if (byId.get(feature)?.density && hasPage(feature)) {
    loadFeature(feature, (f) => {
      examples.replaceWith(showExamples(f, `Examples of feature ${f.id}`));
      redraw();
    }, (words) => examples.replaceChildren(html("p", {}, words)));
  }
}

/** Return what the scores say, in one or two sentences. */
function eventSentence({ scores, auc_gain: gain, auc_gain_interval: ends }) {
  const { sae } = scores;
  const { feature, n_ties: ties, ties_auc: range } = sae;
  const within = sae.auc_interval ? ` (95 % interval ${sae.auc_interval.map((v) => fixed(v)).join(" to ")})` : "";
  const first = `Feature ${feature} separates events from spans without one with an AUC of ${fixed(sae.auc)}${within}.`;
  let tied = "";
  if (ties > 1) tied = ` By the val patients, the best one can be any of ${count(ties, "feature")}${range ? `, with test AUCs of ${fixed(range[0])} to ${fixed(range[1])}` : ""}.`;
  if (missing(ties)) tied = " With events of fewer than three val patients, it is unknown which other features could be the best one.";
  const better = SETS.slice(1).filter(([key]) => scores[key] && scores[key].auc >= sae.auc).map(([, title]) => `best ${title}`);
  const baseline = better.length ? ` The ${better.join(" and the ")} ${better.length > 1 ? "do" : "does"} as well or better.` : "";
  let control = "";
  if (!missing(gain)) control = ` The AUC of feature ${feature} is ${fixed(Math.abs(gain))} ${gain < 0 ? "below" : "above"} that of the random encoder's best feature${ends ? ` (95 % interval of the difference ${ends.map((v) => fixed(v)).join(" to ")})` : ""}.`;
  return first + tied + baseline + control;
}

const eventFacts = (sae) => factList([
  ["test events", whole(sae.test_events)],
  ["val events", whole(sae.val_events)],
  ["tokens that touch one", percent(sae.token_base_rate)],
  ["pure features", whole(sae.pure_features)],
]);

const featureColumns = [
  { name: "feature", title: "Feature", words: true, value: (r) => r.feature, cell: (r) => (byId.has(r.feature) ? named(r.feature) : String(r.feature)) },
  { name: "seeds", title: "Seeds", hint: "seeds in which the same feature is found", value: (r) => byId.get(r.feature)?.seeds,
    cell: (r) => seedDots(byId.get(r.feature)?.seeds, meta.pages.n_seeds) },
];

function rankedFeatures({ features, scores: { sae } }) {
  if (!some(features)) return null;
  const columns = [
    ...featureColumns,
    { name: "val_auc", title: "AUC, val", hint: "by which features are chosen", value: (r) => r.val_auc, cell: (r) => fixed(r.val_auc) },
    { name: "auc", title: "AUC, test", value: (r) => r.auc, cell: (r) => fixed(r.auc) },
    { name: "recall", title: "Recall", hint: MEASURES[0].hint, value: (r) => r.recall, cell: (r) => percent(r.recall) },
    { name: "precision", title: "Precision", hint: MEASURES[2].hint, value: (r) => r.precision, cell: (r) => percent(r.precision) },
    { name: "density", title: "Density", hint: "share of tokens with the feature active", value: (r) => byId.get(r.feature)?.density, cell: (r) => percent(byId.get(r.feature)?.density) },
  ];
  const ties = new Set(sae.n_ties > 1 ? sae.ties : []);
  const shaded = ties.size
    ? ` Shaded: of the ${whole(sae.n_ties)} features that contain the best one for all patients with 95 % confidence.` : "";
  return html("section", {}, html("h2", {}, "Features"),
    html("p", { class: "note" }, `By AUC on val patients; measured on test patients.${shaded}`),
    dataTable(columns, features, "", (r) => ties.has(r.feature)));
}

// ---- steering

/** Return what steering with the best feature changes: probes, waveform and bands, or null. */
function steeringSection({ kind, steering }) {
  if (!some(steering?.effects)) return null;
  const { effects } = steering;
  const name = (effect) => (effect.scale === 0 ? "ablated" : `× ${number(effect.scale)}`);
  const colour = (i) => `scale-${i % 3}`;
  const legend = html("p", { class: "note legend" }, effects.map((effect, i) =>
    html("span", {}, html("span", { class: `swatch ${colour(i)}` }), name(effect))));
  const waves = effects.map((effect, i) => ({ values: effect.waveform ?? [], kind: colour(i) })).filter((w) => w.values.length);
  const bands = effects.some((effect) => Object.keys(effect.band_ratio ?? {}).length);
  const best = effects.map((effect) => effect.selectivity).filter((value) => !missing(value));
  const lead = `The activations of feature ${steering.feature} are multiplied where it is active (${whole(steering.n_affected)} of ` +
    `${whole(steering.n_tokens)} tokens), and the rest of the encoder runs on.`;
  const target = best.length ? ` It changes ${number(Math.max(...best), 2)} times as much as the kind that changes most of the others.` : "";
  return html("section", {}, html("h2", {}, "Steering"), html("p", { class: "note" }, lead), legend,
    html("div", { class: "cards" },
      card("Probes of events", `Mean change of each probe's logit on its own events, in SD. The target is ${kind}.${target}`,
        figure(drawGroups(effects.map((effect) => effect.changes), kind, colour, "change [SD]"))),
      waves.length ? card("Waveform", "Change of the reconstructed patch, mean over tokens with the feature active.",
        figure(drawWaveforms(waves, meta.sampling_rate, steering.unit))) : null,
      bands ? card("Bands", "Power of the reconstruction over that of the untouched one, in dB.",
        figure(drawGroups(effects.map((effect) => decibels(effect.band_ratio)), null, colour, "dB"))) : null));
}

const decibels = (ratios) => Object.fromEntries(Object.entries(ratios).map(([name, ratio]) => [name, decibel(ratio)]));

/** Draw horizontal bars of several series for each name, from a line at 0; the name `target` is emphasised. */
function drawGroups(series, target, colour, label) {
  const names = Object.keys(series[0]);
  const values = series.flatMap((one) => Object.values(one));
  const x = { from: Math.min(0, 1.08 * Math.min(...values)), to: Math.max(0, 1.08 * Math.max(...values)), label };
  const [thick, gap] = [7, 9]; // px
  const tall = series.length * thick + gap;
  return (width) => {
    const indent = Math.min(6.8 * Math.max(...names.map((name) => name.length)) + 14, width / 3);
    const { root, box, sx } = axes(width, names.length * tall + 52, x, { from: 0, to: 0 }, indent);
    for (const value of ticks(x.from, x.to, false, tickCount(width))) {
      root.append(svg("path", { class: "grid", d: `M${sx(value)} ${box.top}V${box.bottom}` }));
    }
    names.forEach((name, k) => {
      const top = box.top + k * tall + gap / 2;
      series.forEach((one, i) => {
        const [a, b] = [sx(0), sx(one[name] ?? 0)].sort((u, v) => u - v);
        const place = { x: a, width: Math.max(b - a, 0.5), y: top + i * thick, height: thick - 1 };
        const tip = svg("title", {}, `${name}: ${number(one[name])} ${label}`);
        root.append(svg("rect", { class: `group ${colour(i)}${target === null || name === target ? "" : " off-target"}`, ...place }, tip));
      });
      root.append(text(box.left - 8, top + (tall - gap) / 2 + 4, "end", name, name === target ? "strong" : ""));
    });
    root.append(svg("path", { class: "axis", d: `M${sx(0)} ${box.top}V${box.bottom}` }));
    return root;
  };
}

// ---- the page of a label

function showLabel(name) {
  const { labels } = meta.pages;
  const place = labels.findIndex((label) => label.name === name);
  const link = (step) => (labels[place + step] ? address("label", labels[place + step].name) : null);
  const navigation = place < 0 ? bar("← Overview") : bar("← Overview", link(-1), `${place + 1} of ${count(labels.length, "label")}`, link(1));
  if (place < 0) return showPage(`Label ${name}`, navigation, html("h1", {}, `There is no label ${name}`));
  const label = labels[place];
  const rows = [["type", label.type], ["values", label.values], ["patients", label.patients], ["recordings", label.recordings]]
    .filter(([, value]) => !missing(value));
  showPage(`Label: ${name}`, navigation,
    html("header", {}, html("p", { class: "eyebrow" }, "Label of patients"), html("h1", {}, name),
      html("p", { class: "lead" }, labelSentence(label)),
      factList(rows),
      (label.notes ?? []).map((note) => html("p", { class: "note" }, `${note}.`))),
    probeSection(label), labelledFeatures(label));
}

function labelSentence(label) {
  const { n_tested: tested, n_significant: found } = label;
  if (!tested) return "No feature is tested.";
  const tests = `Of ${count(tested, "feature")} tested with patients as the unit,`;
  return found
    ? `${tests} ${whole(found)} ${found === 1 ? "is" : "are"} associated with ${label.name} at q < ${SIGNIFICANT}.`
    : `${tests} none is associated with ${label.name} at q < ${SIGNIFICANT}.`;
}

/** Return the probe's scores with a sentence that says what they mean, or null. */
function probeSection({ name, probe }) {
  if (!probe) return null;
  const rows = [["SAE features", probe.features, "sae"], ["raw dimensions", probe.raw, "raw"]];
  const lowest = Math.min(probe.chance, ...rows.flatMap(([, result]) => [result.score, ...result.permuted_interval]));
  const from = Math.floor(10 * lowest) / 10;
  const head = [["Probe on"], [probe.score_name, null, "num"],
    [`${fixed(from, 1)} to 1`, "dot: the score; line: 95 % of the permuted labels", "plot"],
    ["Labels permuted", "mean over permutations", "num"], ["p", "share of permutations that score at least as high", "num"]];
  const body = rows.map(([title, result, kind]) => html("tr", { class: kind }, html("td", {}, title),
    html("td", { class: "num strong" }, fixed(result.score, 2)),
    html("td", { class: "plot" }, track(result.score, { interval: result.permuted_interval, from, kind, of: "95 % of permuted labels" })),
    html("td", { class: "num" }, withInterval(result.permuted, result.permuted_interval, (v) => fixed(v, 2))),
    html("td", { class: "num" }, pValue(result.p))));
  return html("section", {}, html("h2", {}, "Probe"), html("p", { class: "note" }, probeSentence(name, probe)),
    html("div", { class: "scroll" }, headedTable("data", head, body)));
}

function probeSentence(name, { features: own, raw, n_val: fitted, n_test: scored }) {
  const unit = `Fitted on ${count(fitted, "val patient")} and scored on ${count(scored, "test patient")}. The line is where 95 % of ` +
    "the probes of permuted labels score.";
  if (!(own.p < SIGNIFICANT)) return `${unit} Features do not predict ${name} better than permuted labels do.`;
  const than = own.score > raw.score ? "better than" : own.score === raw.score ? "as well as" : "less well than";
  return `${unit} Features predict ${name} better than permuted labels do, and ${than} raw dimensions.`;
}

function labelledFeatures(label) {
  if (!some(label.features)) return null;
  const warned = (r) => (r.patient_share >= PATIENT_EFFECT
    ? html("span", { class: "chip warn", title: "much of the feature's variance is between patients: it may mark a patient" }, percent(r.patient_share))
    : percent(r.patient_share));
  const columns = [
    ...featureColumns,
    { name: "effect", title: label.effect_name, hint: label.effect_hint || null, value: (r) => r.effect, cell: (r) => fixed(r.effect, 2) },
    { name: "p", title: "p", value: (r) => r.p, cell: (r) => pValue(r.p) },
    { name: "q", title: "q", hint: "p corrected for the number of features (Benjamini-Hochberg)", value: (r) => r.q, cell: (r) => pValue(r.q) },
    { name: "patient_share", title: "Patients explain", hint: "share of the feature's variance over tokens that is between patients (eta²)", value: (r) => r.patient_share, cell: warned },
    { name: "event", title: "Event", words: true, value: (r) => byId.get(r.feature)?.event },
  ];
  const shaded = label.n_significant ? ` Shaded: q < ${SIGNIFICANT}.` : "";
  return html("section", {}, html("h2", {}, "Features"),
    html("p", { class: "note" }, `By q. Activations are pooled over each recording (${label.pooling}), then over the recordings of a patient.${shaded}`),
    dataTable(columns, label.features, "", (r) => r.q < SIGNIFICANT));
}
