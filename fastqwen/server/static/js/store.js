// Conversations, votes and settings. All of it stays in this browser: IndexedDB and localStorage.
import { addressed, showAddress } from "./address.js";
import { server } from "./status.js";
import { newSide } from "./tree.js";
import { emit, newId, on, stored } from "./ui.js";

export const SERVER_DEFAULTS = {
  system: "", temperature: null, top_p: null, top_k: null, min_p: null, repetition_penalty: null, presence_penalty: null, frequency_penalty: null,
  max_tokens: null, seed: null, thinking: "auto", thinking_budget: null, stop: "", schema: "", tools: "", mcp: "",
};
/** What a new conversation does not take over from the last one: it would change answers without being seen. */
const OWN = { system: "", stop: "", schema: "", tools: "", mcp: "" };

export const state = {
  list: [], // {id, title, updated, compare}, newest first
  current: null, // the open conversation; it enters the list with its first message
  settings: { ...SERVER_DEFAULTS, ...stored.get("settings", {}), ...OWN },
  model: stored.get("model", null),
  unsaved: null, // why conversations are not kept: "full", "forbidden"; null: they are
};

let db = null;
const memory = { conversations: new Map(), votes: new Map() }; // stands in where IndexedDB is forbidden
const channel = "BroadcastChannel" in window ? new BroadcastChannel("fastqwen") : null;

const asPromise = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const table = (name, mode = "readonly") => db.transaction(name, mode).objectStore(name);

/** Resolves once the browser has written it; a full disk is only noticed then. */
async function put(name, value) {
  if (!db) { memory[name].set(value.id, value); return; }
  const writing = db.transaction(name, "readwrite");
  await new Promise((resolve, reject) => {
    writing.oncomplete = resolve;
    writing.onabort = writing.onerror = () => reject(writing.error ?? new Error("aborted"));
    writing.objectStore(name).put(value);
  });
  note(null);
}

function note(unsaved) {
  if (unsaved === state.unsaved || state.unsaved === "forbidden") return;
  state.unsaved = unsaved;
  emit("app");
}

export async function getAll(name) {
  return db ? asPromise(table(name).getAll()) : [...memory[name].values()];
}

const summary = (c) => ({ id: c.id, title: c.title, updated: c.updated, compare: c.sides.length > 1, pinned: c.pinned === true, folder: c.folder ?? "" });

export async function open() {
  try {
    const opening = indexedDB.open("fastqwen", 1);
    opening.onupgradeneeded = () => {
      for (const name of ["conversations", "votes"]) opening.result.createObjectStore(name, { keyPath: "id" });
    };
    db = await asPromise(opening);
    navigator.storage?.persist?.().catch(() => {});
  } catch {
    state.unsaved = "forbidden";
  }
  await refreshList();
  await openAddressed();
}

/** What the address names: a conversation of this browser, or a new one. */
async function openAddressed() {
  const id = addressed();
  if (id && (await select(id, "keep"))) return;
  startNew(1, id ? "replace" : "keep");
  if (id) setTimeout(() => emit("no-such-chat"));
}
addEventListener("popstate", openAddressed);

async function refreshList() {
  state.list = (await getAll("conversations")).map(summary).sort((a, b) => b.updated - a.updated);
  emit("app");
}

/** A fresh conversation; two sides make it a comparison. */
export function startNew(sides = 1, address = "push") {
  const settings = { ...state.settings, ...OWN };
  state.current = {
    id: newId(), title: "", created: Date.now(), updated: Date.now(), blind: false, swapped: false, votes: {},
    sides: Array.from({ length: sides }, (_, i) => newSide(i ? otherModel() : state.model, settings)),
  };
  showAddress(null, address);
  emit("app");
  return state.current;
}

/** Two different models, where the server has two. */
const otherModel = () => server.models.map((m) => m.id).find((id, _, all) => id !== (state.model ?? all[0])) ?? state.model;

const live = new Map(); // conversations that are still being answered, although another one may be open
export const keepLive = (conversation) => live.set(conversation.id, conversation);
export const dropLive = (conversation) => live.delete(conversation.id);

export async function select(id, address = "push") {
  const found = live.get(id) ?? (db ? await asPromise(table("conversations").get(id)) : memory.conversations.get(id));
  if (!found) return false;
  if (!live.has(id)) closeInterrupted(found);
  for (const side of found.sides) side.settings = { ...SERVER_DEFAULTS, ...side.settings }; // it may be older than some settings
  state.current = found;
  showAddress(id, address);
  emit("app");
  return true;
}

/** An answer that was running when its page went away will not go on. */
function closeInterrupted(conversation) {
  for (const side of conversation.sides) {
    for (const node of Object.values(side.nodes)) {
      if (node.running) Object.assign(node, { running: false, thinking: false, finish: "reloaded" });
    }
  }
}

const pending = new Map(); // id -> {timer, write}: changes not written yet

/** Writes the conversation within a second; `now` writes at once. `moves`: whether it goes to the top of the list. */
export function save(conversation, now = false, moves = true) {
  if (moves) conversation.updated = Date.now();
  if (state.current === conversation) showAddress(conversation.id, "replace");
  const entry = summary(conversation);
  state.list = moves ? [entry, ...state.list.filter((c) => c.id !== entry.id)] : state.list.map((c) => (c.id === entry.id ? entry : c));
  if (!now && pending.has(conversation.id)) return;
  clearTimeout(pending.get(conversation.id)?.timer);
  const write = async () => {
    pending.delete(conversation.id);
    try {
      await put("conversations", conversation);
      channel?.postMessage(conversation.id);
    } catch { note("full"); }
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
  if (state.current?.id === id) startNew(1, "replace");
  channel?.postMessage(id);
  emit("app");
}

export async function removeAll() {
  for (const name of ["conversations", "votes"]) {
    memory[name].clear();
    if (db) await asPromise(table(name, "readwrite").clear());
  }
  state.list = [];
  note(null);
  startNew(1, "replace");
}

/** change: {title}, {pinned} or {folder} of the open conversation. */
export function changeEntry(change) {
  Object.assign(state.current, change);
  save(state.current, true, false);
  emit("app");
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
  if (state.current?.id === data && !live.has(data)) await select(data, "keep");
});
on("not-stored", () => note("full"));
addEventListener("beforeunload", (e) => { if (state.unsaved && Object.keys(state.current.sides[0].nodes).length) e.preventDefault(); });
addEventListener("pagehide", () => { for (const { write } of pending.values()) write(); });
