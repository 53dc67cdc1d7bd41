/**
 * Markdown to the document, while it is still being written.
 *
 * What a model writes is treated as hostile, so there are three barriers: HTML in it is
 * shown as text, DOMPurify lets a short list of elements through, and the page's policy (Trusted
 * Types, no foreign hosts) would stop what came past both. Text grows at its end, so only blocks
 * that changed are made again. Without the libraries (`make` brings them), text is shown as it is.
 */

import { copyButton, h } from "./dom.js";
import { extensions, typeset } from "./formulas.js";

const LIVE_CODE = 6000; // characters; longer code is coloured once it is complete
const MOST_CODE = 100_000;
const HARMLESS_HTML = /^<\/?(br|sub|sup|kbd|u)\s*\/?>$/i;
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd",
    "li", "ol", "p", "pre", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const OWN_CLASSES = /^(language-\S+|hljs-[\w-]+( \w+_)*|math|math-display|depth-[1-6])$/;
const MESSAGE_LEVEL = 2; // of the heading that each message has

const escape = (text) =>
  text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const renderer = {
  html: ({ text }) => (HARMLESS_HTML.test(text.trim()) ? text : escape(text)),
  image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || "image")}</a>`,
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  heading({ tokens, depth, level }) {
    const tag = level ? `h${level}` : "p"; // headings in quotations and lists are not part of the outline
    return `<${tag} class="depth-${depth}">${this.parser.parseInline(tokens)}</${tag}>`;
  },
};

/** Give headings levels that leave none out, whatever depths the model chose. */
function outline(tokens) {
  const depths = [];
  for (const token of tokens.filter(({ type }) => type === "heading")) {
    while (depths.at(-1) >= token.depth) depths.pop();
    depths.push(token.depth);
    token.level = Math.min(6, MESSAGE_LEVEL + depths.length);
  }
}

/** { lex, parse } once loaded, or null without the libraries. */
const libraries = (async () => {
  try {
    const { Marked } = await import("./vendor/marked.esm.js");
    await import("./vendor/purify.min.js");
    const marked = new Marked({ gfm: true, breaks: true, renderer });
    marked.use({ extensions: extensions((name, text) => `<span class="${name}">${escape(text)}</span>`) });
    const purify = window.DOMPurify;
    purify.addHook("uponSanitizeAttribute", (_, attribute) => {
      if (attribute.attrName === "class") attribute.keepAttr = OWN_CLASSES.test(attribute.attrValue);
    });
    purify.addHook("afterSanitizeAttributes", (element) => {
      if (element.tagName !== "A" || !element.hasAttribute("href")) return;
      element.setAttribute("target", "_blank");
      element.setAttribute("rel", "noopener noreferrer nofollow");
    });
    const clean = (html) => purify.sanitize(html, ALLOWED);
    return { lex: (text) => marked.lexer(text), parse: (token) => clean(marked.parser([token])), clean };
  } catch {
    return null;
  }
})();
let loaded = null;
/** Resolves to whether markdown can be shown as such. */
export const ready = libraries.then((found) => Boolean((loaded = found)));

let highlighter = null;
const loadHighlighter = () =>
  (highlighter ??= import("./vendor/highlight.min.js").then((module) => module.default, () => null));

/** An element that shows a growing markdown text. */
export class Markdown {
  #blocks = []; // { raw, complete, element } of each top-level block
  #shown = null; // [text, complete]

  constructor() {
    this.element = h("div.markdown", { dir: "auto" });
  }

  /** Show a text; `complete` says that it will not grow. */
  show(text, complete) {
    if (this.#shown?.[0] === text && this.#shown[1] === complete) return;
    this.#shown = [text, complete];
    if (!loaded) {
      this.element.classList.add("plain");
      this.element.textContent = text;
      return;
    }
    const tokens = loaded.lex(text);
    outline(tokens);
    // A definition at the end gives links further up their address.
    const anew = complete && Object.keys(tokens.links).length > 0;
    tokens.forEach((token, i) => {
      const isComplete = complete || i < tokens.length - 1;
      const shown = this.#blocks[i];
      if (shown && !anew && shown.raw === token.raw && shown.complete === isComplete) return;
      const element = h("div.block", {}, loaded.parse(token));
      finish(element, isComplete);
      if (shown) shown.element.replaceWith(element);
      else this.element.append(element);
      this.#blocks[i] = { raw: token.raw, complete: isComplete, element };
    });
    for (const { element } of this.#blocks.splice(tokens.length)) element.remove();
  }
}

/** What marked does not do: directions, code with colours and a button, formulas, tables that scroll. */
function finish(element, isComplete) {
  for (const code of element.querySelectorAll("pre > code")) {
    const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
    code.parentElement.replaceWith(codeBlock(code.textContent, language, isComplete));
  }
  element.querySelectorAll(".math, .math-display").forEach(typeset);
  for (const table of element.querySelectorAll("table")) {
    const scroll = h("div.scroll", { tabindex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  // Only the outermost: an element with its own direction does not affect its parent's.
  for (const block of element.children) block.dir ||= "auto";
}

/** A block of code with its language, a button to copy it, and colours if it is complete. */
export function codeBlock(text, language, isComplete = true) {
  const code = h("code", {}, text);
  if (language && text.length < (isComplete ? MOST_CODE : LIVE_CODE)) colour(code, text, language);
  return h("figure.code", { dir: "ltr" },
    h("figcaption", {}, h("span", {}, language || "text"), copyButton("Copy the code", () => text)),
    h("pre", { tabindex: 0, "aria-label": "Code" }, code));
}

async function colour(code, text, language) {
  const [highlight] = await Promise.all([loadHighlighter(), ready]);
  if (!loaded || !highlight?.getLanguage(language)) return;
  const html = highlight.highlight(text, { language, ignoreIllegals: true }).value;
  code.replaceChildren(loaded.clean(html));
}
