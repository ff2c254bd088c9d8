"use strict";
// Draws the page's charts, in the colours of the reader's scheme and for the width of the screen.
// Plotly stands in the page compressed; nothing is fetched.
(async () => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const figures = [...document.querySelectorAll("figure.plot")];
  const read = (id) => document.getElementById(id).textContent;
  const darkColours = JSON.parse(read("dark-colours"));

  const inflate = async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const recolour = (key, value) => {
    const known = dark.matches && typeof value === "string" && Object.hasOwn(darkColours, value);
    return known ? darkColours[value] : value;
  };
  const fitNarrow = (figure) => {
    const layout = figure.layout;
    const named = figure.data.filter((trace) => trace.showlegend !== false);
    layout.margin = Object.assign({}, layout.margin, { l: 52, r: 6 });
    if (layout.xaxis.type === "category") {
      const labels = new Set(figure.data.flatMap((trace) => trace.x));
      if ([...labels].join("  ").length > 42) {
        Object.assign(layout.xaxis, { tickangle: -45, dtick: undefined });
        layout.margin.b += 36;
        layout.height += 36;
      }
    } else if (!layout.xaxis.dtick) {
      Object.assign(layout.xaxis, { nticks: 5, tickangle: 0 });
    }
    if (layout.showlegend === false || !named.length) return;
    figure.data.forEach((trace) => delete trace.legendgroup); // a group has a row of its own
    const longest = Math.max(...named.map((trace) => (trace.name || "").length));
    const columns = longest > 16 ? 1 : 2;
    const added = 12 + 20 * Math.ceil(named.length / columns);
    layout.height += added;
    layout.margin.b += added;
    layout.legend = {
      orientation: "h", entrywidth: 0.98 / columns, entrywidthmode: "fraction", font: { size: 12 },
      x: 0, xref: "container", xanchor: "left", y: 0, yref: "container", yanchor: "bottom",
    };
  };
  const draw = (element) => {
    const chart = element.querySelector(".chart");
    if (!chart.offsetParent) return; // in a closed fold
    const figure = JSON.parse(element.querySelector("script").textContent, recolour);
    if (narrow.matches) fitNarrow(figure);
    if (!element.dataset.drawn) chart.replaceChildren();
    element.dataset.drawn = "yes";
    chart.style.height = "";
    Plotly.react(chart, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  };
  const drawAll = () => figures.forEach(draw);

  try {
    const script = document.createElement("script");
    script.textContent = await inflate(read("plotly"));
    document.head.append(script);
    drawAll();
  } catch (error) {
    console.error(error);
    return; // what stands in place of the charts says what they need
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  document.querySelectorAll("details").forEach((fold) => fold.addEventListener("toggle", drawAll));
})();
