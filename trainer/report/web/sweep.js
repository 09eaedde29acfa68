"use strict";
// Marks a trial's lines in both charts: its button in the table keeps the mark, pointing at a line or a row shows it.
const lines = [...document.querySelectorAll("[data-trial]")];
const buttons = [...document.querySelectorAll("button[value]")];
let kept = "";

function mark(trial) {
  lines.forEach((line) => line.classList.toggle("marked", line.dataset.trial === trial));
}

buttons.forEach((button) => {
  button.disabled = false;
  button.addEventListener("click", () => {
    kept = kept === button.value ? "" : button.value;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other.value === kept)));
    mark(kept);
  });
  const row = button.closest("tr");
  row.addEventListener("pointerenter", () => mark(button.value));
  row.addEventListener("pointerleave", () => mark(kept));
});
lines.forEach((line) => {
  line.addEventListener("pointerenter", () => mark(line.dataset.trial));
  line.addEventListener("pointerleave", () => mark(kept));
});
