// The box to write in: files, IME-safe Enter, send or stop, and how full the context is.
import { countTokens, guessTokens } from "./api.js";
import { buildMessages, contextUse, isRunning, send, stop, withFiles } from "./chat.js";
import { t } from "./i18n.js";
import { SlashMenu, take, wanted } from "./library.js";
import { modelInfo, server } from "./status.js";
import { setSettings, state } from "./store.js";
import { offered } from "./tools.js";
import { leafOf, shownPath } from "./tree.js";
import { emit, html, Icon, IconButton, on, sendsOn, showToast, stored, touch, useEffect, useLayoutEffect, useRef, useState, useTopic } from "./ui.js";

const MAX_FILE_BYTES = 2 * 2 ** 20;

/** What would push the conversation out of sight becomes a file; a click on its name brings it back. */
const isLong = (text) => text.length > 8000 || text.split("\n").length > 60;

/** Reads a text file as UTF-8, UTF-16 with a mark, or GB18030. Throws the reason in words. */
async function readTextFile(file) {
  if (file.size > MAX_FILE_BYTES) throw new Error(t("fileTooBig", { name: file.name }));
  const bytes = new Uint8Array(await file.arrayBuffer());
  const mark = (bytes[0] === 0xff && bytes[1] === 0xfe) ? "utf-16le" : (bytes[0] === 0xfe && bytes[1] === 0xff) ? "utf-16be" : null;
  if (!mark && bytes.includes(0)) throw new Error(t("fileNotText", { name: file.name }));
  for (const encoding of mark ? [mark] : ["utf-8", "gb18030"]) {
    try { return { name: file.name, text: new TextDecoder(encoding, { fatal: true }).decode(bytes) }; } catch { /* the next one */ }
  }
  throw new Error(t("fileNotText", { name: file.name }));
}

/** Tokens of the draft on top of the conversation: counted by the server, or guessed where it cannot. */
function useDraftTokens(side, text, files) {
  const [draft, setDraft] = useState(null);
  const size = text.length + files.reduce((n, f) => n + f.text.length, 0);
  useEffect(() => {
    if (!size || server.kind !== "ready") { setDraft(null); return undefined; }
    const controller = new AbortController();
    const timer = setTimeout(async () => {
      const content = withFiles({ files, content: text });
      const messages = [...buildMessages(side, leafOf(side)?.id), { role: "user", content }];
      const count = await countTokens(side.model ?? server.models[0]?.id, messages, controller.signal);
      if (!controller.signal.aborted) setDraft(count ?? (contextUse(side).used ?? 0) + guessTokens(content));
    }, 500);
    return () => { clearTimeout(timer); controller.abort(); };
  }, [text, files, side, server.kind]);
  return size ? draft : null;
}

function ContextMeter({ side, draft }) {
  const { used, cached, limit } = contextUse(side);
  const total = Math.max(draft ?? 0, used ?? 0);
  if (!total) return html`<span class="meter-text">${limit ? t("contextLimit", { n: limit.toLocaleString() }) : ""}</span>`;
  const share = (n) => `${Math.min(100, (n / limit) * 100)}%`;
  const label = (limit ? t("contextUsed", { n: total.toLocaleString(), limit: limit.toLocaleString() }) : `${total.toLocaleString()} ${t("tokens")}`) +
    (cached ? ` · ${t("cachedOf", { n: cached.toLocaleString() })}` : "");
  return html`
    ${limit && html`
      <span class=${`meter ${total > limit * 0.9 ? "full" : ""}`} role="meter" aria-label=${t("context")} aria-valuemin="0" aria-valuemax=${limit} aria-valuenow=${total} aria-valuetext=${label}>
        <i class="draft" style=${{ width: share(total) }}></i><i class="used" style=${{ width: share(used ?? 0) }}></i><i class="cached" style=${{ width: share(cached ?? 0) }}></i>
      </span>`}
    <span class="meter-text">${label}</span>`;
}

const BUDGETS = [512, 2048, 8192];

/** Whether the model thinks before it answers, and for how many tokens at most. */
function ThinkingSwitch({ side }) {
  const { thinking, thinking_budget: budget } = side.settings;
  const value = thinking !== "off" && budget ? `on ${budget}` : thinking;
  const budgets = budget && !BUDGETS.includes(budget) ? [...BUDGETS, budget] : BUDGETS;
  const change = (e) => {
    const [mode, most] = e.target.value.split(" ");
    setSettings(side, { thinking: mode, thinking_budget: most ? Number(most) : null });
  };
  return html`
    <label class="pill"><${Icon} name="brain" /><span class="sr">${t("thinkingMode")}</span>
      <select value=${value} onChange=${change}>
        <option value="auto">${t("think_auto")}</option><option value="off">${t("think_off")}</option><option value="on">${t("think_on")}</option>
        ${budgets.map((n) => html`<option key=${n} value=${`on ${n}`}>${t("think_budget", { n: n.toLocaleString() })}</option>`)}
      </select></label>`;
}

export function Composer({ conversation }) {
  useTopic("server");
  const draftName = "draft." + (state.list.some((c) => c.id === conversation.id) ? conversation.id : "new");
  const [text, setText] = useState("");
  const [files, setFiles] = useState([]);
  const [chosen, choose] = useState(0); // of the list that / opens
  const [hidden, hide] = useState(null); // the draft for which it was closed
  const area = useRef();
  const picker = useRef();
  const busy = isRunning(conversation);
  const side = conversation.sides[0];
  const draft = useDraftTokens(side, text, files);

  useLayoutEffect(() => { setText(stored.get(draftName, "")); setFiles([]); if (!touch.matches) area.current.focus(); }, [conversation.id]);
  useLayoutEffect(() => on("focus-composer", () => { if (!touch.matches) area.current.focus(); }), []);
  useLayoutEffect(() => on("fill-composer", (value) => { setText(value); area.current.focus(); }), []);
  useLayoutEffect(() => on("add-files", addFiles), []);
  useLayoutEffect(() => { const a = area.current; a.style.height = "auto"; a.style.height = `${a.scrollHeight}px`; }, [text]);

  function change(value) { setText(value); stored.set(draftName, value || null); }

  async function addFiles(list) {
    for (const file of list) {
      try {
        const read = await readTextFile(file);
        setFiles((old) => [...old, read]);
      } catch (error) { showToast(error.message); }
    }
  }

  function paste(e) {
    const pasted = e.clipboardData.getData("text/plain");
    if (e.clipboardData.files.length) { e.preventDefault(); addFiles(e.clipboardData.files); }
    else if (isLong(pasted)) {
      e.preventDefault();
      setFiles((old) => [...old, { name: t("pasted", { n: pasted.split("\n").length.toLocaleString() }), text: pasted, pasted: true }]);
    }
  }

  function unfold(file) {
    setFiles(files.filter((f) => f !== file));
    change(text ? `${text}\n${file.text}` : file.text);
    area.current.focus();
  }

  const entries = hidden === text ? null : wanted(text);
  const at = entries ? Math.min(chosen, entries.length - 1) : 0;

  function pick(entry) {
    change(take(side, entry));
    choose(0);
    area.current.focus();
  }

  /** Keys of the list that / opens; true if the key was one of them. */
  function slashKeys(e) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (move) choose((at + move + entries.length) % entries.length);
    else if (e.key === "Enter" || e.key === "Tab") pick(entries[at]);
    else if (e.key === "Escape") hide(text);
    else return false;
    e.preventDefault();
    e.stopPropagation();
    return true;
  }

  function submit() {
    if (busy || (!text.trim() && files.length === 0)) return;
    stored.set(draftName, null);
    setText("");
    setFiles([]);
    send(conversation, text.trim(), files);
    emit("to-end");
  }

  function keys(e) {
    if (e.isComposing || e.keyCode === 229) return; // Enter that picks a candidate of an input method
    if (entries && slashKeys(e)) return;
    if (sendsOn(e)) { e.preventDefault(); submit(); }
    if (e.key === "ArrowUp" && !text && !busy) { e.preventDefault(); emit("edit:" + shownPath(side).findLast(({ node }) => node.role === "user")?.node.id); }
  }

  return html`
    <form class="composer" onSubmit=${(e) => { e.preventDefault(); submit(); }}>
      ${files.length > 0 && html`<div class="chips">${files.map((f, i) => html`
        <span class="chip"><${Icon} name="clip" /> ${f.pasted ? html`<button type="button" class="text-button" title=${t("unfold")} onClick=${() => unfold(f)}>${f.name}</button>` : f.name}
          <${IconButton} name="close" label=${t("removeFile", { name: f.name })} onClick=${() => setFiles(files.filter((_, k) => k !== i))} /></span>`)}</div>`}
      ${entries && html`<${SlashMenu} entries=${entries} index=${at} onPick=${pick} />`}
      <textarea ref=${area} id="composer" rows="1" aria-controls=${entries ? "slash" : undefined} aria-activedescendant=${entries ? `slash-${at}` : undefined} value=${text} aria-label=${t("message")} placeholder=${t("placeholder")}
        onInput=${(e) => change(e.target.value)} onKeyDown=${keys}
        onPaste=${paste}></textarea>
      <div class="composer-row">
        <${IconButton} name="clip" label=${t("attach")} onClick=${() => picker.current.click()} />
        <input type="file" multiple hidden ref=${picker} onChange=${(e) => { addFiles([...e.target.files]); e.target.value = ""; }} />
        ${modelInfo(side.model ?? server.models[0]?.id)?.thinks !== false && html`<${ThinkingSwitch} side=${side} />`}
        ${offered.size > 0 && html`<button type="button" class="pill" aria-pressed=${Boolean(side.settings.mcp)} title=${[...offered.keys()].join(", ")} onClick=${() => setSettings(side, { mcp: side.settings.mcp ? "" : "on" })}>${t("mcpTools", { n: offered.size })}</button>`}
        <${ContextMeter} side=${side} draft=${draft} />
        ${busy
          ? html`<button type="button" class="send stop" aria-label=${t("stop")} title=${t("stop")} onClick=${() => stop(conversation)}><${Icon} name="stop" /></button>`
          : html`<button type="submit" class="send" aria-label=${t("send")} title=${t("send")} disabled=${!text.trim() && files.length === 0}><${Icon} name="send" /></button>`}
      </div>
    </form>`;
}
