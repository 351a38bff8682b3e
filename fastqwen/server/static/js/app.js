// Puts the page together: layout, shortcuts, start.
import { regenerate, stop, isRunning } from "./chat.js";
import { Composer } from "./composer.js";
import { Dialogs } from "./dialogs.js";
import { Banner } from "./errors.js";
import { StorageNote } from "./keeping.js";
import { t } from "./i18n.js";
import { ModelPicker, SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { check } from "./status.js";
import { open, startNew, state } from "./store.js";
import { loadTools } from "./tools.js";
import { leafOf } from "./tree.js";
import { at, emit, html, IconButton, on, render, showToast, stored, toast, useEffect, useLayoutEffect, useState, useTopic } from "./ui.js";
import { Messages } from "./view.js";
import { Words } from "./words.js";

const narrow = matchMedia("(max-width: 800px)");

function Toast() {
  useTopic("toast");
  return html`<div class=${`toast ${toast.text ? "shown" : ""}`} role="status" aria-live="polite">${toast.text}</div>`;
}

function regenerateLast() {
  const [side] = state.current.sides;
  const last = leafOf(side);
  if (last?.role === "assistant") regenerate(state.current, side, last);
}

function useShortcuts(toggle) {
  useLayoutEffect(() => {
    const typing = (e) => /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName);
    const withModifier = { k: () => { toggle.sidebar(true); setTimeout(() => emit("focus-search")); }, b: () => toggle.sidebar(), ",": () => toggle.settings() };
    const withShift = { o: () => { startNew(); emit("focus-composer"); }, enter: regenerateLast };
    const plain = { "/": () => emit("focus-composer"), "?": () => emit("open-dialog", "help") };
    const handle = (e) => {
      if (e.isComposing || e.keyCode === 229 || document.querySelector("dialog[open]")) return;
      const key = e.key.toLowerCase();
      const command = e.ctrlKey || e.metaKey;
      const action = command ? (e.shiftKey ? withShift : withModifier)[key] : !typing(e) && !e.altKey && plain[key];
      if (action) { e.preventDefault(); action(); }
      else if (key === "escape" && isRunning(state.current)) stop(state.current);
    };
    addEventListener("keydown", handle);
    return () => removeEventListener("keydown", handle);
  });
}

/** Properties of the element that files may be dropped on. */
function dropping(setOver) {
  const enter = (e) => { if (e.dataTransfer?.types.includes("Files")) { e.preventDefault(); setOver(true); } };
  const onDragLeave = (e) => { if (!e.currentTarget.contains(e.relatedTarget)) setOver(false); };
  const onDrop = (e) => { e.preventDefault(); setOver(false); emit("add-files", [...e.dataTransfer.files]); };
  return { onDragEnter: enter, onDragOver: enter, onDragLeave, onDrop };
}

function App() {
  useTopic("app");
  const [sidebar, setSidebar] = useState(!narrow.matches && stored.get("sidebar", true));
  const [settings, setSettings] = useState(false);
  const showSidebar = (shown) => { setSidebar(shown); if (!narrow.matches) stored.set("sidebar", shown); };
  useShortcuts({ sidebar: (shown) => showSidebar(shown ?? !sidebar), settings: () => setSettings(!settings) });
  useLayoutEffect(() => on("open-settings", (side = 0) => { setSettings(true); setTimeout(() => emit("settings-side", side)); }), []);
  useLayoutEffect(() => on("no-such-chat", () => showToast(t("noSuchChat"))), []);
  const [over, setOver] = useState(false);
  const conversation = state.current;
  const compare = conversation.sides.length > 1;
  useEffect(() => { document.title = conversation.title ? `${conversation.title} – fastqwen` : "fastqwen"; });
  return html`
    <div class=${`app ${sidebar ? "with-sidebar" : ""} ${settings ? "with-settings" : ""}`} ...${dropping(setOver)}>
      <a class="skip" href="#composer">${t("skip")}</a>
      ${sidebar && html`<${Sidebar} onClose=${() => { if (narrow.matches) setSidebar(false); }} /><div class="shade" onClick=${() => showSidebar(false)}></div>`}
      <main>
        <header>
          <${IconButton} name="menu" label=${t("keySidebar")} aria-expanded=${sidebar} onClick=${() => showSidebar(!sidebar)} />
          ${compare ? html`<span class="title">${t("compare")}</span>` : html`<${ModelPicker} side=${conversation.sides[0]} />`}
          <span class="grow"></span>
          <${IconButton} name="plus" label=${t("newChat")} class="icon-button phone-only" onClick=${() => startNew()} />
          <${IconButton} name="gear" label=${t("settings")} aria-expanded=${settings} onClick=${() => setSettings(!settings)} />
        </header>
        <${Banner} />
        <${StorageNote} conversation=${conversation} />
        <${Messages} conversation=${conversation} />
        <${Composer} conversation=${conversation} />
      </main>
      ${settings && html`<${SettingsPanel} conversation=${conversation} onClose=${() => setSettings(false)} />`}
      ${over && html`<div class="drop">${t("dropHere")}</div>`}
      <${Toast} />
      <${Words} />
      <${Dialogs} />
    </div>`;
}

await open();
const place = document.getElementById("app");
place.replaceChildren();
render(html`<${App} />`, place);
for (const link of document.querySelectorAll("link[rel=manifest], link[rel=icon]")) link.href = at(link.getAttribute("href").replace(/^(\.\.\/)*/, "")); // the address below changes
on("server-ready", loadTools);
check();
navigator.serviceWorker?.register(at("worker.js")).catch(() => {}); // forbidden in some private windows: then the page needs its server
