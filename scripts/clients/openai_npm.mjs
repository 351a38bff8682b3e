// The npm openai client: whole and streamed.
import OpenAI from "openai";
import assert from "node:assert";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none" });
const options = { model: "Qwen", messages: [{ role: "user", content: "Say hello." }], temperature: 0, max_tokens: 20 };
const whole = (await client.chat.completions.create(options)).choices[0].message.content;
assert(whole);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, whole);
console.log("npm openai: ok");
