// Vercel's AI SDK: a streamed tool loop of two steps through each of its providers.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { stepCountIs, streamText, tool } from "ai";
import assert from "node:assert";
import { z } from "zod";
import { FIRST, LAST } from "./say.mjs";

const where = { baseURL: process.argv[2], apiKey: "none" };
const openai = createOpenAI(where);
const models = {
  chat: openai.chat("m"),
  responses: openai.responses("m"),
  compatible: createOpenAICompatible({ name: "ours", ...where })("m"),
  anthropic: createAnthropic(where)("m"),
};
for (const [name, model] of Object.entries(models)) {
  const asked = [];
  const weather = tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (asked.push(city), LAST),
  });
  const found = streamText({ model, prompt: FIRST, tools: { weather }, stopWhen: stepCountIs(3), onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of found.textStream) text += piece;
  assert.deepEqual([text, asked], ["It is sunny.", ["Bern"]], name);
}
console.log("AI SDK: ok");
