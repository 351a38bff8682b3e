// Conversations out of and into the browser: JSON holds everything, Markdown is for reading.
import { language, t } from "./i18n.js";
import { fromForeign } from "./foreign.js";
import { addImported, getAll, SERVER_DEFAULTS } from "./store.js";
import { newSide, shownPath } from "./tree.js";
import { download, newId } from "./ui.js";

const FORMAT = "fastqwen-conversations";
const day = () => new Date().toISOString().slice(0, 10);
export const fileName = (title) => (title.replace(/[\\/:*?"<>|\s]+/g, "-").slice(0, 50) || "chat");

export function exportJson(conversations, name) {
  const data = { format: FORMAT, version: 1, exported: new Date().toISOString(), conversations };
  download(`${fileName(name)}-${day()}.json`, JSON.stringify(data, null, 1), "application/json");
}

export const exportAll = async () => exportJson(await getAll("conversations"), "fastqwen-chats");

export async function exportVotes() {
  download(`fastqwen-votes-${day()}.json`, JSON.stringify({ format: "fastqwen-votes", version: 1, votes: await getAll("votes") }, null, 1), "application/json");
}

const quote = (text) => text.split("\n").map((line) => `> ${line}`).join("\n");

function messageMarkdown({ node }) {
  const who = { user: t("you"), assistant: node.model || t("model"), tool: `${t("toolResult")} (${node.name})` }[node.role];
  const parts = [`## ${who}`];
  for (const file of node.files ?? []) parts.push(`**${file.name}**\n\n~~~~\n${file.text}\n~~~~`);
  if (node.reasoning) parts.push(`<details><summary>${t("thoughts")}</summary>\n\n${quote(node.reasoning)}\n\n</details>`);
  for (const call of node.toolCalls ?? []) parts.push(`${t("toolCall")} \`${call.name}\`\n\n\`\`\`json\n${call.arguments}\n\`\`\``);
  if (node.content) parts.push(node.content);
  return parts.join("\n\n");
}

/** The shown branch of every side. */
export function toMarkdown(conversation) {
  const sides = conversation.sides.map((side, i) => {
    const head = conversation.sides.length > 1 ? [`# ${"AB"[i]}`] : [];
    if (side.settings.system) head.push(`## ${t("system")}\n\n${side.settings.system}`);
    return [...head, ...shownPath(side).map(messageMarkdown)].join("\n\n");
  });
  return `# ${conversation.title || t("newChat")}\n\n${new Date(conversation.created).toLocaleString(language())}\n\n${sides.join("\n\n---\n\n")}\n`;
}

export const exportMarkdown = (conversation) => download(`${fileName(conversation.title)}.md`, toMarkdown(conversation), "text/markdown");

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (typeof value === "number" ? value : null);

/** Takes from a file only what is known, in the type that it must have. */
function readNode(raw) {
  if (!["user", "assistant", "tool"].includes(raw?.role) || typeof raw.id !== "string") throw new Error(t("importBroken"));
  const node = { id: raw.id, parent: text(raw.parent) || null, role: raw.role, time: number(raw.time) ?? 0, v: 0, forgotten: raw.forgotten === true };
  for (const name of ["content", "reasoning", "model", "finish", "toolCallId", "name"]) node[name] = text(raw[name]);
  if (number(raw.thinkMs) !== null) node.thinkMs = raw.thinkMs;
  node.files = (Array.isArray(raw.files) ? raw.files : []).map((f) => ({ name: text(f.name), text: text(f.text) }));
  node.toolCalls = (Array.isArray(raw.toolCalls) ? raw.toolCalls : []).map((c) => ({ id: text(c.id), name: text(c.name), arguments: text(c.arguments) }));
  const stats = raw.stats && Object.fromEntries(["ttftMs", "tokens", "rate", "prompt", "cached"].map((name) => [name, number(raw.stats[name])]));
  node.stats = stats && stats.ttftMs !== null && stats.tokens !== null ? { ...stats, exact: raw.stats.exact === true } : null;
  return node;
}

function readSide(raw) {
  const sameType = ([name, value]) => name in SERVER_DEFAULTS && (SERVER_DEFAULTS[name] === null ? number(value) !== null : typeof value === "string");
  const settings = Object.fromEntries(Object.entries(raw.settings ?? {}).filter(sameType));
  const side = newSide(text(raw.model) || null, { ...SERVER_DEFAULTS, ...settings });
  for (const each of Object.values(raw.nodes ?? {})) side.nodes[each?.id] = readNode(each);
  side.chosen = { ...raw.chosen };
  return side;
}

/** Reads conversations from Markdown as this page writes it: headings of second level are the speakers. */
function fromMarkdown(source, name) {
  const side = newSide(null, SERVER_DEFAULTS);
  const [head, ...parts] = source.split(/^## /m);
  let parent = null;
  for (const part of parts) {
    const [who, ...lines] = part.split("\n");
    const content = lines.join("\n").trim();
    if (who.trim() === t("system")) { side.settings.system = content; continue; }
    const role = /^(you|user|我|用户)$/i.test(who.trim()) ? "user" : "assistant";
    const id = newId();
    side.nodes[id] = { id, parent, role, content, model: role === "assistant" ? who.trim() : undefined, time: Date.now(), v: 0 };
    parent = id;
  }
  if (!parent) throw new Error(t("importBroken"));
  return { title: /^# (.*)$/m.exec(head)?.[1] ?? name, sides: [side] };
}

export async function importFile(file) {
  const source = await file.text();
  let found;
  if (/\.(md|markdown)$/i.test(file.name)) found = [fromMarkdown(source, file.name)];
  else {
    let data;
    try { data = JSON.parse(source); } catch { throw new Error(t("importBroken")); }
    const ours = data?.format === FORMAT && Array.isArray(data.conversations);
    found = ours ? data.conversations.map((c) => ({ ...c, sides: (c.sides ?? []).slice(0, 2).map(readSide) })) : fromForeign(data, SERVER_DEFAULTS);
    if (!found) throw new Error(t("importBroken"));
  }
  if (found.some((c) => c.sides.length === 0)) throw new Error(t("importBroken"));
  await addImported(found.map((c) => ({
    id: newId(), title: text(c.title).slice(0, 200), created: Number(c.created) || Date.now(), updated: Number(c.updated) || Date.now(),
    blind: c.blind === true, swapped: c.swapped === true, votes: { ...c.votes }, sides: c.sides,
    pinned: c.pinned === true, folder: text(c.folder).slice(0, 60),
  })));
  return found.length;
}
