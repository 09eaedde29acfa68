// Adds the slider over the grids of all runs and the switch of the horizontal axis. Without scripts the page shows all
// grids and both axes.
document.documentElement.classList.add("js");
const mark = readCharts(true);
const slider = document.querySelector("#at");
const play = document.querySelector("#play");
const axes = [...document.querySelectorAll("[name=axis]")];

function setAxis(unit) {
  document.querySelectorAll(".over").forEach((box) => box.classList.toggle("current", box.dataset.unit === unit));
  document.querySelectorAll(".keys output").forEach((output) => { output.value = ""; });
}

axes.forEach((axis) => axis.addEventListener("change", () => setAxis(axis.value)));
setAxis((axes.find((axis) => axis.checked) || { value: "kimg" }).value);

if (slider) {
  const steps = slider.dataset.steps.split(" ").map(Number);
  const runs = [...document.querySelectorAll(".run")].map((run) => ({
    frames: [...run.querySelectorAll("figure")],
    none: run.querySelector(".none"),
  }));
  const at = document.querySelector(".player output");
  let timer = 0;

  function show(index) {
    const step = steps[index];
    runs.forEach(({ frames, none }) => {
      const earlier = frames.filter((frame) => Number(frame.dataset.kimg) <= step);
      frames.forEach((frame) => frame.classList.toggle("current", frame === earlier[earlier.length - 1]));
      none.classList.toggle("current", earlier.length === 0);
      if (frames.length) none.textContent = `No grid at or below ${step} kimg.`;
    });
    slider.value = index;
    slider.setAttribute("aria-valuetext", `${step} kimg`);
    at.value = `${step} kimg`;
    if (axes.some((axis) => axis.checked && axis.value === "kimg")) mark(step);
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  }

  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  play.addEventListener("click", () => {
    if (timer) return stop();
    let index = Number(slider.value) === steps.length - 1 ? 0 : Number(slider.value);
    show(index);
    play.textContent = "Stop";
    timer = setInterval(() => {
      index += 1;
      if (index >= steps.length) return stop();
      show(index);
      if (index === steps.length - 1) stop();
    }, 400);
  });
  show(steps.length - 1);
}
