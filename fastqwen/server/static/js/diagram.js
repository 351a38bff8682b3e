// Runs in a diagram's frame, as a classic script: draws what the page sends and answers with its height.
(function () {
  let drawn = 0;
  async function draw({ source, data }) {
    if (source !== parent || typeof data?.source !== "string") return;
    const id = `diagram-${++drawn}`; // ids of two drawings must differ
    try {
      mermaid.initialize({ startOnLoad: false, securityLevel: "strict", theme: data.dark ? "dark" : "neutral", fontFamily: "system-ui, sans-serif", suppressErrorRendering: true });
      const { svg } = await mermaid.render(id, data.source);
      if (id !== `diagram-${drawn}`) return;
      document.getElementById("place").innerHTML = svg;
      parent.postMessage({ height: document.getElementById("place").scrollHeight + 4 }, "*");
    } catch (error) { parent.postMessage({ fault: String(error?.message ?? error) }, "*"); }
  }
  addEventListener("message", draw);
  parent.postMessage("ready", "*");
})();
