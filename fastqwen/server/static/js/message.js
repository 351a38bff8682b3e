// One message: its text, thoughts, tool calls, figures, error and buttons.
import { canContinue, canForget, continueAnswer, forgetOldest, isRunning, isWaiting, regenerate, resend, sendToolResults, switchBranch } from "./chat.js";
import { explain } from "./errors.js";
import { Frame } from "./frames.js";
import { language, t } from "./i18n.js";
import { GrowingMarkdown } from "./markdown.js";
import { drawMath } from "./math.js";
import { startNew } from "./store.js";
import { copyText, emit, html, sendsOn, touch, Icon, IconButton, memo, on, render, showToast, useEffect, useLayoutEffect, useMemo, useRef, useState, useTopic } from "./ui.js";
import { offered, runTool } from "./tools.js";
import { askForWord, isOnText } from "./words.js";

const Block = memo(({ source, running }) => {
  const place = useRef();
  useTopic("katex");
  useLayoutEffect(() => drawMath(place.current));
  useEffect(() => (running ? undefined : showFrames(place.current)), [source, running]);
  return html`<div class="block" ref=${place} dangerouslySetInnerHTML=${{ __html: source }}></div>`;
});

/** Draws the diagrams of a finished answer, and previews on demand: above their code, which a button shows again. */
function showFrames(block) {
  const places = [...block.querySelectorAll(".code[data-frame]")].map((box) => {
    const place = document.createElement("div");
    const button = box.querySelector(".show");
    const { frame: kind } = box.dataset;
    const toggle = (shown) => {
      button.setAttribute("aria-pressed", shown);
      box.classList.toggle("drawn", shown);
      render(shown ? html`<${Frame} kind=${kind} source=${box.querySelector("code").textContent} label=${t(kind)} />` : null, place);
    };
    box.querySelector(".code-head").after(place);
    button.onclick = () => toggle(button.getAttribute("aria-pressed") !== "true");
    if (kind === "diagram") toggle(true);
    return place;
  });
  return () => places.forEach((place) => { render(null, place); place.remove(); });
}

/** Draws a growing text; when drawing takes long, waits in proportion, so that typing and scrolling stay smooth. */
function Markdown({ text, running }) {
  useTopic("markdown");
  const [, draw] = useState(0);
  const pace = useRef({ cost: 0, at: 0, blocks: null, timer: null, key: "" });
  const parser = useMemo(() => new GrowingMarkdown(), [language()]);
  const p = pace.current;
  const key = `${language()} ${text.length}`;
  const wait = running && p.blocks ? p.at + p.cost * 4 - performance.now() : 0;
  clearTimeout(p.timer);
  if (wait > 4) p.timer = setTimeout(() => draw((n) => n + 1), wait);
  else {
    const started = performance.now();
    if (!running && p.key !== key) parser.reset(); // the last drawing knows all link targets
    p.blocks = parser.update(text);
    p.key = running ? "" : key;
    p.at = performance.now();
    p.cost = p.at - started;
  }
  useEffect(() => () => clearTimeout(p.timer), []);
  return html`<div class="markdown">${p.blocks.map((source, i) => html`<${Block} key=${i} source=${source} running=${running} />`)}</div>`;
}

const seconds = (ms) => (ms / 1000).toFixed(ms < 10000 ? 1 : 0);

function Thinking({ node }) {
  if (!node.reasoning) return null;
  const label = node.thinking ? t("thinking") : t("thoughtFor", { s: node.thinkMs === undefined ? "?" : seconds(node.thinkMs) });
  return html`
    <details class="thinking">
      <summary class=${node.thinking ? "active" : ""}><span>${label}</span></summary>
      <div class="thoughts">${node.reasoning}</div>
    </details>`;
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function ToolCalls({ node, side, conversation, isLast }) {
  const [results, setResults] = useState([]);
  if (!node.toolCalls?.length) return null;
  const [state, setState] = useState(""); // "running", or why a tool could not be run
  const give = isLast && !node.running && !node.error;
  const ours = give && node.toolCalls.every((call) => offered.has(call.name));
  const send = (list) => sendToolResults(conversation, side, node, list);
  const runAll = async () => {
    setState("running");
    try {
      const found = [];
      for (const call of node.toolCalls) found.push(await runTool(call)); // one after another: a tool may need what the one before it did
      send(found);
    } catch (error) { setState(error.detail || String(error)); }
  };
  return html`
    <div class="tool-calls">
      ${node.toolCalls.map((call, i) => html`
        <div class="tool" key=${call.id}>
          <div class="tool-head">${t("toolCall")} <code>${call.name}</code></div>
          <pre tabindex="0">${pretty(call.arguments)}</pre>
          ${give && !ours && html`<textarea rows="2" aria-label=${t("toolResult")} placeholder=${t("toolResult")}
            onInput=${(e) => { const next = [...results]; next[i] = e.target.value; setResults(next); }}></textarea>`}
        </div>`)}
      ${give && !ours && html`<button type="button" class="button" disabled=${node.toolCalls.some((_, i) => !results[i])} onClick=${() => send(results)}>${t("sendResult")}</button>`}
      ${ours && html`<div class="row"><button type="button" class="button primary" disabled=${state === "running"} onClick=${runAll}>${t(state === "running" ? "toolRuns" : "runTool")}</button>
        <button type="button" class="button" disabled=${state === "running"} onClick=${() => send(node.toolCalls.map(() => "The user refused this call."))}>${t("refuseTool")}</button></div>`}
      ${state && state !== "running" && html`<p class="fault" role="alert">${state}</p>`}
    </div>`;
}

function Figures({ stats }) {
  if (!stats) return null;
  const about = stats.exact ? "" : "≈ ";
  const parts = [
    stats.rate && `${about}${stats.rate.toFixed(1)} ${t("tokPerS")}`,
    `${about}${stats.tokens.toLocaleString()} ${t("tokens")}`,
  ];
  return html`<span class="figures">${parts.filter(Boolean).join(" · ")}</span>`;
}

const SHORT_S = 0.05; // a wait that nobody notices
const EXPLAINED = new Set(["disabled", "evicted", "state_not_kept", "tools_changed", "system_changed", "thinking_stripped", "message_changed", "other_salt"]);

/** Why the answer began soon or late: what was read from memory, what was computed, what it waited for. */
function Why({ stats }) {
  if (!stats) return null;
  const { prompt, cached, why } = stats;
  const s = (value) => value.toFixed(value < 1 ? 2 : 1);
  const parts = [t("whyFirst", { s: s(stats.ttftMs / 1000) })];
  if (why?.waited_s > SHORT_S) parts.push(t("whyWaited", { s: s(why.waited_s) }));
  if (cached) parts.push(t("whyMemory", { n: cached.toLocaleString(), all: prompt.toLocaleString() }));
  if (prompt != null) parts.push(t(why ? "whyComputedIn" : "whyComputed", { n: (prompt - (cached ?? 0)).toLocaleString(), s: why && s(why.read_s) }));
  if (EXPLAINED.has(why?.cause)) parts.push(t("cause_" + why.cause));
  return html`<p class="why">${parts.join(" · ")}</p>`;
}

function ErrorNote({ node, side, conversation }) {
  useTopic("server");
  if (!node.error) return null;
  const { title, hint, said } = explain(node.error, node.model);
  if (isWaiting(node)) return html`<div class="note waiting" role="status"><span class="spinner"></span> ${title} ${t("willSend")}</div>`;
  return html`
    <div class="note error" role="alert">
      <strong>${title}</strong> ${hint}
      ${said && html`<div class="said">${t("serverSaid")} ${said}</div>`}
      <div class="row">
        <button type="button" class="button" onClick=${() => { regenerate(conversation, side, node); emit("focus-composer"); }}>${t("tryAgain")}</button>
        ${node.error.kind === "context" && html`
          ${canForget(side, node) && html`<button type="button" class="button" onClick=${() => forgetOldest(conversation, side, node)}>${t("forgetOldest")}</button>`}
          <button type="button" class="button" onClick=${() => startNew()}>${t("newChat")}</button>`}
        ${node.error.kind === "key" && html`<button type="button" class="button" onClick=${() => emit("open-dialog", "key")}>${t("enterKey")}</button>`}
      </div>
    </div>`;
}

const FINISH_NOTES = new Set(["length", "stopped", "reloaded", "abort", "error", "content_filter"]);

function Branches({ node, siblings, side, conversation, locked }) {
  if (siblings.length < 2) return null;
  const at = siblings.indexOf(node);
  const go = (step) => switchBranch(conversation, side, siblings[at + step]);
  return html`
    <span class="branches" role="group" aria-label=${t("branches")}>
      <${IconButton} name="left" label=${t("previousBranch")} disabled=${at === 0 || locked} onClick=${() => go(-1)} />
      <span>${at + 1} / ${siblings.length}</span>
      <${IconButton} name="right" label=${t("nextBranch")} disabled=${at === siblings.length - 1 || locked} onClick=${() => go(1)} />
    </span>`;
}

function Editor({ node, conversation, onClose }) {
  const [text, setText] = useState(node.content);
  const area = useRef();
  useLayoutEffect(() => { area.current.focus(); area.current.setSelectionRange(text.length, text.length); }, []);
  const done = () => { if (!text.trim() && !node.files?.length) return; onClose(); resend(conversation, node, text.trim(), node.files); emit("focus-composer"); };
  const keys = (e) => {
    if (e.isComposing || e.keyCode === 229) return;
    if (e.key === "Escape") { e.stopPropagation(); onClose(); }
    if (sendsOn(e)) { e.preventDefault(); done(); }
  };
  return html`
    <div class="editor">
      <textarea ref=${area} rows="3" aria-label=${t("edit")} value=${text} onInput=${(e) => setText(e.target.value)} onKeyDown=${keys}></textarea>
      <div class="row end">
        <span class="hint grow">${t(touch.matches ? "editHintTouch" : "editHint")}</span>
        <button type="button" class="button" onClick=${onClose}>${t("cancel")}</button>
        <button type="button" class="button primary" disabled=${!text.trim() && !node.files?.length} onClick=${done}>${t("send")}</button>
      </div>
    </div>`;
}

function UserMessage({ node, conversation, children }) {
  const [editing, setEditing] = useState(false);
  useLayoutEffect(() => on("edit:" + node.id, () => setEditing(true)), [node.id]);
  if (editing) return html`<${Editor} node=${node} conversation=${conversation} onClose=${() => setEditing(false)} />`;
  return html`
    ${node.files?.map((f) => html`<details class="file"><summary><${Icon} name="clip" /> ${f.name} <small>${f.text.length.toLocaleString()}</small></summary><pre>${f.text}</pre></details>`)}
    ${node.content && html`<div class="bubble">${node.content}</div>`}
    <div class="actions">
      ${children}
      <${IconButton} name="copy" label=${t("copy")} onClick=${() => copyText(node.content).then(() => showToast(t("copied")))} />
      <${IconButton} name="edit" label=${t("edit")} disabled=${isRunning(conversation)} onClick=${() => setEditing(true)} />
    </div>`;
}

function AssistantMessage({ node, side, conversation, isLast, children }) {
  useTopic("node:" + node.id);
  const [raw, setRaw] = useState(false);
  const busy = isRunning(conversation);
  const again = () => { regenerate(conversation, side, node); emit("focus-composer"); };
  const words = (e, point = { x: e.clientX, y: e.clientY }) => askForWord(conversation, side, node, e.target.closest("article"), point);
  const goOn = isLast && canContinue(node);
  const empty = node.running && !node.content && !node.reasoning && !node.toolCalls?.length;
  return html`
    <${Thinking} node=${node} />
    ${empty && html`<div class="dots" aria-label=${t("waitingFirst")}><i></i><i></i><i></i></div>`}
    ${node.content && (raw ? html`<pre class="raw" tabindex="0">${node.content}</pre>`
      : html`<div onClick=${(e) => { if (!node.running && isOnText(e)) words(e); }}><${Markdown} text=${node.content} running=${node.running} /></div>`)}
    <${ToolCalls} node=${node} side=${side} conversation=${conversation} isLast=${isLast} />
    ${!node.running && FINISH_NOTES.has(node.finish) && html`<div class="note">${t("finish_" + node.finish)}</div>`}
    ${goOn && html`<div class="row"><button type="button" class="button" disabled=${busy} onClick=${() => { continueAnswer(conversation, side, node); emit("focus-composer"); }}>${t("continue")}</button></div>`}
    ${!node.running && node.warnings?.map((text) => html`<div class="note">${text}</div>`)}
    <${ErrorNote} node=${node} side=${side} conversation=${conversation} />
    ${!node.running && html`
      <div class="actions">
        ${children}
        ${node.content && html`<${IconButton} name="copy" label=${t("copy")} onClick=${() => copyText(node.content).then(() => showToast(t("copied")))} />`}
        ${(isLast || conversation.sides.length === 1) && html`<${IconButton} name="redo" label=${t("regenerate")} disabled=${busy} onClick=${again} />`}
        ${node.content && !raw && html`<${IconButton} name="fork" label=${t("words")} onClick=${(e) => words(e, null)} />`}
        ${node.content && html`<${IconButton} name="code" label=${t("raw")} aria-pressed=${raw} onClick=${() => setRaw(!raw)} />`}
        <${Figures} stats=${node.stats} />
      </div>
      <${Why} stats=${node.stats} />`}`;
}

/** `v`, `busy` and `count` only tell memo that the mutable node has changed. */
export const Message = memo(({ node, siblings, side, conversation, isLast, name }) => {
  const branches = html`<${Branches} node=${node} siblings=${siblings} side=${side} conversation=${conversation}
    locked=${isRunning(conversation) || (conversation.sides.length > 1 && !isLast && node.role === "assistant")} />`;
  const who = node.role === "user" ? t("you") : node.role === "tool" ? `${t("toolResult")}: ${node.name}` : name ?? node.model ?? t("model");
  const inner = {
    user: () => html`<${UserMessage} node=${node} conversation=${conversation}>${branches}<//>`,
    tool: () => html`<div class="tool"><div class="tool-head">${who}</div><pre tabindex="0">${pretty(node.content)}</pre></div>`,
    assistant: () => html`<${AssistantMessage} node=${node} side=${side} conversation=${conversation} isLast=${isLast}>${branches}<//>`,
  }[node.role];
  return html`
    <article class=${`message ${node.role} ${node.forgotten ? "forgotten" : ""} ${node.running ? "running" : ""}`} data-id=${node.id}>
      <h2 class=${node.role === "assistant" ? "who" : "sr"}>${who}</h2>
      ${node.forgotten && html`<span class="tag">${t("forgotten")}</span>`}
      ${inner()}
    </article>`;
});
