// Conversations that other pages have exported: ChatGPT's conversations.json and Open WebUI's list of chats.
import { newSide } from "./tree.js";

const text = (value) => (typeof value === "string" ? value : "");
const ms = (seconds) => (Number.isFinite(seconds) ? Math.round(seconds < 1e11 ? seconds * 1000 : seconds) : Date.now());
const ROLES = new Set(["user", "assistant"]);

/** ChatGPT writes a content's pieces; those that are no text, such as pictures, are named and left out. */
function partsOf(content) {
  if (typeof content?.text === "string") return content.text;
  return (Array.isArray(content?.parts) ? content.parts : []).map((p) => (typeof p === "string" ? p : `[${text(p?.content_type) || "?"}]`)).join("\n");
}

/** Nodes from messages that name their parents; those that say nothing are skipped, and their children move up. */
function treeOf(messages, settings, read) {
  const side = newSide(null, settings);
  const spoken = new Map();
  for (const [id, raw] of Object.entries(messages ?? {})) {
    const node = read(raw);
    if (node && ROLES.has(node.role) && node.content.trim()) spoken.set(id, { ...node, id, v: 0 });
    else if (node?.role === "system" && node.content.trim()) side.settings.system = node.content;
  }
  const parentOf = (raw) => raw?.parentId ?? raw?.parent ?? null;
  for (const [id, node] of spoken) {
    let parent = parentOf(messages[id]);
    for (let steps = 0; parent && !spoken.has(parent) && steps < 1000; steps++) parent = parentOf(messages[parent]);
    side.nodes[id] = { ...node, parent: spoken.has(parent) ? parent : null, toolCalls: [], files: [] };
  }
  return side;
}

/** Shows the branch that was open when the file was written. */
function openAt(side, messages, id) {
  let last = id;
  for (let steps = 0; last && !side.nodes[last] && steps < 1000; steps++) last = messages[last]?.parentId ?? messages[last]?.parent;
  for (let node = side.nodes[last]; node; node = side.nodes[node.parent]) side.chosen[node.parent ?? "root"] = node.id;
  side.model = side.nodes[last]?.model || null;
  return side;
}

function fromChatGpt(raw, settings) {
  const read = ({ message: m }) => m && !m.metadata?.is_visually_hidden_from_conversation && { role: m.author?.role, content: partsOf(m.content), time: ms(m.create_time), model: text(m.metadata?.model_slug) };
  const side = openAt(treeOf(raw.mapping, settings, read), raw.mapping, raw.current_node);
  side.model = null; // a name that no server here has
  return { title: text(raw.title), created: ms(raw.create_time), updated: ms(raw.update_time), sides: [side] };
}

function fromOpenWebUi(raw, settings) {
  const { history, params, system } = raw.chat;
  const read = (m) => ({ role: m?.role, content: text(m?.content), time: ms(m?.timestamp), model: text(m?.model) });
  const side = openAt(treeOf(history?.messages, settings, read), history?.messages ?? {}, history?.currentId);
  side.settings.system ||= text(params?.system) || text(system);
  return { title: text(raw.title) || text(raw.chat.title), created: ms(raw.created_at), updated: ms(raw.updated_at), pinned: raw.pinned === true, sides: [side] };
}

/** The conversations of such a file, or null if it is another one. `defaults` are a side's settings. */
export function fromForeign(data, defaults) {
  const list = Array.isArray(data) ? data : [data];
  const read = (raw) => (raw?.mapping ? fromChatGpt(raw, defaults) : raw?.chat?.history ? fromOpenWebUi(raw, defaults) : null);
  const found = list.map(read).filter((c) => c && Object.keys(c.sides[0].nodes).length);
  return found.length ? found : null;
}
