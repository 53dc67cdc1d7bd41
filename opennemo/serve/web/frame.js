/** What surrounds the conversation: panels, themes, passing messages, the scroll position. */

import { byId, h } from "./dom.js";

// ---- Panels: beside the conversation where there is room, else above it, one at a time.

const PANELS = ["sidebar", "settings"];
const wide = matchMedia("(min-width: 900px)");
const isShown = (id) => (wide.matches ? !byId(id).hidden : byId(id).classList.contains("out"));

export function togglePanel(id) {
  const panel = byId(id);
  const opens = !isShown(id);
  if (wide.matches) panel.hidden = !opens;
  else {
    closeCover();
    panel.hidden = false;
    panel.getBoundingClientRect(); // or it would not slide in
    panel.classList.toggle("out", opens);
    document.body.classList.toggle("covered", opens);
  }
  showPanels();
  // On a phone, a field in focus would bring up the keyboard.
  if (opens) panel.querySelector(wide.matches ? "textarea, #new" : "header button").focus();
  else byId(`show-${id}`).focus();
}

export const isCovered = () => document.body.classList.contains("covered");

/** Close what lies above the conversation; a panel beside it stays. */
export function closeCover() {
  for (const id of PANELS) byId(id).classList.remove("out");
  document.body.classList.remove("covered");
  showPanels();
}

export function showPanels() {
  for (const id of PANELS) {
    byId(id).inert = !isShown(id);
    byId(`show-${id}`).ariaExpanded = isShown(id);
  }
}
wide.addEventListener("change", closeCover);

// ---- Themes: the system's, light, dark.

const root = document.documentElement;

export function nextTheme() {
  const themes = [undefined, "light", "dark"];
  const next = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
  if (next) {
    root.dataset.theme = next;
    localStorage.setItem("theme", next);
  } else {
    delete root.dataset.theme;
    localStorage.removeItem("theme");
  }
  showTheme();
}

export function showTheme() {
  const label = `Theme: ${root.dataset.theme ?? "as the system"}`;
  Object.assign(byId("theme"), { ariaLabel: label, title: label });
}

// ---- Messages.

let toasting = 0;
/** Say something for some seconds, perhaps with a button. */
export function toast(text, label, action) {
  const box = byId("toast");
  const close = () => (box.hidden = true);
  const act = () => {
    close();
    action();
  };
  box.replaceChildren(text, ...(label ? [h("button", { type: "button", onclick: act }, label)] : []));
  box.hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(close, 8000);
}

/** Say something above the conversation, until it is said that there is nothing. */
export function notice(text, label, action) {
  const box = byId("notice");
  box.hidden = !text;
  box.replaceChildren(text, ...(label ? [h("button", { type: "button", onclick: action }, label)] : []));
}

// ---- Scrolling: keeps the end in sight, unless somebody has scrolled away from it.

export const scroll = {
  sticks: true,
  toEnd() {
    this.sticks = true;
    this.follow();
  },
  follow() {
    const box = byId("scroller");
    if (this.sticks) box.scrollTop = box.scrollHeight;
    this.look();
  },
  look() {
    const { scrollHeight, scrollTop, clientHeight } = byId("scroller");
    const below = scrollHeight - scrollTop - clientHeight;
    byId("latest").hidden = below < 80;
    return below;
  },
};
byId("scroller").addEventListener("scroll", () => (scroll.sticks = scroll.look() < 40));
new ResizeObserver(() => scroll.follow()).observe(byId("scroller"));
