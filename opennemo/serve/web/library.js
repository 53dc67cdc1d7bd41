/** The conversations that this browser keeps: the list at the side, files in and out. */

import { fromJson, toJson } from "./conversation.js";
import { byId, h, iconButton, say, setChildren } from "./dom.js";
import { toast } from "./frame.js";
import * as store from "./store.js";

export class Library {
  all = []; // the latest first
  #items = new WeakMap(); // of conversations, so that focus stays where it is
  #words = []; // that the shown conversations have
  #unsaved = new Set();
  #saving = 0;

  /**
   * @param select called with a conversation to show, or null for a new one
   * @param removed called with a conversation that is gone
   * @param changed called when what the list shows has changed otherwise
   * @param modelName tells the model to name in exported files
   */
  constructor({ select, removed, changed, modelName }) {
    Object.assign(this, { select, removed, changed, modelName });
    addEventListener("pagehide", () => this.#save());
    byId("file").addEventListener("change", async ({ target }) => {
      for (const file of target.files) await this.#import(file);
      target.value = "";
    });
    byId("search").addEventListener("input", ({ target }) => {
      this.#words = plain(target.value).split(/\s+/).filter(Boolean);
      this.changed();
      if (this.#words.length) say(`${this.shown.length} of ${this.all.length} conversations`);
    });
  }

  /** The conversations in the list: all, or those in which every searched word occurs. */
  get shown() {
    if (!this.#words.length) return this.all;
    return this.all.filter((conversation) => {
      const text = plain(textOf(conversation));
      return this.#words.every((word) => text.includes(word));
    });
  }

  async open() {
    const { conversations, kept } = await store.open();
    this.all = conversations;
    if (!kept) toast("This browser keeps no conversations of this page; export what you need.");
  }

  add(conversation, index = 0) {
    this.all.splice(index, 0, conversation);
    this.keepSoon(conversation);
  }

  toFront(conversation) {
    this.all = [conversation, ...this.all.filter((other) => other !== conversation)];
    this.keepSoon(conversation);
  }

  /** Write a conversation once it has been left alone for a moment, or with the page. */
  keepSoon(conversation) {
    if (!this.all.includes(conversation)) return;
    this.#unsaved.add(conversation);
    clearTimeout(this.#saving);
    this.#saving = setTimeout(() => this.#save(), 300);
  }

  #save() {
    for (const conversation of this.#unsaved) {
      store.save(conversation).catch((error) => toast(`This browser cannot keep it: ${error.message}`));
    }
    this.#unsaved.clear();
  }

  /** Show the list. @param isRunning tells of a conversation whether it is being answered */
  show(current, isRunning) {
    const { shown } = this;
    byId("none").hidden = shown.length > 0 || !this.all.length;
    setChildren(byId("conversations"), shown.map((conversation) => {
      let item = this.#items.get(conversation);
      if (!item) this.#items.set(conversation, (item = this.#item(conversation)));
      const open = item.querySelector(".open");
      if (open) {
        open.textContent = conversation.title || "New conversation";
        open.ariaCurrent = conversation === current ? "true" : null;
      }
      item.classList.toggle("running", isRunning(conversation));
      return item;
    }));
  }

  #item(conversation) {
    const open = h("button.open", { type: "button", dir: "auto", onclick: () => this.select(conversation) });
    const item = h("li", {}, open, h("span.tools", {},
      iconButton("edit", "Rename", () => this.#rename(conversation, item)),
      iconButton("export", "Export", () => this.export([conversation])),
      iconButton("trash", "Delete", () => this.#remove(conversation))));
    return item;
  }

  #rename(conversation, item) {
    const button = item.querySelector(".open");
    if (!button) return;
    const input = h("input", { "aria-label": "Name of the conversation", dir: "auto" });
    input.value = conversation.title;
    let isOpen = true; // leaving the document, the field loses focus, which closes it, too
    const close = (keeps) => {
      if (!isOpen) return;
      isOpen = false;
      if (keeps && input.value.trim()) conversation.title = input.value.trim();
      input.replaceWith(button);
      this.keepSoon(conversation);
      this.changed();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      close(event.key === "Enter");
      button.focus();
    });
    input.addEventListener("blur", () => close(true));
    button.replaceWith(input);
    input.select();
  }

  #remove(conversation) {
    const index = this.all.indexOf(conversation);
    this.all.splice(index, 1);
    this.#unsaved.delete(conversation);
    store.remove(conversation);
    this.removed(conversation);
    toast("Deleted.", "Undo", () => {
      this.add(conversation, index);
      this.select(conversation);
    });
  }

  /** Save conversations as a file of OpenAI messages. */
  export(conversations) {
    if (!conversations.length) return toast("There is nothing to export.");
    const bodies = conversations.map((conversation) => toJson(conversation, this.modelName()));
    const isOne = bodies.length === 1;
    const text = JSON.stringify(isOne ? bodies[0] : bodies, null, 2);
    const name = isOne ? conversations[0].title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) : "";
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    h("a", { href: url, download: `${name || "conversations"}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async #import(file) {
    let read;
    try {
      read = fromJson(await file.text());
    } catch (error) {
      return toast(`${file.name}: ${error.message}`);
    }
    read.reverse().forEach((conversation) => this.add(conversation));
    this.select(read.at(-1));
    toast(`Imported ${read.length === 1 ? "a conversation" : `${read.length} conversations`}.`);
  }
}

/** A text as searches compare it: without case, accents or forms of letters. */
const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

/** The title and all words of a conversation, of every version and file. */
function textOf({ title, system, nodes }) {
  const messages = Object.values(nodes).flatMap(({ message, files = [] }) =>
    [message?.content, ...files.flatMap(({ name, text }) => [name, text])]);
  return [title, system, ...messages].filter(Boolean).join("\n");
}
