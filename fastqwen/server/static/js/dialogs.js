// The dialogs: key, help, import and export. <dialog> keeps the focus inside and gives it back.
import { getKey, request, setKey } from "./api.js";
import { t } from "./i18n.js";
import { check, server } from "./status.js";
import { forget, keep, own } from "./library.js";
import { share } from "./share.js";
import { removeAll, state } from "./store.js";
import { exportAll, exportJson, exportMarkdown, exportVotes, fileName, importFile } from "./transfer.js";
import { copyText, html, IconButton, on, showToast, useEffect, useLayoutEffect, useRef, useState, useTopic } from "./ui.js";

const apple = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = apple ? "⌘" : "Ctrl";
export const SHORTCUTS = [
  [["Enter"], "send"], [["Shift", "Enter"], "keyNewline"], [["Esc"], "stop"], [["↑"], "keyEditLast"], [[MOD, "Shift", "Enter"], "regenerate"],
  [[MOD, "Shift", "O"], "newChat"], [[MOD, "K"], "search"], [[MOD, "B"], "keySidebar"], [[MOD, ","], "settings"], [["/"], "skip"], [["?"], "help"],
];

function Dialog({ title, onClose, children }) {
  const box = useRef();
  useLayoutEffect(() => { box.current.showModal(); }, []);
  return html`
    <dialog ref=${box} aria-labelledby="dialog-title" onClose=${onClose} onClick=${(e) => { if (e.target === box.current) box.current.close(); }}>
      <div class="dialog-body">
        <div class="settings-head"><h2 id="dialog-title">${title}</h2><${IconButton} name="close" label=${t("close")} onClick=${() => box.current.close()} /></div>
        ${children}
      </div>
    </dialog>`;
}

function Help({ onClose }) {
  return html`
    <${Dialog} title=${t("help")} onClose=${onClose}>
      <table class="shortcuts"><tbody>${SHORTCUTS.map(([keys, name]) => html`
        <tr><th scope="row">${keys.map((key, i) => html`${i > 0 && " + "}<kbd>${key}</kbd>`)}</th><td>${t(name)}</td></tr>`)}</tbody></table>
      <p class="hint">${t("privacy")}</p>
    <//>`;
}

function Data({ onClose }) {
  const picker = useRef();
  const [sure, setSure] = useState(false);
  const current = state.list.some((c) => c.id === state.current.id) ? state.current : null;
  const take = async (e) => {
    try {
      let count = 0;
      for (const file of e.target.files) count += await importFile(file);
      showToast(t("imported", { n: count }));
      onClose();
    } catch (error) { showToast(error.message); }
  };
  return html`
    <${Dialog} title=${t("dataTitle")} onClose=${onClose}>
      <p class="hint">${t("privacy")}</p>
      <h3>${t("thisChat")}</h3>
      <div class="row wrap">
        <button type="button" class="button" disabled=${!current} onClick=${() => exportMarkdown(current)}>Markdown</button>
        <button type="button" class="button" disabled=${!current} onClick=${() => share(current, fileName(current.title))}>${t("sharePage")}</button>
        <button type="button" class="button" disabled=${!current} onClick=${() => exportJson([current], current.title)}>JSON</button>
      </div>
      <h3>${t("allChats")}</h3>
      <div class="row wrap">
        <button type="button" class="button" disabled=${state.list.length === 0} onClick=${exportAll}>${t("exportAll")}</button>
        <button type="button" class="button" onClick=${() => picker.current.click()}>${t("import")}</button>
        <button type="button" class="button" onClick=${exportVotes}>${t("exportVotes")}</button>
        <input ref=${picker} type="file" class="import-file" accept=".json,.md,.markdown" multiple hidden onChange=${take} />
      </div>
      <div class="row"><button type="button" class="button danger" onClick=${() => { if (sure) { removeAll(); onClose(); } else setSure(true); }}>${t(sure ? "deleteAllSure" : "deleteAll")}</button></div>
    <//>`;
}

export function KeyDialog({ onClose }) {
  const [key, setText] = useState(getKey());
  const save = (e) => { e.preventDefault(); setKey(key); onClose(); check(); };
  return html`
    <${Dialog} title=${t("enterKey")} onClose=${onClose}>
      <form onSubmit=${save}>
        <p>${t(getKey() ? "keyWrong" : "keyWanted")}</p>
        <div class="field"><label for="api-key">${t("apiKey")}</label>
          <input id="api-key" type="password" autocomplete="off" value=${key} onInput=${(e) => setText(e.target.value)} autofocus /></div>
        <p class="hint">${t("keyStays")}</p>
        <div class="row end"><button type="submit" class="button primary">${t("save")}</button></div>
      </form>
    <//>`;
}

function Command({ text }) {
  return html`<div class="command"><code>${text}</code><${IconButton} name="copy" label=${t("copyCommand", { command: text })} onClick=${() => copyText(text).then(() => showToast(t("copied")))} /></div>`;
}

const shortName = (model) => model.split("/").at(-1);

function Runs({ models }) {
  const speed = (s) => (s ? `${Math.round(s.low)}–${Math.round(s.high)}` : "–");
  return html`
    <div class="scroll" tabindex="0"><table class="runs"><thead><tr><th scope="col">${t("model")}</th><th scope="col">GiB</th><th scope="col">${t("context")}</th><th scope="col">${t("tokPerS")}</th><td></td></tr></thead>
      <tbody>${models.map((m) => html`<tr key=${m.model}><th scope="row">${shortName(m.model)}</th><td>${m.gib}</td><td>${m.context.toLocaleString()}</td><td>${speed(m.tokens_per_second)}</td>
        <td><${IconButton} name="copy" label=${t("copyCommand", { command: m.command })} onClick=${() => copyText(m.command).then(() => showToast(t("copied")))} /></td></tr>`)}</tbody></table></div>`;
}

/** What else the server's machine could run. */
function Plan({ onClose }) {
  const [found, setFound] = useState(null);
  useEffect(() => { request("admin/plan").then((r) => r.json()).then(setFound, (error) => setFound({ error })); }, []);
  const [first, ...others] = found?.models ?? [];
  return html`
    <${Dialog} title=${t("planTitle")} onClose=${onClose}>
      ${!found && html`<p class="row"><span class="spinner"></span> ${t("planning")}</p>`}
      ${found?.error && html`<p>${found.error.status === 404 ? t("planNone") : found.error.detail}</p>`}
      ${found && !found.error && !first && html`<p>${t("planNothing", { device: found.device })}</p>`}
      ${first && html`
        <p>${t("planBest", { device: found.device, model: shortName(first.model), n: first.context.toLocaleString() })}</p>
        <${Command} text=${first.command} />
        <h3>${t("planOthers", { n: others.length })}</h3><${Runs} models=${others} />
        <p class="hint">${t("planHint")}</p>`}
    <//>`;
}

/** Presets and prompts of one's own. */
function Library({ onClose }) {
  useTopic("toast"); // keeping and forgetting both say so
  const [name, setName] = useState("");
  const [text, setText] = useState("");
  const [withSettings, setWith] = useState(false);
  const save = (e) => {
    e.preventDefault();
    keep(name.trim(), text, withSettings ? state.current.sides[0] : null);
    showToast(t("kept", { name: name.trim() }));
    setName(""); setText(""); setWith(false);
  };
  return html`
    <${Dialog} title=${t("library")} onClose=${onClose}>
      <p class="hint">${t("libraryHint")}</p>
      <ul class="library">${own().map((e) => html`<li key=${e.id}><b>${e.name}</b> <span class="grow">${e.settings ? t("preset") : ""} ${e.text.split("\n")[0]}</span>
        <${IconButton} name="trash" label=${`${t("delete")} ${e.name}`} onClick=${() => { forget(e.id); showToast(t("gone", { name: e.name })); }} /></li>`)}</ul>
      <form onSubmit=${save}>
        <div class="field"><label for="entry-name">${t("name")}</label><input id="entry-name" maxlength="60" value=${name} onInput=${(e) => setName(e.target.value)} /></div>
        <div class="field"><label for="entry-text">${t("promptText")}</label><textarea id="entry-text" rows="3" value=${text} onInput=${(e) => setText(e.target.value)}></textarea></div>
        <label class="check"><input type="checkbox" checked=${withSettings} onChange=${(e) => setWith(e.target.checked)} /> ${t("withSettings")}</label>
        <div class="row end"><button type="submit" class="button primary" disabled=${!name.trim() || (!text.trim() && !withSettings)}>${t("save")}</button></div>
      </form>
    <//>`;
}

const KINDS = { library: Library, help: Help, data: Data, key: KeyDialog, plan: Plan };

export function Dialogs() {
  const [kind, setKind] = useState(null);
  useLayoutEffect(() => on("open-dialog", setKind), []);
  useLayoutEffect(() => {
    const ask = () => { if (server.kind === "key") setKind("key"); };
    ask();
    return on("server", ask);
  }, []);
  return kind && html`<${KINDS[kind]} onClose=${() => setKind(null)} />`;
}
