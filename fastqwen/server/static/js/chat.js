// Sends messages and keeps the answers that are being written. The page's only writer of message trees.
import { classify, completeChat, streamChat } from "./api.js";
import { t } from "./i18n.js";
import { isAway, modelInfo, noteError, server } from "./status.js";
import { addVote, dropLive, keepLive, save, state } from "./store.js";
import { asTools } from "./tools.js";
import { add, ancestry, choose, leafOf, shownPath } from "./tree.js";
import { announce, emit, newId, on } from "./ui.js";

const running = new Map(); // id of an answer -> {controller, conversation, side}
const FEWEST_FOR_SPEED = 20; // a speed of fewer tokens is chance
const SHORTEST_FOR_SPEED_S = 0.01; // less means that something between held the stream back and gave it at once
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed", "thinking_budget"];
const THINK = /^\s*<think>([\s\S]*?)(?:<\/think>\s*|$)/;

export const isRunning = (conversation) => [...running.values()].some((run) => run.conversation === conversation);

const makeNode = (role, parent, more = {}) => ({ id: newId(), role, parent: parent ?? null, content: "", time: Date.now(), v: 0, ...more });

/** Asks the question on every side. */
export function send(conversation, text, files = []) {
  if (isRunning(conversation)) return;
  if (conversation.sides.length > 1 && conversation.blind && !conversation.title && Math.random() < 0.5) {
    conversation.swapped = true; // so that the place says nothing about the model
  }
  if (!conversation.title) conversation.title = (text || files[0]?.name || "").trim().split("\n")[0].slice(0, 60);
  ask(conversation, text, files, (side) => leafOf(side)?.id ?? null);
}

/** The same question again in other words: a new branch beside the old one. */
export function resend(conversation, node, text, files) {
  ask(conversation, text, files, (side) => side.nodes[node.id].parent);
}

function ask(conversation, text, files, parentOn) {
  const id = newId(); // one id on all sides, so that branches switch together
  for (const side of conversation.sides) add(side, makeNode("user", parentOn(side), { id, content: text, files }));
  for (const side of conversation.sides) answer(conversation, side, id);
}

export function regenerate(conversation, side, node) {
  if (!isRunning(conversation)) answer(conversation, side, node.parent);
}

/** What a tool answered to each call of the last message, then the model's turn. */
export function sendToolResults(conversation, side, node, results) {
  let parent = node.id;
  node.toolCalls.forEach((call, i) => {
    parent = add(side, makeNode("tool", parent, { content: results[i], toolCallId: call.id, name: call.name })).id;
  });
  answer(conversation, side, parent);
}

export function switchBranch(conversation, side, node) {
  for (const each of node.role === "user" ? conversation.sides : [side]) choose(each, node.id);
  save(conversation, true);
  emit("app");
}

/** Marks the older half of the turns, so that they stay readable but are no longer sent, and tries again. */
export function forgetOldest(conversation, side, node) {
  const kept = ancestry(side, node.parent).filter((n) => !n.forgotten);
  const turns = kept.filter((n) => n.role === "user");
  const firstKept = turns[Math.ceil((turns.length - 1) / 2)];
  for (const old of kept.slice(0, kept.indexOf(firstKept))) Object.assign(old, { forgotten: true, v: old.v + 1 });
  regenerate(conversation, side, node);
}

export const canForget = (side, node) => ancestry(side, node.parent).filter((n) => n.role === "user" && !n.forgotten).length > 1;

export function withFiles(node) {
  const parts = (node.files ?? []).map(({ name, text }) => {
    const fence = "`".repeat(Math.max(3, ...(text.match(/`+/g) ?? []).map((run) => run.length + 1)));
    return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...parts, node.content].filter(Boolean).join("\n\n");
}

/** The request's messages for the branch that ends in `id`. Thoughts are not sent back: Qwen's templates drop them too. */
export function buildMessages(side, id) {
  const messages = side.settings.system ? [{ role: "system", content: side.settings.system }] : [];
  for (const node of id ? ancestry(side, id) : []) {
    if (node.forgotten) continue;
    if (node.role === "user") messages.push({ role: "user", content: withFiles(node) });
    if (node.role === "tool") messages.push({ role: "tool", content: node.content, tool_call_id: node.toolCallId, name: node.name });
    if (node.role === "assistant" && (node.content || node.toolCalls?.length)) {
      const tool_calls = node.toolCalls?.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } }));
      messages.push({ role: "assistant", content: node.content, ...(tool_calls?.length && { tool_calls }) });
    }
  }
  return messages;
}

function parsed(settings, name) {
  try { return JSON.parse(settings[name]); } catch { throw classify(400, { error: { message: t(name + "Broken"), param: name } }); }
}

/** The request for what comes after the message `id`. `begun`: the beginning of an answer, which the model is to go on with. */
function requestBody(side, id, begun = null) {
  const { thinking, tools, schema, stop } = side.settings;
  const body = { model: side.model ?? server.models[0]?.id ?? "default", messages: buildMessages(side, id) };
  for (const name of NUMBERS) if (side.settings[name] !== null) body[name] = side.settings[name];
  if (thinking !== "auto") body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  const listed = [...(tools.trim() ? parsed(side.settings, "tools") : []), ...(side.settings.mcp ? asTools() : [])];
  if (listed.length) body.tools = listed;
  if (schema.trim()) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(side.settings, "schema") } };
  if (stop) body.stop = stop.split("\n").filter(Boolean);
  if (begun?.content || begun?.reasoning) {
    body.messages.push({ role: "assistant", content: begun.content, ...(begun.reasoning && { reasoning_content: begun.reasoning }) });
    Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  }
  return body;
}

const settingsUsed = (side) => ({ running: true, model: side.model ?? server.models[0]?.id ?? "", settings: { ...side.settings } });

function startNode(conversation, side, parent) {
  return begin(conversation, add(side, makeNode("assistant", parent, { ...settingsUsed(side), reasoning: "", toolCalls: [] })));
}

function begin(conversation, node) {
  keepLive(conversation);
  save(conversation);
  emit("app");
  return node;
}

const answer = (conversation, side, parent) => run(conversation, side, startNode(conversation, side, parent), (node) => requestBody(side, node.parent));

/** Whether an answer that ended too early can go on where it broke off. A thought that broke off cannot: its end is unknown. */
export const canContinue = (node) => Boolean(node.content) && !node.running && !node.toolCalls?.length && (BROKEN_OFF.has(node.finish) || Boolean(node.error?.started));
const BROKEN_OFF = new Set(["length", "stopped", "reloaded", "abort", "error"]);

export function continueAnswer(conversation, side, node) {
  if (isRunning(conversation)) return;
  const begun = { content: node.content.trimEnd(), reasoning: node.reasoning }; // the model writes its own space or line end
  Object.assign(node, { ...settingsUsed(side), content: begun.content, finish: undefined, error: undefined, v: node.v + 1 });
  run(conversation, side, begin(conversation, node), () => requestBody(side, node.parent, begun), true);
}

/** A version of the answer that is the same up to `content` and is written anew from there. */
export function branchFrom(conversation, side, node, content) {
  if (isRunning(conversation)) return;
  const { reasoning, thinkMs } = node;
  const branch = makeNode("assistant", node.parent, { ...settingsUsed(side), content, reasoning, thinkMs, toolCalls: [] });
  run(conversation, side, begin(conversation, add(side, branch)), () => requestBody(side, node.parent, { content, reasoning }), true);
}

/** What the model might have said after `content`, likeliest first: [{text, share}], shares of 1. */
export async function alternatives(side, node, content, signal) {
  const begun = { content, reasoning: node.reasoning };
  const like = { ...side, model: node.model || side.model, settings: { ...side.settings, ...node.settings, tools: "", mcp: "", schema: "", stop: "" } };
  const body = { ...requestBody(like, node.parent, begun), max_tokens: 1, logprobs: true, top_logprobs: 20 };
  const found = await completeChat(body, signal);
  const listed = found.choices?.[0]?.logprobs?.content?.[0]?.top_logprobs ?? [];
  return listed.map(({ token, logprob }) => ({ text: token, share: Math.exp(logprob) }));
}

async function run(conversation, side, node, makeBody, continues = false) {
  const controller = new AbortController();
  running.set(node.id, { controller, conversation, side });
  const clock = { sent: performance.now(), first: null, last: null, deltas: 0, thought: null, usage: null, why: null, continues };
  try {
    for await (const chunk of streamChat(makeBody(node), controller.signal)) take(node, chunk, clock, conversation);
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else {
      const known = error.kind ? error : Object.assign(error, { kind: "broken", detail: String(error) });
      node.error = { kind: known.kind, status: known.status, detail: known.detail, param: known.param, started: clock.deltas > 0 };
      noteError(known);
    }
  }
  running.delete(node.id);
  finish(node, clock);
  if (!isRunning(conversation)) dropLive(conversation);
  save(conversation, true);
  emit("node:" + node.id);
  emit("app");
}

function take(node, chunk, clock, conversation) {
  if (chunk.usage) clock.usage = chunk.usage;
  if (chunk.cache || chunk.timing) clock.why = { ...chunk.timing, cause: chunk.cache?.cause };
  if (chunk.warnings) node.warnings = chunk.warnings;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  const thought = delta.reasoning_content ?? delta.reasoning;
  if (thought || delta.content || delta.tool_calls) {
    clock.last = performance.now();
    clock.first ??= clock.last;
    clock.deltas += 1;
  }
  if (thought) { node.reasoning += thought; clock.thought ??= clock.last; node.thinking = true; }
  if (delta.content && clock.continues) node.content += delta.content;
  else if (delta.content) { node.raw = (node.raw ?? "") + delta.content; splitThinking(node, clock); }
  if (node.thinking && ((node.content && !thought) || delta.tool_calls)) endThinking(node, clock);
  for (const part of delta.tool_calls ?? []) takeToolCall(node, part);
  if (choice.finish_reason) node.finish = choice.finish_reason;
  draw(node);
  save(conversation);
}

/** Servers without a reasoning parser send <think>…</think> as content. */
function splitThinking(node, clock) {
  const match = node.raw.length < 7 && "<think>".startsWith(node.raw.trimStart()) ? ["", ""] : THINK.exec(node.raw);
  if (!match) { node.content = node.raw; return; }
  clock.thought ??= clock.last;
  node.reasoning = match[1].trimStart();
  node.content = node.raw.slice(match[0].length);
  node.thinking = !node.raw.includes("</think>") && Boolean(match[0]);
  if (!node.thinking && match[0] && node.thinkMs === undefined) endThinking(node, clock);
}

function endThinking(node, clock) {
  node.thinking = false;
  node.thinkMs ??= Math.round(performance.now() - clock.thought);
}

function takeToolCall(node, part) {
  const call = (node.toolCalls[part.index ?? 0] ??= { id: part.id ?? newId(), name: "", arguments: "" });
  if (part.function?.name) call.name += part.function.name;
  if (part.function?.arguments) call.arguments += part.function.arguments;
}

function finish(node, clock) {
  if (node.thinking) endThinking(node, clock);
  delete node.raw;
  node.running = false;
  node.v += 1;
  const usage = clock.usage;
  const tokens = usage?.completion_tokens ?? clock.deltas;
  const seconds = (clock.last - clock.first) / 1000;
  node.stats = clock.first === null ? null : {
    ttftMs: Math.round(clock.first - clock.sent), tokens, exact: Boolean(usage),
    rate: tokens >= FEWEST_FOR_SPEED && seconds >= SHORTEST_FOR_SPEED_S ? (tokens - 1) / seconds : null,
    why: clock.why, prompt: usage?.prompt_tokens ?? null, cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
  };
  if (node.finish === "stopped") announce(t("finish_stopped"));
  else if (!node.error) announce(`${t("answerDone")} ${node.content.slice(0, 600)}`);
}

const due = new Set();
function draw(node) { // at most once a frame, whatever the number of deltas
  if (due.size === 0) requestAnimationFrame(() => { const ids = [...due]; due.clear(); ids.forEach((id) => emit("node:" + id)); });
  due.add(node.id);
}

/** Closing the connection makes the server abort the request. */
export function stop(conversation) {
  for (const run of running.values()) if (run.conversation === conversation) run.controller.abort();
}

/** Questions that the server never began to answer are asked again once it is back. */
on("server-ready", () => {
  const conversation = state.current;
  for (const side of conversation?.sides ?? []) {
    const last = leafOf(side);
    if (last?.role !== "assistant" || !last.error || last.error.started || !WAITING.has(last.error.kind)) continue;
    delete side.nodes[last.id];
    answer(conversation, side, last.parent);
  }
});
const WAITING = new Set(["gone", "upstream", "loading", "restarting", "unready", "key"]);
export const isWaiting = (node) => Boolean(node.error) && !node.error.started && WAITING.has(node.error.kind) && isAway();

/** Tokens of the shown branch: {used, cached, limit}; null where the server did not say. */
export function contextUse(side) {
  const last = shownPath(side).map((p) => p.node).findLast((n) => n.stats?.prompt != null);
  const limit = modelInfo(side.model ?? server.models[0]?.id)?.maxLen ?? null;
  return { used: last ? last.stats.prompt + last.stats.tokens : null, cached: last?.stats.cached ?? null, limit };
}

export async function vote(conversation, question, choice) {
  const [a, b] = conversation.sides.map((side) => {
    const reply = shownPath(side).findLast(({ node }) => node.parent === question.id)?.node;
    return { model: reply?.model, settings: reply?.settings, answer: reply?.content };
  });
  conversation.votes[question.id] = choice;
  await addVote({ id: `${conversation.id}-${question.id}`, time: new Date().toISOString(), blind: conversation.blind, question: question.content, a, b, vote: choice });
  save(conversation, true);
  emit("app");
}
