/** One answer, from the request to its end: its text is put into a node, and timed. */

import { ApiError, chat } from "./api.js";
import { keep } from "./tokens.js";

/**
 * Let an answer grow in `node` until it is complete, stopped or failed, which `node` then records.
 *
 * @param grew called after each piece
 * @param goesOn whether the answer continues the text of `node`, with which `body` ends
 */
export async function answer(node, body, signal, grew, goesOn = false) {
  const clock = new Clock(goesOn ? node.stats : null);
  // Its state if the page is left before it ends: stopped.
  Object.assign(node, { model: body.model, error: null, finish: "stopped" });
  if (!goesOn) Object.assign(node, { message: { role: "assistant", content: "" }, stats: null, tokens: [] });
  try {
    for await (const chunk of chat(body, signal)) {
      if (take(node, chunk)) clock.tick();
      if (chunk.usage) clock.n = chunk.usage.completion_tokens;
      node.stats = clock.stats(Boolean(chunk.usage));
      grew();
    }
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof ApiError)) throw error;
    node.error = { message: error.explanation };
    node.finish = "error";
  }
}

/** Add a chunk's content; returns whether it had any words. */
function take(node, { choices }) {
  const [choice] = choices;
  if (!choice) return false;
  const { content, reasoning_content: thinking, tool_calls: calls } = choice.delta;
  node.message.content += content ?? "";
  if (thinking) node.message.reasoning_content = (node.message.reasoning_content ?? "") + thinking;
  for (const { index, id, function: part } of calls ?? []) {
    const all = (node.message.tool_calls ??= []);
    all[index] ??= { id, type: "function", function: { name: part.name, arguments: "" } };
    all[index].function.arguments += part.arguments ?? "";
  }
  node.tokens.push(...(choice.logprobs?.content ?? []).map(keep));
  node.finish = choice.finish_reason ?? node.finish;
  return Boolean(content || thinking || calls);
}

/** Counts and times tokens, after those of `earlier`; a chunk counts as one until the server has counted. */
class Clock {
  n = 0;
  #begun = performance.now();
  #first = null;
  #last = null;

  constructor(earlier) {
    this.earlier = earlier ?? { n: 0, seconds: 0, exact: true };
  }

  tick() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.n += 1;
  }

  stats(exact) {
    const { earlier } = this;
    if (this.#first === null) return earlier.n ? earlier : null;
    const seconds = earlier.seconds + (this.#last - this.#first) / 1000;
    const first = earlier.first ?? (this.#first - this.#begun) / 1000;
    return { n: earlier.n + this.n, exact: exact && earlier.exact, seconds, first };
  }
}
