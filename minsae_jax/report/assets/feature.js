// The page of a feature (#f=12).
"use strict";

const PATIENT_EFFECT = 0.3; // share of the variance from which the page warns of it

/** Return the navigation of a feature: back, and to its neighbours in the table. */
function featureBar(id) {
  const link = (step) => {
    const to = neighbour(id, step);
    return to === undefined ? null : `#f=${to}`;
  };
  const place = shown.findIndex((f) => f.id === id) + 1;
  const where = place ? `${whole(place)} of ${whole(shown.length)}` : "not in the filtered table";
  return bar("← All features", link(-1), where, link(1));
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
    badges(f),
    active ? facts(f) : html("p", { class: "lead" }, `Never active on ${count(meta.n_tokens, "token")}.`));
  const where = [scalpCard(f), spectrumCard(f)];
  const body = active ? [html("div", { class: "split" }, showExamples(f), html("aside", {}, where))] : [];
  $("#feature").replaceChildren(featureBar(f.id), header, ...body, html("div", { class: "columns" }, otherCards(f, active)));
  redraw();
  scrollTo(0, 0);
}

/** Return "found with 3 of 3 seeds" and the kinds of events, as links to where they are explained. */
function badges(f) {
  const list = [];
  if (f.stability) list.push(seedBadge(f.stability.found, f.stability.seeds));
  const detects = byId.get(f.id)?.detects ?? [];
  for (const { kind, auc } of f.events?.filter((event) => detects.includes(event.kind)) ?? []) {
    list.push(html("a", { class: "badge", href: address("event", kind) }, swatch(kind), `${kind}, AUC ${fixed(auc)}`));
  }
  return list.length ? html("p", { class: "badges" }, list) : null;
}

function seedBadge(found, seeds) {
  return html("span", { class: "badge found", title: "seeds in which the same feature is found, this one included" },
    seedDots(found, seeds), `found with ${found} of ${seeds} seeds`);
}

function facts(f) {
  const rows = [
    ["active on", `${percent(f.density)} of tokens`],
    ["mean, max when active", `${number(f.mean)}, ${number(f.max)}`],
    ["top channel", f.channel],
    ["dominant band", f.band],
    ["patients", `${number(f.patients)} of ${number(meta.n_patients)}, the largest with ${percent(f.patient_share)}`],
    ...(meta.has_cls ? [["on the CLS token", percent(f.cls)]] : []),
    ["most frequent artefact hint", `${percent(f.artefact)} of sampled, ${percent(f.artefact_top)} of the strongest examples`],
    ["examples that fit the suggestion", percent(f.support)],
  ];
  return factList(rows.map(([key, value]) => [key, value || "–"]));
}

const WIDE = 4; // s of EEG from which a montage has the whole width
const duration = (example) => decode(example.trace).length / meta.sampling_rate; // s

const GROUPS = [
  ["top", "Strongest", "The strongest tokens of different windows, largest first, few from one recording."],
  ["q", "Weak to strong", "One from each tenth of the activations, largest first."],
  ["random", "Random", "A random sample of all activations."],
];

/** Return the address's parameters of the chosen examples, layout and reference; null for those by default. */
function viewParameters() {
  return {
    show: view.group === "top" ? null : view.group,
    montage: view.montage ? "1" : null,
    reference: view.reference === "stored" ? null : view.reference,
  };
}

function showExamples(f, title = "Examples") {
  const save = html("button", { type: "button", class: "link", onclick: () => saveExamples(f) }, "Save all as CSV");
  const section = html("section", { class: "examples" });
  const groups = GROUPS.map(([key, ...words]) => [key, ...words, f.examples.filter((e) => e.group[0] === key[0])])
    .filter(([, , , members]) => members.length);
  if (!groups.length) {
    section.append(html("h2", {}, title), html("p", { class: "empty" }, "No examples."));
    return section;
  }
  const [key, , words, members] = groups.find(([name]) => name === view.group) ?? groups[0];
  const examples = key === "q" ? [...members].sort((a, b) => b.activation - a.activation) : members;
  const possible = examples.some((e) => !missing(e.others));
  const references = possibleReferences(examples);
  // Of all examples, so that the gain is the same in all groups.
  const look = {
    ...galleryGain(f.examples),
    montage: view.montage && possible,
    reference: references.some(([name]) => name === view.reference) ? view.reference : "stored",
    largest: Math.max(f.max ?? 0, ...examples.map((e) => e.activation)),
    channels: meta.channels, rate: meta.sampling_rate, seconds: meta.patch_seconds,
    feature: f.id,
  };
  look.spread = look.montage ? rowAmplitude(f.examples, look) : 1;
  const choose = (change) => () => {
    Object.assign(view, change);
    if (change.reference) rememberReference(change.reference);
    setParameters(viewParameters());
    section.replaceWith(showExamples(f, title));
    redraw();
  };
  const tab = (name, pressed, change) =>
    html("button", { type: "button", "aria-pressed": String(pressed), onclick: choose(change) }, name);
  const tabs = groups.map(([name, words, , all]) => tab(`${words} ${all.length}`, name === key, { group: name }));
  const layouts = [["One channel", false], ["All channels", true]]
    .map(([name, montage]) => tab(name, look.montage === montage, { montage }));
  const montages = references.map(([name, words]) => tab(words, look.reference === name, { reference: name }));
  build(section, {}, [
    html("div", { class: "heading" }, html("h2", {}, title), save),
    html("div", { class: "controls" }, html("div", { class: "tabs" }, tabs),
      possible ? html("div", { class: "tabs" }, layouts) : null,
      references.length > 1 ? html("div", { class: "tabs references" }, montages) : null),
    html("p", { class: "note" }, `${words} Shaded: the active patch. Bars below: the activation on each patch. ${faintNote(examples, look)}${gainNote(look)}`),
    look.reference === "stored" ? null : html("p", { class: "note" }, referenceNote(look)),
    eventLegend(examples),
    html("div", { class: `gallery ${look.montage && duration(examples[0]) > WIDE ? "wide" : ""}` }, examples.map((e) => showExample(e, look))),
  ]);
  return section;
}

function faintNote(examples, look) {
  const isFaint = !look.montage && examples.some((e) => exampleRows(e, { ...look, reference: referenceOf(e, look) }).faint.length);
  return isFaint ? "Faint lines: the other channels. " : "";
}

function gainNote({ montage, inUv, cuts }) {
  const unit = inUv ? "µV" : "SD of the recording's channel";
  const cut = !montage && cuts ? "; larger peaks are cut off" : "";
  return `Amplitudes in ${unit}, with the same gain in all panels${cut}. Positive is up.`;
}

/** Return the kinds of event in the examples with their colours, or null without any. */
function eventLegend(examples) {
  const kinds = [...new Set(examples.flatMap((e) => (e.events ?? []).map((event) => event.kind)))];
  if (!kinds.length) return null;
  const known = new Set(meta.pages.events.map((event) => event.kind));
  const item = (kind) => (known.has(kind) ? kindLink(kind) : html("span", {}, swatch(kind), kind));
  return html("p", { class: "note legend" }, html("span", {}, "Labelled events (hollow: on other channels):"), kinds.map(item));
}

function showExample(example, look) {
  const reference = referenceOf(example, look);
  const seconds = example.patch?.map((second) => second.toFixed(2)).join("–");
  const when = seconds ? `${seconds} s` : "CLS token, the whole window";
  const tenth = example.group[0] === "q" ? html("span", { class: "chip" }, `decile ${example.group.slice(1)}`) : null;
  const shown = missing(example.trace_channel) ? null : html("span", {}, `shown: ${example.trace_channel}`);
  const recorded = reference === look.reference ? null
    : html("span", { class: "chip", title: "this montage needs channels that the example does not have" }, "as recorded");
  const hints = (example.hints ?? []).map((hint) => html("span", { class: "chip warn" }, hint));
  return html("figure", {},
    html("figcaption", {},
      html("div", {}, html("b", {}, example.channel), html("span", {}, when), shown, tenth, recorded, hints,
        html("span", { class: "value", title: "activation" }, number(example.activation))),
      html("div", { class: "place" },
        html("span", { class: "where", title: `${example.recording}, patient ${example.patient}` }, example.recording), viewLink(example, look.feature))),
    figure(drawExample(example, { ...look, reference }), `${example.recording} ${seconds ?? "cls"}`),
    alsoActive(example));
}

/** Return a button that says how `minsae view` shows the recording of an example, or null without a folder of recordings. */
function viewLink(example, feature) {
  if (!meta.recordings) return null;
  return html("button", { type: "button", class: "link", title: "How to see this feature over the whole recording",
    onclick: () => explainView(example, feature) }, "whole recording");
}

/** Show the command that writes the page of the example's recording, and the page's address at the example. */
function explainView(example, feature) {
  const recording = `${meta.recordings}/${example.recording}`;
  const encoder = meta.encoder_flags.map(shellWord).join(" ");
  const python = [`config = ms.ViewConfig(recording=(${JSON.stringify(recording)},),`, `member=${JSON.stringify(meta.member_folder)},`,
    `feature=(${feature},), out="views")`];
  const command = [`minsae view ${shellWord(recording)}`, `--member ${shellWord(meta.member_folder)}`,
    ...(encoder ? [encoder] : []), `--feature ${feature} --out views`];
  const code = (separator) => (meta.view_in_python ? `${python.join(separator)}\nms.view(config, encoder)` : command.join(separator));
  const time = example.patch ? `&t=${((example.patch[0] + example.patch[1]) / 2).toFixed(2)}` : "";
  $("#view-note").textContent = meta.view_in_python
    ? "This Python code shows the feature over all of this recording, with import minsae_jax as ms and the encoder of the store:"
    : "This command shows the feature over all of this recording:";
  $("#view-command").textContent = code(meta.view_in_python ? "\n  " : " \\\n  ");
  $("#view-page").textContent = `views/${example.recording.replace(/\.npy$/, "")}.html#f=${feature}${time}`;
  $("#copy").onclick = () => copyText(code(" "), $("#view-command"));
  $("#whole").showModal();
}

/** Return links to the other features that are active at an example, or null. */
function alsoActive(example) {
  if (!some(example.other_features)) return null;
  const link = ([id, activation]) => {
    const f = byId.get(id);
    const name = f?.label || f?.suggestion || "";
    return html("a", { href: `#f=${id}`, title: `${name}, activation ${number(activation)}` }, String(id));
  };
  return html("p", { class: "also" }, html("span", {}, "Also active"), example.other_features.map(link));
}

function scalpCard(f) {
  // All 0: unknown, as of features that are active on CLS tokens alone.
  if (!some(f.channel_ratio) || f.channel_ratio.length < 4 || !f.channel_ratio.some((ratio) => ratio > 0)) return null;
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
  const note = "Relative power of the EEG around active tokens over the base rate of the same channels (dotted: equal), with a 95 % interval.";
  const broadband = f.band === "broadband" ? " Broadband: no band stands out. Total power is not compared." : "";
  return f.spectrum ? card("Spectrum", note + broadband, figure(drawSpectrum(f.spectrum, meta.bands))) : null;
}

function otherCards(f, active) {
  const related = (list) => bars(list.map(([id, share]) => [named(id), share, number(share, 2)]));
  const left = 1 - (f.patient_list ?? []).reduce((sum, [, share]) => sum + share, 0);
  const patients = [...(f.patient_list ?? []), ...(left > 0.002 ? [["all others", left]] : [])];
  const exact = meta.waveform_exact ? ""
    : " It is exact only after the last layer; this autoencoder is of an earlier one.";
  const cards = [
    [active && f.explained, "What else explains it", null, () => explained(f.explained)],
    [active && some(f.events), "Events", "AUC of the feature on test patients, from 0.5 (chance) to 1.", () => featureEvents(f.events)],
    [active && some(f.labels), "Labels", "Association with labels of recordings; q is corrected for the number of features.",
      () => featureLabels(f.labels)],
    [some(f.stability?.matches), "Other seeds", "The match in members trained from other seeds, by the cosine of decoder directions; that of encoder directions does not count.",
      () => seedMatches(f.stability.matches)],
    [active && some(f.histogram?.counts), "Activations", "Number of active tokens by activation.",
      () => figure(drawHistogram(f.histogram))],
    [active && some(f.patient_list), "Patients", "Share of active tokens by patient.", () => bars(patients)],
    [active && some(f.position), "Position in the window", "Share of active tokens by patch (dotted: uniform).",
      () => figure(drawPosition(f.position, meta.patch_seconds))],
    [some(f.nearest), "Nearest features", "Cosine between decoder directions.", () => related(f.nearest)],
    [active && some(f.coactive), "Active together", "Jaccard index: tokens with both active over tokens with either.",
      () => related(f.coactive)],
    [some(f.waveform), "Waveform", `What an activation of 1 adds to a patch, by the pretraining head.${exact}`,
      () => figure(drawWaveforms([{ values: f.waveform, kind: "" }], meta.sampling_rate, meta.waveform_unit))],
    [active && Object.keys(f.artefacts).length, "Artefact hints", "Share of sampled examples with each hint; a hint is not proof.",
      () => bars(Object.entries(f.artefacts))],
  ];
  return cards.filter(([there]) => there).map(([, title, note, content]) => card(title, note, content()));
}

/** Return bars of eta² with a warning if one patient or recording is behind the feature. */
function explained(shares) {
  const names = [["position in the window", "position"], ["channel", "channel"], ["recording", "recording"], ["patient", "patient"]];
  const rows = names.map(([title, key]) => html("div", {}, html("dt", {}, title),
    html("dd", { style: `--fill:${100 * shares[key]}%`, class: isPatientEffect(shares[key], key) ? "high" : null }, percent(shares[key]))));
  const note = html("p", { class: "note" }, "Share of the variance over tokens (eta²) that each of them explains. Shares overlap.");
  const content = [html("dl", { class: "shares" }, rows), note];
  if (Math.max(shares.patient, shares.recording) >= PATIENT_EFFECT) content.unshift(patientWarning(shares));
  return content;
}

const isPatientEffect = (share, key) => share >= PATIENT_EFFECT && (key === "patient" || key === "recording");

function patientWarning(shares) {
  const unit = shares.patient >= PATIENT_EFFECT ? "patient" : "recording";
  const most = missing(shares.top_patient_share) || !shares.top_patient ? ""
    : ` ${percent(shares.top_patient_share)} of its activation is from ${shares.top_patient}.`;
  return html("p", { class: "warning" }, `It may mark the ${unit} rather than what happens in the EEG.${most}`);
}

/** Return a small table: titles of columns of words, titles of columns of numbers, and rows. */
function compactTable(words, numbers, rows) {
  return headedTable("data compact", [...words.map((title) => [title]), ...numbers.map((title) => [title, null, "num"])], rows);
}

const numberCells = (values) => values.map((value) => html("td", { class: "num" }, value));

const featureEvents = (events) => compactTable(["Kind", ""], ["AUC", "Recall", "Precision"], events.map((event) =>
  html("tr", {}, html("td", {}, kindLink(event.kind)), html("td", { class: "plot" }, track(event.auc, { width: 50 })),
    numberCells([fixed(event.auc), percent(event.recall), percent(event.precision)]))));

const featureLabels = (labels) => compactTable(["Label"], ["Effect", "p", "q"], labels.map((label) =>
  html("tr", {}, html("td", {}, html("a", { href: address("label", label.label) }, label.label)),
    numberCells([fixed(label.effect, 2), pValue(label.p), pValue(label.q)]))));

const seedMatches = (matches) => compactTable(["Member"], ["Feature", "Encoder", "Decoder"], matches.map((match) =>
  html("tr", { class: match.is_same ? null : "faded" },
    html("td", { title: match.member }, match.member.match(/seed=[^,]+/)?.[0] ?? match.member),
    numberCells([match.feature, fixed(match.encoder_cosine, 2), fixed(match.decoder_cosine, 2)]))));
