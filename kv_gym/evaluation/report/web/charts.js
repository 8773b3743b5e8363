"use strict";
// Charts: Vega-Lite specifications that are handed the selected points. Colours are custom properties of the page, so
// that light, dark and print need no drawing anew.
const charts = (() => {
  const config = {
    background: null, font: "system-ui, sans-serif", padding: 2, view: { stroke: null },
    axis: { labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)", domainColor: "var(--faint)",
      tickColor: "var(--faint)" },
    legend: { labelColor: "var(--muted)", titleColor: "var(--muted)", gradientLength: 120 },
  };
  const drawn = new Map();

  // Give a chart a figure of its own, not yet drawn; `data` gives its rows whenever it is. All figures stand before the
  // first is drawn: a chart is as wide as its figure, which the figures beside it narrow.
  function add(parent, key, title, spec, source, data, description) {
    const figure = document.createElement("figure");
    const heading = document.createElement("h3");
    const place = document.createElement("div");
    heading.textContent = title;
    place.className = "chart";
    place.id = `chart-${key}`;
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", description || title);
    figure.append(heading, place);
    parent.append(figure);
    figure.hidden = !data().length;
    drawn.set(key, { spec, source, data, figure, place, view: null });
  }

  // A chart without rows is not shown: it would have no scale.
  async function draw(chart) {
    const rows = chart.data();
    chart.figure.hidden = !rows.length;
    if (!rows.length) return;
    if (chart.view) {
      await chart.view.data(chart.source, rows).resize().runAsync();
      return;
    }
    const made = await vegaEmbed(chart.place, { ...chart.spec, datasets: { [chart.source]: rows } }, {
      ast: true, renderer: "svg", actions: false, config, tooltip: { disableDefaultStyle: true },
      logLevel: 1, // errors: a layer that has no rows in this selection is none
    });
    chart.view = made.view;
  }

  async function refresh(keys) {
    for (const [key, chart] of drawn) if (!keys || keys.includes(key)) await draw(chart);
  }

  function highlight(configuration) {
    for (const { view } of drawn.values()) {
      if (view && "highlight" in view.getState().signals) view.signal("highlight", configuration).runAsync();
    }
  }

  // Legends outside of charts: the mark as Vega draws it, on a piece of its line.
  const shapes = {
    circle: "M 4,0 A 4,4 0 1 1 -4,0 A 4,4 0 1 1 4,0", square: "M -3.6,-3.6 h 7.2 v 7.2 h -7.2 z",
    diamond: "M 0,-4.8 L 4.8,0 0,4.8 -4.8,0 z", cross: "M -4.4,-1.6 h 2.8 v -2.8 h 3.2 v 2.8 h 2.8 v 3.2 h -2.8 v 2.8 h -3.2 v -2.8 h -2.8 z",
    "triangle-up": "M 0,-4.4 L 4.6,3.6 -4.6,3.6 z", "triangle-down": "M 0,4.4 L 4.6,-3.6 -4.6,-3.6 z",
    "triangle-right": "M 4.4,0 L -3.6,4.6 -3.6,-4.6 z", "triangle-left": "M -4.4,0 L 3.6,4.6 3.6,-4.6 z",
  };
  function symbol(style) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    for (const [name, value] of Object.entries({ width: 26, height: 12, viewBox: "-13 -6 26 12", "aria-hidden": "true" })) {
      svg.setAttribute(name, value);
    }
    const line = document.createElementNS(space, "line");
    const strong = style.role === "learned" ? 3 : 1.5;
    const attributes = { x1: -13, x2: 13, stroke: `var(--c-${style.colour})`, "stroke-width": strong, "stroke-dasharray": style.dash.join(" ") };
    for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
    const mark = document.createElementNS(space, "path");
    mark.setAttribute("d", shapes[style.mark]);
    mark.setAttribute("fill", `var(--c-${style.colour})`);
    svg.append(line, mark);
    return svg;
  }

  return { add, refresh, highlight, symbol, drawn };
})();
