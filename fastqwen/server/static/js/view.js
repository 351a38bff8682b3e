// The middle of the page: messages of one side, or two sides turn by turn with a vote.
import { isRunning } from "./chat.js";
import { Compare } from "./compare.js";
import { t } from "./i18n.js";
import { Message } from "./message.js";
import { SystemCard } from "./settings.js";
import { server } from "./status.js";
import { state } from "./store.js";
import { shownPath } from "./tree.js";
import { at, copyText, emit, html, Icon, on, showToast, useEffect, useLayoutEffect, useRef, useState, useTopic } from "./ui.js";

const NEAR_PX = 80;

const isDemo = (model) => model?.root === "demo" || model?.id === "demo";
const hasPlanner = () => Boolean(server.models[0]?.root); // other servers' lists of models do not tell what a name stands for

function Welcome() {
  useTopic("server");
  const demo = isDemo(server.models[0]);
  const ideas = [1, 2, 3, 4].map((n) => (demo ? "demoIdea" : "idea") + n);
  return html`
    <div class="welcome">
      <img src=${at("static/icon.svg")} alt="" width="56" height="56" />
      <h1>${t("welcome")}</h1>
      <p>${t(state.unsaved === "forbidden" ? "notPersistent" : "welcomeHint")}</p>
      ${demo && html`<p class="note">${t("demoNote")}</p>`}
      <div class="ideas">${ideas.map((name) => html`<button type="button" key=${name} onClick=${() => emit("fill-composer", t(name))}>${t(name)}</button>`)}</div>
      ${hasPlanner() && html`<button type="button" class="text-button plan" onClick=${() => emit("open-dialog", "plan")}>${t(demo ? "planReal" : "planMore")}</button>`}
    </div>`;
}

function Single({ conversation }) {
  const side = conversation.sides[0];
  const path = shownPath(side);
  return html`${path.length > 0 && html`<${SystemCard} text=${side.settings.system} />`}${path.map(({ node, siblings }, i) => html`<${Message} key=${node.id} node=${node} siblings=${siblings} side=${side} conversation=${conversation}
    isLast=${i === path.length - 1} v=${node.v} count=${siblings.length} busy=${isRunning(conversation)} language=${document.documentElement.lang} />`)}`;
}

function onTextClick(e) {
  const mark = e.target.closest(".note-mark");
  const text = mark && [...mark.closest(".markdown").querySelectorAll(".footnote")].find((note) => note.dataset.note === mark.dataset.note);
  text?.scrollIntoView({ block: "nearest" });
  const button = e.target.closest("button.copy");
  if (button) copyText(button.closest(".code").querySelector("code").textContent).then(() => showToast(t("copied")));
}

/** Follows the end of the text while the reader is there, and stays put once they scroll up. */
export function Messages({ conversation }) {
  const box = useRef();
  const inner = useRef();
  const follow = useRef(true);
  const [away, setAway] = useState(false);
  const toEnd = () => { follow.current = true; box.current.scrollTop = box.current.scrollHeight; };
  useLayoutEffect(toEnd, [conversation.id]);
  useLayoutEffect(() => on("to-end", () => requestAnimationFrame(toEnd)), []);
  useEffect(() => {
    const observer = new ResizeObserver(() => { if (follow.current) box.current.scrollTop = box.current.scrollHeight; });
    observer.observe(inner.current);
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  const last = useRef(0);
  const scrolled = () => {
    const b = box.current;
    const near = b.scrollHeight - b.scrollTop - b.clientHeight < NEAR_PX;
    if (near) follow.current = true;
    else if (b.scrollTop < last.current - 2) follow.current = false; // only the reader scrolls up
    last.current = b.scrollTop;
    setAway(!near);
  };
  const empty = Object.keys(conversation.sides[0].nodes).length === 0;
  const compare = conversation.sides.length > 1;
  return html`
    <div class=${`messages ${compare ? "wide" : ""}`} ref=${box} onScroll=${scrolled} onClick=${onTextClick} tabindex="-1">
      <div class="column" ref=${inner} role="log" aria-live="off" aria-label=${t("thisChat")} aria-busy=${isRunning(conversation)}>
        ${empty ? !compare && html`<${Welcome} />` : html`<h1 class="sr">${conversation.title || t("thisChat")}</h1>`}
        ${compare ? html`<${Compare} conversation=${conversation} empty=${empty} />` : html`<${Single} conversation=${conversation} />`}
      </div>
      ${away && html`<button type="button" class="to-end" aria-label=${t("toEnd")} title=${t("toEnd")} onClick=${toEnd}><${Icon} name="down" /></button>`}
    </div>`;
}
