/**
 * The token view: an answer as its tokens, coloured by how likely each was, with what else could
 * have stood there on hover, or with the arrow keys.
 */

import { byId, h } from "./dom.js";

/** What is kept of an entry of `logprobs.content`. */
export function keep({ token, bytes, logprob, top_logprobs }) {
  const top = (top_logprobs ?? []).map((other) => [nameOf(other), other.logprob]);
  return { text: nameOf({ token, bytes }), logprob, top };
}

/** A token that is no whole letter is named by its bytes. */
function nameOf({ token, bytes }) {
  if (!token.includes("\uFFFD") || !bytes?.length) return token;
  return bytes.map((b) => `\\x${b.toString(16).padStart(2, "0")}`).join("");
}

export class TokenView {
  #shown = 0;
  #at = -1;

  constructor() {
    this.element = h("div.tokens", {
      dir: "auto", tabindex: 0, role: "group", "aria-label": "Tokens; arrow keys go through them",
      onkeydown: (event) => this.#key(event),
      onblur: () => this.#point(-1),
      onpointerover: ({ target }) => {
        if (target.matches(".token")) this.#point([...this.element.children].indexOf(target));
      },
      onpointerleave: () => this.#point(-1),
    });
  }

  /** Show tokens; those shown before are not made again. */
  show(tokens) {
    this.tokens = tokens;
    for (const { text, logprob } of tokens.slice(this.#shown)) {
      const visible = text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");
      const token = h("span.token", {}, visible || "␀");
      token.style.setProperty("--doubt", doubt(logprob).toFixed(3)); // allowed: no style attribute
      this.element.append(token);
    }
    this.#shown = tokens.length;
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = this.#at < 0 && step < 0 ? this.#shown - 1 : this.#at + step;
    if (next >= 0 && next < this.#shown) this.#point(next);
  }

  #point(index) {
    this.element.children[this.#at]?.classList.remove("pointed");
    this.#at = index;
    const token = this.element.children[index];
    token?.classList.add("pointed");
    showTip(token, this.tokens?.[index]);
  }
}

/** 0 for a certain token, 1 for one of a thousandth: equal steps for equal factors. */
const doubt = (logprob) => Math.min(1, -logprob / Math.log(1000));
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p < 0.01 ? "< 0.01 %" : `${p.toPrecision(3)} %`;
};

function showTip(target, token) {
  const tip = byId("tip") ?? document.body.appendChild(h("div", { id: "tip", role: "status" }));
  tip.hidden = !token;
  if (!token) return;
  const others = token.top.filter(([text]) => text !== token.text);
  const rows = [[token.text, token.logprob], ...others].sort((a, b) => b[1] - a[1]);
  tip.replaceChildren(
    h("p", {}, h("strong", {}, percent(token.logprob)), ` log-probability ${token.logprob.toFixed(3)}`),
    h("table", {}, h("tbody", {}, rows.map(([text, logprob]) => {
      const bar = h("span.bar");
      bar.style.width = `${100 * Math.exp(logprob)}%`;
      const row = text === token.text ? "tr.own" : "tr";
      return h(row, {}, h("th", { scope: "row", dir: "auto" }, JSON.stringify(text).slice(1, -1).replace(/^ | $/g, "␣")),
        h("td", {}, percent(logprob)), h("td.bars", {}, bar));
    }))),
  );
  const box = target.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const fits = box.bottom + height + 12 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${fits ? box.bottom + 6 : Math.max(8, box.top - height - 6)}px`;
}
