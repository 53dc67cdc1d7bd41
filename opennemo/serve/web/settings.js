/** The panel that edits a conversation's settings, and says what is wrong where it is typed. */

import { SAMPLING, readTools } from "./conversation.js";
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
    elements.tools.value = conversation.tools;
    elements.toolChoice.value = conversation.toolChoice;
    for (const element of elements) this.#check(element);
  }

  #read(field) {
    const { name, value } = field;
    if (name === "stop") this.conversation.stop = value.split("\n").filter(Boolean).slice(0, 16);
    else if (field.type !== "number") this.conversation[name] = value;
    else if (value === "" || !isValid(field)) delete this.conversation.sampling[name];
    else this.conversation.sampling[name] = Number(value);
    this.#check(field);
  }

  #check(field) {
    if (field.name === "tools") {
      const { tools, error } = readTools(field.value);
      const state = byId("tools-state");
      state.textContent = error || (tools.length ? `✓ ${tools.map((t) => t.function.name).join(", ")}` : "");
      state.classList.toggle("wrong", Boolean(error));
      field.ariaInvalid = Boolean(error);
    } else if (field.type === "number") {
      field.ariaInvalid = !isValid(field);
      field.parentElement.querySelector(".wrong")?.remove();
      if (!isValid(field)) field.after(h("span.wrong", { role: "alert" }, field.validationMessage));
    }
  }
}

/** Whether a number is one the server takes; steps are for the arrows alone, if not of 1. */
function isValid({ validity, step }) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = validity;
  return !(badInput || rangeUnderflow || rangeOverflow || (step === "1" && stepMismatch));
}

/** What is not as usual, in few words: "temperature 0.7 · 2 tools". */
export function summary({ sampling, system, stop, tools, toolChoice }) {
  const parts = SAMPLING.filter(([name]) => name in sampling)
    .map(([name, label]) => `${label.toLowerCase()} ${sampling[name]}`);
  if (system) parts.unshift("system prompt");
  if (stop.length) parts.push("stop");
  const { tools: read, error } = readTools(tools);
  if (error) parts.push("tools are not valid and not sent");
  else if (read.length && toolChoice !== "none") parts.push(`${read.length} tool${read.length > 1 ? "s" : ""}`);
  return parts.join(" · ");
}
