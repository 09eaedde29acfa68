// Favourites: a button over each image of the latest grid, of which image i has seed i. The page's address keeps the
// seeds as #seeds=3,7-12.
const favourites = document.querySelector(".favourites");

if (favourites) {
  const { columns, rows, count, command } = favourites.dataset;
  const [seeds, field, copy, clear] = ["seeds", "command", "copy", "clear"].map((id) => document.getElementById(id));
  const image = frames[frames.length - 1].querySelector("img");
  const box = document.createElement("div");
  const cells = document.createElement("div");
  box.className = "pick";
  cells.className = "cells";
  cells.setAttribute("role", "group");
  cells.setAttribute("aria-label", "Images of the latest grid");
  cells.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  const buttons = Array.from({ length: Number(count) }, (_, seed) => {
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = seed === 0 ? 0 : -1;
    button.title = `Seed ${seed}`;
    button.setAttribute("aria-label", `Seed ${seed}`);
    button.setAttribute("aria-pressed", "false");
    const label = document.createElement("span");
    label.textContent = seed;
    button.append(label);
    return button;
  });
  image.replaceWith(box);
  cells.append(...buttons);
  box.append(image, cells);

  const marked = () => buttons.map((button, seed) => seed).filter((seed) => isMarked(buttons[seed]));
  const isMarked = (button) => button.getAttribute("aria-pressed") === "true";

  function ranges(numbers) {
    const found = [];
    for (const n of numbers) {
      const last = found[found.length - 1];
      if (last && last[1] === n - 1) last[1] = n;
      else found.push([n, n]);
    }
    return found.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(",");
  }

  function update() {
    const list = ranges(marked());
    seeds.value = list || "none marked";
    field.value = list && command + list;
    copy.disabled = clear.disabled = !list;
    copy.textContent = "Copy";
    return list;
  }

  function markOnly(wanted) {
    buttons.forEach((button, seed) => button.setAttribute("aria-pressed", String(wanted(seed))));
    return update();
  }

  function save(list) {
    try {
      history.replaceState(null, "", list ? `#seeds=${list}` : location.pathname + location.search);
    } catch (error) {
      // A page in a frame without an origin has no address of its own.
    }
  }

  function load() {
    const parts = (/^#seeds=([\d,-]+)$/.exec(location.hash) || ["", ""])[1].split(",");
    const found = parts.map((part) => /^(\d+)(?:-(\d+))?$/.exec(part)).filter(Boolean);
    markOnly((seed) => found.some(([, first, last]) => seed >= Number(first) && seed <= Number(last || first)));
  }

  function focus(seed) {
    if (!buttons[seed]) return;
    buttons.forEach((button, i) => { button.tabIndex = i === seed ? 0 : -1; });
    buttons[seed].focus();
  }

  cells.addEventListener("click", (event) => {
    const seed = buttons.indexOf(event.target);
    if (seed < 0) return;
    focus(seed);
    buttons[seed].setAttribute("aria-pressed", String(!isMarked(buttons[seed])));
    save(update());
  });
  cells.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: Number(columns) };
    const seed = buttons.indexOf(event.target);
    if (seed < 0 || !(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    focus(seed + steps[event.key]);
  });
  clear.addEventListener("click", () => save(markOnly(() => false)));
  copy.addEventListener("click", async () => {
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
    } catch (error) {
      document.execCommand("copy"); // pages that may not write to the clipboard, or without HTTPS
    }
    copy.textContent = "Copied";
  });
  field.addEventListener("focus", () => field.select());
  window.addEventListener("hashchange", load);
  load();
  favourites.hidden = false;
}
