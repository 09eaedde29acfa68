"use strict";
// Adds the slider over the samples and a cursor that reads values off the curves. Without scripts the page shows all samples.
document.documentElement.classList.add("js");
const frames = [...document.querySelectorAll(".frames figure")];
const slider = document.querySelector("#at");
const play = document.querySelector("#play");

const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
  const { left, right, top, bottom, end, low, high } = svg.dataset;
  const toValue = (y) => {
    const value = Number(low) + ((bottom - y) / (bottom - top)) * (high - low);
    return "log" in svg.dataset ? Math.exp(value) : value;
  };
  const curves = [...svg.querySelectorAll(".curve")].map((group) =>
    [...group.querySelectorAll("polyline")].flatMap((line) => [...line.points].map(({ x, y }) => ({ x, y }))));
  const outputs = svg.parentElement.querySelectorAll("output");
  const cursor = svg.querySelector(".cursor");
  return {
    svg,
    kimgAt(clientX) {
      const box = svg.getBoundingClientRect();
      const x = ((clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      return Math.min(Math.max((x - left) / (right - left), 0), 1) * end;
    },
    mark(kimg) {
      const x = Number(left) + (kimg / end) * (right - left);
      cursor.setAttribute("transform", `translate(${x} 0)`);
      cursor.style.visibility = "visible";
      curves.forEach((points, i) => {
        const near = points.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
        outputs[i].value = Number(toValue(near.y).toPrecision(3));
      });
    },
  };
});

function mark(kimg) {
  charts.forEach((chart) => chart.mark(kimg));
}

function show(index) {
  frames.forEach((frame, i) => frame.classList.toggle("current", i === index));
  slider.value = index;
  slider.setAttribute("aria-valuetext", `${frames[index].dataset.kimg} kimg`);
}

charts.forEach((chart) => chart.svg.addEventListener("pointermove", (event) => mark(chart.kimgAt(event.clientX))));

if (slider) {
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
    mark(Number(frames[slider.value].dataset.kimg));
  });
  play.addEventListener("click", () => {
    if (timer) return stop();
    let index = Number(slider.value) === frames.length - 1 ? 0 : Number(slider.value);
    show(index);
    play.textContent = "Stop";
    timer = setInterval(() => {
      index += 1;
      show(index);
      mark(Number(frames[index].dataset.kimg));
      if (index === frames.length - 1) stop();
    }, 400);
  });
  show(frames.length - 1);
}
