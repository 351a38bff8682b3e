// The service worker: keeps the page's own files, so that it opens and shows its conversations while the server is away.
const CACHE = "fastqwen-page";
const root = new URL("./", self.location.href);
const MODULES = "address api app chat compare composer dialogs errors foreign frames i18n keeping library markdown markup math message settings share sidebar status store theme tools transfer tree ui view words".split(" ");
const SHELL = ["", "chat/shell", "static/icon.svg", "static/manifest.json", "static/css/base.css", "static/css/chat.css", ...MODULES.map((name) => `static/js/${name}.js`),
  "static/vendor/preact/preact.js", "static/vendor/preact/hooks.js", "static/vendor/htm/htm.js", "static/vendor/markdown-it/markdown-it.js", "static/vendor/dompurify/purify.js"];

/** Under which address a page or file is kept: all conversations have the same page. Null for what is never kept. */
function kept(url) {
  if (!url.href.startsWith(root.href)) return null;
  const path = url.href.slice(root.href.length).split(/[?#]/)[0];
  if (path.startsWith("chat/")) return new URL("chat/shell", root).href;
  return path === "" || (path.startsWith("static/") && !path.startsWith("static/vendor/mermaid/") && !path.startsWith("static/frame/")) ? new URL(path, root).href : null;
}

async function fresh(request, key) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(key, response.clone()).catch(() => {}); // a full disk must not keep the page from being shown
    return response;
  } catch (error) {
    const old = await cache.match(key);
    if (old) return old;
    throw error;
  }
}

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(SHELL.map((path) => new URL(path, root).href))));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const key = event.request.method === "GET" ? kept(new URL(event.request.url)) : null;
  if (key) event.respondWith(fresh(event.request, key));
});
