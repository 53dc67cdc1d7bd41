// Vercel's AI SDK with its Mistral provider: node ai_sdk_client.mjs URL KEY MODEL
import assert from "node:assert/strict";
import { createMistral } from "@ai-sdk/mistral";
import { generateText, jsonSchema, streamText, tool } from "ai";

const [url, apiKey, id] = process.argv.slice(2);
const model = createMistral({ baseURL: `${url}/v1`, apiKey })(id);
const inputSchema = jsonSchema({
  type: "object",
  properties: { n: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["n"],
  additionalProperties: false,
});
const prompt = "Hello";

const whole = await generateText({ model, prompt, maxOutputTokens: 8, seed: 1, temperature: 1 });
const stream = streamText({ model, prompt, maxOutputTokens: 8, seed: 1, temperature: 1 });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, whole.text);
const called = await generateText({
  model, prompt, tools: { add: tool({ inputSchema }) }, toolChoice: "required", maxOutputTokens: 2000,
});
assert.ok(called.toolCalls[0].input.n <= 9);
const streamed = streamText({
  model, prompt, tools: { add: tool({ inputSchema }) }, toolChoice: "required", maxOutputTokens: 2000,
});
assert.ok((await streamed.toolCalls)[0].input.n <= 9);
const unknown = createMistral({ baseURL: `${url}/v1`, apiKey })("gpt-4");
await assert.rejects(generateText({ model: unknown, prompt, maxRetries: 0 }), /no model/);
console.log("ok");
