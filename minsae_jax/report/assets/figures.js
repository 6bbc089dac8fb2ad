// The report's figures: plots, the scalp and EEG. Each is drawn at the width of its element.
// Data become text nodes and attributes only, never markup.
"use strict";

function build(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}
const html = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const text = (x, y, anchor, content, kind = "") => svg("text", { x, y, "text-anchor": anchor, class: kind }, content);
const line = (points) => "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");

const missing = (value) => value === null || value === undefined || value === "";
const whole = (value) => Math.round(value).toLocaleString("en");
const count = (n, name) => `${whole(n)} ${name}${n === 1 ? "" : "s"}`;

/** Format a number for an axis: up to three digits. */
function short(value) {
  if (missing(value)) return "";
  return (Math.abs(value) >= 1000 ? whole(value) : String(Number(value.toPrecision(3)))).replaceAll("-", "−");
}

/** Format a number for a table: three digits, as in 8.30 and 0.0210; "–" if it is missing. */
function number(value, digits = 3) {
  if (missing(value)) return "–";
  const plain = Number.isInteger(value) || Math.abs(value) >= 10 ** digits - 0.5;
  return (plain ? whole(value) : value.toPrecision(digits)).replaceAll("-", "−");
}
/** Format a number with a fixed number of decimals, so that columns are aligned. */
const fixed = (value, decimals = 3) => (missing(value) ? "–" : value.toFixed(decimals).replaceAll("-", "−"));
const percent = (value) => (missing(value) ? "–" : `${number(100 * value, 2)} %`);

/** Return an element in which `draw(width)` draws; `name` is that of its file when it is saved. */
function figure(draw, name = null) {
  const node = html("div", { class: "figure" });
  const save = html("button", { type: "button", class: "save", title: "Save this figure as SVG", onclick: () => saveFigure(node, name) }, "SVG");
  node.draw = () => {
    node.replaceChildren(draw(node.clientWidth), save);
    // By this box the style for paper, which is narrower than the window, can make it smaller.
    const drawn = node.querySelector("svg");
    drawn?.setAttribute("viewBox", `0 0 ${drawn.getAttribute("width")} ${drawn.getAttribute("height")}`);
  };
  return node;
}

function redrawFigures() {
  for (const node of document.querySelectorAll(".figure")) {
    if (node.clientWidth) node.draw();
  }
}

// ---- plots

function scale(from, to, a, b, log = false) {
  const f = log ? Math.log10 : Number;
  return (value) => a + ((f(value) - f(from)) / (f(to) - f(from) || 1)) * (b - a);
}

function ticks(from, to, log, n) {
  if (log) {
    const powers = [];
    for (let p = Math.floor(Math.log10(from)); p <= Math.log10(to); p++) powers.push(p);
    const all = (steps) => powers.flatMap((p) => steps.map((m) => Number(`${m}e${p}`))).filter((v) => v >= from && v <= 1.0001 * to);
    const fine = all([1, 2, 5]);
    if (fine.length <= n) return fine;
    const coarse = all([1]);
    const step = Math.ceil(coarse.length / n);
    return coarse.filter((_, i) => (coarse.length - 1 - i) % step === 0);
  }
  const rough = (to - from) / n || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= 0.999 * rough);
  const values = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + 1e-9 * step; i++) values.push(i * step);
  return values;
}

/** Return how many ticks fit the x axis of a plot; those of a logarithmic one have long labels. */
const tickCount = (width, log = false) => Math.max(2, Math.floor(width / (log ? 70 : 50)));

/** Return axes with a grid: the svg, both scales and the box. x and y: {from, to, label, log, format}; a y of no extent has no ticks. */
function axes(width, height, x, y, left = 44) {
  const box = { left, right: width - 16, top: 18, bottom: height - 34 };
  const sx = scale(x.from, x.to, box.left, box.right, x.log);
  const sy = scale(y.from, y.to, box.bottom, box.top, y.log);
  const root = svg("svg", { width, height, role: "img" });
  for (const value of y.to > y.from ? ticks(y.from, y.to, y.log, 4) : []) {
    root.append(svg("path", { class: "grid", d: `M${box.left} ${sy(value)}H${box.right}` }));
    root.append(text(box.left - 6, sy(value) + 3.5, "end", (y.format ?? short)(value)));
  }
  for (const value of ticks(x.from, x.to, x.log, tickCount(width, x.log))) {
    root.append(text(sx(value), box.bottom + 14, "middle", (x.format ?? short)(value)));
  }
  root.append(svg("path", { class: "axis", d: `M${box.left} ${box.bottom}H${box.right}` }));
  root.append(text((box.left + box.right) / 2, height - 4, "middle", x.label, "label"));
  root.append(text(box.left, 10, "start", y.label ?? "", "label"));
  return { root, sx, sy, box };
}

const level = ({ box, sy }, value) => svg("path", { class: "base", d: `M${box.left} ${sy(value)}H${box.right}` });

/** Return a function that draws counts between edges, with a dotted line at `expected`; `describe` makes tooltips. */
function drawBars(edges, counts, x, y, describe, expected = null) {
  return (width) => {
    const plot = axes(width, 190, { from: edges[0], to: edges.at(-1), ...x }, y);
    counts.forEach((n, i) => {
      if (!n) return;
      const [a, b, top] = [plot.sx(edges[i]), plot.sx(edges[i + 1]), plot.sy(n)];
      const at = { x: a + 0.5, width: Math.max(b - a - 1, 0.5), y: top, height: plot.box.bottom - top };
      plot.root.append(svg("rect", { class: "bar", ...at }, svg("title", {}, describe(n, i))));
    });
    if (expected !== null) plot.root.append(level(plot, expected));
    return plot.root;
  };
}

/** Draw the number of features by density, in half decades. */
function drawDensities(densities) {
  const active = densities.filter((density) => density > 0).map((density) => Math.log10(density));
  // Not Math.min(...): the features may be too many for arguments of a function.
  const least = active.reduce((smallest, power) => (power > -8 && power < smallest ? power : smallest), -2);
  const first = Math.floor(2 * least);
  const edges = Array.from({ length: 1 - first }, (_, i) => 10 ** ((first + i) / 2));
  const counts = Array.from({ length: -first }, () => 0);
  for (const power of active) counts[Math.min(Math.max(Math.floor(2 * power) - first, 0), counts.length - 1)]++;
  const x = { log: true, label: "density: share of tokens", format: (v) => `${short(100 * v)} %` };
  const y = { from: 0, to: 1.1 * Math.max(...counts, 1), label: "features" };
  return drawBars(edges, counts, x, y, (n) => count(n, "feature"));
}

function drawHistogram({ edges, counts }) {
  const y = { from: 0.7, to: 1.5 * Math.max(...counts, 1), log: true, label: "tokens" };
  const describe = (n, i) => `${number(edges[i])} to ${number(edges[i + 1])}: ${count(n, "token")}`;
  return drawBars(edges, counts, { log: edges[0] > 0, label: "activation" }, y, describe);
}

function drawPosition(shares, seconds) {
  const even = 1 / shares.length;
  const edges = [...shares.map((_, i) => i * seconds), shares.length * seconds];
  const y = { from: 0, to: 1.15 * Math.max(...shares, even), label: "share", format: (v) => `${short(100 * v)} %` };
  const describe = (share, i) => `patch ${i}: ${percent(share)}`;
  return drawBars(edges, shares, { label: "second of the window" }, y, describe, even);
}

const N_COLOURS = 6;
const MAX_NAMES = 40; // of channels on the head; of more, the top channel only

const decibel = (ratio) => 10 * Math.log10(Math.max(ratio ?? 1, 1e-3));
const GREEK = { delta: "δ", theta: "θ", alpha: "α", beta: "β", gamma: "γ" };

function drawSpectrum({ hz, ratio, low, high }, bands) {
  const [middle, bottom, top] = [ratio, low, high].map((values) => values.map(decibel));
  const [least, most] = [Math.min(-1, ...bottom), Math.max(1, ...top)];
  const room = 0.2 * (most - least);
  return (width) => {
    const y = { from: least - room / 4, to: most + room, label: "dB" };
    const plot = axes(width, 220, { from: hz[0], to: hz.at(-1), label: "frequency [Hz]" }, y);
    const { root, sx, sy, box } = plot;
    const inside = (f) => Math.min(Math.max(sx(f), box.left), box.right);
    const narrow = bands.some(([name, from, to]) => sx(to) - sx(from) < 6.5 * name.length);
    bands.forEach(([name, from, to], i) => {
      const [a, b] = [inside(from), inside(to)];
      const at = { x: a, width: b - a, y: box.top, height: box.bottom - box.top };
      if (i % 2 === 0) root.prepend(svg("rect", { class: "band", ...at }));
      const written = narrow ? (GREEK[name] ?? name[0]) : name;
      if (b > a) root.append(text((a + b) / 2, box.top + 12, "middle", written, "label"));
    });
    const course = (values) => values.map((value, i) => [sx(hz[i]), sy(value)]);
    root.append(svg("path", { class: "area", d: line([...course(top), ...course(bottom).reverse()]) + "Z" }));
    root.append(level(plot, 0), svg("path", { class: "curve", d: line(course(middle)) }));
    return root;
  };
}

/** Draw waveforms of a patch over each other: {values, kind, name}; names are the legend. */
function drawWaveforms(waveforms, rate, unit = "") {
  const most = 1.15 * Math.max(...waveforms.flatMap((w) => w.values.map(Math.abs)), 1e-9);
  const step = 1000 / rate;
  const longest = Math.max(...waveforms.map((w) => w.values.length));
  return (width) => {
    const x = { from: 0, to: Math.max(longest - 1, 1) * step, label: "ms from the patch's start" };
    const plot = axes(width, 190, x, { from: -most, to: most, label: unit.replace("uV", "µV") });
    plot.root.append(level(plot, 0));
    waveforms.forEach(({ values, kind, name }, i) => {
      const points = values.map((value, k) => [plot.sx(k * step), plot.sy(value)]);
      plot.root.append(svg("path", { class: `curve ${kind}`, d: line(points) }));
      if (name) plot.root.append(text(plot.box.right, plot.box.top + 13 * i, "end", name, kind));
    });
    return plot.root;
  };
}

/** Return a list with a bar for each row [name or node, share, text]. */
function bars(rows) {
  const most = Math.max(...rows.map((row) => row[1]), 1e-9);
  return html("dl", { class: "bars" }, rows.map(([name, share, value]) => [
    html("dt", { title: name.title || (typeof name === "string" ? name : null) }, name),
    html("dd", { style: `--fill:${(100 * Math.max(share, 0)) / most}%` }, value ?? percent(share)),
  ]));
}

/** Return a small plot of a value with an interval, for a cell of a table; `of` says what the interval is. */
function track(value, { interval = null, from = 0.5, to = 1, kind = "", of = "95 % interval", width = 140 }) {
  const [height, middle] = [20, 10];
  const x = scale(from, to, 5, width - 5);
  const inside = (v) => x(Math.min(Math.max(v, from), to));
  const root = svg("svg", { width, height, class: `track ${kind}`, role: "img" }, svg("path", { class: "grid", d: `M${x(from)} ${middle}H${x(to)}` }));
  if (missing(value)) return root;
  const range = interval ? `, ${of} ${interval.map((v) => fixed(v)).join(" to ")}` : "";
  root.append(svg("title", {}, `${fixed(value)}${range}`));
  if (interval) root.append(svg("path", { class: "whisker", d: `M${inside(interval[0])} ${middle}H${inside(interval[1])}` }));
  root.append(svg("circle", { cx: inside(value), cy: middle, r: 3.2 }));
  return root;
}

// ---- the scalp

/**
 * Fit a slightly smoothed thin-plate spline to values at points, and return (x, y) => value.
 *
 * value(p) = Σ_i w_i U(|p - p_i|) + a + b·x + c·y with U(r) = r² log r², where Σ w_i = Σ w_i x_i = Σ w_i y_i = 0.
 * The linear system of these equations at all points is solved by Gauss-Jordan elimination with pivoting.
 */
function spline(points, values) {
  const bend = (d2) => (d2 > 0 ? d2 * Math.log(d2) : 0);
  const n = points.length;
  const rows = points.map(([x, y], i) => {
    const row = points.map(([u, v], j) => (i === j ? 0.02 : bend((x - u) ** 2 + (y - v) ** 2)));
    return [...row, 1, x, y, values[i]];
  });
  for (const column of [n, n + 1, n + 2]) rows.push([...rows.slice(0, n).map((row) => row[column]), 0, 0, 0, 0]);
  for (let i = 0; i < n + 3; i++) {
    let pivot = i;
    for (let k = i; k < n + 3; k++) if (Math.abs(rows[k][i]) > Math.abs(rows[pivot][i])) pivot = k;
    [rows[i], rows[pivot]] = [rows[pivot], rows[i]];
    for (const row of rows) {
      const factor = row === rows[i] ? 0 : row[i] / rows[i][i];
      if (factor) for (let k = i; k < row.length; k++) row[k] -= factor * rows[i][k];
    }
  }
  const weight = rows.map((row, i) => row.at(-1) / row[i]);
  return (x, y) =>
    points.reduce((sum, [u, v], i) => sum + weight[i] * bend((x - u) ** 2 + (y - v) ** 2), 0) +
    weight[n] + weight[n + 1] * x + weight[n + 2] * y;
}

/** Return a function from a value in [-1, 1] to [r, g, b], between the page's three colours. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const [low, middle, high] = ["--low", "--mid", "--high"].map((name) =>
    style.getPropertyValue(name).match(/\w\w/g).map((part) => parseInt(part, 16)));
  return (value) => {
    const end = value < 0 ? low : high;
    return middle.map((from, i) => Math.round(from + Math.min(Math.abs(value), 1) * (end[i] - from)));
  };
}

/**
 * Draw ratios of channels on a head seen from above, on a log2 colour scale.
 *
 * `of` names the denominator. Channels without a position are left out.
 */
function drawScalp(allRatios, top, allChannels, allPositions, of) {
  const placed = allPositions.flatMap((p, i) => (missing(p[0]) ? [] : [i]));
  const [ratios, channels, positions] = [allRatios, allChannels, allPositions].map((list) => placed.map((i) => list[i]));
  const exact = ratios.map((ratio) => Math.log2(Math.max(ratio ?? 1, 1e-3)));
  const doublings = exact.map((power) => Math.min(3, Math.max(-3, power)));
  const most = Math.max(1, Math.ceil(Math.max(...doublings.map(Math.abs))));
  const smooth = spline(positions, doublings);
  const reach = 1.2; // half the image's width; the head's radius is 1.17 and that of the ears 1
  const outermost = Math.max(reach, ...positions.map(([x, y]) => Math.hypot(x, y)));
  return (width) => {
    const colour = colours();
    const n = 80;
    const canvas = html("canvas", { width: n, height: n });
    const image = new ImageData(n, n);
    for (let i = 0; i < n * n; i++) {
      const [x, y] = [i % n, Math.floor(i / n)].map((k) => reach * ((2 * k + 1) / n - 1));
      image.data.set([...colour(smooth(x, -y) / most), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);

    const radius = Math.min(width - 90, 290) / (2 * outermost);
    const head = 1.17 * radius;
    const isCrowded = channels.length > MAX_NAMES;
    const below = outermost > reach ? 14 : 0; // for names of channels below the head
    const [cx, cy] = [(width - 40) / 2, outermost * radius + 15];
    const root = svg("svg", { width, height: cy + outermost * radius + 5 + below, role: "img" });
    const [side, href] = [2 * reach * radius, canvas.toDataURL()];
    root.append(svg("clipPath", { id: "head" }, svg("circle", { cx, cy, r: head })),
      svg("image", { href, "clip-path": "url(#head)", x: cx - side / 2, y: cy - side / 2, width: side, height: side }));
    const nose = `M${cx - 13} ${cy - head + 1}L${cx} ${cy - head - 13}L${cx + 13} ${cy - head + 1}`;
    const ear = (to) => `M${cx + to * head} ${cy - 16}q${to * 10} 0 ${to * 7} 16t${-to * 7} 16`;
    root.append(svg("path", { class: "head", d: nose + ear(-1) + ear(1) }));
    root.append(svg("circle", { class: "head", cx, cy, r: head }));
    channels.forEach((name, i) => {
      const [x, y] = [cx + radius * positions[i][0], cy - radius * positions[i][1]];
      const tip = svg("title", {}, `${name}: ${number(ratios[i])} times ${of}`);
      const fill = `rgb(${colour(doublings[i] / most)})`;
      root.append(svg("circle", { class: "dot", cx: x, cy: y, r: isCrowded ? 3.5 : 5, fill }, tip));
      if (name === top || !isCrowded) root.append(text(x, y + 16, "middle", name, name === top ? "channel strong" : "channel"));
    });
    const [at, tall] = [width - 46, Math.min(150, 1.6 * head)];
    for (let i = 0; i < 40; i++) {
      const part = { x: at, y: cy - tall / 2 + (i * tall) / 40, width: 9, height: tall / 40 + 0.5 };
      root.append(svg("rect", { ...part, fill: `rgb(${colour(1 - i / 19.5)})` }));
    }
    for (const power of [most, 0, -most]) {
      const beyond = power && exact.some((value) => value / power > 1) ? (power < 0 ? "≤" : "≥") : "";
      const name = `${beyond}×${power < 0 ? `1/${2 ** -power}` : 2 ** power}`;
      root.append(text(at + 14, cy - (power / most) * (tall / 2) + 3.5, "start", name));
    }
    return root;
  };
}
