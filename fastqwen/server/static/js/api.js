// Talks to an OpenAI-compatible server. Every failure leaves here as an ApiError whose kind says the cause.
import { at, stored } from "./ui.js";

/** kind: gone cut upstream loading restarting unready overloaded key forbidden model context refused broken */
export class ApiError extends Error {
  constructor(kind, { status = 0, detail = "", param = null, progress = null } = {}) {
    super(detail || kind);
    Object.assign(this, { kind, status, detail, param, progress });
  }
}

export const getKey = () => stored.get("key", "");
export const setKey = (key) => stored.set("key", key.trim());

const CONTEXT = /context.?(length|window|size)|max_model_len|maximum.{0,20}length|too (long|many tokens)|longer than the (model|context)/i;

/** From a status code and what the server said to the one cause that the user is told. */
export function classify(status, body, aboutHealth = false) {
  const error = body && typeof body === "object" ? body.error ?? body : {};
  const said = typeof error === "string" ? error : error.message ?? body?.message ?? body?.detail ?? "";
  const detail = typeof said === "string" ? said : JSON.stringify(said);
  const facts = { status, detail, param: error.param ?? null, progress: body?.progress ?? error.progress ?? null };
  const code = `${error.code ?? ""} ${error.type ?? ""} ${body?.status ?? ""}`;
  const kind = () => {
    if (status === 401) return "key";
    if (status === 502 || status === 504 || /upstream/i.test(code)) return "upstream";
    if (status === 403) return "forbidden";
    if (/loading/i.test(code) || (status === 503 && /loading/i.test(detail))) return "loading";
    if (/restart|engine_gone/i.test(code) || /restart|engine process/i.test(detail)) return "restarting";
    if ((aboutHealth && status === 503) || /unavailable/i.test(code)) return "unready";
    if (/context_length/i.test(code) || ((status === 400 || status === 413 || !status) && CONTEXT.test(detail))) return "context";
    if (status === 429 || /overload|rate_limit/i.test(code) || /overload|too many requests/i.test(detail)) return "overloaded";
    if (status === 404) return "model";
    if (status === 503) return "overloaded";
    return status >= 400 && status < 500 ? "refused" : "broken";
  };
  return new ApiError(kind(), facts);
}

/** fetch with the key; a dead connection is `gone`, an answer that is no success is classified. */
export async function request(path, { body, signal, headers: more, ...options } = {}) {
  const headers = { ...more, ...(getKey() && { Authorization: `Bearer ${getKey()}` }), ...(body && { "Content-Type": "application/json" }) };
  const init = { ...options, headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) };
  const response = await fetch(at(path), init).catch((error) => { throw toApiError(error); });
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  let parsed;
  try { parsed = JSON.parse(text); } catch { parsed = { message: text.startsWith("<") ? "" : text.slice(0, 500) }; }
  throw classify(response.status, parsed, path.startsWith("health"));
}

function toApiError(error) {
  if (error.name === "AbortError" || error instanceof ApiError) return error;
  return new ApiError("gone", { detail: error.message });
}

async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => { throw toApiError(error); });
      const lines = (rest + (value ?? "")).split(/\r?\n/);
      rest = done ? "" : lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally { reader.cancel().catch(() => {}); } // whoever stops reading closes the connection
}

let usageRefused = false; // some older servers answer 400 to stream_options

/** Yields the chunks of one streamed chat completion. A stream that just ends, without a finish reason, is `cut`. */
export async function* streamChat(body, signal) {
  const full = { ...body, stream: true, ...(!usageRefused && { stream_options: { include_usage: true } }) };
  let response;
  try {
    response = await request("v1/chat/completions", { body: full, signal, headers: { "X-Explain-Cache": "1" } });
  } catch (error) {
    if (usageRefused || !(error.param === "stream_options" || /stream_options/.test(error.detail ?? ""))) throw error;
    usageRefused = true;
    yield* streamChat(body, signal);
    return;
  }
  if ((response.headers.get("content-type") ?? "").includes("json")) { // a server that cannot stream
    const whole = await response.json();
    yield { ...whole, choices: whole.choices.map((c) => ({ delta: c.message, finish_reason: c.finish_reason })) };
    return;
  }
  let ended = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    if (!data) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw classify(Number(chunk.error.status ?? chunk.error.code) || 0, chunk);
    ended ||= Boolean(chunk.choices?.[0]?.finish_reason);
    yield chunk;
  }
  if (!ended) throw new ApiError("cut");
}

/** The whole answer at once. */
export const completeChat = async (body, signal) => (await request("v1/chat/completions", { body, signal })).json();

export async function listModels() {
  const list = await (await request("v1/models")).json();
  return (list.data ?? []).map((m) => ({ id: m.id, root: m.root ?? "", sampling: m.default_sampling ?? {}, thinks: m.thinks ?? true, mcp: m.mcp_tools ?? false, maxLen: m.max_model_len ?? m.context_length ?? m.meta?.n_ctx_train ?? null }));
}

let tokenizeMissing = false;

/** How many tokens the messages are, or null where the server cannot say. */
export async function countTokens(model, messages, signal) {
  if (tokenizeMissing) return null;
  try {
    return (await (await request("tokenize", { body: { model, messages }, signal })).json()).count ?? null;
  } catch (error) {
    tokenizeMissing = error.status === 404 || error.status === 405;
    return null;
  }
}

/** A guess for servers without /tokenize: a Chinese character is about 0.7 tokens, four other ones about 1. */
export function guessTokens(text) {
  const wide = (text.match(/[\u3000-\u9fff\uac00-\ud7af\uff00-\uffef]/g) ?? []).length;
  return Math.ceil(wide * 0.7 + (text.length - wide) / 4);
}
