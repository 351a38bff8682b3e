// The list of conversations: new, open, search, rename, delete; and the switches at its foot.
import { language, setLanguage, t } from "./i18n.js";
import { changeEntry, remove, search, select, startNew, state } from "./store.js";
import { at, emit, html, Icon, IconButton, on, stored, useEffect, useLayoutEffect, useRef, useState } from "./ui.js";

const DAY_MS = 86400000;

function ageGroup(updated) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "today";
  return updated >= midnight - 6 * DAY_MS ? "thisWeek" : "older";
}

function Entry({ entry, open, onOpen }) {
  const [editing, setEditing] = useState(null); // "title", "folder"
  const [sure, setSure] = useState(false);
  const field = useRef();
  useLayoutEffect(() => { if (editing) { field.current.focus(); field.current.select(); } }, [editing]);
  const close = (keep) => {
    const value = field.current?.value.trim();
    setEditing(null);
    if (keep && (value || (value === "" && editing === "folder"))) changeEntry({ [editing]: value });
  };
  if (editing) {
    return html`<li><input ref=${field} class="rename" defaultValue=${entry[editing]} aria-label=${t(editing === "folder" ? "folder" : "rename")} placeholder=${t(editing === "folder" ? "folder" : "rename")} list="folders" onBlur=${() => close(true)}
      onKeyDown=${(e) => { if (e.isComposing || e.keyCode === 229) return; if (e.key === "Enter") close(true); if (e.key === "Escape") { e.stopPropagation(); close(false); } }} /></li>`;
  }
  return html`
    <li class=${open ? "open" : ""}>
      <button type="button" class="entry" aria-current=${open ? "true" : undefined} onClick=${() => select(entry.id).then(onOpen)}>
        ${entry.compare && html`<${Icon} name="split" />`}<span>${entry.title || t("newChat")}</span></button>
      ${open && html`<span class="entry-tools">
        ${sure
          ? html`<button type="button" class="button danger" onClick=${() => remove(entry.id)} onBlur=${() => setSure(false)} ref=${(b) => b?.focus()}>${t("deleteSure")}</button>`
          : html`<${IconButton} name="pin" label=${t("pin")} aria-pressed=${entry.pinned} onClick=${() => changeEntry({ pinned: !entry.pinned })} /><${IconButton} name="folder" label=${t("folder")} onClick=${() => setEditing("folder")} />
            <${IconButton} name="edit" label=${t("rename")} onClick=${() => setEditing("title")} /><${IconButton} name="trash" label=${t("delete")} onClick=${() => setSure(true)} />`}
      </span>`}
    </li>`;
}

export function ThemeButton() {
  const [theme, setTheme] = useState(stored.get("theme", "auto"));
  const turn = () => {
    const next = { auto: "light", light: "dark" }[theme] ?? "auto";
    stored.set("theme", next);
    setTheme(next);
    dispatchEvent(new Event("fastqwen-theme"));
  };
  return html`<${IconButton} name=${{ light: "sun", dark: "moon" }[theme] ?? "auto"} label=${t("theme_" + theme)} onClick=${turn} />`;
}

export const LanguageButton = () => {
  const other = language() === "en" ? "zh-CN" : "en";
  return html`<button type="button" class="text-button" lang=${other} title=${t("language")} onClick=${() => setLanguage(other)}>${other === "en" ? "English" : "中文"}</button>`;
};

export function Sidebar({ onClose }) {
  const [query, setQuery] = useState("");
  const [hits, setHits] = useState(null);
  const field = useRef();
  useLayoutEffect(() => on("focus-search", () => field.current.focus()), []);
  useEffect(() => {
    if (!query.trim()) { setHits(null); return undefined; }
    const timer = setTimeout(async () => setHits(await search(query)), 150);
    return () => clearTimeout(timer);
  }, [query, state.list.length]);
  const shown = state.list.filter((c) => hits === null || hits.has(c.id));
  const loose = shown.filter((c) => !c.pinned && !c.folder);
  const folders = [...new Set(state.list.map((c) => c.folder).filter(Boolean))].sort((a, b) => a.localeCompare(b));
  const groups = [["pinned", shown.filter((c) => c.pinned)], ...["today", "thisWeek", "older"].map((name) => [name, loose.filter((c) => ageGroup(c.updated) === name)])];
  const entry = (one) => html`<${Entry} key=${one.id} entry=${one} open=${one.id === state.current?.id} onOpen=${onClose} />`;
  const fresh = (sides) => { startNew(sides); onClose(); emit("focus-composer"); };
  return html`
    <nav class="sidebar" aria-label=${t("conversations")}>
      <div class="brand"><img src=${at("static/icon.svg")} alt="" width="24" height="24" /><b>fastqwen</b>
        <${IconButton} name="close" label=${t("close")} class="icon-button phone-only" onClick=${onClose} /></div>
      <button type="button" class="new" onClick=${() => fresh(1)}><${Icon} name="plus" /> ${t("newChat")}</button>
      <button type="button" class="new quiet" onClick=${() => fresh(2)}><${Icon} name="split" /> ${t("compare")}</button>
      <label class="search"><${Icon} name="search" /><span class="sr">${t("search")}</span>
        <input ref=${field} type="search" value=${query} placeholder=${t("search")} onInput=${(e) => setQuery(e.target.value)} /></label>
      <div class="list">
        <datalist id="folders">${folders.map((name) => html`<option key=${name} value=${name}></option>`)}</datalist>
        ${folders.map((name) => {
          const inside = shown.filter((c) => c.folder === name && !c.pinned);
          return inside.length > 0 && html`<details class="folder" key=${"folder " + name} open=${hits !== null || inside.some((c) => c.id === state.current?.id)}>
            <summary><${Icon} name="folder" /> ${name} <small>${inside.length}</small></summary><ul>${inside.map(entry)}</ul></details>`;
        })}
        ${groups.map(([name, entries]) => entries.length > 0 && html`<h2 key=${name}>${t(name)}</h2><ul key=${name + " list"}>${entries.map(entry)}</ul>`)}
        ${shown.length === 0 && html`<p class="hint">${t(hits ? "noHits" : "noChats")}</p>`}
      </div>
      <div class="foot">
        <${ThemeButton} /><${LanguageButton} />
        <span class="grow"></span>
        <a class="icon-button" href=${at("admin")} aria-label=${t("operators")} title=${t("operators")}><${Icon} name="pulse" /></a>
        <${IconButton} name="book" label=${t("library")} onClick=${() => emit("open-dialog", "library")} />
        <${IconButton} name="box" label=${t("dataTitle")} onClick=${() => emit("open-dialog", "data")} />
        <${IconButton} name="help" label=${t("help")} onClick=${() => emit("open-dialog", "help")} />
      </div>
    </nav>`;
}
