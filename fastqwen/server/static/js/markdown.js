// Markdown to safe HTML, block by block, so that a growing answer costs only its last blocks.
import MarkdownIt from "../vendor/markdown-it/markdown-it.js";
import "../vendor/dompurify/purify.js";
import { t } from "./i18n.js";
import { emit } from "./ui.js";
import { frameFor } from "./frames.js";
import { addMarkup } from "./markup.js";
import { addMath } from "./math.js";

const md = new MarkdownIt({ html: false, linkify: true, breaks: false, typographer: false });
md.use(addMath);
md.use(addMarkup);
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

const escape = md.utils.escapeHtml;
let highlighter = null;
let loading = null;

/** Colours arrive after the text: the library is fetched with the first code block. */
function colour(code, language) {
  if (highlighter?.getLanguage(language)) return highlighter.highlight(code, { language, ignoreIllegals: true }).value;
  if (!highlighter && language) {
    loading ??= import("../vendor/highlight/highlight.js").then((module) => { highlighter = module.default; emit("markdown"); });
  }
  return escape(code);
}

function codeBlock(code, language) {
  const kind = frameFor(language, code);
  return `<div class="code"${kind ? ` data-frame="${kind}"` : ""}><div class="code-head"><span class="label">${escape(language || t("plainText"))}</span>` +
    (kind ? `<button type="button" class="show" aria-pressed="false">${escape(t(kind))}</button>` : "") +
    `<button type="button" class="copy">${escape(t("copy"))}</button></div><pre tabindex="0"><code>${colour(code, language)}</code></pre></div>`;
}

md.renderer.rules.fence = (tokens, i) => codeBlock(tokens[i].content, tokens[i].info.trim().split(/\s+/)[0].toLowerCase());
md.renderer.rules.code_block = (tokens, i) => codeBlock(tokens[i].content, "");
md.renderer.rules.table_open = () => '<div class="table" tabindex="0"><table>';
md.renderer.rules.th_open = md.renderer.rules.td_open = (tokens, i) => {
  const side = /text-align:(right|center)/.exec(tokens[i].attrGet("style") ?? "")?.[1]; // answers carry no styles
  return `<${tokens[i].tag}${side ? ` class="${side}"` : ""}>`;
};
md.renderer.rules.table_close = () => "</table></div>";
// A picture would make the browser call a host that the model chose; a link waits for the reader.
md.renderer.rules.image = (tokens, i) => {
  const link = escape(tokens[i].attrGet("src") ?? "");
  return `<a href="${link}">${escape(tokens[i].content || link)}</a>`;
};

const ALLOWED = {
  ALLOWED_TAGS: "a p br hr h1 h2 h3 h4 h5 h6 strong em s del code pre blockquote ul ol li table thead tbody tr th td div span button details summary sup sub kbd mark input".split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start", "type", "tabindex", "data-display", "data-note", "data-frame", "rel", "target", "open", "checked", "disabled", "aria-pressed", "aria-label"],
  ALLOW_DATA_ATTR: false,
};
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "INPUT") { node.setAttribute("type", "checkbox"); node.setAttribute("disabled", ""); } // a task's box, and no other field
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const clean = (tokens, env) => DOMPurify.sanitize(md.renderer.render(tokens, md.options, env), ALLOWED);

/** Indices at which top-level blocks begin. */
function blockStarts(tokens) {
  const starts = [];
  tokens.forEach((token, i) => { if (token.level === 0 && token.nesting >= 0) starts.push(i); });
  return starts;
}

/** Remembers the finished blocks of a text that grows at its end. */
export class GrowingMarkdown {
  constructor() { this.reset(); }

  reset() {
    this.done = "";
    this.coloured = Boolean(highlighter);
    this.blocks = []; // HTML of finished blocks
    this.env = {};
  }

  /** Returns the HTML of every block. The last two stay open: the next characters may still change what they are. */
  update(text) {
    if (!text.startsWith(this.done) || this.coloured !== Boolean(highlighter)) this.reset();
    const tail = text.slice(this.done.length);
    const tokens = md.parse(tail, this.env);
    const starts = blockStarts(tokens);
    const parts = starts.map((start, i) => clean(tokens.slice(start, starts[i + 1]), this.env));
    const open = Math.max(0, parts.length - 2);
    if (open > 0) {
      const line = tokens[starts[open]].map[0];
      this.blocks.push(...parts.slice(0, open));
      this.done += tail.split("\n", line).join("\n") + "\n";
    }
    return [...this.blocks, ...parts.slice(open)];
  }
}
