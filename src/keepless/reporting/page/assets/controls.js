/* Buttons: of a theme, of a choice, of something that is shown or not. */

/** Buttons of which one is chosen. */
function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    el("button", { type: "button", class: "seg", "aria-pressed": String(value === chosen), "data-value": value,
      on: { click: () => set(value) } }, text));
  const set = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
    choose(value);
  };
  const node = el("span", { class: "group", role: "group", "aria-label": label }, buttons);
  return { node, set };
}

/** A button of a legend, which hides and shows. */
function toggle(text, colour, dashed, isOn, change) {
  const swatch = el("i", { class: dashed ? "swatch dash" : "swatch", style: dashed ? { "border-color": colour } : { background: colour } });
  const button = el("button", { type: "button", "aria-pressed": String(isOn), on: { click: () => {
    isOn = !isOn;
    button.setAttribute("aria-pressed", String(isOn));
    change(isOn);
  } } }, swatch, text);
  return button;
}

/** Light, dark, or as the system says. */
function theme() {
  const button = document.getElementById("theme");
  const names = { auto: "\u25d0 system", dark: "\u25cf dark", light: "\u25cb light" };
  const order = Object.keys(names);
  let now = "auto";
  const set = (name) => {
    now = name;
    if (name === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.setAttribute("data-theme", name);
    button.textContent = names[name];
    button.setAttribute("aria-label", `Colours: ${name}`);
  };
  button.addEventListener("click", () => set(order[(order.indexOf(now) + 1) % order.length]));
  set("auto");
}
