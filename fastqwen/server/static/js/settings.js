// The model picker, and the panel that says how a side answers. An empty field leaves the choice to the server.
import { t } from "./i18n.js";
import { modelInfo, server } from "./status.js";
import { SERVER_DEFAULTS, setModel, setSettings } from "./store.js";
import { emit, html, IconButton, on, useLayoutEffect, useState, useTopic } from "./ui.js";

export function ModelPicker({ side, label }) {
  useTopic("server");
  const names = server.models.map((m) => m.id);
  const shown = side.model && !names.includes(side.model) ? [side.model, ...names] : names;
  return html`
    <select class="model" aria-label=${label ?? t("model")} value=${side.model ?? names[0] ?? ""} onChange=${(e) => setModel(side, e.target.value)}>
      ${shown.length === 0 && html`<option value="">${t("noModel")}</option>`}
      ${shown.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
    </select>`;
}

/** What changes every answer of a conversation is seen in it. */
export const SystemCard = ({ text }) => text && html`
  <details class="system"><summary><span class="label">${t("system")}</span> <span>${text.split("\n")[0]}</span></summary>
    <pre>${text}</pre><button type="button" class="button" onClick=${() => emit("open-settings")}>${t("change")}</button></details>`;

const NUMBERS = [ // name, least, most, step, whether a slider helps
  ["temperature", 0, 2, 0.05, true],
  ["top_p", 0.05, 1, 0.05, true],
  ["max_tokens", 1, 1000000, 1, false],
  ["seed", 0, 2 ** 53 - 1, 1, false],
];
const MORE_NUMBERS = [
  ["top_k", -1, 1000000, 1, false],
  ["min_p", 0, 1, 0.01, false],
  ["repetition_penalty", 0.1, 2, 0.05, false],
  ["presence_penalty", -2, 2, 0.1, false],
  ["frequency_penalty", -2, 2, 0.1, false],
  ["thinking_budget", 0, 1000000, 1, false],
];

function NumberField({ side, name, min, max, step, slider }) {
  const value = side.settings[name];
  const [typed, setTyped] = useState(null); // "0." on the way to 0.3 must not be tidied up
  const read = (e) => {
    setTyped(e.target.type === "number" ? e.target.value : null);
    const number = e.target.value === "" ? null : Number(e.target.value);
    if (number === null || (number >= min && number <= max)) setSettings(side, { [name]: number });
  };
  const id = `set-${name}`;
  const models = modelInfo(side.model ?? server.models[0]?.id)?.sampling?.[name]; // what its publisher recommends
  return html`
    <div class="field">
      <label for=${id}>${t(name)}</label>
      <div class="row">
        ${slider && html`<input type="range" aria-label=${t(name)} min=${min} max=${max} step=${step} value=${value ?? models ?? 1} class=${value === null ? "unset" : ""} onInput=${read} />`}
        <input id=${id} type="number" min=${min} max=${max} step=${Number.isInteger(step) ? 1 : "any"} placeholder=${models ?? t("serverDefault")} value=${typed ?? value ?? ""} onInput=${read} onBlur=${() => setTyped(null)} aria-describedby=${id + "-hint"} />
      </div>
      <small id=${id + "-hint"}>${t(name + "Hint")}</small>
    </div>`;
}

const isObject = (value) => value !== null && typeof value === "object";

function JsonField({ side, name, isRight }) {
  const text = side.settings[name];
  let fault = "";
  try { if (text.trim() && !isRight(JSON.parse(text))) fault = t(name + "Broken"); } catch { fault = t(name + "Broken"); }
  return html`
    <details class="field" open=${Boolean(text)}>
      <summary>${t(name)}</summary>
      <textarea rows="6" class="mono" aria-label=${t(name)} aria-invalid=${Boolean(fault)} value=${text} onInput=${(e) => setSettings(side, { [name]: e.target.value })}></textarea>
      <small class=${fault ? "fault" : ""}>${fault || t(name + "Hint")}</small>
    </details>`;
}

function MoreFields({ side }) {
  return html`
    <details class="field" open=${Boolean(side.settings.stop) || MORE_NUMBERS.some(([name]) => side.settings[name] !== null)}>
      <summary>${t("moreSettings")}</summary>
      ${MORE_NUMBERS.map(([name, min, max, step, slider]) => html`<${NumberField} key=${name} side=${side} name=${name} min=${min} max=${max} step=${step} slider=${slider} />`)}
      <div class="field"><label for="set-stop">${t("stopTexts")}</label>
        <textarea id="set-stop" rows="2" class="mono" value=${side.settings.stop} onInput=${(e) => setSettings(side, { stop: e.target.value })}></textarea><small>${t("stopTextsHint")}</small></div>
    </details>`;
}

export function SettingsPanel({ conversation, onClose }) {
  const [index, setIndex] = useState(0);
  useLayoutEffect(() => on("settings-side", setIndex), []);
  const side = conversation.sides[Math.min(index, conversation.sides.length - 1)];
  const { system, tools, ...reset } = SERVER_DEFAULTS;
  return html`
    <aside class="settings" aria-label=${t("settings")}>
      <div class="settings-head"><h2>${t("settings")}</h2><${IconButton} name="close" label=${t("close")} onClick=${onClose} /></div>
      ${conversation.sides.length > 1 && html`
        <div class="tabs" role="group" aria-label=${t("sides")}>${["A", "B"].map((name, i) => html`<button type="button" aria-pressed=${index === i} onClick=${() => setIndex(i)}>${name}</button>`)}</div>`}
      <div class="field"><label for="set-system">${t("system")}</label>
        <textarea id="set-system" rows="4" placeholder=${t("systemHint")} value=${side.settings.system} onInput=${(e) => setSettings(side, { system: e.target.value })}></textarea></div>
      ${NUMBERS.map(([name, min, max, step, slider]) => html`<${NumberField} key=${name} side=${side} name=${name} min=${min} max=${max} step=${step} slider=${slider} />`)}
      ${modelInfo(side.model ?? server.models[0]?.id)?.thinks !== false && html`<div class="field"><label for="set-thinking">${t("thinkingMode")}</label>
        <select id="set-thinking" value=${side.settings.thinking} onChange=${(e) => setSettings(side, { thinking: e.target.value })}>
          ${["auto", "on", "off"].map((mode) => html`<option value=${mode}>${t("thinking_" + mode)}</option>`)}
        </select></div>`}
      <${MoreFields} side=${side} />
      <${JsonField} side=${side} name="schema" isRight=${(value) => isObject(value) && !Array.isArray(value)} />
      <${JsonField} side=${side} name="tools" isRight=${Array.isArray} />
      <button type="button" class="button" onClick=${() => emit("open-dialog", "library")}>${t("library")}</button>
      <button type="button" class="button" onClick=${() => setSettings(side, reset)}>${t("resetSettings")}</button>
    </aside>`;
}
