// Diagrams, and previews of HTML and SVG. Each is drawn in a frame without origin, network or storage: what a model writes runs there.
import { t } from "./i18n.js";
import { at, html, useEffect, useRef, useState } from "./ui.js";

const KINDS = { mermaid: "diagram", html: "preview", htm: "preview", xml: "preview", svg: "preview" };
const LONGEST_PX = 900;

/** Which frame can show code of this language: "diagram", "preview" or null. */
export const frameFor = (language, code) => {
  const kind = KINDS[language] ?? null;
  return language === "xml" && !/^\s*(<\?xml[^>]*>\s*)?<svg[\s>]/i.test(code) ? null : kind;
};

/** Asks the frame to draw `source`; it answers with the height that the drawing takes, or with what is wrong with it. */
export function Frame({ kind, source, label }) {
  const frame = useRef();
  const [height, setHeight] = useState(kind === "diagram" ? 80 : 240);
  const [fault, setFault] = useState("");
  useEffect(() => {
    const draw = () => frame.current.contentWindow.postMessage({ source, dark: document.documentElement.dataset.theme === "dark" }, "*"); // it has no origin to name
    const hear = ({ source: from, data }) => {
      if (from !== frame.current?.contentWindow) return;
      if (data === "ready") draw();
      if (Number.isFinite(data?.height)) setHeight(Math.max(40, Math.min(LONGEST_PX, Math.ceil(data.height))));
      if (typeof data?.fault === "string") setFault(data.fault.slice(0, 300));
    };
    addEventListener("message", hear);
    addEventListener("fastqwen-theme", draw);
    return () => { removeEventListener("message", hear); removeEventListener("fastqwen-theme", draw); };
  }, [source]);
  return html`
    ${fault && html`<p class="hint fault">${t("diagramWrong")} ${fault}</p>`}
    <iframe ref=${frame} class="frame" hidden=${Boolean(fault)} title=${label} sandbox="allow-scripts" src=${at(`static/frame/${kind}.html`)} style=${{ height: `${height}px` }}></iframe>`;
}
