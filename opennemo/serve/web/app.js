/** The chat page: actions of the user become requests, and answers are shown and stored. */

import { answer } from "./answer.js";
import * as api from "./api.js";
import { append, choose, create, last, openCalls, parentOf, path, requestBody, withFiles } from "./conversation.js";
import { Attachments } from "./attachments.js";
import { byId, h, say, setChildren } from "./dom.js";
import { closeCover, isCovered, nextTheme, notice, scroll, showPanels, showTheme, togglePanel } from "./frame.js";
import { Library } from "./library.js";
import { ready } from "./markdown.js";
import { Settings, beginning, summary } from "./settings.js";
import { Thread } from "./thread.js";

const IDEAS = [
  "What is the capital of Germany?",
  "Write a Python function that checks whether a word is a palindrome.",
  "Explain in three points why the sky is blue.",
  "Write a haiku about the sea.",
];
const TOP_LOGPROBS = 5;

let current = create(beginning.get());
let cards = []; // of models, from the server
const runs = new Map(); // conversation -> { node, controller } while it is being answered
const drafts = new WeakMap(); // conversation -> { text, files }

const draft = byId("draft");
const modelName = () => byId("model").value;
const card = () => cards.find(({ id }) => id === modelName());
const thread = new Thread(byId("thread"), { again, edit, choose: step, answerCalls, goOn });
const attachments = new Attachments(showDock);
const library = new Library({ select, removed, changed: show, modelName });
const settings = new Settings(() => {
  library.keepSoon(current);
  thread.show(current, runs.get(current)?.node);
  showDock();
});

// ---- Answers

function send() {
  const message = { role: "user", content: draft.value.trim() };
  if (!canSend()) return;
  draft.value = "";
  run(append(current, last(current), message, attachments.take()));
}

const canSend = () =>
  !runs.has(current) && !attachments.isReading && Boolean(draft.value.trim() || attachments.files.length);

function edit(node, text) {
  if (runs.has(current)) return;
  run(append(current, parentOf(current, node), { ...node.message, content: text }, node.files));
}

/** A new version of an answer; one that never began is overwritten. */
function again(node) {
  if (runs.has(current)) return;
  const isEmpty = !node.message.content && !node.message.tool_calls;
  run(parentOf(current, node), isEmpty ? node : null);
}

function answerCalls(node, results) {
  if (runs.has(current)) return;
  let parent = node;
  openCalls(current, node).forEach((call, i) => {
    const message = { role: "tool", tool_call_id: call.id, name: call.function.name, content: results[i] };
    parent = append(current, parent, message);
  });
  run(parent);
}

/** Have an answer that was cut off continued where it ends. */
function goOn(node) {
  if (runs.has(current)) return;
  node.message.content = node.message.content.replace(/ +$/, ""); // words begin with their space
  run(node, node);
}

/** Answer the messages up to `parent`, in a new node, or continue the node given. */
async function run(parent, node = null) {
  const conversation = current;
  const goesOn = node === parent;
  const body = { model: modelName(), ...requestBody(conversation, parent) };
  if (goesOn) Object.assign(body, { add_generation_prompt: false, continue_final_message: true });
  // All tokens of an answer have their log-probabilities, or none.
  const wantsTokens = goesOn ? node.tokens?.length > 0 : thread.showTokens;
  if (wantsTokens) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  node ??= append(conversation, parent, { role: "assistant", content: "" });
  const controller = new AbortController();
  runs.set(conversation, { node, controller });
  library.toFront(conversation);
  const answered = answer(node, body, controller.signal, () => growSoon(conversation, node), goesOn);
  scroll.sticks = true;
  show();
  say("Answering");
  try {
    await answered;
  } finally {
    runs.delete(conversation);
    library.keepSoon(conversation);
    show();
    if (!node.error) say(`Answer: ${node.message.content.slice(0, 500) || node.finish}`);
  }
}

// ---- What is shown

function show() {
  byId("welcome").hidden = path(current).length > 0;
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · OpenNemo` : "OpenNemo";
  thread.show(current, runs.get(current)?.node);
  library.show(current, (conversation) => runs.has(conversation));
  showDock();
  scroll.follow();
}

/** Show what is new with the next frame, however many pieces come before it. */
const growing = new Map();
function growSoon(conversation, node) {
  if (!growing.size) requestAnimationFrame(grow);
  growing.set(conversation, node);
}

function grow() {
  for (const [conversation, node] of growing) {
    library.keepSoon(conversation);
    if (conversation !== current || runs.get(current)?.node !== node) continue;
    thread.grow(conversation, node);
    context.show(context.n + (node.stats?.n ?? 0));
    scroll.follow();
  }
  growing.clear();
}

function showDock() {
  const isRunning = runs.has(current);
  const hadFocus = document.activeElement === byId(isRunning ? "send" : "stop");
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("send").disabled = !canSend();
  if (hadFocus) (isRunning ? byId("stop") : draft).focus();
  byId("active").textContent = summary(current) || "Usual settings";
  draft.style.height = "auto";
  draft.style.height = `${Math.min(draft.scrollHeight, innerHeight * 0.4)}px`;
  context.countSoon();
}

/** The meter of tokens in use; the server counts those of the conversation and the draft. */
const context = {
  n: 0, // as last counted
  timer: 0,

  countSoon() {
    clearTimeout(this.timer);
    if (cards.length && !runs.has(current)) this.timer = setTimeout(() => this.count(), 250);
  },

  async count() {
    const conversation = current;
    const { messages, tools } = requestBody(current, last(current));
    const { content } = withFiles({ content: draft.value.trim() }, attachments.files);
    if (content) messages.push({ role: "user", content });
    const end = messages.at(-1);
    if (!end || end.role === "system") return this.show((this.n = 0));
    if (end.role === "assistant") {
      // The server counts what it could answer, so an answer counts as one to go on with.
      const calls = end.tool_calls?.map((call) => call.function.arguments).join("") ?? "";
      messages[messages.length - 1] = { role: "assistant", content: end.content + calls, prefix: true };
    }
    try {
      const count = await api.count({ model: modelName(), messages, tools });
      if (conversation === current && !runs.has(current)) this.show((this.n = count));
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error; // sending will show the error
    }
  },

  show(n) {
    const meter = byId("context");
    const most = card()?.max_model_len;
    meter.hidden = !most;
    if (!most) return;
    const text = `${n.toLocaleString("en")} / ${most.toLocaleString("en")}`;
    const label = `${text} tokens of context`;
    Object.assign(meter, { ariaValueNow: n, ariaValueMax: most, ariaValueText: label, title: label });
    meter.querySelector(".text").textContent = text;
    meter.querySelector(".fill").style.setProperty("--share", Math.min(1, n / most));
    meter.classList.toggle("full", n > 0.9 * most);
  },
};

/** Show another conversation, or with null a new one. */
function select(conversation) {
  drafts.set(current, { text: draft.value, files: attachments.files });
  current = conversation ?? create(beginning.get());
  const { text, files } = drafts.get(current) ?? { text: "", files: [] };
  draft.value = text;
  attachments.show(files);
  settings.show(current, card());
  scroll.sticks = true;
  closeCover();
  show();
  draft.focus({ preventScroll: true });
}

function removed(conversation) {
  runs.get(conversation)?.controller.abort();
  if (conversation === current) select(library.all[0] ?? null);
  else show();
}

/** Show another version of a message, with the focus still on its switch. */
function step(node, by) {
  const shown = choose(current, node, by);
  library.keepSoon(current);
  show();
  const view = thread.list.querySelector(`[data-node="${shown.id}"]`);
  const buttons = [by, -by].map((wanted) => view.querySelector(`[data-step="${wanted}"]`));
  buttons.find((button) => !button.disabled)?.focus();
}

// ---- The server

/** Ask for the models until there is an answer: a model may still be loading. */
async function connect() {
  for (;;) {
    try {
      cards = await api.models();
      break;
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      if (error.status === 401) return notice(error.message, "Enter a key", connect);
      notice(error.code === "loading" ? "The model is being loaded …" : error.explanation);
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }
  notice("");
  const choice = byId("model");
  const wanted = localStorage.getItem("model");
  const option = ({ id }) => h("option", { value: id }, id);
  const adapters = cards.filter(({ parent }) => parent);
  setChildren(choice, [
    ...cards.filter(({ parent }) => !parent).map(option),
    ...(adapters.length ? [h("optgroup", { label: "With an adapter" }, adapters.map(option))] : []),
  ]);
  if (cards.some(({ id }) => id === wanted)) choice.value = wanted;
  choice.disabled = cards.length < 2;
  showModel();
}

function showModel() {
  const { id, max_model_len: most, capabilities } = card();
  byId("greeting").textContent = id;
  byId("about").textContent = capabilities?.completion_chat === false
    ? "This is a base model without a chat layout: it cannot hold a conversation."
    : `${most.toLocaleString("en")} tokens of context. Conversations stay in this browser.`;
  settings.show(current, card());
  context.show(context.n);
  showDock();
}

const keyDialog = byId("key-dialog");

/** Resolves to whether a key was given. */
function askForKey(why) {
  byId("key-why").textContent = why;
  keyDialog.returnValue = "";
  if (!keyDialog.open) keyDialog.showModal();
  return new Promise((resolve) => {
    const closed = () => resolve(keyDialog.returnValue === "use");
    keyDialog.addEventListener("close", closed, { once: true });
  });
}
api.onKeyNeeded(askForKey);

keyDialog.addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = byId("key").value.trim();
  byId("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(typed)) {
    byId("key-why").textContent = "A key has letters, digits and signs, without spaces.";
    return;
  }
  api.key.set(typed, byId("key-keep").checked);
  keyDialog.close("use");
});

// ---- What people do: buttons by their data-do, and keys

const DO = {
  new: () => select(library.all.includes(current) ? null : current), // a draft stays
  stop: () => runs.get(current)?.controller.abort(),
  latest() {
    scroll.toEnd();
    draft.focus();
  },
  tokens() {
    thread.showTokens = !thread.showTokens;
    byId("show-tokens").ariaPressed = thread.showTokens;
    show();
  },
  theme: nextTheme,
  sidebar: () => togglePanel("sidebar"),
  search() {
    if (byId("sidebar").inert) togglePanel("sidebar");
    byId("search").focus();
  },
  settings: () => togglePanel("settings"),
  "close-cover": closeCover,
  shortcuts: () => byId("shortcuts").showModal(),
  async key() {
    if (await askForKey(api.key.get() ? "One is in use." : "None is in use.")) connect();
  },
  "forget-key"() {
    api.key.forget();
    keyDialog.close("");
  },
  "close-dialog": () => keyDialog.close(""),
  import: () => byId("file").click(),
  attach: () => byId("attachment").click(),
  "export-all": () => library.export(library.all),
};

function keyAction({ key, altKey, shiftKey, ctrlKey, metaKey, target }) {
  const control = ctrlKey || metaKey;
  if (key === "Escape") {
    if (isCovered()) return closeCover;
    return runs.has(current) ? DO.stop : null;
  }
  if (control && shiftKey && key.toLowerCase() === "o") return DO.new;
  if (control && key === ".") return DO.settings;
  if (control && key.toLowerCase() === "k") return DO.search;
  if (altKey && (key === "ArrowUp" || key === "ArrowDown")) {
    const next = library.shown[library.shown.indexOf(current) + (key === "ArrowUp" ? -1 : 1)];
    return next ? () => select(next) : null;
  }
  if (control || altKey || target.matches("input, textarea, select")) return null;
  return { "/": () => draft.focus(), "?": DO.shortcuts }[key] ?? null;
}

document.addEventListener("click", ({ target }) => DO[target.closest("[data-do]")?.dataset.do]?.());
document.addEventListener("keydown", (event) => {
  const action = document.querySelector("dialog[open]") ? null : keyAction(event);
  if (!action) return;
  event.preventDefault();
  action();
});
byId("model").addEventListener("change", () => {
  localStorage.setItem("model", modelName());
  showModel();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
draft.addEventListener("input", showDock);
draft.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // Enter chooses a character there
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !event.altKey && !draft.value && !runs.has(current)) {
    const mine = path(current).findLast(({ message }) => message.role === "user");
    if (!mine) return;
    event.preventDefault();
    thread.edit(current, mine);
  }
});

function tryIdea(idea) {
  draft.value = idea;
  send();
}
byId("ideas").append(...IDEAS.map((idea) =>
  h("li", {}, h("button", { type: "button", onclick: () => tryIdea(idea) }, idea))));

showTheme();
showPanels();
await Promise.all([library.open(), ready]);
current = library.all[0] ?? current;
settings.show(current);
show();
connect();
