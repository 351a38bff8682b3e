// A classic script that runs before the first paint, so that neither colours nor the sidebar flash.
"use strict";
(function () {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const read = (name) => { try { return JSON.parse(localStorage.getItem("fastqwen." + name)); } catch { return null; } };
  function apply() {
    const wish = read("theme");
    document.documentElement.dataset.theme = wish === "light" || wish === "dark" ? wish : dark.matches ? "dark" : "light";
  }
  apply();
  dark.addEventListener("change", apply);
  addEventListener("fastqwen-theme", apply);
  const language = read("lang") || navigator.language || "en";
  document.documentElement.lang = /^zh/i.test(language) ? "zh-CN" : "en";
})();
