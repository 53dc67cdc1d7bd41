/**
 * Formulas: marked's extensions for TeX, and KaTeX, which comes with the first of them.
 *
 * `$a$` and `\(a\)` stand within a line, `$$a$$` and `\[a\]` apart. As in pandoc a dollar opens no
 * formula before a space and closes none after a space or before a digit: "$5 or $10" is a price.
 */

import { h } from "./dom.js";

const INLINE = /^(?:\$(?![\s$])((?:\\[^\n]|[^\\$\n`])+?)(?<!\s)\$(?![\d$])|\\\(([^\n]+?)\\\))/;
const DISPLAY = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])/;
const BLOCK = new RegExp(`${DISPLAY.source}[ \\t]*(?:\\n+|$)`);

const find = (name, pattern, level, begin) => ({
  name,
  level,
  start: (source) => source.match(begin)?.index,
  tokenizer(source) {
    const match = pattern.exec(source);
    return match ? { type: name, raw: match[0], text: (match[1] ?? match[2]).trim() } : undefined;
  },
});

/** Extensions of marked; `mark` makes the element that `typeset` fills. */
export const extensions = (mark) => [
  { ...find("formula", INLINE, "inline", /\$|\\\(/), renderer: ({ text }) => mark("math", text) },
  { ...find("formulaWithin", DISPLAY, "inline", /\$\$|\\\[/), renderer: ({ text }) => mark("math-display", text) },
  { ...find("formulaBlock", BLOCK, "block", /(?<=\n)(?:\$\$|\\\[)/), renderer: ({ text }) => mark("math-display", text) },
];

let katex = null;
let loading = null;
function load() {
  document.head.append(h("link", { rel: "stylesheet", href: new URL("vendor/katex.min.css", import.meta.url).href }));
  return import("./vendor/katex.min.js").then(() => (katex = window.katex), () => null);
}

/** Replace the TeX in an element with the formula, at once if KaTeX is there already. */
export function typeset(element) {
  const tex = element.textContent;
  const displayMode = element.classList.contains("math-display");
  if (displayMode) Object.assign(element, { tabIndex: 0, role: "group", ariaLabel: "Formula" });
  const show = () => katex?.render(tex, element, {
    displayMode, throwOnError: false, errorColor: "var(--wrong)", strict: "ignore", trust: false, maxSize: 20,
    maxExpand: 200,
  });
  if (katex) show();
  else (loading ??= load()).then(show);
}
