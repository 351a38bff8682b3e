// A small line plot over time, as SVG. Pointing at it reads the values of that moment.
import { t } from "./i18n.js";
import { html, useState } from "./ui.js";

const WIDTH = 600;
const HEIGHT = 160;

/** The next of 1, 2, 5, 10, 20, ... above the value, so that the scale does not jump with every sample. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= value);
}

const shown = (value) => (value ?? 0).toLocaleString(undefined, { maximumFractionDigits: value < 100 ? 1 : 0 });
const ago = (seconds) => (seconds < 1 ? t("now") : seconds < 100 ? t("secondsAgo", { n: seconds }) : t("minutesAgo", { n: Math.round(seconds / 60) }));

/** series: [{name, color, values}], a value each `everyS` seconds, all of one length; the newest is at the right edge of `slots` places. */
export function Plot({ title, series, slots, everyS = 1 }) {
  const [pointed, point] = useState(null); // places before the newest
  const length = series[0].values.length;
  const top = niceTop(Math.max(...series.flatMap((s) => s.values), 1));
  const x = (i) => ((slots - length + i) / (slots - 1)) * WIDTH;
  const y = (value) => HEIGHT - (value / top) * (HEIGHT - 4) - 2;
  const line = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const area = (values) => `${line(values)}L${WIDTH} ${HEIGHT}L${x(0).toFixed(1)} ${HEIGHT}Z`;
  const back = Math.min(pointed ?? 0, Math.max(0, length - 1));
  const at = (s) => shown(s.values.at(-1 - back));
  const follow = (e) => { const box = e.currentTarget.getBoundingClientRect(); point(Math.round((1 - (e.clientX - box.left) / box.width) * (slots - 1))); };
  return html`
    <section class="panel">
      <div class="row"><h2>${title}</h2><span class="legend">${back > 0 && html`<span class="hint">${ago(back * everyS)}</span>`}
        ${series.map((s) => html`<span><i style=${{ background: s.color }}></i>${s.name} <b>${at(s)}</b></span>`)}</span></div>
      <div class="plot-row">
        <svg class="plot" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label=${`${title}. ${series.map((s) => `${s.name}: ${at(s)}`).join(", ")}`}
          onPointerMove=${follow} onPointerLeave=${() => point(null)}>
          ${[0, 0.5, 1].map((part) => html`<line x1="0" x2=${WIDTH} y1=${y(top * part)} y2=${y(top * part)} />`)}
          ${series.map((s) => s.values.length > 1 && html`<path class="area" d=${area(s.values)} style=${{ fill: s.color }} /><path d=${line(s.values)} style=${{ stroke: s.color }} />`)}
          ${back > 0 && html`<line class="pointer" x1=${x(length - 1 - back)} x2=${x(length - 1 - back)} y1="0" y2=${HEIGHT} />`}
        </svg>
        <div class="scale">${[1, 0.5, 0].map((part) => html`<span>${shown(top * part)}</span>`)}</div>
      </div>
      <div class="axis">${[1, 0.5, 0].map((part) => html`<span>${ago(Math.round(slots * everyS * part))}</span>`)}</div>
    </section>`;
}
