"use strict";
(function () {
  // Figures: drawn at the width of the page, those in closed parts when they are opened.
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  function draw(box) {
    const data = box.querySelector("script");
    if (!data || !window.Plotly) return;
    const spec = JSON.parse(data.textContent);
    data.remove();
    spec.layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    Plotly.newPlot(box, spec.data, spec.layout, config);
  }
  const visible = (box) => !box.closest("details:not([open])");
  const drawVisible = () => Array.from(document.querySelectorAll(".plot")).filter(visible).forEach(draw);
  drawVisible();
  document.querySelectorAll("details").forEach((d) => d.addEventListener("toggle", drawVisible));
  document.querySelectorAll("nav a").forEach((a) => a.addEventListener("click", () => {
    const target = document.querySelector(a.hash);
    if (target && target.tagName === "DETAILS") target.open = true;
  }));

  // Tables: a click on a heading sorts by it, a second click turns the order; empty cells stay last.
  function compare(a, b) {
    const x = a.dataset.v, y = b.dataset.v;
    if (x !== undefined && y !== undefined) return Number(x) - Number(y);
    return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  }
  function sort(table, column, heading) {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    rows.sort((r, s) => {
      const a = r.cells[column], b = s.cells[column];
      const gone = (a.textContent === "") - (b.textContent === "");
      return gone || (up ? compare(a, b) : compare(b, a));
    });
    body.append(...rows);
  }
  function filter(table, words, output) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = Array.from(table.tBodies[0].rows);
    let shown = 0;
    for (const row of rows) {
      const text = Array.from(row.cells, (cell) => cell.textContent).join("\t").toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
      if (!row.hidden) shown += 1;
    }
    output.textContent = wanted.length ? shown + " of " + rows.length + " rows" : rows.length + " rows";
  }
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("thead th").forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => sort(table, column, heading));
    });
    const box = table.closest(".tablebox");
    const input = box.querySelector("input");
    input.addEventListener("input", () => filter(table, input.value, box.querySelector("output")));
  });
})();
