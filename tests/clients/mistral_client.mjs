// Mistral's JavaScript client: node mistral_client.mjs URL KEY MODEL
import assert from "node:assert/strict";
import { Mistral } from "@mistralai/mistralai";
import { z } from "zod";

const [serverURL, apiKey, model] = process.argv.slice(2);
const client = new Mistral({ serverURL, apiKey });
const messages = [{ role: "user", content: "Hello" }];
const parameters = {
  type: "object",
  properties: { n: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["n"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "add", parameters } }];
const ask = (more) => client.chat.complete({ model, messages, maxTokens: 8, ...more });

const whole = await ask({ randomSeed: 1 });
let text = "";
for await (const event of await client.chat.stream({ model, messages, maxTokens: 8, randomSeed: 1 })) {
  text += event.data.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

for (const toolChoice of ["any", "required"]) {
  const { message } = (await ask({ tools, toolChoice, maxTokens: 2000 })).choices[0];
  const streamed = [];
  for await (const event of await client.chat.stream({ model, messages, tools, toolChoice, maxTokens: 2000 })) {
    streamed.push(...(event.data.choices[0]?.delta?.toolCalls ?? []));
  }
  assert.ok(streamed.length);
  for (const call of [...streamed, ...message.toolCalls]) {
    assert.equal(call.function.name, "add");
    assert.ok(JSON.parse(call.function.arguments).n <= 9);
  }
  for (const toolCalls of [message.toolCalls, streamed]) {
    const results = toolCalls.map((call) => ({ role: "tool", name: "add", content: "4", toolCallId: call.id }));
    const again = await ask({ messages: [...messages, { role: "assistant", content: "", toolCalls }, ...results] });
    assert.ok(again.choices[0].message.content);
  }
}

const responseFormat = z.object({ n: z.number().int().min(0).max(9) });
const answer = await client.chat.parse({ model, messages, responseFormat, maxTokens: 200 });
assert.ok(answer.choices[0].message.parsed.n <= 9);
assert.ok((await client.models.list()).data.some((card) => card.id === model));
await assert.rejects(ask({ model: "codestral" }));
console.log("ok: text, streamed calls, tool loop, parse with zod");
