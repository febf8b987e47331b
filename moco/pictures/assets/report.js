"use strict";
// Draws the panels of a report with plotly, each when it comes into sight.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const align = document.getElementById("align"), smooth = document.getElementById("smooth");
  const boxes = [...document.querySelectorAll("#runs input")];
  const plots = [...document.querySelectorAll(".plot")];
  const seen = new Set();

  // What the reader has chosen outlives the page that is read again; some browsers store nothing for a file.
  const place = "report " + location.pathname;
  function remember() {
    const hidden = boxes.filter(box => !box.checked).map(box => box.dataset.line);
    try { sessionStorage.setItem(place, JSON.stringify([align?.value, smooth?.value, hidden])); } catch { /* nothing */ }
  }
  try {
    const [axis, weight, hidden] = JSON.parse(sessionStorage.getItem(place));
    if (align && axis) align.value = axis;
    if (smooth && weight) smooth.value = weight;
    for (const box of boxes) box.checked = !hidden.includes(box.dataset.line);
  } catch { /* nothing was chosen */ }

  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = new Intl.NumberFormat("en", {maximumSignificantDigits: 5});

  // An exponential moving average, corrected for its beginning (arXiv 1412.6980, section 3); gaps stay.
  function averaged(values, weight) {
    let sum = 0, of = 0;
    return values.map(value => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      of = weight * of + 1 - weight;
      return sum / of;
    });
  }

  function timeUnit(curves) {
    const latest = Math.max(0, ...curves.map(curve => curve.time?.at(-1) ?? 0));
    return latest < 120 ? [1, "seconds"] : latest < 7200 ? [60, "minutes"] : [3600, "hours"];
  }

  function traces(panel) {
    const axis = align.value, weight = Number(smooth.value), shown = new Set();
    for (const box of boxes) if (box.checked) shown.add(Number(box.dataset.line));
    const [seconds, unit] = timeUnit(panel.curves);
    const found = [];
    for (const curve of panel.curves) {
      if (!shown.has(curve.line) || !curve[axis]) continue;
      const {name, colour} = data.lines[curve.line];
      const x = axis === "time" ? curve.time.map(value => value === null ? null : value / seconds) : curve[axis];
      const few = curve.y.filter(value => value !== null).length <= 30;
      const line = {color: colour[dark.matches ? 1 : 0], dash: dashes[curve.dash % 4], width: 1.8};
      const label = (curve.label ? name + ", " + curve.label : name).replace(/&/g, "&amp;").replace(/</g, "&lt;");
      const trace = {x, y: curve.y, name: label, line, mode: few ? "lines+markers" : "lines", marker: {size: 5},
        hovertemplate: "%{y:.5~g}" + (panel.unit === "%" ? " %" : "")};
      if (weight) {
        found.push({...trace, mode: "lines", opacity: 0.25, hoverinfo: "skip", hovertemplate: null});
        trace.y = averaged(curve.level ?? curve.y, weight);
        trace.mode = "lines";
      }
      found.push(trace);
    }
    return [found, axis === "time" ? unit : axis + "s"];
  }

  function draw(plot) {
    const panel = data.panels[plot.dataset.panel];
    const [found, unit] = traces(panel);
    const rule = style("--rule"), ink = style("--ink"), pale = style("--pale");
    const axis = {gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true, exponentformat: "power"};
    const layout = {
      margin: {l: 8, r: 8, t: 10, b: 8}, showlegend: false, uirevision: align.value,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: ink, size: 11},
      hovermode: found.length > 12 ? "closest" : "x unified",
      hoverlabel: {bgcolor: style("--raised"), bordercolor: rule, font: {color: ink}, namelength: 60},
      xaxis: {...axis, exponentformat: "none", separatethousands: true, title: {text: unit, standoff: 6}, rangemode: "tozero", hoverformat: ".6~g"},
      yaxis: {...axis, ticksuffix: panel.unit === "%" ? " %" : "", rangemode: panel.unit === "%" ? "nonnegative" : "normal"},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: pale, activecolor: ink},
    };
    if (panel.level) {
      const [y, name] = panel.level;
      layout.shapes = [{type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y,
        line: {color: pale, width: 1, dash: "6px 4px"}}];
      layout.annotations = [{xref: "paper", x: 0, xanchor: "left", y, yanchor: "bottom", text: name, showarrow: false,
        font: {color: pale, size: 10}}];
    }
    if (!found.length) {
      layout.annotations = [{xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font: {color: pale},
        text: "no shown run has this over " + align.value}];
      layout.shapes = [];
    }
    // Named one by one: plotly has others that send the data away. SVG, as a PNG is drawn from a blob, which the
    // page's policy forbids.
    const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
    const image = {format: "svg", filename: panel.title.replace(/\W+/g, "_").toLowerCase()};
    return Plotly.react(plot, found, layout,
      {responsive: true, displaylogo: false, modeBarButtons: buttons, toImageButtonOptions: image});
  }

  const redraw = () => seen.forEach(draw);
  function changed() {
    remember();
    redraw();
  }

  async function begin() {
    const packed = Uint8Array.from(atob(data.plotly), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    const show = plot => {
      if (seen.has(plot)) return;
      seen.add(plot);
      draw(plot);
    };
    const sight = new IntersectionObserver(
      entries => entries.filter(entry => entry.isIntersecting).forEach(entry => show(entry.target)), {rootMargin: "400px"});
    plots.forEach(plot => sight.observe(plot));
    addEventListener("beforeprint", () => plots.forEach(show));
    for (const control of [align, smooth, ...boxes]) control.addEventListener("input", changed);
    for (const [id, checked] of [["all", true], ["none", false]]) {
      document.getElementById(id).addEventListener("click", () => {
        for (const box of boxes) box.checked = checked;
        changed();
      });
    }
    dark.addEventListener("change", redraw);
  }
  if (data.plotly && plots.length) begin();
  else for (const box of boxes) box.hidden = true;

  if (data.again) {
    let touched = 0;  // nobody who is looking at a point or zooming is disturbed
    for (const kind of ["pointerdown", "wheel", "keydown"]) addEventListener(kind, () => touched = Date.now());
    setInterval(() => Date.now() - touched > 5000 && location.reload(), 1000 * data.again);
  }
}
