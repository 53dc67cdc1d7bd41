// OpenAI's JavaScript client: node openai_client.mjs URL KEY MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const parameters = {
  type: "object",
  properties: { n: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["n"],
  additionalProperties: false,
};
const ask = (more) => client.chat.completions.create({ model, messages, max_tokens: 8, ...more });

const whole = await ask({ seed: 1 });
let text = "";
for await (const chunk of await ask({ seed: 1, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

// The client's own loop: it calls the function, and asks again.
const seen = [];
const runner = client.chat.completions.runTools({
  model, messages, stream: true, max_tokens: 400, parallel_tool_calls: false,
  tool_choice: { type: "function", function: { name: "add" } },
  tools: [{
    type: "function",
    function: { name: "add", parameters, parse: JSON.parse, function: ({ n }) => (seen.push(n), "4") },
  }],
}, { maxChatCompletions: 2 });
await runner.done();
assert.ok(seen.length >= 1 && seen.every((n) => n >= 0 && n <= 9));
assert.ok(runner.messages.some((message) => message.role === "tool"));
const dialogue = runner.messages.slice(0, 3);
assert.ok((await ask({ messages: dialogue })).choices[0].message.content);

const format = zodResponseFormat(z.object({ n: z.number().int().min(0).max(9) }), "n");
const answer = await client.chat.completions.parse({ model, messages, response_format: format, max_tokens: 200 });
assert.ok(answer.choices[0].message.parsed.n <= 9);
assert.ok((await client.models.list()).data.some((card) => card.id === model));
await assert.rejects(ask({ model: "gpt-4" }), OpenAI.NotFoundError);
console.log("ok: text, streamed calls, tool loop (runTools), parse with zod");
