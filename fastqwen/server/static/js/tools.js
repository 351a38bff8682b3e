// Tools of the MCP servers that the operator named: offered to the model, and run one by one when the reader says so.
import { request } from "./api.js";
import { server } from "./status.js";
import { emit } from "./ui.js";

/** name -> {name, description, parameters, server}; empty where the server offers none. */
export const offered = new Map();

export async function loadTools() {
  if (!server.models.some((model) => model.mcp)) return;
  try {
    const { tools } = await (await request("mcp/tools")).json();
    offered.clear();
    for (const tool of tools) offered.set(tool.name, tool);
    emit("app");
  } catch { /* they are missing until the server is there again */ }
}

export const asTools = () => [...offered.values()].map(({ name, description, parameters }) => ({ type: "function", function: { name, description, parameters } }));

/** What the tool said. Its own failure is an answer, too, which the model should read; any other one is thrown. */
export async function runTool({ name, arguments: given }) {
  const answer = await (await request("mcp/call", { body: { name, arguments: given.trim() ? JSON.parse(given) : {} } })).json();
  return answer.text;
}
