// The operators' page: asks the server once a second and draws what it says.
import { request } from "./api.js";
import { Dialogs } from "./dialogs.js";
import { Banner } from "./errors.js";
import { language, t } from "./i18n.js";
import { Plot } from "./plot.js";
import { LanguageButton, ThemeButton } from "./sidebar.js";
import { check, noteError, server } from "./status.js";
import { at, emit, html, render, stored, useTopic } from "./ui.js";

const SLOTS = 300;
const EVERY_MS = 1000;
const HISTORY_MS = 5000;
const view = { data: null, samples: [], last: null, hour: null, shows: stored.get("admin", "minutes") };

/** vLLM's metric names, for servers that have no /admin/data. */
function fromMetrics(text) {
  const sum = (name) => {
    const lines = text.split("\n").filter((line) => line.startsWith(name + "{") || line.startsWith(name + " "));
    return lines.length ? lines.reduce((total, line) => total + Number(line.trim().split(" ").at(-1)), 0) : null;
  };
  const names = { running: "num_requests_running", waiting: "num_requests_waiting", kv_usage: "kv_cache_usage_perc", num_preemptions: "num_preemptions_total",
    prefix_queries_tokens: "prefix_cache_queries_total", prefix_hits_tokens: "prefix_cache_hits_total", prompt_tokens_total: "prompt_tokens_total", generation_tokens_total: "generation_tokens_total" };
  const data = Object.fromEntries(Object.entries(names).map(([ours, theirs]) => [ours, sum("vllm:" + theirs)]));
  return { ...data, model: /model_name="([^"]*)"/.exec(text)?.[1] ?? "", plan: null, measured: null, recent_errors: [] };
}

async function ask() {
  try {
    return await (await request("admin/data", { cache: "no-store" })).json();
  } catch (error) {
    if (error.status !== 404) throw error;
    return fromMetrics(await (await request("metrics", { cache: "no-store" })).text());
  }
}

function sample(data) {
  const now = performance.now();
  if (view.last) {
    const seconds = data.uptime_s - view.last.data.uptime_s || (now - view.last.at) / 1000; // the server's clock knows no slow network
    const rate = (name) => Math.max(0, (data[name] - view.last.data[name]) / seconds) || 0; // a restart sets counters to zero
    view.samples.push({ generated: rate("generation_tokens_total"), read: rate("prompt_tokens_total"), running: data.running ?? 0, waiting: data.waiting ?? 0 });
    if (view.samples.length > SLOTS) view.samples.shift();
  }
  view.last = { at: now, data };
  view.data = data;
}

/** The server's own memory of the last hour; servers without one show only what this page has seen. */
async function pollHour() {
  try {
    if (!document.hidden) view.hour = await (await request("admin/history", { cache: "no-store" })).json();
  } catch (error) { if (error.status === 404) return; }
  emit("admin");
  setTimeout(pollHour, HISTORY_MS);
}

async function poll() {
  try {
    if (!document.hidden) sample(await ask());
    if (server.kind !== "ready") await check();
  } catch (error) {
    Object.assign(view, { last: null, absent: error.status === 404 });
    noteError(error);
  }
  emit("admin");
  setTimeout(poll, EVERY_MS);
}

const number = (value) => (value == null ? "–" : Math.round(value).toLocaleString());
const percent = (value) => (value == null ? "–" : `${(value * 100).toFixed(1)} %`);

function duration(seconds) {
  if (seconds == null) return "–";
  const [d, h, m] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.floor(seconds)} s`;
}

const Card = ({ title, value, note, share }) => html`
  <section class="card"><h2>${title}</h2><strong>${value}</strong><small>${note}</small>
    ${share != null && html`<div class=${`bar ${share > 0.9 ? "full" : ""}`}><i style=${{ width: `${share * 100}%` }}></i></div>`}</section>`;

function amount(name, value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (!name.endsWith("_bytes")) return value.toLocaleString();
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${(value / 2 ** 20).toFixed(1)} MiB`;
}

const PLANNED = ["weights", "kv", "peak"].map((name) => name + "_bytes").concat("num_blocks", "max_model_len", "max_num_seqs", "dtype");

function PlanTable({ plan, measured }) {
  if (!plan) return html`<p class="hint">${t("noPlan")}</p>`;
  const whole = (side) => ({ kv_bytes: side.num_blocks && side.num_blocks * plan.block_size * plan.kv_bytes_per_token, ...side });
  [plan, measured] = [whole(plan), whole(measured ?? {})];
  const names = PLANNED.filter((name) => plan[name] != null || measured[name] != null);
  const off = (name) => (typeof plan[name] === "number" && typeof measured[name] === "number" && plan[name] > 0 ? `${((measured[name] / plan[name] - 1) * 100).toFixed(1)} %` : "");
  return html`
    <div class="scroll" tabindex="0"><table><thead><tr><th scope="col">${t("kind")}</th><th scope="col">${t("planned")}</th><th scope="col">${t("measured")}</th><th scope="col">±</th></tr></thead>
      <tbody>${names.map((name) => html`<tr key=${name}><th scope="row">${t("plan_" + name)}</th>
        <td>${amount(name, plan[name])}</td><td>${amount(name, measured[name])}</td><td>${off(name)}</td></tr>`)}</tbody></table></div>
    ${plan.notices?.map((text) => html`<p class="hint">${text}</p>`)}`;
}

/** Only the front ends of a cluster have workers. */
function Workers({ list }) {
  const memory = (one) => (one.kv_bytes ? `${percent(one.kv_usage)} / ${amount("kv_bytes", one.kv_bytes)}` : "–");
  const columns = { model: (one) => one.names.join(", "), worker: (one) => `${one.address} (${one.host})`,
    workerState: (one) => one.refused ?? (one.is_draining ? "draining" : one.state), running: (one) => number(one.num_running),
    waiting: (one) => number(one.num_waiting), kvUse: memory, plan_weights_bytes: (one) => amount("weights_bytes", one.weights_bytes || null),
    machine: (one) => one.machine && `${t("load_of", { load: number(one.machine.load), cpus: one.machine.num_cpus })}, ${amount("kv_bytes", one.machine.memory_free_bytes)} / ${amount("kv_bytes", one.machine.memory_bytes)}` };
  return html`<div class="scroll" tabindex="0"><table>
    <thead><tr>${Object.keys(columns).map((name) => html`<th scope="col" key=${name}>${t(name)}</th>`)}</tr></thead>
    <tbody>${list.map((one) => html`<tr key=${one.key}>${Object.values(columns).map((cell, place) => (place ? html`<td>${cell(one)}</td>` : html`<th scope="row">${cell(one)}</th>`))}</tr>`)}</tbody></table></div>`;
}

function Errors({ list }) {
  if (!list?.length) return html`<p class="hint">${t("noErrors")}</p>`;
  const time = (value) => new Date(typeof value === "number" ? value * 1000 : value).toLocaleString(language());
  return html`<ul>${[...list].reverse().map((e) => html`<li><time>${time(e.time)}</time><span>${e.message}</span></li>`)}</ul>`;
}

function Figures({ data }) {
  const hour = view.shows === "hour" ? view.hour : null;
  const column = (name) => hour?.[name] ?? view.samples.map((s) => s[name]);
  const hits = data.prefix_queries_tokens ? data.prefix_hits_tokens / data.prefix_queries_tokens : null;
  const [slots, everyS] = hour ? [3600 / hour.every_s, hour.every_s] : [view.samples.length > 60 ? SLOTS : 60, 1];
  const show = (what) => { view.shows = what; stored.set("admin", what); emit("admin"); };
  const main = "var(--accent)";
  const second = "var(--series-2)";
  return html`
    <div class="cards">
      <${Card} title=${t("running")} value=${number(data.running)} note=${`${t("waiting")}: ${number(data.waiting)}`} />
      <${Card} title=${t("kvUse")} value=${percent(data.kv_usage)} note=${data.num_blocks ? t("blocks", { n: number(data.num_blocks) }) : ""} share=${data.kv_usage} />
      <${Card} title=${t("hitRate")} value=${percent(hits)} note=${t("ofPrompt", { n: number(data.prefix_queries_tokens) })} />
      <${Card} title=${t("generated")} value=${number(data.generation_tokens_total)} note=${t("tokens")} />
      <${Card} title=${t("read")} value=${number(data.prompt_tokens_total)} note=${t("tokens")} />
      <${Card} title=${t("uptime")} value=${duration(data.uptime_s)} note=${`${t("preemptions")}: ${number(data.num_preemptions)}`} />
    </div>
    ${view.hour && html`<div class="row" role="group" aria-label=${t("range")}>${["minutes", "hour"].map((what) => html`<button type="button" class="button" key=${what} aria-pressed=${view.shows === what} onClick=${() => show(what)}>${t("range_" + what)}</button>`)}</div>`}
    <${Plot} title=${t("throughput")} everyS=${everyS} slots=${slots} series=${[{ name: t("generated"), color: main, values: column("generated") }, { name: t("read"), color: second, values: column("read") }]} />
    <${Plot} title=${t("load")} everyS=${everyS} slots=${slots} series=${[{ name: t("running"), color: main, values: column("running") }, { name: t("waiting"), color: second, values: column("waiting") }]} />
    ${data.workers && html`<section class="panel"><h2>${t("workers")}</h2><${Workers} list=${data.workers} /></section>`}
    <section class="panel"><h2>${t("plan")}</h2><${PlanTable} plan=${data.plan} measured=${data.measured} /></section>
    <section class="panel"><h2>${t("errors")}</h2><${Errors} list=${data.recent_errors} /></section>`;
}

function Admin() {
  useTopic("admin");
  useTopic("app");
  return html`
    <${Banner} />
    <div class="admin">
      <header><img src=${at("static/icon.svg")} alt="" width="28" height="28" /><h1>${t("operators")}</h1><span>${view.data?.model}</span>
        ${view.last && html`<span class="state">${t("live")}</span>`}<span class="grow"></span>
        <a href=${at("")}>${t("toChat")}</a><${ThemeButton} /><${LanguageButton} /></header>
      <main>${view.data ? html`<${Figures} data=${view.data} />` : view.absent && html`<p class="panel hint">${t("noFigures")}</p>`}</main>
    </div>
    <${Dialogs} />`;
}

render(html`<${Admin} />`, document.getElementById("app"));
poll();
pollHour();
