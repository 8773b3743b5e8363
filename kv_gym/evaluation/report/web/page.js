"use strict";
// The page: what is selected, and the sections that show it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const { points, styles, specs } = data;
  const hidden = new Set(Object.keys(styles).filter((configuration) => !styles[configuration].prime));
  const light = ["slots", "head_utility", "head_gain", "parts"]; // what charts over budgets do not draw
  const slim = points.map((point) => Object.fromEntries(Object.entries(point).filter(([name]) => !light.includes(name))));
  let task = data.tasks[0];
  const ofTask = () => points.filter((point) => point.task === task);
  const shown = () => slim.filter((point) => point.task === task && !hidden.has(point.configuration));
  const has = (field, among = points) => among.some((point) => point[field] !== null && point[field] !== undefined);
  const options = (select, values, texts) => {
    const before = select.value;
    select.replaceChildren(...values.map((value, i) => new Option(texts[i], value)));
    if (values.map(String).includes(before)) select.value = before;
  };
  const budgets = (among) => {
    const known = new Map(among.map((point) => [point.budget, point.budget_text]));
    return [...known].sort((a, b) => b[0] - a[0]);
  };

  const measures = { accuracy: "Accuracy", nll: "NLL", utility_kept: "Utility kept", hit_rate: "Hit rate" };
  const costs = { total_bytes: "Accuracy against bytes", milliseconds: "Accuracy against time" };
  const policy = { field: "configuration", title: "policy", form: "text" };
  const budget = { field: "budget_text", title: "budget", form: "text", sort: "budget" };
  const capacity = { ...budget, title: "capacity" };
  const interval = (field, title, form) => ({ field, title, form, low: `${field}_low`, high: `${field}_high` });
  const columns = {
    quality: [policy, budget, interval("accuracy", "accuracy", "percent"), interval("nll", "NLL", "three"),
      interval("utility_kept", "utility kept", "three"), interval("hit_rate", "hit rate", "percent"), interval("difference", "points over best heuristic", "signed"),
      { field: "runs", title: "runs", form: "whole" }, { field: "n", title: "n", form: "whole" }],
    frontier: [policy, budget, interval("accuracy", "accuracy", "percent"), { field: "bytes", title: "cache bytes", form: "whole" },
      { field: "weights", title: "policy bytes", form: "whole" }, { field: "total_bytes", title: "together", form: "whole" },
      { field: "milliseconds", title: "ms", form: "one" }, { field: "front_total_bytes", title: "bytes frontier", form: "flag" },
      { field: "front_milliseconds", title: "ms frontier", form: "flag" }],
  };
  const used = (list, rows) => list.filter((column) => has(column.field, rows) && (column.form !== "flag" || rows.some((row) => row[column.field])));

  function legend() {
    for (const [configuration, style] of Object.entries(styles)) {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.configuration = configuration;
      button.dataset.role = style.role;
      button.dataset.prime = style.prime;
      button.title = configuration;
      const name = document.createElement("span");
      name.textContent = configuration;
      button.append(charts.symbol(style), name);
      button.addEventListener("click", () => { hidden.has(configuration) ? hidden.delete(configuration) : hidden.add(configuration); pressed(); });
      for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => charts.highlight(hidden.has(configuration) ? "" : configuration));
      for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => charts.highlight(""));
      find("legend").append(button);
    }
    const few = Object.values(styles).every((style) => style.prime);
    find("more").hidden = find("prime").hidden = few;
    const open = (wide) => { find("legend").toggleAttribute("data-open", wide); find("more").setAttribute("aria-expanded", String(wide)); find("more").textContent = wide ? "fewer" : "more"; };
    open(Object.keys(styles).length < 20);
    find("more").addEventListener("click", () => open(!find("legend").hasAttribute("data-open")));
    const choose = (keep) => { hidden.clear(); Object.keys(styles).filter((configuration) => !keep(configuration)).forEach((configuration) => hidden.add(configuration)); pressed(); };
    find("prime").addEventListener("click", () => choose((configuration) => styles[configuration].prime));
    find("every").addEventListener("click", () => { open(true); choose(() => true); });
    pressed();
  }
  function pressed() {
    for (const button of find("legend").children) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.configuration)));
    charts.refresh();
  }

  function cards() {
    const made = [];
    const card = (big, text, colour) => {
      const box = document.createElement("div");
      box.className = "card";
      if (colour) box.style.setProperty("--hue", `var(--c-${colour})`);
      const [strong, small] = [document.createElement("b"), document.createElement("small")];
      strong.textContent = big;
      small.textContent = text;
      box.append(strong, small);
      made.push(box);
    };
    const full = ofTask().find((point) => point.role === "full" && point.accuracy !== null);
    const first = (role) => ofTask().filter((p) => p.smallest && role.includes(p.role)).sort((a, b) => a.budget - b.budget || b.accuracy - a.accuracy)[0];
    for (const [role, name] of [[["learned"], "learned policy"], [["heuristic", "null"], "heuristic"]]) {
      const best = first(role);
      if (best) card(best.budget_text, `of the cache holds the full cache's accuracy within a point: ${best.configuration}, the best ${name}`, styles[best.configuration].colour);
      else if (full && ofTask().some((p) => role.includes(p.role) && p.accuracy !== null)) card("–", `no ${name} keeps the full cache's accuracy within a point`, "grey");
    }
    if (full) card(`${(100 * full.accuracy).toFixed(1)}%`, "of the questions are answered right with the full cache", "ink");
    find("cards").replaceChildren(...made);
    find("summary").hidden = !made.length;
  }

  function heads() {
    const able = ofTask().filter((point) => point.slots || point.head_gain);
    find("heads").hidden = !able.length;
    if (!able.length) return [];
    const configurations = Object.keys(styles).filter((configuration) => able.some((point) => point.configuration === configuration));
    options(find("heads-configuration"), configurations, configurations);
    const mine = able.filter((point) => point.configuration === find("heads-configuration").value);
    const known = budgets(mine);
    options(find("heads-budget"), known.map(([value]) => value), known.map(([, text]) => text));
    const point = mine.find((one) => String(one.budget) === find("heads-budget").value);
    const grid = point.slots || point.head_gain;
    find("heads-caption").textContent = (point.slots ? "Slots held by each KV head, mean over contexts" : "")
      + (point.head_gain ? `${point.slots ? "; " : ""}utility kept by each head beyond that of ${point.gain_over}, the best heuristic at this budget` : "") + ".";
    return grid.flatMap((line, layer) => line.map((_, head) => ({
      layer, head, slots: point.slots ? point.slots[layer][head] : null, gain: point.head_gain ? point.head_gain[layer][head] : null,
    })));
  }
  let cells = [];
  function showHeads() {
    cells = heads();
    if (!cells.length) return;
    const place = [{ field: "layer", title: "layer", form: "whole" }, { field: "head", title: "head", form: "whole" }];
    const list = [...place, { field: "slots", title: "slots", form: "one" }, { field: "gain", title: "gain", form: "gain" }];
    tables.show(find("heads-table"), "Layers and heads", used(list, cells), cells, { field: "layer", down: false });
  }

  let pieces = [];
  function showParts() {
    const able = ofTask().filter((point) => point.parts.length);
    find("parts").hidden = !able.length;
    const known = budgets(able.filter((point) => point.role !== "full"));
    options(find("parts-budget"), known.map(([value]) => value), known.map(([, text]) => text));
    pieces = able.filter((point) => point.role === "full" || String(point.budget) === find("parts-budget").value)
      .flatMap((point) => point.parts.map((part) => ({ configuration: point.configuration, role: point.role, ...part })));
    const list = [policy, { field: "part", title: "part", form: "text" }, { field: "accuracy", title: "accuracy", form: "percent" },
      { field: "questions", title: "questions", form: "whole" }];
    tables.show(find("parts-table"), "Along the context", list, pieces);
  }

  let variants = [];
  function showAblations() {
    find("ablations").hidden = !data.ablations.length;
    const known = budgets(data.ablations);
    options(find("ablations-budget"), known.map(([value]) => value), known.map(([, text]) => text));
    variants = data.ablations.filter((row) => String(row.budget) === find("ablations-budget").value);
    const list = [{ field: "variant", title: "variant", form: "text" }, budget,
      { field: "accuracy", title: "accuracy", form: "percent", low: "low", high: "high" }, { field: "difference", title: "points of difference", form: "signed" }];
    tables.show(find("ablations-table"), "Ablations", used(list, variants), variants, { field: "accuracy", down: true });
  }

  function showTask() {
    const rows = ofTask();
    cards();
    const quality = used(columns.quality, rows).map((column) => (column === budget && has("hit_rate", rows) ? capacity : column));
    const first = ["accuracy", "hit_rate"].find((field) => has(field, rows)) || "utility_kept";
    tables.show(find("quality-table"), "Quality over budget", quality, rows, { field: first, down: true });
    tables.show(find("frontier-table"), "What quality costs", used(columns.frontier, rows), rows, { field: "total_bytes", down: false });
    find("frontier").hidden = !rows.some((row) => row.accuracy !== null && (row.total_bytes !== null || row.milliseconds !== null));
    showHeads();
    showParts();
  }

  // One chart after another, the upper ones first, so that the page can be read meanwhile.
  async function draw() {
    const knowing = (...fields) => () => shown().filter((point) => fields.every((field) => point[field] !== null));
    const wanted = [
      ...Object.entries(measures).map(([key, title]) => ["quality", key, title, "points", knowing(key), `${title} over the ${key === "hit_rate" ? "capacity" : "budget"}, as in the table below`]),
      ...Object.entries(costs).map(([key, title]) => ["frontier", key, title, "points", knowing(key, "accuracy"), `${title}, as in the table below`]),
      ["heads", "slots", "Slots held", "cells", () => cells.filter((cell) => cell.slots !== null)],
      ["heads", "gain", "Gain over the best heuristic", "cells", () => cells.filter((cell) => cell.gain !== null)],
      ["parts", "parts", "Accuracy by part", "parts", () => pieces.filter((piece) => !hidden.has(piece.configuration))],
      ["ablations", "ablation", "Accuracy of every variant", "ablations", () => [...variants].sort((a, b) => b.accuracy - a.accuracy)],
    ];
    const there = wanted.filter(([, key]) => specs[key]);
    for (const [section, key, title, ...rest] of there) charts.add(find(`${section}-figures`), key, title, specs[key], ...rest);
    for (const [, key] of there) {
      await new Promise((done) => setTimeout(done));
      await charts.refresh([key]);
    }
  }

  async function start() {
    find("theme").addEventListener("click", () => {
      const dark = getComputedStyle(document.documentElement).getPropertyValue("--dark").trim() === "1";
      document.documentElement.dataset.theme = dark ? "light" : "dark";
    });
    options(find("task"), data.tasks, data.tasks.map((name) => name || "all"));
    find("task").parentElement.hidden = data.tasks.length < 2;
    find("task").addEventListener("change", () => { task = find("task").value; showTask(); charts.refresh(); });
    find("bar").hidden = find("quality").hidden = !points.length;
    find("heads-configuration").addEventListener("change", () => { showHeads(); charts.refresh(["slots", "gain"]); });
    find("heads-budget").addEventListener("change", () => { showHeads(); charts.refresh(["slots", "gain"]); });
    find("parts-budget").addEventListener("change", () => { showParts(); charts.refresh(["parts"]); });
    find("ablations-budget").addEventListener("change", () => { showAblations(); charts.refresh(["ablation"]); });
    for (const command of data.commands) {
      const [line, code] = [document.createElement("li"), document.createElement("code")];
      code.textContent = command;
      line.append(code);
      find("commands").append(line);
    }
    find("versions").textContent = Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ");
    find("origin").hidden = !data.commands.length && !find("versions").textContent;
    if (data.tokens) window.kvContext = tokens.start(data.tokens);
    if (points.length) { legend(); showTask(); }
    showAblations();
    await draw();
    document.documentElement.dataset.ready = "true";
  }
  start();
})();
