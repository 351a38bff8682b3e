// A small line plot over time, as SVG.
import { html } from "./ui.js";

const WIDTH = 600;
const HEIGHT = 160;

/** The next of 1, 2, 5, 10, 20, ... above the value, so that the scale does not jump with every sample. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= value);
}

const shown = ({ values }) => (values.at(-1) ?? 0).toLocaleString(undefined, { maximumFractionDigits: 1 });

/** series: [{name, color, values}], all of one length; the newest value is at the right edge of `slots` places. */
export function Plot({ title, note, series, slots }) {
  const top = niceTop(Math.max(...series.flatMap((s) => s.values), 1));
  const x = (i, length) => ((slots - length + i) / (slots - 1)) * WIDTH;
  const y = (value) => HEIGHT - (value / top) * (HEIGHT - 4) - 2;
  const line = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(i, values.length).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const area = (values) => `${line(values)}L${WIDTH} ${HEIGHT}L${x(0, values.length).toFixed(1)} ${HEIGHT}Z`;
  const words = series.map((s) => `${s.name}: ${shown(s)}`).join(", ");
  return html`
    <section class="panel">
      <div class="row"><h2>${title}</h2><span class="legend">${series.map((s) => html`<span><i style=${{ background: s.color }}></i>${s.name} ${shown(s)}</span>`)}</span></div>
      <svg class="plot" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label=${`${title}. ${words}`}>
        ${[0, 0.5, 1].map((part) => html`<line x1="0" x2=${WIDTH} y1=${y(top * part)} y2=${y(top * part)} />`)}
        ${series.map((s) => s.values.length > 1 && html`<path class="area" d=${area(s.values)} style=${{ fill: s.color }} /><path d=${line(s.values)} style=${{ stroke: s.color }} />`)}
      </svg>
      <div class="axis"><span>${note}</span><span>0 – ${top.toLocaleString()}</span></div>
    </section>`;
}
