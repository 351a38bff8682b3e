// Knows whether the server can answer now, keeps asking while it cannot, and tells everyone when it can again.
import { listModels, request } from "./api.js";
import { emit } from "./ui.js";

export const server = { kind: "unknown", progress: null, detail: "", models: [], recovered: false };

let timer = null;
let wait_ms = 1000;
let checking = false;

function become(kind, { progress = null, detail = "" } = {}) {
  const was = server.kind;
  server.recovered = kind === "ready" && was !== "unknown" && (was !== "ready" || server.recovered);
  Object.assign(server, { kind, progress, detail });
  emit("server");
  if (kind === "ready" && was !== "ready") emit("server-ready");
}

/** Asks once and plans the next question: soon and then rarer while the server is away, every half minute while it is there. */
export async function check() {
  if (checking) return;
  checking = true;
  clearTimeout(timer);
  try {
    await request("health/ready", { cache: "no-store" });
    server.models = await listModels();
    if (server.kind === "ready" && server.recovered) server.recovered = false;
    become("ready");
    wait_ms = 1000;
  } catch (error) {
    become(error.kind ?? "broken", error);
    wait_ms = server.kind === "loading" ? 1000 : Math.min(5000, wait_ms * 1.4);
  }
  checking = false;
  if (server.kind !== "key") timer = setTimeout(check, server.kind === "ready" ? (server.recovered ? 4000 : 30000) : wait_ms);
}

const AWAY = new Set(["gone", "cut", "upstream", "loading", "restarting", "unready", "key"]);

/** Called with the error of any other request: starts asking if it means that the server is away. */
export function noteError(error) {
  if (!AWAY.has(error.kind)) return;
  wait_ms = 1000;
  if (error.kind === "cut") { check(); return; }
  become(error.kind, error);
  clearTimeout(timer);
  if (error.kind !== "key") timer = setTimeout(check, wait_ms);
}

export const isAway = () => AWAY.has(server.kind);
export const modelInfo = (id) => server.models.find((m) => m.id === id) ?? null;

addEventListener("online", check);
document.addEventListener("visibilitychange", () => { if (!document.hidden) check(); });
