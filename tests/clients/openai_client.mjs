// OpenAI's JavaScript client: node openai_client.mjs URL KEY MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const schema = {
  type: "object",
  properties: { n: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["n"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "add", parameters: schema } }];
const ask = (more) => client.chat.completions.create({ model, messages, max_tokens: 8, ...more });

const whole = await ask({ seed: 1 });
let text = "";
for await (const chunk of await ask({ seed: 1, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);
const called = await ask({ tools, tool_choice: "required", max_tokens: 2000, parallel_tool_calls: false });
const [call] = called.choices[0].message.tool_calls;
assert.ok(JSON.parse(call.function.arguments).n <= 9);
const result = { role: "tool", tool_call_id: call.id, content: "4" };
const again = await ask({ messages: [...messages, called.choices[0].message, result] });
assert.ok(again.choices[0].message.content);
const format = { type: "json_schema", json_schema: { name: "n", schema, strict: true } };
const answer = await ask({ response_format: format, max_tokens: 200 });
assert.ok(JSON.parse(answer.choices[0].message.content).n <= 9);
assert.ok((await client.models.list()).data.some((card) => card.id === model));
await assert.rejects(ask({ model: "gpt-4" }), OpenAI.NotFoundError);
console.log("ok");
