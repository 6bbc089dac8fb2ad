// The data of a viewed recording: the activations of features on every token, the EEG, and their times.
"use strict";

const EXCERPT = 10; // s of EEG
const PEAKS = 30; // strongest moments of a feature
const LEVELS = 255; // of an activation: the largest one of its feature

let meta; // names and numbers, as view.py writes them
let levels; // Uint8Array [features, rows, places]
let eeg; // Int16Array [channels, samples], in units of meta.eeg_step SD
let places; // {begin, end}: seconds of each place, which is a start of tokens

const seconds = () => meta.samples / meta.sampling_rate;
const nRows = () => (meta.channel_tokens ? meta.channels.length : 1);
const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));
const activationOf = (feature, level) => (level / LEVELS) * meta.features[feature].max;
const eventsBetween = (from, to) => meta.events.filter(({ start, stop }) => stop > from && start < to);
const kinds = () => [...new Set(meta.events.map((event) => event.kind))].sort();

/** Return a time as 4:03 or 1:04:03, with `decimals` of a second. */
function clock(time, decimals = 0) {
  const unit = 10 ** decimals;
  const all = Math.round(time * unit) / unit;
  const [hours, minutes] = [Math.floor(all / 3600), Math.floor(all / 60) % 60];
  const rest = (all % 60).toFixed(decimals).padStart(decimals ? 3 + decimals : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

/** Unpack the data of `meta`. */
async function unpackAll() {
  const bytes = async (packed) => new Uint8Array(await (await inflate(packed)).arrayBuffer());
  levels = await bytes(meta.activations);
  const packed = await bytes(meta.eeg);
  eeg = new Int16Array(packed.length / 2);
  const n = eeg.length / meta.channels.length;
  for (let i = 0; i < eeg.length; i++) {
    // The difference from the sample before, which view.py's `pack_eeg` has folded: 0, -1, 1, -2, …
    const folded = packed[i] | (packed[eeg.length + i] << 8);
    eeg[i] = (i % n ? eeg[i - 1] : 0) + ((folded >>> 1) ^ -(folded & 1));
  }
  const nPlaces = levels.length / (meta.features.length * nRows());
  const perWindow = meta.starts.length;
  places = { begin: new Float64Array(nPlaces), end: new Float64Array(nPlaces) };
  for (let p = 0; p < nPlaces; p++) {
    const first = Math.floor(p / perWindow) * meta.seq_len + meta.starts[p % perWindow];
    places.begin[p] = first / meta.sampling_rate;
    places.end[p] = Math.min((first + meta.lengths[p % perWindow]) / meta.sampling_rate, seconds());
  }
}

/** Return the levels of a feature [rows, columns] between two times: the largest of the tokens that touch each column. */
function binned(feature, from, to, columns) {
  const n = places.begin.length;
  const perSecond = columns / (to - from);
  const result = new Uint8Array(nRows() * columns);
  for (let row = 0; row < nRows(); row++) {
    const values = levels.subarray((feature * nRows() + row) * n, (feature * nRows() + row + 1) * n);
    for (let p = 0; p < n; p++) {
      if (!values[p] || places.end[p] <= from || places.begin[p] >= to) continue;
      const first = Math.max(0, Math.floor((places.begin[p] - from) * perSecond + 1e-6));
      const stop = Math.min(columns, Math.ceil((places.end[p] - from) * perSecond - 1e-6));
      for (let x = row * columns + first; x < row * columns + stop; x++) if (values[p] > result[x]) result[x] = values[p];
    }
  }
  return result;
}

/** Return the largest level of a feature on any row, at each place. */
function overRows(feature) {
  const n = places.begin.length;
  const most = new Uint8Array(n);
  for (let i = 0; i < nRows() * n; i++) most[i % n] = Math.max(most[i % n], levels[feature * nRows() * n + i]);
  return most;
}

/** Return the places of the largest activations of a feature that are EXCERPT apart, the largest first. */
function strongest(feature) {
  const most = overRows(feature);
  const order = [...most.keys()].filter((p) => most[p]).sort((a, b) => most[b] - most[a] || a - b);
  const chosen = [];
  for (const p of order) {
    if (chosen.every((other) => Math.abs(places.begin[other] - places.begin[p]) >= EXCERPT)) chosen.push(p);
    if (chosen.length === PEAKS) break;
  }
  return chosen;
}

/** Return the seconds of EEG that are shown around a time. */
function shownSpan(time) {
  const from = clamp(time - EXCERPT / 2, 0, seconds() - EXCERPT);
  return [from, Math.min(from + EXCERPT, seconds())];
}

/** Return the EEG around a time as an example of the report, with the tokens where a feature is active. */
function excerpt(feature, time) {
  const { begin, end } = places;
  const [from, to] = shownSpan(time);
  const n = eeg.length / meta.channels.length;
  const [first, stop] = [from, to].map((second) => Math.min(n, Math.round(second * meta.eeg_rate)));
  const others = new Int16Array(meta.channels.length * (stop - first));
  for (const i of meta.channels.keys()) others.set(eeg.subarray(i * n + first, i * n + stop), i * (stop - first));
  const [cells, bars, most] = [[], [], new Float64Array(nRows())];
  for (let p = 0; p < begin.length; p++) {
    if (end[p] <= from || begin[p] >= to) continue;
    const at = Array.from({ length: nRows() }, (_, row) => levels[(feature * nRows() + row) * begin.length + p]);
    at.forEach((level, row) => {
      most[row] = Math.max(most[row], level);
      const channels = meta.channel_tokens ? [row] : null;
      if (level) cells.push({ channels, from: begin[p], to: end[p], kind: "strip", opacity: 0.1 + (0.5 * level) / LEVELS });
    });
    bars.push([begin[p], end[p], activationOf(feature, Math.max(...at))]);
  }
  const events = eventsBetween(from, to);
  for (const { kind, start, stop: last, channels } of events) {
    const columns = channels.map((name) => meta.channels.indexOf(name));
    cells.push({ channels: columns, from: start, to: last, kind: `event-band ${eventColour(kind)}`, opacity: null });
  }
  const own = most.indexOf(Math.max(...most));
  const length = stop - first;
  return { start: first / meta.eeg_rate, trace: others.subarray(own * length, (own + 1) * length), others, channel: meta.channels[own],
    cells, bars, events, others_uv: meta.uv_per_sd, uv_per_sd: meta.uv_per_sd?.[own] ?? null, patch: null,
    step: meta.eeg_step };
}
