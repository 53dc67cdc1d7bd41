/** The panel that edits a conversation's settings, and says what is wrong where it is typed. */

import { SAMPLING, readFormat, readTools, settingsOf } from "./conversation.js";
import { byId, h } from "./dom.js";

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city now",
      parameters: {
        type: "object",
        properties: {
          city: { type: "string", maxLength: 40 },
          unit: { type: "string", enum: ["celsius", "fahrenheit"] },
        },
        required: ["city", "unit"],
      },
    },
  },
];

/** The settings that new conversations begin with, kept in this browser. */
export const beginning = {
  get() {
    try {
      return settingsOf(JSON.parse(localStorage.getItem("beginning") ?? "{}"));
    } catch {
      return settingsOf();
    }
  },
  set: (conversation) => localStorage.setItem("beginning", JSON.stringify(settingsOf(conversation))),
};

export class Settings {
  /** @param changed is called after each change */
  constructor(changed) {
    this.form = byId("fields");
    byId("sampling").append(...SAMPLING.map(([name, label, min, max, step, hint]) =>
      h("label.field.number", { title: hint }, label,
        h("input", { name, type: "number", min, max, step, inputmode: "decimal", placeholder: "–" }))));
    this.form.addEventListener("input", ({ target }) => {
      this.#read(target);
      changed();
    });
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("fields").addEventListener("click", ({ target }) => {
      const what = target.closest("[data-do]")?.dataset.do;
      if (what === "reset-sampling") Object.assign(this.conversation, { sampling: {}, stop: [] });
      else if (what === "example-tool") this.conversation.tools = JSON.stringify(EXAMPLE, null, 2);
      else if (what === "begin-with-these") beginning.set(this.conversation);
      else if (what === "as-in-the-beginning") Object.assign(this.conversation, beginning.get());
      else return;
      this.show(this.conversation, this.card);
      changed();
    });
  }

  /** Show a conversation's settings; `card` is the model's, which names its own temperature. */
  show(conversation, card) {
    Object.assign(this, { conversation, card });
    const { elements } = this.form;
    for (const [name] of SAMPLING) elements[name].value = conversation.sampling[name] ?? "";
    elements.temperature.placeholder = card?.default_model_temperature ?? "–";
    elements.system.value = conversation.system;
    elements.stop.value = conversation.stop.join("\n");
    elements.format.value = conversation.format ?? "text";
    elements.schema.value = conversation.schema ?? "";
    elements.tools.value = conversation.tools;
    elements.toolChoice.value = conversation.toolChoice;
    for (const element of elements) this.#check(element);
    this.#showBeginning();
  }

  /** What new conversations begin with, and whether that differs from this conversation. */
  #showBeginning() {
    const kept = beginning.get();
    const isSame = JSON.stringify(kept) === JSON.stringify(settingsOf(this.conversation));
    byId("beginning").textContent = `They begin with ${summary(kept) || "the usual settings"}.`;
    for (const name of ["begin-with-these", "as-in-the-beginning"]) {
      this.form.querySelector(`[data-do="${name}"]`).disabled = isSame;
    }
  }

  #read(field) {
    const { name, value } = field;
    if (name === "stop") this.conversation.stop = value.split("\n").filter(Boolean).slice(0, 16);
    else if (field.type !== "number") this.conversation[name] = value;
    else if (value === "" || !isValid(field)) delete this.conversation.sampling[name];
    else this.conversation.sampling[name] = Number(value);
    this.#check(field);
    this.#showBeginning();
  }

  #check(field) {
    if (field.name === "tools") {
      const { tools, error } = readTools(field.value);
      judge(field, error, tools.length ? `✓ ${tools.map((t) => t.function.name).join(", ")}` : "");
    } else if (field.name === "format" || field.name === "schema") {
      const { schema } = this.form.elements;
      schema.parentElement.hidden = this.conversation.format !== "schema";
      judge(schema, readFormat(this.conversation).error, "");
    } else if (field.type === "number") {
      field.ariaInvalid = !isValid(field);
      field.parentElement.querySelector(".wrong")?.remove();
      if (!isValid(field)) field.after(h("span.wrong", { role: "alert" }, field.validationMessage));
    }
  }
}

/** Say below a field what is wrong with it, or what it holds. */
function judge(field, error, good) {
  const state = byId(field.getAttribute("aria-describedby"));
  state.textContent = error || good;
  state.classList.toggle("wrong", Boolean(error));
  field.ariaInvalid = Boolean(error);
}

/** Whether a number is one the server takes; steps are for the arrows alone, if not of 1. */
function isValid({ validity, step }) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = validity;
  return !(badInput || rangeUnderflow || rangeOverflow || (step === "1" && stepMismatch));
}

/** What is not as usual, in few words: "temperature 0.7 · 2 tools". */
export function summary(conversation) {
  const { sampling, system, stop, tools, toolChoice, format } = conversation;
  const parts = SAMPLING.filter(([name]) => name in sampling)
    .map(([name, label]) => `${label.toLowerCase()} ${sampling[name]}`);
  if (system) parts.unshift("system prompt");
  if (stop.length) parts.push("stop");
  if (readFormat(conversation).error) parts.push("the schema is not valid and not sent");
  else if (format === "json" || format === "schema") parts.push(format === "json" ? "JSON" : "JSON by a schema");
  const { tools: read, error } = readTools(tools);
  if (error) parts.push("tools are not valid and not sent");
  else if (read.length && toolChoice !== "none") parts.push(`${read.length} tool${read.length > 1 ? "s" : ""}`);
  return parts.join(" · ");
}
