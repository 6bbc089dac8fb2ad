// Montages of an example's channels: as recorded, longitudinal bipolar, or against their average.
"use strict";

const REFERENCES = [
  ["stored", "As recorded"],
  ["bipolar", "Bipolar", "Longitudinal bipolar montage: each channel minus the next one behind it."],
  ["average", "Average", "Average reference: each channel minus the mean of all channels with a known place."],
];
const MIN_AVERAGE = 8; // channels: a mean of fewer is far from the potential that they share
const MEMORY = "minsae.reference"; // in the browser's storage

/** Return the reference that was chosen last in this browser. */
function rememberedReference() {
  try {
    return localStorage.getItem(MEMORY) ?? "stored";
  } catch {
    return "stored"; // the browser keeps no data of pages from disk
  }
}

function rememberReference(reference) {
  try {
    localStorage.setItem(MEMORY, reference);
  } catch {
    // Then the choice ends with the page.
  }
}

/** Return the references for which the examples have the channels. */
function possibleReferences(examples) {
  const isPossible = {
    stored: true,
    bipolar: some(meta.bipolar),
    average: placedChannels().length >= MIN_AVERAGE,
  };
  const isNamed = examples.some((e) => !missing(e.others) && meta.channels.includes(shownChannel(e)));
  return isNamed ? REFERENCES.filter(([key]) => isPossible[key]) : REFERENCES.slice(0, 1);
}

const placedChannels = () => meta.positions.flatMap((place, i) => (missing(place[0]) ? [] : [i]));

/** Return the name of the channel whose trace an example shows. */
const shownChannel = (example) => example.trace_channel ?? example.channel;

/** Return the reference for an example: that of the gallery, or the recorded one without its channels. */
function referenceOf(example, { montage, reference }) {
  const own = meta.channels.indexOf(shownChannel(example));
  if (missing(example.others) || own < 0) return "stored";
  const used = { stored: [own], bipolar: meta.bipolar.flat(2), average: placedChannels() }[reference];
  return montage || used.includes(own) ? reference : "stored";
}

/**
 * Return the rows that are drawn of an example, and others that are faint behind them: {name, values, isOwn, isFirst}.
 *
 * Values are in µV if `inUv`, else in SD. `isOwn`: of the channel that the token is on. `isFirst`: of its chain.
 */
function exampleRows(example, { montage, reference, inUv, channels }) {
  const trace = scaled(decode(example.trace), inUv ? example.uv_per_sd : 1, example.step);
  const name = shownChannel(example);
  if (missing(example.others)) return { rows: [{ name, values: trace, isOwn: true }], faint: [] };
  // Recordings whose columns may not be the channels have numbers for names.
  const names = channels.includes(name) ? channels : channels.map((_, i) => `column ${i + 1}`);
  const own = names.indexOf(name);
  const signals = channelSignals(example, channels.length, inUv);
  // Where it is drawn as it is, the own channel has the full sampling rate.
  if (reference === "stored") signals[own] = trace;
  const all = reference === "bipolar" ? bipolarRows(signals, own) : channelRows(signals, names, own, reference);
  if (montage) return { rows: all, faint: [] };
  const faint = reference === "bipolar" ? [] : all.filter((row) => !row.isOwn);
  return { rows: all.filter((row) => row.isOwn), faint };
}

const TRACE_STEP = 0.1; // SD per unit of a trace, unless an example has another `step`
const scaled = (values, factor, step = TRACE_STEP) => Float32Array.from(values, (value) => value * step * factor);

function channelSignals(example, n, inUv) {
  const values = decode(example.others);
  const samples = values.length / n;
  return Array.from({ length: n }, (_, i) =>
    scaled(values.subarray(i * samples, (i + 1) * samples), inUv ? example.others_uv[i] : 1, example.step));
}

function bipolarRows(signals, own) {
  const row = ([a, b], place) => ({
    name: `${meta.channels[a]}–${meta.channels[b]}`,
    values: signals[a].map((value, k) => value - signals[b][k]),
    channels: [a, b],
    isOwn: a === own || b === own,
    isFirst: place === 0,
  });
  return meta.bipolar.flatMap((chain) => chain.map(row));
}

function channelRows(signals, names, own, reference) {
  const averaged = reference === "average" ? placedChannels() : [];
  const mean = (k) => averaged.reduce((sum, i) => sum + signals[i][k], 0) / averaged.length;
  const means = averaged.length ? signals[0].map((_, k) => mean(k)) : null;
  return signals.map((values, i) => ({
    name: names[i],
    values: averaged.includes(i) ? values.map((value, k) => value - means[k]) : values,
    channels: [i],
    isOwn: i === own,
  }));
}

/** Return the amplitude between two rows of a montage, the same in all panels, so that usual traces do not overlap. */
function rowAmplitude(examples, look) {
  const rows = examples.filter((e) => !missing(e.others))
    .flatMap((e) => exampleRows(e, { ...look, reference: referenceOf(e, look) }).rows);
  const size = ({ values }) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
  const strongest = quantile(rows.filter((row) => row.isOwn).map((row) => peak(row.values)), 0.75);
  return Math.max(2.2 * quantile(rows.map(size), 0.5), strongest / 2.5) || 1;
}

/** Choose the next of the montages that the page offers. */
function nextReference() {
  const tabs = [...document.querySelectorAll("main:not([hidden]) .references button")];
  const chosen = tabs.findIndex((tab) => tab.getAttribute("aria-pressed") === "true");
  tabs[(chosen + 1) % tabs.length]?.click();
}

/** Return what the chosen montage is and what its amplitudes mean. */
function referenceNote({ reference, inUv }) {
  const [, , words] = REFERENCES.find(([key]) => key === reference);
  const caution = " These are differences of SD, not of µV: each channel was divided by its own SD over the recording, so that what " +
    "channels share cancels completely only if their SDs are equal.";
  return inUv ? words : words + caution;
}
