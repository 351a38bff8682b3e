// Each conversation has an address, /chat/ID, so that Back, reload and bookmarks do what they do elsewhere.
import { at } from "./ui.js";

const chats = new URL(at("chat/")).pathname;

/** Id of the conversation that the address names, or null. */
export function addressed() {
  const { pathname } = location;
  return pathname.startsWith(chats) ? decodeURIComponent(pathname.slice(chats.length)) || null : null;
}

/** how: "push" adds a step for Back, "replace" changes the present one, "keep" leaves the address alone. */
export function showAddress(id, how) {
  if (how === "keep" || addressed() === id) return;
  history[`${how}State`](null, "", at(id ? `chat/${id}` : ""));
}
