// Two models, or one model with two settings, answer the same question; the reader says which answer is better.
import { isRunning, vote } from "./chat.js";
import { t } from "./i18n.js";
import { Message } from "./message.js";
import { ModelPicker, SystemCard } from "./settings.js";
import { server } from "./status.js";
import { emit, html } from "./ui.js";
import { shownPath } from "./tree.js";

const CHOICES = ["a", "tie", "bad", "b"];

function summary(side) {
  const set = ["temperature", "top_p", "max_tokens", "seed"].filter((name) => side.settings[name] !== null);
  return set.map((name) => `${t(name)} ${side.settings[name]}`).join(" · ");
}

/** One turn: the question, and each side's answer to it. */
function turnsOf(conversation) {
  const paths = conversation.sides.map(shownPath);
  const questions = paths[0].filter(({ node }) => node.role === "user");
  return questions.map((question) => ({
    question,
    replies: paths.map((path) => {
      const from = path.findIndex(({ node }) => node.id === question.node.id) + 1;
      const next = path.findIndex(({ node }, i) => i >= from && node.role === "user");
      return from > 0 ? path.slice(from, next === -1 ? undefined : next) : [];
    }),
  }));
}

function VoteBar({ conversation, question, names }) {
  const given = conversation.votes[question.id];
  return html`
    <div class="votes" role="group" aria-label=${t("voteQuestion")}>
      <span>${t(given ? "voted" : "voteQuestion")}</span>
      ${CHOICES.map((choice) => html`<button type="button" class="button" aria-pressed=${given === choice} onClick=${() => vote(conversation, question, choice)}>${t("vote_" + choice, names)}</button>`)}
    </div>`;
}

export function Compare({ conversation, empty }) {
  const turns = turnsOf(conversation);
  const busy = isRunning(conversation);
  const order = conversation.swapped ? [1, 0] : [0, 1]; // where each side is shown
  const hidden = conversation.blind && Object.keys(conversation.votes).length === 0 && !empty;
  const label = (i, node) => (hidden ? `${t("model")} ${"AB"[order.indexOf(i)]}` : `${"AB"[order.indexOf(i)]} · ${node.model}`);
  return html`
    <div class="sides-head">
      ${order.map((i) => html`
        <div key=${i}>
          <span class="side-name">${"AB"[order.indexOf(i)]}</span>
          ${hidden ? html`<span class="hidden-model">${t("hiddenModel")}</span>` : html`<${ModelPicker} side=${conversation.sides[i]} label=${`${t("model")} ${"AB"[i]}`} /><small>${summary(conversation.sides[i])}</small>`}
          <${SystemCard} text=${conversation.sides[i].settings.system} />
        </div>`)}
    </div>
    ${empty && html`
      <div class="compare-intro"><h1>${t("compare")}</h1><p>${t(server.models.length > 1 ? "compareHint" : "compareOne")}</p>
        ${server.models.length > 1
          ? html`<div class="row wrap center">${conversation.sides.map((side, i) => html`<label key=${i}><span class="side-name">${"AB"[i]}</span> <${ModelPicker} side=${side} label=${t("chooseSide", { side: "AB"[i] })} /></label>`)}</div>`
          : html`<button type="button" class="button" onClick=${() => emit("open-settings", 1)}>${t("settingsOfB")}</button>`}
        <label class="check"><input type="checkbox" checked=${conversation.blind} onChange=${(e) => { conversation.blind = e.target.checked; emit("app"); }} /> ${t("blind")}</label></div>`}
    ${turns.map(({ question, replies }, index) => {
      const last = index === turns.length - 1;
      const common = { conversation, busy, language: document.documentElement.lang };
      return html`
        <section class="turn" key=${question.node.id}>
          <${Message} node=${question.node} siblings=${question.siblings} side=${conversation.sides[0]} isLast=${last} v=${question.node.v} count=${question.siblings.length} ...${common} />
          <div class="sides">
            ${order.map((i) => html`<div key=${i}>${replies[i].map(({ node, siblings }) => html`
              <${Message} key=${node.id} node=${node} siblings=${siblings} side=${conversation.sides[i]} isLast=${last} name=${label(i, node)} v=${node.v} count=${siblings.length} ...${common} />`)}</div>`)}
          </div>
          ${last && !busy && replies.every((r) => r.length > 0) && html`<${VoteBar} conversation=${conversation} question=${question.node} />`}
        </section>`;
    })}`;
}
