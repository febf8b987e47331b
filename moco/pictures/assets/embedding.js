"use strict";
// The page of an embedding: one map or two of the same images, a filter of classes, and what is pinned. Needs
// point_map.js. Names of files and classes are set by textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const FRAMES = { query: [], right: [], wrong: [5, 3] }; // dashes of each mark, so that colour alone tells nothing

function element(tag, words = "", properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (words !== "") made.textContent = words;
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------------------- what all maps share: `page`

const labelled = data.classes.length > 0;
const page = {
  count: data.names.length,
  labels: labelled ? data.labels : new Uint8Array(data.names.length),
  // Images in an order without meaning: the first ones to be drawn as pictures, and the last ones above the others.
  order: Uint32Array.from(data.names.keys()).sort((a, b) => scattered(a) - scattered(b)),
  shown: new Uint8Array(data.names.length).fill(1),
  version: 0, // of `shown`
  pictures: !labelled,
  pins: [],
  hovered: -1,
  sheets: [...document.querySelectorAll("img.sheet")],
  accent: "",
  pinFrame: {},

  // The points of all classes with this radius, drawn once.
  marks(radius, ratio) {
    const key = `${radius} ${ratio}`;
    if (key !== this.marksKey) {
      const different = this.colours.length * SHAPES.length;
      const drawn = Array.from({ length: Math.min(different, Math.max(1, data.classes.length)) }, (_, label) =>
        drawMark(label, labelled ? this.colours : [this.accent], this.edge, radius, ratio));
      this.drawnMarks = Array.from({ length: Math.max(1, data.classes.length) }, (_, label) => drawn[label % different]);
      this.marksKey = key;
    }
    return this.drawnMarks;
  },

  colourOf: (i) => (labelled ? page.colours[page.labels[i] % page.colours.length] : ""),

  // How a neighbour is framed; without labels nothing is right or wrong.
  frame(pin, other) {
    return this.frames[labelled ? (this.labels[pin] === this.labels[other] ? "right" : "wrong") : "query"];
  },

  // Width and height of an image whose longest side is `side`.
  sizeIn(i, side) {
    const [width, height] = [data.sheets.sizes[2 * i], data.sheets.sizes[2 * i + 1]];
    const scale = side / Math.max(width, height);
    return [width * scale, height * scale];
  },

  drawImage(c, i, x, y, width, height) {
    const { cell, columns, perSheet, sizes } = data.sheets;
    const sheet = this.sheets[Math.floor(i / perSheet)], place = i % perSheet;
    if (!sheet.complete) return; // all is drawn again when it is
    c.imageSmoothingEnabled = cell > 32 || width < sizes[2 * i]; // pixels of tiny images stay pixels
    c.imageSmoothingQuality = "medium";
    c.drawImage(sheet, (place % columns) * cell, Math.floor(place / columns) * cell, sizes[2 * i], sizes[2 * i + 1],
      x, y, width, height);
  },
};

function scattered(i) {
  return Math.imul(i + 1, 2654435761) >>> 0;
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  page.colours = [];
  while (colour(`class-${page.colours.length}`)) page.colours.push(colour(`class-${page.colours.length}`));
  page.frames = Object.fromEntries(Object.entries(FRAMES).map(([name, dashes]) =>
    [name, { colour: colour(name), dashes }]));
  page.accent = colour("accent");
  page.edge = colour("ground");
  page.pinFrame = { colour: colour("ink"), dashes: [] };
  page.marksKey = "";
}
readColours();

const together = new View();
const maps = data.maps.map((map) => {
  const holder = element("div", "", { className: "map", tabIndex: 0 });
  holder.setAttribute("role", "application");
  holder.setAttribute("aria-label", `Map of ${page.count} images: arrow keys choose one, plus and minus zoom`);
  find("maps").append(element("section", "", {}, element("h2", map.title, { hidden: !map.title }), holder));
  return new PointMap(holder, page, map, together);
});
let active = maps[0]; // the one that keys act on

function change(all = true) {
  for (const map of maps) map.change(all);
}

for (const sheet of page.sheets) sheet.decode().then(() => { change(); showPins(); }, () => {});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); change(); });

// ----------------------------------------------------------------------------------------------------- hovering and pins

// A canvas with an image, for the tip and for the list of what is pinned.
function picture(i, side) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = page.sizeIn(i, side);
  const canvas = element("canvas", "", { width: Math.ceil(width * ratio), height: Math.ceil(height * ratio) });
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  page.drawImage(canvas.getContext("2d"), i, 0, 0, canvas.width, canvas.height);
  return canvas;
}

const className = (i) => (labelled ? data.classes[page.labels[i]] : "");

function hover(i, x = 0, y = 0) {
  const tip = find("tip");
  if (i !== page.hovered) {
    page.hovered = i;
    change(false);
    if (i >= 0) tip.replaceChildren(picture(i, 128), element("b", className(i)), element("span", data.names[i]));
  }
  tip.hidden = i < 0 || x === 0;
  if (tip.hidden) return;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width < innerWidth ? x + 16 : Math.max(4, x - 16 - width);
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - height - 4))}px`;
}

function pin(images) {
  page.pins = images;
  change();
  showPins();
}

function showPins() {
  find("none-pinned").hidden = page.pins.length > 0;
  find("pins").replaceChildren(...page.pins.map(pinCard));
}

function pinCard(i) {
  const close = element("button", "\u00d7", { title: "Unpin (Escape)", className: "close" });
  close.setAttribute("aria-label", "Unpin");
  close.onclick = () => pin(page.pins.filter((other) => other !== i));
  const head = element("header", "", {}, picture(i, 96),
    element("div", "", {}, element("b", className(i)), element("span", data.names[i])), close);
  return element("article", "", {}, head, ...maps.map((map, number) => nearestList(i, map, data.maps[number])));
}

// The nearest images of one map, as buttons that pin them.
function nearestList(i, map, { title, similarities }) {
  const others = map.neighbours[i];
  const same = others.filter((other) => page.labels[other] === page.labels[i]).length;
  const words = `${others.length} nearest` + (title ? ` by ${title}` : "") +
    (labelled ? `: ${same} of its class` : "");
  const list = element("div", "", { className: "nearest" });
  others.forEach((other, rank) => {
    const mark = labelled ? (page.labels[other] === page.labels[i] ? "right" : "wrong") : "";
    const label = `${className(other)} ${data.names[other]}, cosine ${similarities[i][rank].toFixed(2)}`.trim();
    const button = element("button", "", { className: mark, title: label }, picture(other, 52),
      element("span", similarities[i][rank].toFixed(2)));
    button.onclick = () => { pin([other]); for (const map of maps) map.reveal(other); };
    button.onpointerenter = () => hover(other);
    button.onpointerleave = () => hover(-1);
    list.append(button);
  });
  return element("div", "", {}, element("p", words), list);
}

// ------------------------------------------------------------------------------------------------------- the pointer

for (const map of maps) {
  const down = new Map(); // pointers by their number: where each is
  let moved = 0;
  const here = (event) => {
    const { left, top } = map.holder.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };
  const middle = () => {
    const places = [...down.values()];
    const x = places.reduce((sum, at) => sum + at[0], 0) / places.length;
    const y = places.reduce((sum, at) => sum + at[1], 0) / places.length;
    return [x, y, Math.hypot(places[0][0] - x, places[0][1] - y)];
  };
  map.holder.addEventListener("pointerdown", (event) => {
    active = map;
    if (!down.size) moved = 0;
    down.set(event.pointerId, here(event));
    map.holder.setPointerCapture(event.pointerId);
  });
  map.holder.addEventListener("pointermove", (event) => {
    if (!down.has(event.pointerId)) return hover(map.at(...here(event)), event.clientX, event.clientY);
    const [x, y, spread] = middle();
    down.set(event.pointerId, here(event));
    const [newX, newY, newSpread] = middle();
    moved += Math.hypot(newX - x, newY - y) + Math.abs(newSpread - spread);
    if (moved < 4) return undefined;
    hover(-1);
    map.view.pan(newX - x, newY - y, map.unit);
    if (down.size > 1 && spread > 0) map.zoomAt(newSpread / spread, newX, newY);
    return change(false);
  });
  const release = (event) => {
    if (!down.delete(event.pointerId) || down.size || event.type !== "pointerup" || moved >= 4) return;
    const i = map.at(...here(event));
    const more = event.shiftKey || event.ctrlKey || event.metaKey;
    if (i >= 0) pin(more ? [...page.pins.filter((other) => other !== i), i] : [i]);
    else if (!more) pin([]);
  };
  map.holder.addEventListener("pointerup", release);
  map.holder.addEventListener("pointercancel", release);
  map.holder.addEventListener("pointerleave", () => hover(-1));
  map.holder.addEventListener("focus", () => (active = map));
  map.holder.addEventListener("wheel", (event) => {
    event.preventDefault();
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode];
    map.zoomAt(Math.exp(-pixels * (event.ctrlKey ? 0.01 : 0.0015)), ...here(event)); // ctrl: a touchpad's pinch
    hover(map.at(...here(event)), event.clientX, event.clientY);
    change(false);
  }, { passive: false });
}

// ---------------------------------------------------------------------------------------------------- buttons and keys

function zoom(factor) {
  for (const view of new Set(maps.map((map) => map.view)))
    maps.find((map) => map.view === view).zoomAt(factor);
  change(false);
}

function whole() {
  for (const map of maps) map.view.reset();
  change(false);
}

function choosePictures(on) {
  page.pictures = on;
  find("as-points").setAttribute("aria-pressed", String(!on));
  find("as-pictures").setAttribute("aria-pressed", String(on));
  change();
}

find("larger").onclick = () => zoom(1.5);
find("smaller").onclick = () => zoom(1 / 1.5);
find("whole").onclick = whole;
find("as-points").onclick = () => choosePictures(false);
find("as-pictures").onclick = () => choosePictures(true);
find("linked").parentElement.hidden = maps.length < 2;
find("linked").onchange = (event) => {
  for (const map of maps.slice(1)) map.view = event.target.checked ? together : Object.assign(new View(), together);
  change();
};
choosePictures(page.pictures);

// The next image in a direction from the last pinned one; without a pin the one nearest to the middle.
function step(right, down) {
  const from = page.pins.at(-1);
  const next = from === undefined
    ? active.nearest(active.width / 2, active.height / 2, () => 1)
    : active.nearest(active.screenX(from), active.screenY(from), (x, y) => {
      const along = x * right + y * down, length = Math.hypot(x, y);
      return length > 0.01 ? Math.max(0, along / length - 0.5) : 0; // at most 60 degrees off
    });
  if (next < 0) return;
  pin([next]);
  active.reveal(next);
}

const KEYS = {
  ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
  "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: whole,
  Escape: () => { hover(-1); pin([]); },
};
addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input[type=search]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

// ------------------------------------------------------------------------------------------------- the filter of classes

const counts = new Map(); // images of each class that has any, in the order of the classes
for (const label of Float64Array.from(labelled ? page.labels : []).sort()) counts.set(label, (counts.get(label) ?? 0) + 1);
const rows = [...counts].map(([label, count]) => {
  const box = element("input", "", { type: "checkbox", checked: true });
  const name = element("span", data.classes[label], { className: "name", title: data.classes[label] });
  const row = element("label", "", {}, box, markOf(label), name, element("span", count, { className: "pale" }));
  row.addEventListener("click", (event) => {
    if (!event.shiftKey) return;
    event.preventDefault(); // which also keeps the box as it was
    setTimeout(() => { for (const other of rows) other.box.checked = other.label === label; filter(); });
  });
  box.onchange = filter;
  return { label, row, box, name: data.classes[label].toLowerCase() };
});

function markOf(label) {
  const drawn = drawMark(label, page.colours, "transparent", 4.5, 2);
  drawn.style.width = `${drawn.width / 2}px`;
  return drawn;
}

function filter() {
  const shownLabels = new Set(rows.filter((one) => one.box.checked).map((one) => one.label));
  for (let i = 0; labelled && i < page.count; i++) page.shown[i] = Number(shownLabels.has(page.labels[i]));
  page.version++;
  const images = page.shown.reduce((sum, one) => sum + one, 0);
  find("count").textContent = `${shownLabels.size} of ${rows.length} classes, ${images} of ${page.count} images`;
  change();
}

function search() {
  const wanted = find("search").value.trim().toLowerCase();
  for (const one of rows) one.row.hidden = !one.name.includes(wanted);
}

function setListed(on) {
  for (const one of rows) if (!one.row.hidden) one.box.checked = on;
  filter();
}

find("filter").hidden = !labelled;
find("classes").append(...rows.map((one) => one.row));
find("search").oninput = search;
find("search").onkeydown = (event) => {
  if (event.key === "Escape") { event.target.value = ""; search(); event.target.blur(); }
};
find("all").onclick = () => setListed(true);
find("none").onclick = () => setListed(false);
filter();
showPins();
