"use strict";
// A figure is drawn when it comes into view, or is printed: so a page with many of them opens at once.
{
  const waiting = new Map();
  const draw = div => { const how = waiting.get(div); waiting.delete(div); how?.(); };
  const watch = new IntersectionObserver(seen => {
    for (const { isIntersecting, target } of seen) if (isIntersecting) { watch.unobserve(target); draw(target); }
  }, { rootMargin: "300px" });
  let library;
  // Plotly's texts and backgrounds follow the page into the dark and back.
  const dark = matchMedia("(prefers-color-scheme: dark)"), recolored = new WeakMap();
  const recolor = () => {
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink"), page = style.getPropertyValue("--page");
    for (const div of document.querySelectorAll(".js-plotly-plot")) {
      if ((recolored.get(div) ?? "light") === (dark.matches ? "dark" : "light")) continue;
      recolored.set(div, dark.matches ? "dark" : "light");
      library.relayout(div, { "font.color": ink, paper_bgcolor: page });
    }
  };
  dark.addEventListener("change", recolor);
  // The room for a legend is reserved for a narrow page; where it needs less, or more, the plot has the difference.
  const fit = div => {
    const { meta, margin } = div.layout, legend = div.querySelector("g.legend");
    const extra = legend && meta?.legend ? Math.ceil(legend.getBBox().height) - meta.legend : 0;
    if (Math.abs(extra) >= 5) library.relayout(div, { "meta.legend": meta.legend + extra, "margin.t": margin.t + extra });
  };
  Object.defineProperty(window, "Plotly", {
    configurable: true,
    get: () => library,
    set(value) {
      library = value;
      const now = value.newPlot;
      value.newPlot = (id, ...rest) => new Promise(done => {
        const div = document.getElementById(id);
        waiting.set(div, () => now(id, ...rest).then(drawn => {
          drawn.on("plotly_afterplot", () => fit(drawn));
          fit(drawn);
          recolor();
          done(drawn);
        }));
        watch.observe(div);
      });
    },
  });
  let opened = [];  // what is folded would be missing on paper
  addEventListener("beforeprint", () => {
    [...waiting.keys()].forEach(draw);
    opened = [...document.querySelectorAll("main details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
}
