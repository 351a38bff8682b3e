// A click on a word of an answer shows what else the model might have said there, how likely each was, and goes on from it.
import { alternatives, branchFrom, isRunning } from "./chat.js";
import { explain } from "./errors.js";
import { language, t } from "./i18n.js";
import { emit, html, IconButton, on, useEffect, useLayoutEffect, useRef, useState } from "./ui.js";

const SHOWN = 8;
const FAR = 400; // characters of markup between two words; a word further away is another one that looks alike
const NOT_SAID = ".code-head, .katex, .frame"; // what stands in the page, but not in the model's words

/** Every word of the drawn answer, in order: {range, at}; `at` is where the word begins in the model's own text. */
function wordsOf(markdown, source) {
  const segmenter = new Intl.Segmenter(language(), { granularity: "word" });
  const walker = document.createTreeWalker(markdown, NodeFilter.SHOW_TEXT);
  const found = [];
  let from = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest(NOT_SAID)) continue;
    for (const { segment, index, isWordLike } of segmenter.segment(node.data)) {
      if (!isWordLike) continue;
      const at = source.indexOf(segment, from);
      if (at === -1 || at - from > FAR) continue;
      from = at + segment.length;
      const range = new Range();
      range.setStart(node, index);
      range.setEnd(node, index + segment.length);
      found.push({ range, at });
    }
  }
  return found;
}

const isIn = (range, x, y) => [...range.getClientRects()].some((box) => x >= box.left && x <= box.right && y >= box.top && y <= box.bottom);

/** Shows the alternatives of the word under the pointer, or of the first word where `point` is null. */
export function askForWord(conversation, side, node, article, point) {
  const words = wordsOf(article.querySelector(".markdown"), node.content);
  const index = point ? words.findIndex(({ range }) => isIn(range, point.x, point.y)) : 0;
  if (words[index]) emit("words", { conversation, side, node, words, index });
}

/** A plain click on the text itself: not the end of a selection, nor on something that has a purpose of its own. */
export const isOnText = (e) => e.detail === 1 && getSelection().isCollapsed && !e.target.closest("a, button, summary, input, .katex, iframe");

/** Tokens carry the space before a word, so the text that the model has seen ends before it. */
const upTo = (source, at) => source.slice(0, at).replace(/ +$/, "");

function useAlternatives(asked) {
  const [found, setFound] = useState(null); // {list, said} or {error}
  useEffect(() => {
    const controller = new AbortController();
    const { side, node, words, index } = asked;
    const before = upTo(node.content, words[index].at);
    setFound(null);
    alternatives(side, node, before, controller.signal)
      .then((list) => setFound({ list, before, said: list.find(({ text }) => text && node.content.startsWith(text, before.length)) }))
      .catch((error) => { if (error.name !== "AbortError") setFound({ error: explain(error.kind ? error : { kind: "broken", detail: String(error) }, node.model) }); });
    return () => controller.abort();
  }, [asked]);
  return found;
}

const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)} %` : share >= 0.001 ? `${(share * 100).toFixed(1)} %` : "< 0.1 %");
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

function Alternative({ text, share, isSaid, onPick }) {
  return html`
    <li><button type="button" aria-current=${isSaid ? "true" : undefined} disabled=${isSaid || !text} title=${isSaid ? t("wordSaid") : t("wordBranch")} onClick=${onPick}>
      <i style=${{ width: `${share * 100}%` }}></i><span>${visible(text.trim() ? text.trim() : text)}</span><b>${percent(share)}</b></button></li>`;
}

/** Marks the word in the text without changing the text. */
function mark(range) {
  CSS.highlights?.set("word", new Highlight(range));
  return () => CSS.highlights?.delete("word");
}

function placeBeside(box, range) {
  const word = range.getBoundingClientRect();
  const { width, height } = box.getBoundingClientRect();
  const below = word.bottom + 8 + height < innerHeight;
  box.style.left = `${Math.max(8, Math.min(word.left - 16, innerWidth - width - 8))}px`;
  box.style.top = `${Math.max(8, below ? word.bottom + 8 : word.top - height - 8)}px`;
}

function Card({ asked, onStep, onClose }) {
  const { conversation, side, node, words, index } = asked;
  const found = useAlternatives(asked);
  const box = useRef();
  const { range } = words[index];
  useLayoutEffect(() => mark(range), [asked]);
  useLayoutEffect(() => placeBeside(box.current, range), [asked, found]);
  useLayoutEffect(() => { box.current.focus(); }, []);
  useEffect(() => {
    const away = (e) => { if (!box.current.contains(e.target)) onClose(); };
    addEventListener("pointerdown", away);
    return () => removeEventListener("pointerdown", away);
  }, []);
  const keys = (e) => {
    if (e.key === "Escape") { e.stopPropagation(); onClose(); }
    if (e.key === "ArrowLeft") onStep(-1);
    if (e.key === "ArrowRight") onStep(1);
  };
  const pick = (text) => { onClose(); branchFrom(conversation, side, node, found.before + text); emit("focus-composer"); };
  const word = range.toString();
  return html`
    <section class="words" role="dialog" aria-label=${t("words")} tabindex="-1" ref=${box} onKeyDown=${keys}>
      <div class="row"><strong>${word}</strong>${found?.said && html`<span class="hint">${percent(found.said.share)}</span>`}<span class="grow"></span>
        <${IconButton} name="left" label=${t("previousWord")} disabled=${index === 0} onClick=${() => onStep(-1)} />
        <${IconButton} name="right" label=${t("nextWord")} disabled=${index === words.length - 1} onClick=${() => onStep(1)} />
        <${IconButton} name="close" label=${t("close")} onClick=${onClose} /></div>
      ${found === null && html`<div class="dots" aria-label=${t("wordsWaiting")}><i></i><i></i><i></i></div>`}
      ${found?.error && html`<p class="fault" role="alert">${found.error.title} ${found.error.said}</p>`}
      ${found?.list && html`
        ${!found.list.length && html`<p class="hint">${t("wordsNone")}</p>`}
        <ol>${found.list.slice(0, SHOWN).map((one) => html`<${Alternative} key=${one.text} ...${one} isSaid=${one === found.said} onPick=${() => pick(one.text)} />`)}</ol>
        <p class="hint">${t(isRunning(conversation) ? "wordsBusy" : found.said ? "wordsHint" : "wordsUnlikely")}</p>`}
    </section>`;
}

export function Words() {
  const [asked, ask] = useState(null);
  useLayoutEffect(() => on("words", ask), []);
  useLayoutEffect(() => on("app", () => ask((now) => (now && now.conversation.sides.some((side) => side.nodes[now.node.id]) ? now : null))), []);
  const step = (by) => {
    const index = asked.index + by;
    if (!asked.words[index]) return;
    const { range } = asked.words[index];
    range.startContainer.parentElement.scrollIntoView({ block: "nearest" });
    ask({ ...asked, index });
  };
  return asked && html`<${Card} asked=${asked} onStep=${step} onClose=${() => ask(null)} />`;
}
