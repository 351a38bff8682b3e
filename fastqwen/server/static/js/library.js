// Presets (settings under a name) and prompts (texts under a name): kept in this browser, chosen by typing / in the message box.
import { t } from "./i18n.js";
import { SERVER_DEFAULTS, setModel, setSettings } from "./store.js";
import { html, newId, showToast, stored } from "./ui.js";

const BUILT_IN = ["summarise", "translate", "explain", "improve"];
const SHOWN = 8;

/** Each entry: {id, name, text, settings, model}; settings and model are null for a mere prompt. */
export const own = () => stored.get("library", []).filter((e) => e && typeof e.name === "string");
const all = () => [...own(), ...BUILT_IN.map((name) => ({ id: name, name: t("prompt_" + name), text: t("promptText_" + name), settings: null, model: null }))];

export function keep(name, text, side) {
  const entry = { id: newId(), name, text, settings: side ? { ...side.settings } : null, model: side?.model ?? null };
  stored.set("library", [...own().filter((e) => e.name !== name), entry]);
}

export const forget = (id) => stored.set("library", own().filter((e) => e.id !== id));

/** Entries that the draft asks for: "/tra" finds "Translate". Null where the draft is no such question. */
export function wanted(draft) {
  const match = /^\/([^\n]{0,40})$/.exec(draft);
  if (!match) return null;
  const word = match[1].trim().toLowerCase();
  const found = all().filter((e) => e.name.toLowerCase().includes(word)).slice(0, SHOWN);
  return found.length ? found : null;
}

/** Sets the side as the entry says; returns the text for the message box. */
export function take(side, entry) {
  if (entry.settings) {
    setSettings(side, { ...SERVER_DEFAULTS, ...entry.settings });
    if (entry.model) setModel(side, entry.model);
    showToast(t("presetTaken", { name: entry.name }));
  }
  return entry.text;
}

export const SlashMenu = ({ entries, index, onPick }) => html`
  <ul class="slash" id="slash" role="listbox" aria-label=${t("library")}>
    ${entries.map((e, i) => html`<li key=${e.id} id=${`slash-${i}`} role="option" aria-selected=${i === index} onPointerDown=${(event) => { event.preventDefault(); onPick(e); }}>
      <b>${e.name}</b> <span>${e.settings ? t("preset") : ""} ${e.text.split("\n")[0]}</span></li>`)}
  </ul>`;
