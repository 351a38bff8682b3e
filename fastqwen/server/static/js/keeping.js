// Says at once when the browser keeps nothing, and offers to keep the conversation as a file.
import { t } from "./i18n.js";
import { state } from "./store.js";
import { exportJson } from "./transfer.js";
import { emit, html } from "./ui.js";

export function StorageNote({ conversation }) {
  const empty = Object.keys(conversation.sides[0].nodes).length === 0;
  if (!state.unsaved || (empty && state.unsaved === "forbidden")) return null; // the empty page says that itself
  return html`
    <div class="banner bad" role="alert">
      <div class="grow"><strong>${t(state.unsaved === "full" ? "storageFull" : "notPersistent")}</strong> ${t(state.unsaved === "full" ? "storageFullHint" : "keepHint")}</div>
      ${!empty && html`<button type="button" class="button" onClick=${() => exportJson([conversation], conversation.title)}>${t("saveFile")}</button>`}
      ${state.unsaved === "full" && html`<button type="button" class="button" onClick=${() => emit("open-dialog", "data")}>${t("dataTitle")}</button>`}
    </div>`;
}
