// What people expect of Markdown beyond its core: task lists, footnotes, <details>, and a few tags that carry no risk.
import { t } from "./i18n.js";

const HARMLESS = /^<(\/?)(br|sub|sup|kbd|mark)\s*\/?>/i;
const DETAILS = /^<details(\s+open)?\s*>/i;
const NOTE = /^\[\^([^\]\s]{1,40})\](:?)/;

const lineOf = (state, line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);

/** <br>, <sub>, <sup>, <kbd>, <mark>, without attributes; every other tag stays text. */
function harmlessTag(state, silent) {
  const match = HARMLESS.exec(state.src.slice(state.pos, state.pos + 12));
  if (!match) return false;
  if (!silent) state.push("tag", "", 0).content = `<${match[1]}${match[2].toLowerCase()}>`;
  state.pos += match[0].length;
  return true;
}

/** [^1] in a text. */
function noteMark(state, silent) {
  const match = NOTE.exec(state.src.slice(state.pos, state.pos + 48));
  if (!match || match[2]) return false;
  if (!silent) state.push("note_mark", "", 0).content = match[1];
  state.pos += match[0].length;
  return true;
}

/** [^1]: words, and the indented lines below them. The note stays where it was written. */
function note(state, startLine, endLine, silent) {
  const match = NOTE.exec(lineOf(state, startLine));
  if (!match?.[2] || state.sCount[startLine] - state.blkIndent >= 4) return false;
  if (silent) return true;
  const words = [lineOf(state, startLine).slice(match[0].length).trim()];
  let line = startLine + 1;
  while (line < endLine && !state.isEmpty(line) && state.sCount[line] >= state.blkIndent + 2) words.push(lineOf(state, line++));
  const open = state.push("note_open", "div", 1);
  Object.assign(open, { content: match[1], map: [startLine, line] });
  Object.assign(state.push("inline", "", 0), { content: words.join("\n"), children: [], map: [startLine, line] });
  state.push("note_close", "div", -1);
  state.line = line;
  return true;
}

/** Line of the </details> that ends the one opened in `startLine`; endLine if it is still being written. */
function endOfDetails(state, startLine, endLine) {
  let depth = 0;
  for (let line = startLine; line < endLine; line++) {
    const text = lineOf(state, line);
    depth += (text.match(/<details/gi) ?? []).length - (text.match(/<\/details>/gi) ?? []).length;
    if (depth <= 0) return line;
  }
  return endLine;
}

/** <details><summary>…</summary> … </details>, with Markdown inside. */
function details(state, startLine, endLine, silent) {
  const match = DETAILS.exec(lineOf(state, startLine));
  if (!match || state.sCount[startLine] - state.blkIndent >= 4) return false;
  if (silent) return true;
  const last = endOfDetails(state, startLine, endLine);
  const next = Math.min(last + 1, endLine);
  let inner = state.getLines(startLine, next, state.blkIndent, false).trim().slice(match[0].length).replace(/<\/details>\s*$/i, "");
  const summary = /^\s*<summary>([\s\S]*?)(<\/summary>|$)/i.exec(inner);
  if (summary) inner = inner.slice(summary[0].length);
  Object.assign(state.push("details_open", "details", 1), { map: [startLine, next], attrs: match[1] ? [["open", ""]] : null });
  state.push("summary_open", "summary", 1);
  Object.assign(state.push("inline", "", 0), { content: (summary?.[1] ?? "…").trim(), children: [], map: [startLine, next] });
  state.push("summary_close", "summary", -1);
  const first = state.tokens.length;
  state.md.block.parse(inner, state.md, state.env, state.tokens);
  for (const token of state.tokens.slice(first)) token.level += state.level; // only <details> itself is a block of the answer
  state.push("details_close", "details", -1);
  state.line = next;
  return true;
}

/** "- [x] done" becomes a ticked box. */
function tasks(state) {
  state.tokens.forEach((token, i) => {
    const text = token.type === "inline" && state.tokens[i - 2]?.type === "list_item_open" ? token.children[0] : null;
    const match = text?.type === "text" && /^\[([ xX])\]\s+/.exec(text.content);
    if (!match) return;
    text.content = text.content.slice(match[0].length);
    const box = new state.Token("task", "", 0);
    box.content = match[1] === " " ? "" : " checked";
    token.children.unshift(box);
    state.tokens[i - 2].attrJoin("class", "task");
  });
}

export function addMarkup(md) {
  const escape = md.utils.escapeHtml;
  const interrupting = { alt: ["paragraph", "blockquote", "list"] };
  md.inline.ruler.before("autolink", "tag", harmlessTag);
  md.inline.ruler.before("link", "note_mark", noteMark);
  md.block.ruler.before("reference", "note", note, interrupting);
  md.block.ruler.before("reference", "details", details, interrupting);
  md.core.ruler.after("inline", "tasks", tasks);
  Object.assign(md.renderer.rules, {
    tag: (tokens, i) => tokens[i].content,
    note_mark: (tokens, i) => `<sup><button type="button" class="note-mark" data-note="${escape(tokens[i].content)}">${escape(tokens[i].content)}</button></sup>`,
    note_open: (tokens, i) => `<div class="footnote" data-note="${escape(tokens[i].content)}"><sup>${escape(tokens[i].content)}</sup> `,
    note_close: () => "</div>",
    task: (tokens, i) => `<input type="checkbox" disabled${tokens[i].content} aria-label="${escape(t(tokens[i].content ? "taskDone" : "taskOpen"))}"> `,
  });
}
