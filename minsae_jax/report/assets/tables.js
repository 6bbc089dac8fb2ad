// Tables, most of them sorted by a click on a column's title, with the order in the page's address; and lists of facts.
"use strict";

/**
 * Return a table of `rows`; columns without any value are left out.
 *
 * A column is {name, title, hint, value, cell, words}: value(row) sorts, cell(row) is shown (value by default), and
 * words are sorted and aligned as text. `order` is a column's name, after "-" for descending. Rows for which `isMarked`
 * are emphasised.
 */
function dataTable(columns, rows, order, isMarked = () => false) {
  const used = columns.filter((c) => rows.some((row) => !missing(c.value(row))));
  const chosen = parameters().get("sort") ?? order;
  const down = chosen.startsWith("-");
  const sorted = used.find((c) => c.name === chosen.replace(/^-/, ""));
  const title = (c) => {
    const isSorted = c === sorted;
    const next = isSorted ? !down : !c.words;
    const sort = () => {
      setParameters({ sort: `${next ? "-" : ""}${c.name}` });
      table.replaceWith(dataTable(columns, rows, order, isMarked));
    };
    const direction = !isSorted ? "none" : down ? "descending" : "ascending";
    return html("th", { scope: "col", class: c.words ? "" : "num", title: c.hint ?? null, "aria-sort": direction },
      html("button", { type: "button", onclick: sort }, c.title));
  };
  const ordered = sorted ? sortRows(rows, sorted.value, down) : rows;
  const body = ordered.map((row) => html("tr", { class: isMarked(row) ? "marked" : null },
    used.map((c) => html("td", { class: c.words ? "" : "num" }, c.cell ? c.cell(row) : c.value(row)))));
  const table = html("div", { class: "scroll" },
    html("table", { class: "data" }, html("thead", {}, html("tr", {}, used.map(title))), html("tbody", {}, body)));
  return table;
}

/** Return a table with a head; a column is [title, hint, class]. */
function headedTable(kind, columns, rows) {
  const head = columns.map(([title, hint, column]) => html("th", { scope: "col", class: column ?? null, title: hint ?? null }, title));
  return html("table", { class: kind }, html("thead", {}, html("tr", {}, head)), html("tbody", {}, rows));
}

/** Return a list of facts: [name, value]. */
const factList = (rows) => html("dl", { class: "facts" }, rows.map(([name, value]) =>
  html("div", {}, html("dt", {}, name), html("dd", {}, value))));

const pValue = (value) => (value < 1e-4 ? "< 0.0001" : number(value, 2));

/** Return the rows in the order of a value; those without one are last, whichever the direction. */
function sortRows(rows, value, down) {
  const sign = down ? -1 : 1;
  return rows.map((row) => [value(row), row])
    .sort(([u], [v]) => (missing(u) || missing(v) ? missing(u) - missing(v) : sign * (u < v ? -1 : u > v ? 1 : 0)))
    .map(([, row]) => row);
}

/** Return dots for all seeds, filled for those in which a feature is found, or "–". */
function seedDots(found, seeds) {
  if (missing(found)) return "–";
  const title = `found with ${found} of ${seeds} seeds`;
  return html("span", { class: `dots ${found === 1 ? "few" : ""}`, title, role: "img", "aria-label": title },
    Array.from({ length: seeds }, (_, i) => html("i", { class: i < found ? "on" : "" })));
}

/** Return a value with its interval in softer ink beside it. */
function withInterval(value, interval, format = fixed) {
  if (!interval) return format(value);
  const between = interval[0] < 0 ? " to " : "–";
  return [`${format(value)} `, html("span", { class: "interval" }, `${format(interval[0])}${between}${format(interval[1])}`)];
}
