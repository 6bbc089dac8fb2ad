// The EEG around a token, with the labelled events that overlap it.
"use strict";

const decode = (base64) => Int8Array.from(atob(base64), (byte) => byte.charCodeAt(0)); // units of 0.1 SD
const peak = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 10;
const EVENT_BAR = 7; // px, of each kind of event above the trace

const eventColours = new Map();
/** Return the class of a kind of event's colour, the same on all pages. */
function eventColour(kind) {
  if (!eventColours.has(kind)) eventColours.set(kind, `kind-${eventColours.size % N_COLOURS}`);
  return eventColours.get(kind);
}

/**
 * Return the gain of panels of one channel: the amplitude drawn at full height, the same in all of them.
 *
 * It is in µV if all examples have them, else in SD. A tenth of the peaks is cut off.
 */
function galleryGain(examples) {
  const inUv = examples.every((e) => e.uv_per_sd > 0);
  const peaks = examples.map((e) => peak(decode(e.trace)) * (inUv ? e.uv_per_sd : 1)).sort((a, b) => a - b);
  const usual = peaks[Math.floor(0.9 * (peaks.length - 1))] ?? 0;
  return { inUv, full: Math.max(usual, inUv ? 1 : 2), cuts: peaks.at(-1) > usual };
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

/** Return bands over the time of labelled events on a channel, and bars above them for events on any channel. */
function eventBands(events, kinds, x, channel, box, floor) {
  const place = (event) => [event.start, event.stop].map((second) => Math.min(Math.max(x(second), box.left), box.right));
  const bands = kinds.flatMap((kind) => {
    const here = events.filter((event) => event.kind === kind && isOn(event, channel));
    return united(here.map(place)).map(([a, b]) => svg("rect", { class: `event-band ${eventColour(kind)}`, x: a,
      width: Math.max(b - a, 1.5), y: box.top, height: floor - box.top }));
  });
  const bars = events.map((event) => {
    const [a, b] = place(event);
    const tip = svg("title", {}, `${event.kind}, ${fixed(event.start, 2)}–${fixed(event.stop, 2)} s, ${event.channels.join(" ")}`);
    const kind = `event-bar ${eventColour(event.kind)}${isOn(event, channel) ? "" : " elsewhere"}`;
    const top = EVENT_BAR * kinds.indexOf(event.kind) + 1;
    return svg("rect", { class: kind, x: a + 0.5, width: Math.max(b - a - 1, 1), y: top, height: EVENT_BAR - 3, rx: 2 }, tip);
  });
  return [...bands, ...bars];
}

/**
 * Draw the EEG around a token: the channel's trace with the active patch, and below it the activation on each patch.
 *
 * Other channels are faint behind it or, in a montage, one below the other. `gain` is that of the gallery, `usual` [SD]
 * the amplitude of a montage, and `largest` the activation drawn at full height. Labelled events are bars above the
 * trace, hollow if they are on other channels.
 */
function drawExample(example, { montage, gain, usual, largest, channels, rate, seconds }) {
  const trace = decode(example.trace);
  const others = missing(example.others) ? null : decode(example.others);
  const samples = others && others.length / channels.length;
  const own = channels.indexOf(example.trace_channel ?? example.channel);
  const end = example.start + trace.length / rate;
  const gap = 15; // px between the rows of a montage
  const full = gain.inUv ? gain.full / example.uv_per_sd : gain.full; // SD
  const sd = montage ? gap / Math.max(2.2, usual / 2.5) : 43 / full; // px
  const events = example.events ?? [];
  const shownChannel = example.trace_channel ?? example.channel;
  const here = new Set(events.filter((event) => isOn(event, shownChannel)).map((event) => event.kind));
  // Those on the channel come last, which is nearest to its trace.
  const kinds = [...new Set(events.map((event) => event.kind))].sort((a, b) => here.has(a) - here.has(b));
  return (width) => {
    const above = EVENT_BAR * kinds.length;
    const box = { left: montage ? 32 : 0, right: width - 44, top: (montage ? 8 : 2) + above };
    box.bottom = box.top + (montage ? gap * (channels.length + 1) : 92);
    const floor = box.bottom + 26;
    const x = scale(example.start, end, box.left, box.right);
    const middle = (i) => (montage ? box.top + gap * (i + 1) : (box.top + box.bottom) / 2);
    const root = svg("svg", { width, height: floor + 18, role: "img" });
    if (example.patch) {
      const [a, b] = example.patch.map(x);
      root.append(svg("rect", { class: "patch", x: a, width: b - a, y: box.top, height: floor - box.top }));
    }
    root.append(...eventBands(events, kinds, x, shownChannel, box, floor));
    // Peaks that are larger than the gain allows end at the border of this viewport.
    const window = svg("svg", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top });
    const course = (values, y, kind) => {
      const step = (box.right - box.left) / values.length;
      const points = Array.from(values, (value, k) => [(k + 0.5) * step, y - box.top - (value / 10) * sd]);
      window.append(svg("path", { class: kind, d: line(points) }));
    };
    channels.forEach((name, i) => {
      if (others && i !== own) {
        course(others.subarray(i * samples, (i + 1) * samples), middle(i), montage ? "other" : "other faint");
      }
      if (montage) root.append(text(0, middle(i) + 3.5, "start", name, i === own ? "strong" : ""));
    });
    course(trace, middle(own), "trace");
    root.append(window);

    // In a montage the channels' µV differ, and so the bar is in SD.
    const inUv = !montage && gain.inUv;
    const [unit, px] = inUv ? ["µV", sd / example.uv_per_sd] : ["SD", sd];
    const sizes = inUv ? [1000, 500, 200, 100, 50, 20, 10, 5, 2, 1] : [10, 5, 2, 1];
    const bar = sizes.find((size) => size * px <= 46) ?? 0.5;
    const [at, low] = [box.right + 7, (montage ? middle(1) : middle(0)) + (bar * px) / 2];
    root.append(svg("path", { class: "axis", d: `M${at} ${low}v${-bar * px}` }));
    root.append(text(at + 4, low - (bar * px) / 2 + 3.5, "start", `${bar} ${unit}`));
    (example.strip ?? []).forEach((value, i) => {
      const from = example.strip_start + i * seconds;
      const [a, b] = [from, from + seconds].map((second) => x(Math.min(Math.max(second, example.start), end)));
      if (!(value > 0) || b <= a) return;
      const height = Math.max(1, (20 * value) / largest);
      const place = { x: a + 0.5, width: Math.max(b - a - 1, 0.5), y: floor - height, height };
      root.append(svg("rect", { class: "strip", ...place }, svg("title", {}, `activation ${number(value)}`)));
    });
    root.append(svg("path", { class: "axis", d: `M${box.left} ${floor}H${box.right}` }));
    for (const second of ticks(example.start, end, false, 5)) {
      root.append(svg("path", { class: "axis", d: `M${x(second)} ${floor}v3` }));
      const anchor = x(second) < box.left + 16 ? "start" : x(second) > box.right - 12 ? "end" : "middle";
      root.append(text(x(second), floor + 14, anchor, `${second.toFixed(1)} s`));
    }
    return root;
  };
}
