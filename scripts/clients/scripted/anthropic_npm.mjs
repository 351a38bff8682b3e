// The npm anthropic client: a streamed call, its result, the second turn.
import Anthropic from "@anthropic-ai/sdk";
import assert from "node:assert";
import { FIRST, LAST } from "./say.mjs";

const client = new Anthropic({ baseURL: process.argv[2].replace(/\/v1$/, ""), apiKey: "none" });
const tools = [{ name: "weather", input_schema: { type: "object", properties: { city: { type: "string" } } } }];
const messages = [{ role: "user", content: FIRST }];
const first = await client.messages.stream({ model: "m", max_tokens: 300, tools, messages }).finalMessage();
const use = first.content.at(-1);
assert.deepEqual([use.name, use.input, first.stop_reason], ["weather", { city: "Bern" }, "tool_use"]);
messages.push({ role: "assistant", content: first.content });
messages.push({ role: "user", content: [{ type: "tool_result", tool_use_id: use.id, content: LAST }] });
const last = await client.messages.create({ model: "m", max_tokens: 300, tools, messages });
assert.equal(last.content.at(-1).text, "It is sunny.");
console.log("npm anthropic: ok");
