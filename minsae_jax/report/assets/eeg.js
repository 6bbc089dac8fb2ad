// The EEG around a token, with the labelled events that overlap it.
"use strict";

/** Return EEG in units of TRACE_STEP SD, from base64 unless it is decoded already. */
const decode = (eeg) => (typeof eeg === "string" ? Int8Array.from(atob(eeg), (byte) => byte.charCodeAt(0)) : eeg);
const peak = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const quantile = (values, share) => values.toSorted((a, b) => a - b)[Math.floor(share * (values.length - 1))] ?? 0;
const EVENT_BAR = 7; // px, of each kind of event above the trace

const eventColours = new Map();
/** Return the class of a kind of event's colour, the same on all pages. */
function eventColour(kind) {
  if (!eventColours.has(kind)) eventColours.set(kind, `kind-${eventColours.size % N_COLOURS}`);
  return eventColours.get(kind);
}

const swatch = (kind) => html("span", { class: `swatch ${eventColour(kind)}` });

/** Return a link to the page of a kind of event, with its colour. */
const kindLink = (kind) => html("a", { href: address("event", kind) }, swatch(kind), kind);

/**
 * Return the gain of panels of one channel: the amplitude drawn at full height, the same in all of them.
 *
 * It is in µV if all examples have them, else in SD. A tenth of the peaks is cut off.
 */
function galleryGain(examples) {
  const inUv = examples.every((e) => e.uv_per_sd > 0);
  const peaks = examples.map((e) => peak(scaled(decode(e.trace), inUv ? e.uv_per_sd : 1)));
  const usual = quantile(peaks, 0.9);
  return { inUv, full: Math.max(usual, inUv ? 1 : 2), cuts: Math.max(...peaks) > usual };
}

/** Return spans [from, to] without overlaps. */
function united(spans) {
  const result = [];
  for (const [from, to] of spans.toSorted((a, b) => a[0] - b[0])) {
    const last = result.at(-1);
    if (last && from <= last[1]) last[1] = Math.max(last[1], to);
    else result.push([from, to]);
  }
  return result;
}

const isOn = (event, channel) => event.channels.includes(channel) || !event.channels.length;

/** Return bands over the time of labelled events on a channel, if there is one, and bars above for events on any channel. */
function eventBands(events, kinds, x, channel, box, floor) {
  const place = (event) => [event.start, event.stop].map((second) => Math.min(Math.max(x(second), box.left), box.right));
  const bands = (channel === null ? [] : kinds).flatMap((kind) => {
    const here = events.filter((event) => event.kind === kind && isOn(event, channel));
    return united(here.map(place)).map(([a, b]) => svg("rect", { class: `event-band ${eventColour(kind)}`, x: a,
      width: Math.max(b - a, 1.5), y: box.top, height: floor - box.top }));
  });
  const bars = events.map((event) => {
    const [a, b] = place(event);
    const tip = svg("title", {}, `${event.kind}, ${fixed(event.start, 2)}–${fixed(event.stop, 2)} s, ${event.channels.join(" ")}`);
    const kind = `event-bar ${eventColour(event.kind)}${channel === null || isOn(event, channel) ? "" : " elsewhere"}`;
    const top = EVENT_BAR * kinds.indexOf(event.kind) + 1;
    return svg("rect", { class: kind, x: a + 0.5, width: Math.max(b - a - 1, 1), y: top, height: EVENT_BAR - 3, rx: 2 }, tip);
  });
  return [...bands, ...bars];
}

const ROW_GAP = { stack: 15, own: 58, chain: 7 }; // px between rows of a montage or of the own channel, and before a chain

/**
 * Draw the EEG around a token: the rows of a montage with the active patch, and below them the activation on each patch.
 *
 * Without `montage`, only the rows of the token's channel are drawn, with the other channels faint behind them. The
 * gain is that of the gallery: `full` is the amplitude of a single row at full height, `spread` that between the rows of
 * a montage, and `largest` the activation drawn at full height. Labelled events are bars above the trace, hollow if they
 * are on other channels.
 *
 * The view of a recording adds to the example: `cells` {channels, from, to, kind, opacity}, which are shaded on the rows of
 * their channels (null: all) in place of the bands of events, and `bars` [from, to, activation] in place of its strip; to
 * the look, `gap` between rows [px], `time` to write seconds, and `plain` if no channel is the token's own.
 */
function drawExample(example, look) {
  const { full, spread, inUv, largest, rate, seconds } = look;
  const montage = look.montage && !missing(example.others);
  const { rows, faint } = exampleRows(example, look);
  const samples = decode(example.trace).length;
  const end = example.start + samples / rate;
  const gap = look.gap ?? (montage ? ROW_GAP.stack : ROW_GAP.own);
  const pxPerUnit = montage ? gap / spread : 43 / full;
  const sizes = inUv ? [1000, 500, 200, 100, 50, 20, 10, 5, 2, 1] : [10, 5, 2, 1];
  const bar = sizes.find((each) => each * pxPerUnit <= 46) ?? 0.5;
  const size = `${bar} ${inUv ? "µV" : "SD"}`;
  const chains = rows.map((_, i) => rows.slice(1, i + 1).filter((row) => row.isFirst).length);
  const margin = rows.length > 1 ? Math.max(...rows.map((row) => 6.4 * row.name.length)) + 8 : 0;
  const events = example.events ?? [];
  const channel = shownChannel(example);
  const here = new Set(events.filter((event) => isOn(event, channel)).map((event) => event.kind));
  // Those on the channel come last, which is nearest to its trace.
  const kinds = [...new Set(events.map((event) => event.kind))].sort((a, b) => here.has(a) - here.has(b));
  return (width) => {
    const above = EVENT_BAR * kinds.length;
    const box = { left: montage ? Math.max(32, margin) : margin, right: width - 13 - 6.2 * size.length, top: (montage ? 8 : 2) + above };
    const middle = (i) => box.top + (montage ? gap : 46) + gap * i + (montage ? ROW_GAP.chain * chains[i] : 0);
    box.bottom = middle(rows.length - 1) + (montage ? gap : 46);
    const floor = box.bottom + 26;
    const x = scale(example.start, end, box.left, box.right);
    const root = svg("svg", { width, height: floor + 18, role: "img" });
    if (example.patch) {
      const [a, b] = example.patch.map(x);
      root.append(svg("rect", { class: "patch", x: a, width: b - a, y: box.top, height: floor - box.top }));
    }
    root.append(...eventBands(events, kinds, x, example.cells ? null : channel, box, floor));
    const inside = (second) => x(Math.min(Math.max(second, example.start), end));
    for (const { channels, from, to, kind, opacity } of example.cells ?? []) {
      const place = { x: inside(from), width: inside(to) - inside(from), class: kind, opacity };
      const isOn = (row) => row.channels.some((i) => channels.includes(i));
      const marked = channels ? rows.flatMap((row, i) => (isOn(row) ? [{ y: middle(i) - gap / 2, height: gap }] : []))
        : [{ y: box.top, height: box.bottom - box.top }];
      root.append(...marked.map((at) => svg("rect", { ...place, ...at })));
    }
    // Peaks that are larger than the gain allows end at the border of this viewport.
    const window = svg("svg", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top });
    const course = (values, y, kind) => {
      // Of a montage, a sample is one of several of the trace: it is drawn at its own time.
      const each = Math.ceil(samples / values.length);
      const step = (box.right - box.left) / samples;
      const points = Array.from(values, (value, k) => [(k * each + 0.5) * step, y - box.top - value * pxPerUnit]);
      window.append(svg("path", { class: kind, d: line(points) }));
    };
    for (const { values } of faint) course(values, middle(0), "other faint");
    // The rows of the token's channel are drawn last, over the others.
    const isOwn = (row) => (row.isOwn ?? false) && !look.plain;
    const order = rows.map((_, i) => i).sort((a, b) => isOwn(rows[a]) - isOwn(rows[b]));
    for (const i of order) course(rows[i].values, middle(i), isOwn(rows[i]) ? "trace" : "other");
    const label = (row, i) => text(0, middle(i) + 3.5, "start", row.name, isOwn(row) ? "strong" : "");
    if (rows.length > 1) root.append(...rows.map(label));
    root.append(window);

    const [at, low] = [box.right + 7, middle(montage ? Math.min(1, rows.length - 1) : 0) + (bar * pxPerUnit) / 2];
    root.append(svg("path", { class: "axis", d: `M${at} ${low}v${-bar * pxPerUnit}` }));
    root.append(text(at + 4, low - (bar * pxPerUnit) / 2 + 3.5, "start", size));
    const strip = (example.strip ?? []).map((value, i) => [example.strip_start + i * seconds, example.strip_start + (i + 1) * seconds, value]);
    for (const [from, to, value] of example.bars ?? strip) {
      const [a, b] = [from, to].map(inside);
      if (!(value > 0) || b <= a) continue;
      const height = Math.max(1, (20 * value) / largest);
      const place = { x: a + 0.5, width: Math.max(b - a - 1, 0.5), y: floor - height, height };
      root.append(svg("rect", { class: "strip", ...place }, svg("title", {}, `activation ${number(value)}`)));
    }
    root.append(svg("path", { class: "axis", d: `M${box.left} ${floor}H${box.right}` }));
    const timeName = (second) => look.time?.(second) ?? `${second.toFixed(1)} s`;
    const wide = 6.2 * timeName(end).length; // px
    for (const second of ticks(example.start, end, false, Math.min(5, (box.right - box.left) / (wide + 6)))) {
      root.append(svg("path", { class: "axis", d: `M${x(second)} ${floor}v3` }));
      // Not where it would be cut off.
      if (x(second) >= wide / 2) root.append(text(x(second), floor + 14, "middle", timeName(second)));
    }
    return root;
  };
}
