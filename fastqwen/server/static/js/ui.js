// What every component needs: templates, a bus that tells components to draw again, small browser helpers.
import { h, render, Component } from "../vendor/preact/preact.js";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact/hooks.js";
import htm from "../vendor/htm/htm.js";

export const html = htm.bind(h);
export { render, useEffect, useLayoutEffect, useMemo, useRef, useState };

/** An address of this server. The page may lie below a path of somebody's proxy, and is itself shown at / and at /chat/... */
export const at = (path) => new URL(`../../${path}`, import.meta.url).href;

const listeners = new Map(); // topic -> set of functions

export function on(topic, listener) {
  if (!listeners.has(topic)) listeners.set(topic, new Set());
  listeners.get(topic).add(listener);
  return () => {
    const set = listeners.get(topic);
    set?.delete(listener);
    if (set?.size === 0) listeners.delete(topic);
  };
}

export function emit(topic, value) {
  for (const listener of [...(listeners.get(topic) || [])]) listener(value);
}

/** Draws the calling component again whenever the topic is emitted. */
export function useTopic(topic) {
  const [, draw] = useState(0);
  useLayoutEffect(() => on(topic, () => draw((n) => n + 1)), [topic]); // before the paint: no emit may be missed
}

/** A component that draws again only if one of its properties is another object or value. */
export function memo(view) {
  return class extends Component {
    shouldComponentUpdate(next) {
      const keys = Object.keys(next);
      return keys.length !== Object.keys(this.props).length || keys.some((key) => next[key] !== this.props[key]);
    }
    render() { return h(view, this.props); }
  };
}

/** Random and unique; crypto.randomUUID exists only on https and localhost, and pages are also opened on a LAN. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(10)), (b) => b.toString(16).padStart(2, "0")).join("");
}

export const stored = {
  get(name, fallback = null) {
    try {
      const text = localStorage.getItem("fastqwen." + name);
      return text === null ? fallback : JSON.parse(text);
    } catch { return fallback; }
  },
  set(name, value) {
    try {
      if (value === null) localStorage.removeItem("fastqwen." + name);
      else localStorage.setItem("fastqwen." + name, JSON.stringify(value));
    } catch { if (value !== null) emit("not-stored"); }
  },
};

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard object on plain http
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "sr";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type })); // a File is a piece of text, too
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

export const touch = matchMedia("(pointer: coarse)");

/** Enter sends, Shift + Enter is a new line; on a phone Enter is a new line, and Enter that ends an input method's word is neither. */
export const sendsOn = (e) => !e.isComposing && e.keyCode !== 229 && e.key === "Enter" && !e.shiftKey && (e.ctrlKey || e.metaKey || !touch.matches);

let toastTimer;
export const toast = { text: "" };
export function showToast(text) {
  toast.text = text;
  emit("toast");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { toast.text = ""; emit("toast"); }, 3500);
}

/** Speaks to screen readers without moving the focus. */
export const announce = (text) => document.getElementById("announcer")?.replaceChildren(text);

const PATHS = {
  fork: "M6 4v6a6 6 0 0 0 6 6h6M18 20l3-4-3-4M6 10V20", code: "M8 7l-5 5 5 5M16 7l5 5-5 5", pin: "M9 4h6l-1 7 3 3H7l3-3zM12 14v6", book: "M5 5a2 2 0 0 1 2-2h12v16H7a2 2 0 0 0-2 2zM5 21V5M9 8h6",
  brain: "M9 18h6M10 21h4M8 14a6 6 0 1 1 8 0c-1 .8-1 1.600-1 2H9c0-.4 0-1.200-1-2z", folder: "M3 6h6l2 2h10v11H3z", eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7-10-7-10-7zM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  plus: "M12 5v14M5 12h14", menu: "M4 7h16M4 12h16M4 17h16", send: "M12 19V5M6 11l6-6 6 6", stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM5 15V4h10", redo: "M20 11a8 8 0 1 0-2 6M20 5v6h-6", edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  left: "M14 6l-6 6 6 6", right: "M10 6l6 6-6 6", gear: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4", close: "M6 6l12 12M18 6L6 18",
  clip: "M19 11l-7.5 7.5a4.5 4.5 0 0 1-6.4-6.4L13 4.3a3 3 0 0 1 4.3 4.3l-7.7 7.6a1.5 1.5 0 0 1-2.1-2.1L14 7.6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13", split: "M4 5h7v14H4zM13 5h7v14h-7z", sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M19 5l-1.5 1.5M6.5 17.5L5 19",
  moon: "M20 14A8 8 0 1 1 10 4a6.5 6.5 0 0 0 10 10z", help: "M9 9a3 3 0 1 1 4 3c-1 .5-1 1-1 2M12 17.5v.5", search: "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM16 16l4 4",
  box: "M12 4v10M8 10l4 4 4-4M4 17v3h16v-3", auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 1 1 0 16", pulse: "M3 12h4l3-7 4 14 3-7h4", down: "M12 5v14M6 13l6 6 6-6",
};

export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;

export const IconButton = ({ name, label, onClick, ...rest }) => html`
  <button type="button" class="icon-button" aria-label=${label} title=${label} onClick=${onClick} ...${rest}><${Icon} name=${name} /></button>`;
