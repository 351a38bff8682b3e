// An ApiError in plain words: what happened, and what to do about it.
import { t } from "./i18n.js";
import { modelInfo, server } from "./status.js";
import { html, useTopic } from "./ui.js";

const HAS_HINT = new Set(["gone", "cut", "upstream", "loading", "restarting", "overloaded", "key", "forbidden", "model", "context", "broken"]);

export function explain(error, model) {
  const limit = modelInfo(model)?.maxLen;
  const title = error.kind === "gone" && error.started ? t("errGoneMid") : t("err_" + error.kind, { model, status: error.status });
  const hint = HAS_HINT.has(error.kind) ? t("hint_" + error.kind, { limit: limit ? ` (${limit.toLocaleString()})` : "" }) : "";
  const said = [error.param && `${error.param}:`, error.detail].filter(Boolean).join(" ");
  return { title, hint, said: error.kind === "gone" || error.kind === "cut" ? "" : said };
}

/** The line at the top while the server cannot answer; it goes by itself. */
export function Banner() {
  useTopic("server");
  const { kind, progress, detail, recovered } = server;
  if (kind === "unknown" || (kind === "ready" && !recovered)) return null;
  if (kind === "ready") return html`<div class="banner good" role="status">${t("back")}</div>`;
  const { title, hint } = explain({ kind, status: "" }, "");
  const known = kind === "loading" && typeof progress === "number";
  return html`
    <div class=${`banner ${kind === "loading" ? "calm" : "bad"}`} role="status">
      <span class="spinner" aria-hidden="true"></span>
      <div><strong>${title}</strong> ${kind === "loading" ? detail : hint}
        ${known && html`<progress max="1" value=${progress} aria-label=${title}></progress><span>${Math.round(progress * 100)} %</span>`}
      </div>
    </div>`;
}
