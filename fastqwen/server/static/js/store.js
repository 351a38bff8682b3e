// Conversations, votes and settings. All of it stays in this browser: IndexedDB and localStorage.
import { newSide } from "./tree.js";
import { emit, newId, stored } from "./ui.js";

export const SERVER_DEFAULTS = { system: "", temperature: null, top_p: null, max_tokens: null, seed: null, thinking: "auto", tools: "" };

export const state = {
  list: [], // {id, title, updated, compare}, newest first
  current: null, // the open conversation; it enters the list with its first message
  settings: { ...SERVER_DEFAULTS, ...stored.get("settings", {}) },
  model: stored.get("model", null),
  persistent: true,
};

let db = null;
const memory = { conversations: new Map(), votes: new Map() }; // stands in where IndexedDB is forbidden
const channel = "BroadcastChannel" in window ? new BroadcastChannel("fastqwen") : null;

const asPromise = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const table = (name, mode = "readonly") => db.transaction(name, mode).objectStore(name);

async function put(name, value) {
  if (!db) { memory[name].set(value.id, value); return; }
  await asPromise(table(name, "readwrite").put(value));
}

export async function getAll(name) {
  return db ? asPromise(table(name).getAll()) : [...memory[name].values()];
}

const summary = (c) => ({ id: c.id, title: c.title, updated: c.updated, compare: c.sides.length > 1 });

export async function open() {
  try {
    const opening = indexedDB.open("fastqwen", 1);
    opening.onupgradeneeded = () => {
      for (const name of ["conversations", "votes"]) opening.result.createObjectStore(name, { keyPath: "id" });
    };
    db = await asPromise(opening);
    navigator.storage?.persist?.().catch(() => {});
  } catch {
    state.persistent = false;
  }
  await refreshList();
  const last = stored.get("open");
  if (!last || !(await select(last))) startNew();
}

async function refreshList() {
  state.list = (await getAll("conversations")).map(summary).sort((a, b) => b.updated - a.updated);
  emit("app");
}

/** A fresh conversation; two sides make it a comparison. */
export function startNew(sides = 1) {
  const model = state.model;
  state.current = {
    id: newId(), title: "", created: Date.now(), updated: Date.now(), blind: false, swapped: false, votes: {},
    sides: Array.from({ length: sides }, () => newSide(model, state.settings)),
  };
  stored.set("open", null);
  emit("app");
  return state.current;
}

const live = new Map(); // conversations that are still being answered, although another one may be open
export const keepLive = (conversation) => live.set(conversation.id, conversation);
export const dropLive = (conversation) => live.delete(conversation.id);

export async function select(id) {
  const found = live.get(id) ?? (db ? await asPromise(table("conversations").get(id)) : memory.conversations.get(id));
  if (!found) return false;
  if (!live.has(id)) closeInterrupted(found);
  state.current = found;
  stored.set("open", id);
  emit("app");
  return true;
}

/** An answer that was running when its page went away will not go on. */
function closeInterrupted(conversation) {
  for (const side of conversation.sides) {
    for (const node of Object.values(side.nodes)) {
      if (node.running) Object.assign(node, { running: false, finish: "reloaded" });
    }
  }
}

const pending = new Map(); // id -> {timer, write}: changes not written yet

/** Writes the conversation within a second; `now` writes at once. */
export function save(conversation, now = false) {
  conversation.updated = Date.now();
  const entry = summary(conversation);
  state.list = [entry, ...state.list.filter((c) => c.id !== entry.id)];
  if (!now && pending.has(conversation.id)) return;
  if (state.current === conversation) stored.set("open", conversation.id);
  clearTimeout(pending.get(conversation.id)?.timer);
  const write = async () => {
    pending.delete(conversation.id);
    try {
      await put("conversations", conversation);
      channel?.postMessage(conversation.id);
    } catch { state.persistent = false; emit("app"); }
  };
  if (now) write();
  else pending.set(conversation.id, { write, timer: setTimeout(write, 1000) });
}

export async function remove(id) {
  clearTimeout(pending.get(id)?.timer);
  pending.delete(id);
  memory.conversations.delete(id);
  if (db) await asPromise(table("conversations", "readwrite").delete(id));
  state.list = state.list.filter((c) => c.id !== id);
  if (state.current?.id === id) startNew();
  channel?.postMessage(id);
  emit("app");
}

export async function removeAll() {
  for (const name of ["conversations", "votes"]) {
    memory[name].clear();
    if (db) await asPromise(table(name, "readwrite").clear());
  }
  state.list = [];
  startNew();
}

export function rename(id, title) {
  const conversation = state.current?.id === id ? state.current : live.get(id);
  if (conversation) { conversation.title = title; save(conversation, true); emit("app"); }
}

/** Ids of the conversations whose title or messages contain every word. */
export async function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = new Set();
  for (const conversation of await getAll("conversations")) {
    const bodies = conversation.sides.flatMap((side) => Object.values(side.nodes).map((n) => n.content));
    const all = [conversation.title, ...bodies].join("\n").toLowerCase();
    if (words.every((word) => all.includes(word))) hits.add(conversation.id);
  }
  return hits;
}

export const addVote = (vote) => put("votes", vote);

export async function addImported(conversations) {
  for (const conversation of conversations) await put("conversations", conversation);
  await refreshList();
}

export function setSettings(side, change) {
  Object.assign(side.settings, change);
  if (side === state.current.sides[0]) { // a new conversation starts as this one was set
    state.settings = { ...side.settings };
    stored.set("settings", state.settings);
  }
  if (Object.keys(side.nodes).length) save(state.current);
  emit("app");
}

export function setModel(side, model) {
  side.model = model;
  if (side === state.current.sides[0]) { state.model = model; stored.set("model", model); }
  if (Object.keys(side.nodes).length) save(state.current);
  emit("app");
}

channel?.addEventListener("message", async ({ data }) => { // another tab changed something
  await refreshList();
  if (state.current?.id === data && !live.has(data)) await select(data);
});
addEventListener("pagehide", () => { for (const { write } of pending.values()) write(); });
