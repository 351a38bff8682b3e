// An ApiError in plain words: what happened, and what to do about it.
import { t } from "./i18n.js";
import { modelInfo, server } from "./status.js";
import { emit, html, useTopic } from "./ui.js";

export function explain(error, model) {
  const limit = modelInfo(model)?.maxLen;
  const facts = { model, limit: limit ? ` (${limit.toLocaleString()})` : "" };
  const [cause, hint = ""] = t("err_" + error.kind, facts).split("\n");
  const title = error.started && (error.kind === "gone" || error.kind === "upstream") ? t("errGoneMid") : cause;
  const said = [error.param && `${error.param}:`, error.detail].filter(Boolean).join(" ");
  return { title, hint, said: error.kind === "gone" || error.kind === "cut" ? "" : said };
}

/** The line at the top while the server cannot answer; it goes by itself. */
export function Banner() {
  useTopic("server");
  const { kind, progress, detail, recovered } = server;
  if (kind === "unknown" || (kind === "ready" && !recovered)) return null;
  if (kind === "ready") return html`<div class="banner good" role="status">${t("back")}</div>`;
  const { title, hint } = explain({ kind }, "");
  const known = kind === "loading" && typeof progress === "number";
  return html`
    <div class=${`banner ${kind === "loading" ? "calm" : "bad"}`} role="status">
      ${kind !== "key" && html`<span class="spinner" aria-hidden="true"></span>`}
      <div><strong>${title}</strong> ${kind === "loading" ? detail : hint} ${(kind === "unready" || kind === "upstream") && detail}
        ${known && html`<progress max="1" value=${progress} aria-label=${title}></progress><span>${Math.round(progress * 100)} %</span>`}
        ${kind === "key" && html` <button type="button" class="button" onClick=${() => emit("open-dialog", "key")}>${t("enterKey")}</button>`}
      </div>
    </div>`;
}
