// Mistral's JavaScript client: node mistral_client.mjs URL KEY MODEL
import assert from "node:assert/strict";
import { Mistral } from "@mistralai/mistralai";

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
const called = await ask({ tools, toolChoice: "any", maxTokens: 2000 });
const message = called.choices[0].message;
assert.ok(JSON.parse(message.toolCalls[0].function.arguments).n <= 9);
const results = message.toolCalls.map((call) => ({
  role: "tool", name: "add", content: "4", toolCallId: call.id,
}));
const again = await ask({ messages: [...messages, message, ...results] });
assert.ok(again.choices[0].message.content);
const jsonSchema = { name: "n", schemaDefinition: parameters, strict: true };
const answer = await ask({ responseFormat: { type: "json_schema", jsonSchema }, maxTokens: 200 });
assert.ok(JSON.parse(answer.choices[0].message.content).n <= 9);
assert.ok((await client.models.list()).data.some((card) => card.id === model));
await assert.rejects(ask({ model: "codestral" }));
console.log("ok");
