// Adds the slider over the samples. Without scripts the page shows all samples.
document.documentElement.classList.add("js");
const mark = readCharts();
const frames = [...document.querySelectorAll(".frames figure")];
const slider = document.querySelector("#at");
const play = document.querySelector("#play");

function show(index) {
  frames.forEach((frame, i) => frame.classList.toggle("current", i === index));
  slider.value = index;
  slider.setAttribute("aria-valuetext", `${frames[index].dataset.kimg} kimg`);
}

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
