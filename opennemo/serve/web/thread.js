/**
 * The shown path of a conversation as a list of messages. A view is made once for a message and
 * then kept, so that switching branches and growing answers touch nothing else.
 */

import { last, openCalls, path, place } from "./conversation.js";
import { copyButton, h, icon, iconButton, setChildren } from "./dom.js";
import { Markdown, codeBlock } from "./markdown.js";
import { TokenView } from "./tokens.js";

const NAMES = { user: "You", assistant: "Answer", tool: "Result" };

export class Thread {
  #views = new WeakMap(); // of nodes
  showTokens = false;

  /**
   * @param list the element to fill
   * @param actions what buttons do: again, edit, choose, answerCalls, goOn
   */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
  }

  /** Show a conversation; `running` is the message that is being written, if one is. */
  show(conversation, running) {
    setChildren(this.list, path(conversation).map((node) => {
      const view = this.#view(conversation, node);
      view.update(running);
      return view.element;
    }));
  }

  /** Show what is new of the message that is being written. */
  grow(conversation, node) {
    this.#view(conversation, node).update(node);
  }

  /** Open the editor of a message of the user's. */
  edit(conversation, node) {
    this.#view(conversation, node).edit();
  }

  #view(conversation, node) {
    let view = this.#views.get(node);
    if (!view) {
      view = new MessageView(this, conversation, node);
      this.#views.set(node, view);
    }
    return view;
  }
}

class MessageView {
  #markdown = null;
  #tokens = null;
  #forms = null;
  #showing = ""; // a summary of what the foot shows, so that it is made again only if that changed

  constructor(thread, conversation, node) {
    Object.assign(this, { thread, conversation, node });
    this.body = h("div.body");
    this.foot = h("footer");
    const { role } = node.message;
    const heading = h("h2.hidden", {}, NAMES[role]);
    this.element = h(`article.${role}`, { "aria-label": NAMES[role], "data-node": node.id }, heading, this.body, this.foot);
  }

  update(running) {
    const { node } = this;
    const isRunning = running === node;
    this.element.classList.toggle("running", isRunning);
    this.element.ariaBusy = isRunning;
    if (node.message.role === "assistant") this.#answer(isRunning);
    else if (!this.body.hasChildNodes()) this.#plain();
    this.#updateFoot(isRunning, Boolean(running));
  }

  #plain() {
    const { role, content, name } = this.node.message;
    if (role === "user") {
      this.body.append(...(this.node.files ?? []).map(attached));
      if (content) this.body.append(h("div.text", { dir: "auto" }, content));
    } else {
      this.body.append(h("details.result", {},
        h("summary", {}, icon("tool"), "Result", name ? [" of ", h("code", {}, name)] : null),
        codeBlock(content, isJson(content) ? "json" : "")));
    }
  }

  #answer(isRunning) {
    const { message, tokens, error } = this.node;
    const asTokens = this.thread.showTokens && tokens?.length > 0;
    const parts = [];
    if (message.reasoning_content) parts.push(this.#thinking(message.reasoning_content));
    if (asTokens) {
      this.#tokens ??= new TokenView();
      this.#tokens.show(tokens);
      parts.push(this.#tokens.element);
    } else if (message.content) {
      this.#markdown ??= new Markdown();
      this.#markdown.show(message.content, !isRunning);
      parts.push(this.#markdown.element);
    }
    if (message.tool_calls?.length) parts.push(this.#calls(isRunning));
    if (isRunning && !parts.length) {
      this.waiting ??= h("div.waiting", { role: "img", "aria-label": "Waiting for the first words" }, h("i"), h("i"), h("i"));
      parts.push(this.waiting);
    }
    if (error) {
      this.alert ??= h("div.error", { role: "alert" }, h("span", { dir: "auto" }, error.message),
        h("button", { type: "button", onclick: () => this.thread.actions.again(this.node) }, "Try again"));
      parts.push(this.alert);
    } else {
      this.alert = null;
    }
    setChildren(this.body, parts);
  }

  /** What the model thought, folded. */
  #thinking(text) {
    this.thought ??= h("div.text", { dir: "auto" });
    this.thought.textContent = text;
    return (this.fold ??= h("details.result", {}, h("summary", {}, "Thinking"), this.thought));
  }

  /** Cards of the calls and, where they wait for results, a form; made anew only as they change. */
  #calls(isRunning) {
    const { conversation, node } = this;
    const calls = node.message.tool_calls;
    const isOpen = !isRunning && !node.error && openCalls(conversation, node).length > 0;
    const summary = JSON.stringify([isOpen, isRunning, calls]);
    if (this.#forms?.summary === summary) return this.#forms.element;
    const names = calls.map((call, i) => (calls.length > 1 ? `${call.function.name}, call ${i + 1}` : call.function.name));
    const fields = names.map((name) => h("textarea.code", {
      rows: 3, spellcheck: "false", dir: "auto", required: true, "aria-label": `Result of ${name}`,
      placeholder: "What the tool answers: JSON or text",
    }));
    const cards = calls.map((call, i) => h("section.call", { "aria-label": `Call of ${names[i]}` },
      h("h3", {}, icon("tool"), h("code", {}, call.function.name)),
      codeBlock(pretty(call.function.arguments), "json", !isRunning),
      isOpen && fields[i]));
    const element = h("form.calls", {
      onsubmit: (event) => {
        event.preventDefault();
        this.thread.actions.answerCalls(node, fields.map((field) => field.value));
      },
    }, cards, isOpen && h("div.row.end", {}, h("button.primary", {}, calls.length > 1 ? "Send the results" : "Send the result")));
    this.#forms = { summary, element };
    return element;
  }

  #updateFoot(isRunning, isBusy) {
    const { conversation, node } = this;
    const [index, count] = place(conversation, node);
    const { showTokens } = this.thread;
    const goesOn = !isRunning && this.#canGoOn();
    const summary = JSON.stringify([index, count, isRunning, isBusy, showTokens, goesOn, node.stats, node.finish, node.error]);
    if (this.#showing === summary) return;
    this.#showing = summary;
    const { role, content } = node.message;
    const { again, choose, goOn } = this.thread.actions;
    const off = { disabled: isBusy };
    const step = (name, label, by, disabled) =>
      iconButton(name, label, () => choose(node, by), { disabled: isBusy || disabled, "data-step": by });
    const parts = [
      count > 1 && h("span.branches", { role: "group", "aria-label": "Versions" },
        step("left", "Previous version", -1, index === 0),
        h("span", {}, `${index + 1} / ${count}`),
        step("right", "Next version", 1, index === count - 1)),
      role === "user" && iconButton("edit", "Edit", () => this.edit(), off),
      content && !isRunning && copyButton("Copy", () => node.message.content),
      role === "assistant" && !isRunning && !node.error && iconButton("again", "Answer again", () => again(node), off),
      goesOn && h("button.quiet", {
        type: "button", title: "Have the model go on where this ends", onclick: () => goOn(node), ...off,
      }, "Continue"),
      role === "assistant" && h("span.stats", {}, describe(node, showTokens, isRunning)),
    ];
    setChildren(this.foot, parts.filter(Boolean));
  }

  /** Whether an answer was cut off, and its text is all that a model needs to go on with it. */
  #canGoOn() {
    const { message, finish, error } = this.node;
    const { content, tool_calls: calls, role } = message;
    const isCut = role === "assistant" && !error && ["length", "stopped"].includes(finish);
    const isText = (this.conversation.format ?? "text") === "text"; // a form begins with an answer
    return isCut && isText && Boolean(content) && !calls && last(this.conversation) === this.node;
  }

  edit() {
    if (this.editor) return this.editor.focus();
    const { node } = this;
    const area = this.editor = h("textarea", { dir: "auto", "aria-label": "Edit the message", rows: 2 });
    const close = () => {
      this.editor = null;
      form.remove();
      this.body.hidden = this.foot.hidden = false;
    };
    const send = () => {
      if (!area.value.trim() && !node.files?.length) return;
      close();
      this.thread.actions.edit(node, area.value);
    };
    const form = h("form.editor", {
      onsubmit: (event) => { event.preventDefault(); send(); },
      onkeydown: (event) => {
        if (event.isComposing) return;
        if (event.key === "Enter" && !event.shiftKey && event.target === area) {
          event.preventDefault();
          send();
        } else if (event.key === "Escape") {
          event.stopPropagation();
          close();
          this.foot.querySelector('[aria-label="Edit"]')?.focus();
        }
      },
    }, area, h("div.row.end", {}, h("button", { type: "button", onclick: close }, "Cancel"), h("button.primary", {}, "Send")));
    area.value = node.message.content;
    this.body.hidden = this.foot.hidden = true;
    this.element.prepend(form);
    area.style.height = `${Math.min(area.scrollHeight + 2, 400)}px`;
    area.focus();
  }
}

/** A file that went with a message, folded; its text is made only when it is opened. */
function attached({ name, text }) {
  const fold = h("details.result", {
    ontoggle: () => fold.open && fold.childElementCount < 2 && fold.append(codeBlock(text, "")),
  }, h("summary", {}, icon("file"), h("span", { dir: "auto" }, name), ` ${size(text)}`));
  return fold;
}

/** "1,234 characters" */
export const size = (text) => `${text.length.toLocaleString("en")} characters`;

/** "46 tokens · 12.3 tokens/s · first after 0.42 s" */
function describe({ stats, finish, tokens }, showTokens, isRunning) {
  if (!stats) return "";
  const { n, seconds, first, exact } = stats;
  const parts = [`${exact ? "" : "about "}${n} token${n === 1 ? "" : "s"}`];
  if (n > 1 && seconds > 0) parts.push(`${((n - 1) / seconds).toFixed(1)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${first < 0.995 ? `${Math.round(1000 * first)} ms` : `${first.toFixed(1)} s`}`);
  if (finish === "length") parts.push("cut off at max tokens");
  if (finish === "stopped" && !isRunning) parts.push("stopped");
  if (showTokens && !tokens?.length && !isRunning) parts.push("answer again to see its tokens");
  return parts.join(" · ");
}

function isJson(text) {
  try {
    return typeof JSON.parse(text) === "object";
  } catch {
    return false;
  }
}

/** Arguments may be half written, or no JSON at all. */
const pretty = (text) => (isJson(text) ? JSON.stringify(JSON.parse(text), null, 2) : text);
