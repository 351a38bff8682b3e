// A conversation as one web page that anybody can open, without this page, a server or a network.
import { language, t } from "./i18n.js";
import { GrowingMarkdown } from "./markdown.js";
import { shownPath } from "./tree.js";
import { download, touch } from "./ui.js";

const STYLE = `body{max-width:46em;margin:2em auto;padding:0 1em;font:16px/1.6 system-ui,sans-serif;color:#211f1c;background:#fcfbf9}
section{margin:1.6em 0}h2{font-size:.85em;color:#68635b;margin:0 0 .3em}.user{background:#efedfb;padding:.6em 1em;border-radius:14px;white-space:pre-wrap}
pre{overflow:auto;background:#f4f2ee;padding:1em;border-radius:10px}code{font-family:ui-monospace,monospace;font-size:.9em}table{border-collapse:collapse}
td,th{border-bottom:1px solid #e5e1da;padding:.3em 1em .3em 0;text-align:left}.right{text-align:right}.center{text-align:center}.code-head,.math{font-family:ui-monospace,monospace;font-size:.85em;color:#68635b}
@media (prefers-color-scheme:dark){body{background:#18181b;color:#ecebe8}.user{background:#2b2a40}pre{background:#202024}}`;

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function drawn(text) {
  const page = new DOMParser().parseFromString(new GrowingMarkdown().update(text).join("\n"), "text/html");
  for (const button of page.querySelectorAll(".code-head button")) button.remove();
  for (const mark of page.querySelectorAll("button")) mark.replaceWith(mark.textContent);
  return page.body.innerHTML;
}

function section({ node }) {
  const who = { user: t("you"), assistant: node.model || t("model"), tool: `${t("toolResult")} (${node.name})` }[node.role];
  const files = (node.files ?? []).map((f) => `<details><summary>${escape(f.name)}</summary><pre>${escape(f.text)}</pre></details>`).join("");
  const said = node.role === "assistant" ? drawn(node.content) : escape(node.content);
  return `<section><h2>${escape(who)}</h2>${files}<div class="${node.role}">${said}</div></section>`;
}

export function toHtml(conversation) {
  const title = escape(conversation.title || t("newChat"));
  const sides = conversation.sides.map((side) => {
    const system = side.settings.system ? `<section><h2>${t("system")}</h2><pre>${escape(side.settings.system)}</pre></section>` : "";
    return system + shownPath(side).map(section).join("\n");
  });
  return `<!doctype html>\n<html lang="${language()}"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><title>${title}</title><style>${STYLE}</style></head>
<body><h1>${title}</h1>\n${sides.join("\n<hr>\n")}\n</body></html>\n`;
}

/** On a phone the system's own way of sharing, elsewhere a download. */
export async function share(conversation, name) {
  const file = new File([toHtml(conversation)], `${name}.html`, { type: "text/html" });
  if (touch.matches && navigator.canShare?.({ files: [file] })) await navigator.share({ files: [file], title: conversation.title }).catch(() => {});
  else download(file.name, file, file.type);
}
