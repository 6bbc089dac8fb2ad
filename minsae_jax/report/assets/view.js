// The view of a recording: heatmaps of features over all of it, and the EEG around a time.
"use strict";

const CLOCK_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400]; // s
const GAINS = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8];

let rows; // nodes of the features
let peaks = []; // places of the selected feature's strongest moments, the strongest first
const spreads = {}; // amplitude between two rows of EEG, by montage
const state = { feature: 0, time: 0, from: 0, to: 1, reference: "stored", gain: 1, peak: -1 };

const nameOf = (feature) => feature.label || feature.suggestion;

async function start(data) {
  meta = data;
  await unpackAll();
  for (const kind of kinds()) eventColour(kind);
  state.reference = rememberedReference();
  drawPage();
  restore();
  addEventListener("hashchange", restore);
  addEventListener("keydown", onKey);
  addEventListener("resize", () => requestAnimationFrame(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

// ---- the page

function drawPage() {
  const { features, channels, samples, encoded_samples: encoded, sampling_rate: rate } = meta;
  $("#origin").textContent = `${meta.member} · encoder ${meta.encoder}, layer ${meta.layer}`;
  $("#title").textContent = meta.recording;
  $("#rule").textContent = meta.rule;
  const left = samples - encoded;
  const rest = left ? ` The last ${number(left / rate)} s are shorter than a window of the encoder and have no features (grey).` : "";
  const row = meta.channel_tokens ? `Rows are the ${channels.length} channels, from ${channels[0]} to ${channels.at(-1)}`
    : `There is a single row, since tokens are over all ${channels.length} channels`;
  $("#about").append(`Each heatmap is a feature over the recording. ${row}. `, html("span", { id: "bins" }),
    ` The strongest colour is the feature's max, its largest activation in this recording.${rest}`);
  $("#version").textContent = `Written by ${meta.created_with}.`;
  const button = (name, title, onclick) => html("button", { type: "button", title, onclick }, name);
  $("#zoom").append(button("−", "zoom out (−)", () => zoomBy(2)), button("+", "zoom in (+)", () => zoomBy(0.5)),
    button("Whole recording", "(0)", () => update({ from: 0, to: seconds() })));
  rows = features.map((feature, i) => {
    const { id, note, max, mean, density, mean_elsewhere: there } = feature;
    const names = html("div", { class: "channels" }, meta.channel_tokens && channels.length <= 32
      ? channels.map((name, k) => html("i", { style: `top:${(100 * (k + 0.5)) / channels.length}%` }, name)) : []);
    const title = html("span", { class: "name", title: nameOf(feature) }, html("b", {}, `${id} `),
      html("span", { class: feature.label ? "" : "suggestion" }, nameOf(feature)));
    const about = max > 0 ? [html("small", {}, `max ${number(max)}`),
      html("small", { class: "more" }, `mean ${number(mean, 2)}${missing(there) ? "" : ` (test patients: ${number(there, 2)})`}`),
      html("small", { class: "more" }, `active on ${percent(density)} of tokens`),
      note ? html("small", { class: "more" }, note) : null] : html("small", {}, "not active in this recording");
    return html("div", { class: "row", onclick: () => update({ feature: i }) }, html("div", { class: "names" }, title, about, names),
      html("div", { class: "track" }, html("canvas", { onpointerdown: onDrag, onpointermove: onHover, onpointerleave: () => $("#readout").replaceChildren() })));
  });
  $("#features").append(...rows);
}

/** Set the state from the address; without a time it is that of the first feature's largest activation. */
function restore() {
  const now = parameters();
  const feature = Math.max(0, meta.features.findIndex(({ id }) => String(id) === now.get("f")));
  const [from, to] = (now.get("zoom") ?? "").split("-").map(Number);
  peaks = strongest(feature);
  const time = now.has("t") ? Number(now.get("t")) : some(peaks) ? places.begin[peaks[0]] : 0;
  state.feature = -1;
  update({ feature, time: time || 0, ...(to > from ? { from, to } : { from: 0, to: seconds() }), peak: now.has("t") ? -1 : 0 });
}

/** Change the state, and draw what depends on it. */
function update(change) {
  const before = { ...state };
  Object.assign(state, { peak: -1 }, change);
  state.time = clamp(state.time, 0, seconds());
  [state.from, state.to] = [Math.max(0, state.from), Math.min(seconds(), state.to)];
  const isMoved = state.time < state.from || state.time > state.to;
  if (isMoved && "time" in change) {
    const length = state.to - state.from;
    state.from = clamp(state.time - length / 2, 0, seconds() - length);
    state.to = state.from + length;
  }
  if (state.feature !== before.feature) {
    peaks = strongest(state.feature);
    for (const [i, row] of rows.entries()) row.classList.toggle("selected", i === state.feature);
  }
  const isWhole = state.from === 0 && state.to === seconds();
  setParameters({ f: meta.features[state.feature].id, t: state.time.toFixed(2), zoom: isWhole ? null : `${state.from.toFixed(2)}-${state.to.toFixed(2)}` });
  const isZoomed = state.from !== before.from || state.to !== before.to;
  if (isZoomed || before.feature < 0) draw();
  else {
    for (const i of new Set([before.feature, state.feature])) if (state.feature !== before.feature) drawRow(i);
    drawCursor();
    drawEeg();
  }
}

function zoomBy(factor) {
  const length = clamp((state.to - state.from) * factor, EXCERPT, seconds());
  const from = clamp(state.time - length / 2, 0, seconds() - length);
  update({ from, to: from + length, peak: state.peak });
}

function draw() {
  drawTimes();
  for (const i of rows.keys()) drawRow(i);
  drawCursor();
  drawEeg();
}

/** Draw the time axis and the bars of events above it. */
function drawTimes() {
  const [width, tall] = [$("#axis").clientWidth, 12];
  const shown = kinds();
  const floor = shown.length * tall + 2;
  const x = scale(state.from, state.to, 0, width);
  const root = svg("svg", { width, height: floor + 18, role: "img" });
  for (const event of eventsBetween(state.from, state.to)) {
    const words = `${event.kind}, ${clock(event.start, 1)}, ${number(event.stop - event.start, 2)} s, ${event.channels.join(" ")}`;
    const place = { x: x(event.start), width: Math.max(x(event.stop) - x(event.start), 1.5), y: shown.indexOf(event.kind) * tall + 2, height: tall - 4, rx: 1 };
    const onclick = () => update({ time: (event.start + event.stop) / 2 });
    root.append(svg("rect", { class: `event-bar ${eventColour(event.kind)}`, ...place, onclick }, svg("title", {}, words)));
  }
  const step = CLOCK_STEPS.find((s) => x(state.from + s) >= 70) ?? CLOCK_STEPS.at(-1);
  for (let k = Math.ceil(state.from / step); k * step <= state.to; k++) {
    const at = x(k * step);
    const anchor = at < 16 ? "start" : at > width - 16 ? "end" : "middle";
    root.append(svg("path", { class: "axis", d: `M${at} ${floor + 14}v4` }), text(at, floor + 11, anchor, clock(k * step, step < 1 ? 1 : 0)));
  }
  $("#axis").replaceChildren(root);
  $("#kinds").replaceChildren(...shown.map((kind, i) => html("span", { style: `top:${i * tall}px` }, swatch(kind),
    `${kind} ${meta.events.filter((event) => event.kind === kind).length}`)));
  const column = (state.to - state.from) / width;
  $("#bins").textContent = `A column of a heatmap is ${number(column, 2)} s wide and shows the largest activation of the tokens in it.${shown.length ? " Bars above are labelled events." : ""}`;
}

/** Return colours of all levels, from the card's through that of active patches to a dark one. */
function heat() {
  const node = html("i");
  const rgb = (name) => {
    node.style.color = `var(${name})`;
    return getComputedStyle(node).color.match(/[\d.]+/g).map(Number);
  };
  document.body.append(node);
  const [low, middle, high] = ["--card", "--fire", "--ink"].map(rgb);
  node.remove();
  const mix = (a, b, share) => a.map((v, i) => Math.round(v + share * (b[i] - v)));
  return Array.from({ length: LEVELS + 1 }, (_, level) => {
    const share = level / LEVELS;
    return (share < 0.6 ? mix(low, middle, 0.12 + (0.88 * share) / 0.6) : mix(middle, high, ((share - 0.6) / 0.4) * 0.7)).slice(0, 3);
  });
}

function drawRow(i) {
  const track = rows[i].querySelector(".track");
  const selected = i === state.feature;
  const height = selected ? clamp((innerHeight < 900 ? 8 : 9) * nRows(), 60, 270) : clamp(2 * nRows(), 34, 60);
  track.style.height = `${height}px`;
  const encoded = meta.encoded_samples / meta.sampling_rate;
  track.style.setProperty("--encoded", `${(100 * (encoded - state.from)) / (state.to - state.from)}%`);
  const columns = Math.max(1, Math.floor(track.clientWidth));
  const colour = heat();
  const image = new ImageData(columns, nRows());
  for (const [k, level] of binned(i, state.from, state.to, columns).entries()) if (level) image.data.set([...colour[level], 255], 4 * k);
  const canvas = track.querySelector("canvas");
  [canvas.width, canvas.height] = [columns, nRows()];
  canvas.getContext("2d").putImageData(image, 0, 0);
  track.querySelector("svg")?.remove();
  if (!selected || !meta.channel_tokens) return;
  const [x, tall] = [scale(state.from, state.to, 0, columns), height / nRows()];
  const outlines = eventsBetween(state.from, state.to).filter(({ start: a, stop: b }) => x(b) - x(a) > 8).flatMap((event) =>
    event.channels.map((name) => svg("rect", { class: `outline ${eventColour(event.kind)}`, x: x(event.start), width: x(event.stop) - x(event.start),
      y: meta.channels.indexOf(name) * tall + 0.5, height: tall - 1 })));
  track.append(svg("svg", { width: columns, height }, outlines));
}

function drawCursor() {
  const percentOf = (time) => (100 * (time - state.from)) / (state.to - state.from);
  const [from, to] = shownSpan(state.time);
  Object.assign($("#cursor").style, { left: `${percentOf(from)}%`, width: `${percentOf(to) - percentOf(from)}%` });
}

// ---- the EEG

function drawEeg() {
  const example = excerpt(state.feature, state.time);
  const references = possibleReferences([example]);
  const reference = references.some(([name]) => name === state.reference) ? state.reference : "stored";
  const look = { montage: true, reference, inUv: !missing(meta.uv_per_sd), channels: meta.channels, rate: meta.eeg_rate, full: 1, spread: 1,
    plain: !meta.channel_tokens, largest: meta.features[state.feature].max || 1, time: (second) => clock(second, 1) };
  // The same gain at all times: from stretches of all the recording.
  spreads[reference] ??= rowAmplitude(Array.from({ length: 12 }, (_, i) => excerpt(state.feature, ((i + 0.5) / 12) * seconds())), look);
  look.spread = spreads[reference] / state.gain;
  look.gap = clamp((0.27 * innerHeight) / exampleRows(example, look).rows.length, 9, 16);
  const feature = meta.features[state.feature];
  const tab = (name, title, pressed, change) => html("button", { type: "button", title, "aria-pressed": String(pressed),
    onclick: () => (typeof change === "function" ? change() : update(change)) }, name);
  const gain = (step) => () => update({ gain: GAINS[clamp(GAINS.indexOf(state.gain) + step, 0, GAINS.length - 1)], peak: state.peak });
  const [from, to] = shownSpan(state.time);
  const rank = state.peak >= 0 ? `strongest ${state.peak + 1} of ${peaks.length}` : `${peaks.length} strongest`;
  const controls = html("div", { class: "controls" },
    html("h3", {}, `${clock(from, 1)} – ${clock(to, 1)} `, html("span", { class: "suggestion" }, `shaded: feature ${feature.id} active${nameOf(feature) && `, ${nameOf(feature)}`}`)),
    html("div", { class: "tabs" }, tab("‹", "stronger moment (p)", false, () => stepPeak(-1)), tab(rank, "strongest moment", false, () => stepPeak(0)),
      tab("›", "next strongest moment (n)", false, () => stepPeak(1))),
    html("div", { class: "tabs" }, tab("−", "smaller amplitudes", false, gain(-1)), tab("gain", "", false, { gain: 1 }), tab("+", "larger amplitudes", false, gain(1))),
    references.length > 1 ? html("div", { class: "tabs references" }, references.map(([name, words]) =>
      tab(words, "montage (r)", name === reference, () => chooseReference(name)))) : null);
  const drawn = figure(drawExample(example, look), `${meta.recording} ${clock(from, 1)}`);
  $("#eeg").replaceChildren(controls, drawn);
  drawn.draw();
}

function chooseReference(reference) {
  rememberReference(reference);
  update({ reference, peak: state.peak });
}

/** Go to a stronger (-1) or weaker (1) one of the strongest moments, or to the strongest (0). */
function stepPeak(step) {
  if (!some(peaks)) return;
  const peak = step ? clamp(state.peak + step, 0, peaks.length - 1) : 0;
  update({ time: (places.begin[peaks[peak]] + places.end[peaks[peak]]) / 2, peak });
}

// ---- mouse and keys

const timeAt = (canvas, clientX) => {
  const { left, width } = canvas.getBoundingClientRect();
  return state.from + clamp((clientX - left) / width, 0, 1) * (state.to - state.from);
};

/** Show the EEG at the time that is clicked, or zoom into the range that is dragged over. */
function onDrag({ target, clientX: from, button }) {
  if (button) return;
  const feature = rows.findIndex((row) => row.contains(target));
  const left = target.getBoundingClientRect().left;
  const move = ({ clientX: to }) => {
    $("#drag").hidden = Math.abs(to - from) < 5;
    Object.assign($("#drag").style, { left: `${Math.min(from, to) - left}px`, width: `${Math.abs(to - from)}px` });
  };
  addEventListener("pointermove", move);
  addEventListener("pointerup", ({ clientX: to }) => {
    removeEventListener("pointermove", move);
    $("#drag").hidden = true;
    const [a, b] = [from, to].map((x) => timeAt(target, x)).sort((u, v) => u - v);
    if (Math.abs(to - from) < 5) update({ feature, time: a });
    else update({ feature, time: (a + b) / 2, from: Math.max(0, Math.min(a, (a + b - EXCERPT) / 2)), to: Math.max(b, (a + b + EXCERPT) / 2) });
  }, { once: true });
}

function onHover({ target, clientX, clientY }) {
  const { left, width, top, height } = target.getBoundingClientRect();
  const i = rows.findIndex((row) => row.contains(target));
  const row = clamp(Math.floor(((clientY - top) / height) * nRows()), 0, nRows() - 1);
  const column = clamp(Math.floor(((clientX - left) / width) * target.width), 0, target.width - 1);
  const step = (state.to - state.from) / target.width;
  const value = activationOf(i, binned(i, state.from + column * step, state.from + (column + 1) * step, 1)[row]);
  const where = meta.channel_tokens ? `${meta.channels[row]}, ` : "";
  $("#readout").textContent = `feature ${meta.features[i].id}, ${where}${clock(timeAt(target, clientX), 1)}: ${value ? number(value) : "not active"}`;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { feature, time } = state;
  const to = (i) => () => {
    update({ feature: clamp(i, 0, rows.length - 1) });
    rows[state.feature].scrollIntoView({ block: "nearest" });
  };
  const action = {
    ArrowLeft: () => update({ time: time - EXCERPT / 2 }), ArrowRight: () => update({ time: time + EXCERPT / 2 }),
    ArrowUp: to(feature - 1), ArrowDown: to(feature + 1), n: () => stepPeak(1), p: () => stepPeak(-1), r: nextReference,
    "+": () => zoomBy(0.5), "-": () => zoomBy(2), 0: () => update({ from: 0, to: seconds() }),
  }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}
