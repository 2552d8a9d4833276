// The official Node client on a running Hone server: plain, streamed, tools, agents, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.HONE_URL}/v1`, apiKey: "unused", maxRetries: 0 });
const wish = [
  { role: "system", content: "You work the order desk." },
  { role: "user", content: "Please cancel the lamp of Bavorik." },
];
const tool = {
  type: "function",
  function: {
    name: "find_orders",
    parameters: {
      type: "object",
      properties: { customer: { type: "string" }, item: { type: "string" } },
    },
  },
};

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.includes("desk") && models.includes("agent:desk"), models);

const { data, response } = await client.chat.completions
  .create({ model: "desk", messages: wish, max_tokens: 32, logprobs: true })
  .withResponse();
assert.match(response.headers.get("x-hone-episode"), /^ep_/);
assert.ok(data.choices[0].logprobs.content.length > 0);

let text = "";
let usage;
const stream = await client.chat.completions.create({
  model: "desk", messages: wish, max_tokens: 32, stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.ok(text.length > 0 && usage.completion_tokens > 0);

const runner = client.chat.completions.runTools({
  model: "desk", messages: wish, temperature: 0, max_tokens: 64,
  tools: [
    {
      ...tool,
      function: { ...tool.function, parse: JSON.parse, function: () => '{"orders": []}' },
    },
  ],
}, { maxChatCompletions: 1 });
const asked = await new Promise((resolve) => runner.once("functionToolCall", resolve));
assert.equal(asked.name, "find_orders");
await runner.done().catch(() => {}); // one turn was enough

const served = await client.chat.completions.create({ model: "agent:desk", messages: wish.slice(1) });
assert.equal(typeof served.choices[0].message.content, "string");

await assert.rejects(
  client.chat.completions.create({ model: "nobody", messages: wish }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
console.log("openai-node: ok");
