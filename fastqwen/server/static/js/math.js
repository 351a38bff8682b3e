// $…$, $$…$$, \(…\) and \[…\] in Markdown. The formula travels as text and KaTeX draws it in the page.
import { emit } from "./ui.js";

const PAIRS = [["$$", "$$", true], ["\\[", "\\]", true], ["\\(", "\\)", false], ["$", "$", false]];

function closingDollar(text, from) {
  for (let at = text.indexOf("$", from); at !== -1; at = text.indexOf("$", at + 1)) {
    if (text[at - 1] === "\\") continue;
    // "$5 and $6" is money: a formula ends without a space before the sign and without a digit after it
    return /\s/.test(text[at - 1]) || /\d/.test(text[at + 1] ?? "") ? -1 : at;
  }
  return -1;
}

function inline(state, silent) {
  const pair = PAIRS.find(([open]) => state.src.startsWith(open, state.pos));
  if (!pair) return false;
  const [open, close, display] = pair;
  const from = state.pos + open.length;
  if (open === "$" && /[\s$]/.test(state.src[from] ?? " ")) return false;
  const end = open === "$" ? closingDollar(state.src, from) : state.src.indexOf(close, from);
  if (end === -1 || end === from) return false;
  if (!silent) {
    const token = state.push("math", "", 0);
    token.content = state.src.slice(from, end);
    token.meta = { display };
  }
  state.pos = end + close.length;
  return true;
}

function block(state, startLine, endLine, silent) {
  const first = state.src.slice(state.bMarks[startLine] + state.tShift[startLine], state.eMarks[startLine]);
  const pair = PAIRS.slice(0, 2).find(([open]) => first.startsWith(open));
  if (!pair || state.sCount[startLine] - state.blkIndent >= 4) return false;
  const [open, close] = pair;
  const body = [];
  for (let line = startLine; line < endLine; line++) {
    let text = line === startLine ? first.slice(open.length) : state.getLines(line, line + 1, state.blkIndent, false);
    const end = text.indexOf(close);
    if (end !== -1 && text.slice(end + close.length).trim()) return false; // words after it: leave it to the inline rule
    body.push(end === -1 ? text : text.slice(0, end));
    if (end !== -1 || line === endLine - 1) { // still open at the end of the text: it is being written
      if (silent) return true;
      const token = state.push("math_block", "", 0);
      Object.assign(token, { block: true, content: body.join("\n").trim(), map: [startLine, line + 1], meta: { display: true, pending: end === -1 } });
      state.line = line + 1;
      return true;
    }
  }
  return false;
}

export function addMath(md) {
  const show = (tokens, i) => {
    const { display, pending } = tokens[i].meta;
    const text = md.utils.escapeHtml(tokens[i].content);
    return `<span class="math${pending ? " pending" : ""}"${display ? ' data-display="1"' : ""}>${text}</span>`;
  };
  md.inline.ruler.before("escape", "math", inline);
  md.block.ruler.before("fence", "math_block", block, { alt: ["paragraph", "reference", "blockquote", "list"] });
  md.renderer.rules.math = show;
  md.renderer.rules.math_block = (tokens, i) => `<p>${show(tokens, i)}</p>`;
}

let loading = null;

function loadKatex() {
  const style = document.createElement("link");
  Object.assign(style, { rel: "stylesheet", href: new URL("../vendor/katex/katex.css", import.meta.url).href });
  document.head.append(style);
  return import("../vendor/katex/katex.js").then(() => emit("katex"));
}

/** Draws the formulas below `element`; an unreadable one stays as its source. */
export function drawMath(element) {
  const places = element.querySelectorAll(".math:not(.pending):not(.drawn)");
  if (places.length === 0) return;
  if (!globalThis.katex) { loading ??= loadKatex(); return; }
  for (const place of places) {
    const source = place.textContent;
    try {
      katex.render(source, place, { displayMode: "display" in place.dataset, throwOnError: true, maxSize: 20, strict: "ignore" });
      place.classList.add("drawn");
    } catch { place.textContent = source; place.classList.add("drawn", "wrong"); }
  }
}
