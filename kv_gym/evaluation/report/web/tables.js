"use strict";
// Tables whose columns sort. All text goes in as text, never as markup; every number also stands, unrounded, in the
// data attributes of its cell.
const tables = (() => {
  const number = (digits) => (value) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const format = {
    text: (value) => String(value),
    percent: (value) => `${number(1)(100 * value)}%`,
    signed: (value) => `${value < 0 ? "−" : "+"}${number(1)(Math.abs(100 * value))}`,
    gain: (value) => `${value < 0 ? "−" : "+"}${number(3)(Math.abs(value))}`,
    three: number(3), one: number(1), whole: number(0),
    flag: (value) => (value ? "●" : ""),
  };

  // Fill `parent` with rows; `columns` are { field, title, form, low, high, sort }.
  function show(parent, caption, columns, rows, start) {
    const state = parent.sorting || { field: start && start.field, down: !start || start.down };
    parent.sorting = state;
    const table = document.createElement("table");
    table.setAttribute("aria-label", caption);
    const head = table.createTHead().insertRow();
    for (const column of columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.dataset.field = column.field;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = column.title;
      button.addEventListener("click", () => {
        state.down = state.field === column.field ? !state.down : column.form !== "text";
        state.field = column.field;
        show(parent, caption, columns, rows);
        parent.querySelector(`th[data-field="${column.field}"] button`).focus({ preventScroll: true });
      });
      if (state.field === column.field) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      cell.append(button);
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of sorted(rows, columns.find((column) => column.field === state.field), state.down)) {
      const line = body.insertRow();
      for (const name of ["task", "configuration", "budget", "role", "layer", "head", "part", "variant"]) {
        if (row[name] !== undefined) line.dataset[name] = row[name];
      }
      for (const column of columns) fill(line.insertCell(), column, row);
    }
    parent.replaceChildren(table);
  }

  function fill(cell, column, row) {
    const value = row[column.field];
    cell.dataset.field = column.field;
    if (value === null || value === undefined) return;
    cell.dataset.value = value;
    cell.textContent = format[column.form](value);
    if (column.form === "text") cell.title = value;
    const [low, high] = [row[column.low], row[column.high]];
    if (typeof low === "number" && typeof high === "number") {
      cell.dataset.low = low;
      cell.dataset.high = high;
      const small = document.createElement("small");
      small.textContent = ` ${format[column.form](low)} to ${format[column.form](high)}`;
      cell.append(small);
    }
  }

  // What is not known comes last, whichever way is sorted.
  function sorted(rows, column, down) {
    if (!column) return rows;
    const key = (row) => row[column.sort || column.field];
    const missing = (value) => value === null || value === undefined;
    return [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return down ? -order : order;
    });
  }

  return { show };
})();
