// Vercel's AI SDK with its four providers that fit: node ai_sdk_client.mjs URL KEY MODEL
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createMistral } from "@ai-sdk/mistral";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";

const [url, apiKey, id] = process.argv.slice(2);
const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey });
const providers = {
  mistral: createMistral({ baseURL, apiKey }),
  "openai (responses)": openai,
  "openai (chat)": openai.chat,
  "openai-compatible": createOpenAICompatible({
    name: "opennemo", baseURL, apiKey, supportsStructuredOutputs: true, includeUsage: true,
  }),
  anthropic: createAnthropic({ baseURL, apiKey }),
};
const schema = jsonSchema({
  type: "object",
  properties: { n: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["n"],
  additionalProperties: false,
});
const prompt = "Hello";

for (const [name, provider] of Object.entries(providers)) {
  try {
    await check(provider, name);
  } catch (error) {
    error.message = `${name}: ${error.message}`;
    throw error;
  }
}
console.log("ok: text, streamed calls, tool loop, objects, whole and streamed, for each of",
  Object.keys(providers).join(", "));

async function check(provider, name) {
  const model = provider(id);
  const settings = { model, prompt, maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
  const whole = await generateText(settings);
  const stream = streamText(settings);
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.ok(whole.usage.inputTokens > 0 && (await stream.usage).outputTokens > 0, "usage");

  // The SDK's own loop: it calls the function, and asks again with the result.
  for (const streamed of [false, true]) {
    const seen = [];
    const looping = {
      model, prompt, maxOutputTokens: 1000, maxRetries: 0,
      tools: { add: tool({ inputSchema: schema, execute: ({ n }) => (seen.push(n), "4") }) },
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
      stopWhen: stepCountIs(2),
    };
    const steps = streamed ? await streamText(looping).steps : (await generateText(looping)).steps;
    assert.ok(steps[0].toolCalls.length && !steps[0].toolCalls[0].invalid, "a call");
    assert.ok(seen.length && seen.every((n) => n >= 0 && n <= 9), "arguments");
    assert.equal(steps.length, 2);
  }

  const forming = { model, prompt, maxOutputTokens: 200, maxRetries: 0, output: Output.object({ schema }) };
  assert.ok((await generateText(forming)).output.n <= 9);
  let last;
  const parts = streamText(forming);
  for await (const part of parts.partialOutputStream) last = part;
  assert.ok(last.n <= 9);
  await assert.rejects(generateText({ ...settings, model: provider("gpt-4") }), /no model/);
}
