/**
 * A conversation: a tree of OpenAI messages, of which one path is shown, and its settings.
 *
 * Editing a message or asking again adds a sibling and chooses it, so nothing is ever lost. These
 * are plain objects, as IndexedDB keeps them; nothing here knows the document or the server.
 *
 * @typedef {{id: string, parent: string?, children: string[], chosen: string?, message: object?,
 *   files?: {name: string, text: string}[], model?: string, finish?: string, error?: object,
 *   stats?: object, tokens?: object[]}} Node
 */

/** Sampling settings: name, label, least, most, step and what it does. Bounds are the server's. */
export const SAMPLING = [
  ["temperature", "Temperature", 0, 5, 0.1, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0.01, 1, 0.05, "only the likeliest tokens that together have this probability"],
  ["top_k", "Top k", 0, 2 ** 31 - 1, 1, "only so many of the likeliest tokens; 0 is all"],
  ["min_p", "Min p", 0, 1, 0.05, "only tokens this likely, compared with the likeliest"],
  ["max_tokens", "Max tokens", 1, 2 ** 31 - 1, 1, "where an answer is cut off"],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1, "the same seed gives the same answer"],
  ["repetition_penalty", "Repetition penalty", 0.01, 10, 0.1, "above 1: fewer repetitions"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "above 0: new words"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "above 0: rarer words"],
];

const ROOT = "root";
const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36).padStart(2, "0")).join("");

/** A conversation's settings alone; those that are missing are as usual. */
export const settingsOf = (like = {}) => ({
  system: like.system ?? "",
  sampling: { ...like.sampling },
  stop: [...(like.stop ?? [])],
  format: like.format ?? "text", // of answers: or "json", or "schema"
  schema: like.schema ?? "",
  tools: like.tools ?? "",
  toolChoice: like.toolChoice ?? "auto",
});

/** An empty conversation; its settings are those of `like`. */
export function create(like = {}) {
  return {
    id: newId(),
    title: "",
    updated: Date.now(),
    ...settingsOf(like),
    nodes: { [ROOT]: { id: ROOT, parent: null, children: [], chosen: null, message: null } },
  };
}

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const found = [];
  let node = conversation.nodes[ROOT];
  while ((node = conversation.nodes[node.chosen])) found.push(node);
  return found;
}

export const last = (conversation) => path(conversation).at(-1) ?? conversation.nodes[ROOT];
export const parentOf = (conversation, node) => conversation.nodes[node.parent];

/** Add a message after another and choose it; `files` go with it. */
export function append(conversation, parent, message, files = []) {
  const node = { id: newId(), parent: parent.id, children: [], chosen: null, message, files };
  conversation.nodes[node.id] = node;
  parent.children.push(node.id);
  parent.chosen = node.id;
  conversation.updated = Date.now();
  if (!conversation.title && message.role === "user") {
    conversation.title = titleOf(message.content || (files[0]?.name ?? ""));
  }
  return node;
}

/** A message as the model reads it: the files stand before the words. */
export function withFiles(message, files = []) {
  if (!files.length) return message;
  const texts = files.map(({ name, text }) => `<file name="${name.replace(/["<>\s]+/g, " ")}">\n${text}\n</file>`);
  return { ...message, content: [...texts, message.content].filter(Boolean).join("\n\n") };
}

/** Where a message stands among its alternatives: [index from 0, how many]. */
export function place(conversation, node) {
  const { children } = parentOf(conversation, node);
  return [children.indexOf(node.id), children.length];
}

/** Show the alternative `step` further on. */
export function choose(conversation, node, step) {
  const parent = parentOf(conversation, node);
  const [index] = place(conversation, node);
  parent.chosen = parent.children[index + step] ?? node.id;
  return conversation.nodes[parent.chosen];
}

/** Calls of an assistant's message that nothing has answered on the shown path. */
export function openCalls(conversation, node) {
  const next = conversation.nodes[node.chosen];
  return next?.message.role === "tool" ? [] : (node.message.tool_calls ?? []);
}

/** The body of a request: the conversation up to and with `node`, and its settings. */
export function requestBody(conversation, node) {
  const messages = [];
  for (let at = node; at.message; at = parentOf(conversation, at)) {
    messages.unshift(withFiles(at.message, at.files));
  }
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  const body = { messages, ...conversation.sampling };
  if (conversation.stop.length) body.stop = conversation.stop;
  const { format } = readFormat(conversation);
  if (format) body.response_format = format;
  const { tools } = readTools(conversation.tools);
  if (tools.length) {
    body.tools = tools;
    // Were a call required after a result, too, the model could never say what it found.
    const results = node.message?.role === "tool" && conversation.toolChoice === "required";
    body.tool_choice = results ? "auto" : conversation.toolChoice;
  }
  return body;
}

/** The form of answers, as requests name it: { format, error }; none for any text. */
export function readFormat({ format, schema }) {
  if (format === "json") return { format: { type: "json_object" }, error: "" };
  if (format !== "schema") return { format: null, error: "" };
  const { value, error } = readJson(schema || "{}");
  if (error || !isObject(value)) return { format: null, error: error || "Expected an object: { … }" };
  return { format: { type: "json_schema", json_schema: { name: "answer", schema: value } }, error: "" };
}

function readJson(text) {
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    return { error: `Not JSON: ${error.message}` };
  }
}

/** Tool definitions from the typed text: { tools, error }. */
export function readTools(text) {
  if (!text.trim()) return { tools: [], error: "" };
  const fail = (error) => ({ tools: [], error });
  const { value: tools, error: invalid } = readJson(text);
  if (invalid) return fail(invalid);
  if (!Array.isArray(tools)) return fail("Expected a list: [ … ]");
  const names = new Set();
  for (const [i, tool] of tools.entries()) {
    const { name, description, parameters } = tool?.function ?? {};
    if (tool?.type !== "function") return fail(`[${i}].type: must be "function"`);
    if (typeof name !== "string" || !/^[\w-]{1,64}$/.test(name)) {
      return fail(`[${i}].function.name: letters, digits, _ and -, at most 64`);
    }
    if (names.has(name)) return fail(`[${i}].function.name: there is another "${name}"`);
    if (description !== undefined && typeof description !== "string") {
      return fail(`[${i}].function.description: must be a text`);
    }
    if (parameters !== undefined && !isObject(parameters)) {
      return fail(`[${i}].function.parameters: must be a JSON schema, { … }`);
    }
    names.add(name);
  }
  return { tools, error: "" };
}

/** What is shown of a conversation as the body of a request, which any client can send again. */
export function toJson(conversation, model) {
  const end = path(conversation).findLast((node) => !node.error) ?? conversation.nodes[ROOT];
  return { model, ...requestBody(conversation, end), metadata: { title: conversation.title } };
}

/** Conversations from a file: a request's body, a list of messages, or a list of bodies. */
export function fromJson(text) {
  const { value: read, error } = readJson(text);
  if (error) throw new Error(error);
  const isMessages = Array.isArray(read) && read.every((entry) => typeof entry?.role === "string");
  const bodies = isMessages ? [{ messages: read }] : [read].flat();
  if (!bodies.length || !bodies.every((body) => Array.isArray(body?.messages))) {
    throw new Error('expected { "messages": [ … ] }, or a list of those');
  }
  return bodies.map(fromBody);
}

function fromBody(body) {
  const conversation = create();
  const system = [];
  body.messages.forEach((message, i) => {
    const read = readMessage(message, `messages[${i}]`);
    if (read.role === "system") system.push(read.content);
    else append(conversation, last(conversation), read);
  });
  conversation.system = system.join("\n\n");
  for (const [name, , least, most] of SAMPLING) {
    const value = body[name];
    if (typeof value === "number" && value >= least && value <= most) {
      conversation.sampling[name] = value;
    }
  }
  conversation.stop = [body.stop ?? []].flat().filter((text) => typeof text === "string");
  if (Array.isArray(body.tools) && body.tools.length) {
    conversation.tools = JSON.stringify(body.tools, null, 2);
  }
  if (["required", "none"].includes(body.tool_choice)) conversation.toolChoice = body.tool_choice;
  const { type, json_schema: form } = body.response_format ?? {};
  if (type === "json_object") conversation.format = "json";
  else if (type === "json_schema" && isObject(form?.schema)) {
    Object.assign(conversation, { format: "schema", schema: JSON.stringify(form.schema, null, 2) });
  }
  const title = body.metadata?.title;
  if (typeof title === "string" && title) conversation.title = titleOf(title);
  return conversation;
}

function readMessage(message, where) {
  const role = message?.role === "developer" ? "system" : message?.role;
  if (!["system", "user", "assistant", "tool"].includes(role)) {
    throw new Error(`${where}.role: system, user, assistant or tool`);
  }
  const parts = Array.isArray(message.content) ? message.content : [{ text: message.content ?? "" }];
  if (!parts.every((part) => typeof part?.text === "string")) {
    throw new Error(`${where}.content: must be a text`);
  }
  const read = { role, content: parts.map((part) => part.text).join("\n\n") };
  if (role === "assistant" && typeof message.reasoning_content === "string") {
    read.reasoning_content = message.reasoning_content;
  }
  if (role === "assistant" && message.tool_calls?.length) {
    read.tool_calls = [message.tool_calls].flat().map((call, i) => {
      const { name, arguments: given } = call?.function ?? {};
      if (typeof name !== "string") throw new Error(`${where}.tool_calls[${i}].function.name: missing`);
      const text = typeof given === "string" ? given : JSON.stringify(given ?? {});
      const id = typeof call.id === "string" ? call.id : newId().slice(0, 9);
      return { id, type: "function", function: { name, arguments: text } };
    });
  }
  if (role === "tool" && typeof message.tool_call_id === "string") {
    read.tool_call_id = message.tool_call_id;
  }
  if (role === "tool" && typeof message.name === "string") read.name = message.name;
  return read;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const titleOf = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80);
