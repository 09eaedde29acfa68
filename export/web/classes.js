// The menu of a generator's classes, as catinfer --class. In the page's address the class is class=NAME; a generator
// without classes has neither.

/** Adds `names` to the menu in `field` and shows it; `changed(name)` is called when another one is chosen. */
export function addClasses(field, names, changed) {
  const menu = field.querySelector("select");
  menu.append(...names.map((name) => new Option(name, name)));
  menu.addEventListener("change", () => changed(menu.value));
  field.hidden = names.length === 0;
}

/** The class in an address, { class: name }: the first one if none or an unknown one is given, {} without classes. */
export function readClass(parameters, names) {
  const given = parameters.get("class");
  return names.length ? { class: names.includes(given) ? given : names[0] } : {};
}
