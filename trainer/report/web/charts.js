"use strict";
// Adds a cursor to the charts that reads values off the curves. Returns a function that places it at a position of the
// axis `unit` in all charts of that axis. `endsMatter`: a curve that ended before the cursor has no value there.
function readCharts(endsMatter = false) {
  const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
    const { left, right, top, bottom, end, low, high, unit } = svg.dataset;
    const toValue = (y) => {
      const value = Number(low) + ((bottom - y) / (bottom - top)) * (high - low);
      return "log" in svg.dataset ? Math.exp(value) : value;
    };
    const box = svg.closest(".charts > div");
    const curves = [...svg.querySelectorAll(".curve")].map((group) => ({
      points: [...group.querySelectorAll("polyline")].flatMap((line) => [...line.points].map(({ x, y }) => ({ x, y }))),
      output: box.querySelector(`.keys .${group.classList[1]} output`),
    }));
    const cursor = svg.querySelector(".cursor");
    return {
      svg,
      unit,
      positionAt(clientX) {
        const frame = svg.getBoundingClientRect();
        const x = ((clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
        return Math.min(Math.max((x - left) / (right - left), 0), 1) * end;
      },
      mark(position) {
        const x = Number(left) + (position / end) * (right - left);
        cursor.setAttribute("transform", `translate(${x} 0)`);
        cursor.style.visibility = "visible";
        curves.forEach(({ points, output }) => {
          const near = points.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
          const ended = endsMatter && x > points[points.length - 1].x + 5;
          output.value = ended ? "" : Number(toValue(near.y).toPrecision(3));
        });
      },
    };
  });
  const mark = (position, unit = "kimg") =>
    charts.filter((chart) => chart.unit === unit).forEach((chart) => chart.mark(position));
  charts.forEach((chart) =>
    chart.svg.addEventListener("pointermove", (event) => mark(chart.positionAt(event.clientX), chart.unit)));
  return mark;
}
