"use strict";
// One map of the page: points on a canvas. A place on the map is x and y from 0 to 1, y upwards; a place on the screen
// is in CSS pixels from the canvas's upper left corner.

const ZOOM = { least: 0.5, most: 200 };
const MARGIN = 0.3; // of width and height, beyond which a move of the map draws its points anew
const NEAR = 9; // pixels from a point at which the pointer means it

// ---------------------------------------------------------------------------------------------------- points of classes

// A corner or two for each of `arms`; with `inner` below 1 a star.
function starPath(c, radius, arms, turn, inner = 1) {
  const corners = inner < 1 ? 2 * arms : arms;
  for (let corner = 0; corner < corners; corner++) {
    const angle = turn + (2 * Math.PI * corner) / corners;
    const length = corner % 2 && inner < 1 ? inner * radius : radius;
    c.lineTo(length * Math.sin(angle), -length * Math.cos(angle));
  }
  c.closePath();
}

// The first classes differ by colour; the next ones have the same colours and the next shape.
const SHAPES = [
  (c, r) => c.arc(0, 0, r, 0, 2 * Math.PI),
  (c, r) => starPath(c, 1.25 * r, 3, 0),
  (c, r) => starPath(c, 1.25 * r, 4, Math.PI / 4),
  (c, r) => starPath(c, 1.3 * r, 4, 0, 0.45),
  (c, r) => starPath(c, 1.3 * r, 4, Math.PI / 4, 0.45),
  (c, r) => starPath(c, 1.25 * r, 4, 0),
  (c, r) => starPath(c, 1.25 * r, 3, Math.PI),
  (c, r) => starPath(c, 1.35 * r, 5, 0, 0.5),
];

// A canvas with the point of a class: its colour and shape with a thin edge of the ground, so that neighbours stay apart.
function drawMark(label, colours, edge, radius, ratio) {
  const side = Math.ceil(2 * (1.35 * radius + 1) * ratio);
  const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
  const c = canvas.getContext("2d");
  c.translate(side / 2, side / 2);
  c.scale(ratio, ratio);
  c.beginPath();
  SHAPES[Math.floor(label / colours.length) % SHAPES.length](c, radius);
  c.fillStyle = colours[label % colours.length];
  c.fill();
  c.lineWidth = 0.6;
  c.strokeStyle = edge;
  c.stroke();
  return canvas;
}

// ------------------------------------------------------------------------------------------------------------- the view

// What part of the map is seen: the place in the middle of the screen, and how many times larger than the whole map.
class View {
  constructor() {
    this.reset();
  }

  reset() {
    Object.assign(this, { x: 0.5, y: 0.5, zoom: 1 }); // all points lie around this place
  }

  // Of a map whose side is `unit` pixels at a zoom of 1.
  pan(right, down, unit) {
    this.x = Math.min(1, Math.max(0, this.x - right / (unit * this.zoom)));
    this.y = Math.min(1, Math.max(0, this.y + down / (unit * this.zoom)));
  }

  // The place that is `right` and `down` of the middle stays where it is.
  zoomBy(factor, right, down, unit) {
    const before = this.zoom;
    this.zoom = Math.min(ZOOM.most, Math.max(ZOOM.least, before * factor));
    const moved = 1 - this.zoom / before;
    this.pan(right * moved, down * moved, unit);
  }
}

// -------------------------------------------------------------------------------------------------------------- the map

class PointMap {
  // page: what all maps share, see embedding.js. points: x and y of each image in turn, 0 to 65535.
  constructor(holder, page, { points, neighbours }, view) {
    Object.assign(this, { holder, page, neighbours, view });
    this.x = Float64Array.from({ length: page.count }, (_, i) => points[2 * i] / 65535);
    this.y = Float64Array.from({ length: page.count }, (_, i) => points[2 * i + 1] / 65535);
    this.canvases = [0, 1].map(() => holder.appendChild(document.createElement("canvas"))); // what stays, what changes
    const reach = (places) => places.reduce((most, at) => Math.max(most, 2 * Math.abs(at - 0.5)), 0.05);
    this.drawn = { zoom: 0 }; // the view of the points on the canvas
    this.reach = { x: reach(this.x), y: reach(this.y) }; // of the map's side, as the points need it
    this.dirty = this.waiting = false;
    this.resize();
    new ResizeObserver(() => this.resize()).observe(holder);
  }

  resize() {
    this.ratio = window.devicePixelRatio || 1;
    [this.width, this.height] = [this.holder.clientWidth, this.holder.clientHeight];
    // The points are drawn beyond the edges, so that most moves of the map only move the canvas.
    this.margins = [Math.ceil(this.width * MARGIN), Math.ceil(this.height * MARGIN)];
    this.canvases.forEach((canvas, number) => {
      const [right, down] = number ? [0, 0] : this.margins;
      const [width, height] = [this.width + 2 * right, this.height + 2 * down];
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(height * this.ratio);
      canvas.style.cssText = `left: ${-right}px; top: ${-down}px; width: ${width}px; height: ${height}px`;
    });
    this.change();
  }

  // Draw at the next frame: all, or what the view and the pointer change.
  change(all = true) {
    this.dirty ||= all;
    if (!this.waiting) requestAnimationFrame(() => this.draw());
    this.waiting = true;
  }

  draw() {
    if (this.dirty || !this.shift()) this.drawPoints();
    this.drawAbove();
    this.dirty = this.waiting = false;
  }

  // Move the canvas of the points to where the view is; false where it would not cover the map.
  shift() {
    const { view, drawn, margins, ratio } = this;
    const side = this.unit * view.zoom;
    const [right, down] = [(drawn.x - view.x) * side, (view.y - drawn.y) * side];
    if (drawn.zoom !== view.zoom || Math.abs(right) > margins[0] || Math.abs(down) > margins[1]) return false;
    const whole = (pixels) => Math.round(pixels * ratio) / ratio;
    this.canvases[0].style.transform = `translate(${whole(right)}px, ${whole(down)}px)`;
    return true;
  }

  // ------------------------------------------------------------------------------------------------------------ places

  // The map's side in pixels at a zoom of 1, at which all of its points are seen.
  get unit() {
    return Math.max(1, Math.min((this.width - 40) / this.reach.x, (this.height - 40) / this.reach.y));
  }

  screenX(i) {
    return this.width / 2 + (this.x[i] - this.view.x) * this.unit * this.view.zoom;
  }

  screenY(i) {
    return this.height / 2 - (this.y[i] - this.view.y) * this.unit * this.view.zoom;
  }

  zoomAt(factor, x = this.width / 2, y = this.height / 2) {
    this.view.zoomBy(factor, x - this.width / 2, y - this.height / 2, this.unit);
  }

  // Move the view, if it has to, so that an image lies inside it.
  reveal(i) {
    const margin = 0.1 * Math.min(this.width, this.height);
    const [x, y] = [this.screenX(i), this.screenY(i)];
    const within = (at, size) => Math.min(size - margin, Math.max(margin, at));
    this.view.pan(within(x, this.width) - x, within(y, this.height) - y, this.unit);
  }

  // The image under a place of the screen, or -1: what is drawn as a picture there, else the nearest point.
  at(x, y) {
    const half = this.picture / 2;
    const inside = (i) => Math.abs(this.screenX(i) - x) <= half && Math.abs(this.screenY(i) - y) <= half;
    const found = this.page.pictures ? this.pictured().find(inside) : undefined;
    return found ?? this.nearest(x, y, (right, down) => (right * right + down * down <= NEAR * NEAR ? 1 : 0));
  }

  // The shown image with the least distance over `weight(right, down)`, of those with a weight above 0; or -1.
  nearest(x, y, weight) {
    let [best, least] = [-1, Infinity];
    const side = this.unit * this.view.zoom;
    const placeX = this.view.x + (x - this.width / 2) / side, placeY = this.view.y - (y - this.height / 2) / side;
    for (let i = 0; i < this.page.count; i++) {
      if (!this.page.shown[i]) continue;
      const right = (this.x[i] - placeX) * side, down = (placeY - this.y[i]) * side;
      const w = weight(right, down);
      const distance = w > 0 ? (right * right + down * down) / (w * w) : Infinity;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  // ----------------------------------------------------------------------------------------------------------- pictures

  // The side of a picture on the map in pixels: it grows more slowly than the map.
  get picture() {
    const base = Math.min(44, Math.max(26, Math.min(this.width, this.height) / 20));
    return Math.round(Math.min(120, base * Math.max(0.8, this.view.zoom) ** 0.45));
  }

  // The images that are drawn as pictures: as many as do not cover each other, the pinned ones and their neighbours
  // first. They depend on the zoom and not on the place, so that none comes or goes while the map is moved.
  pictured() {
    const { page, view, picture } = this;
    const key = [view.zoom, picture, page.version, this.unit, ...page.pins].join();
    if (key === this.picturedKey) return this.picturedImages;
    const side = picture + 2, scale = (this.unit * view.zoom) / side; // places in sides of a picture
    const columns = Math.ceil(scale) + 3;
    const taken = new Map(); // a square of one side holds one picture's middle at most
    const free = (x, y, cell) => {
      for (const near of [cell, cell - 1, cell + 1, cell - columns, cell + columns, cell - columns - 1,
        cell - columns + 1, cell + columns - 1, cell + columns + 1]) {
        const other = taken.get(near);
        if (other !== undefined && Math.abs(this.x[other] * scale - x) < 1 && Math.abs(this.y[other] * scale - y) < 1)
          return false;
      }
      return true;
    };
    const place = (i) => {
      if (!page.shown[i]) return false;
      const x = this.x[i] * scale, y = this.y[i] * scale;
      const cell = (Math.floor(y) + 1) * columns + Math.floor(x) + 1;
      if (!free(x, y, cell)) return false;
      taken.set(cell, i);
      return true;
    };
    this.picturedImages = [...this.related(), ...page.order].filter(place);
    this.picturedKey = key;
    return this.picturedImages;
  }

  // The pinned images and then their neighbours.
  related() {
    return [...this.page.pins, ...this.page.pins.flatMap((pin) => this.neighbours[pin])];
  }

  // ------------------------------------------------------------------------------------------------------------ drawing

  // A canvas without anything on it, whose unit is a place on the screen.
  begin(number) {
    const c = this.canvases[number].getContext("2d");
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, c.canvas.width, c.canvas.height);
    const [right, down] = number ? [0, 0] : this.margins;
    c.setTransform(this.ratio, 0, 0, this.ratio, right * this.ratio, down * this.ratio);
    return c;
  }

  get radius() {
    const { count } = this.page;
    return Math.min(8, (count > 5000 ? 2.4 : count > 1200 ? 3 : 4) * Math.max(1, this.view.zoom) ** 0.3);
  }

  drawPoints() {
    const { page, ratio } = this;
    const c = this.begin(0);
    const marks = page.marks(this.radius, ratio);
    const pale = page.pins.length > 0;
    const pictured = page.pictures ? this.pictured() : [];
    const points = Uint8Array.from(page.shown);
    for (const i of pictured) points[i] = 0;
    // Whole device pixels: a mark between them would be computed anew for each point.
    const within = c.getTransform();
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.globalAlpha = pale ? 0.4 : page.pictures ? 0.6 : 1;
    const side = this.unit * this.view.zoom * ratio, half = marks[0].width / 2;
    const left = within.e + (this.width / 2) * ratio - this.view.x * side - half;
    const top = within.f + (this.height / 2) * ratio + this.view.y * side - half;
    const { width: right, height: bottom } = c.canvas;
    for (const i of page.order) {
      const x = left + this.x[i] * side, y = top - this.y[i] * side;
      if (points[i] && x > -2 * half && y > -2 * half && x < right && y < bottom)
        c.drawImage(marks[page.labels[i]], Math.round(x), Math.round(y));
    }
    c.setTransform(within);
    const above = new Set(this.related()); // drawn by drawAbove
    for (const i of pictured) if (!above.has(i)) this.drawPicture(c, i, { alpha: pale ? 0.25 : 1 });
    this.drawn = { x: this.view.x, y: this.view.y, zoom: this.view.zoom };
    this.shift();
  }

  // A picture with the colour of its class as frame, where there are classes.
  drawPicture(c, i, { colour = this.page.colourOf(i), line = 1.5, dashes = [], alpha = 1 } = {}) {
    const x = this.screenX(i), y = this.screenY(i), side = this.picture;
    const [right, down] = this.margins;
    if (x < -side - right || y < -side - down || x > this.width + right + side || y > this.height + down + side) return;
    const [width, height] = this.page.sizeIn(i, side - 2 * line);
    c.globalAlpha = 1;
    c.fillStyle = this.page.edge; // no point shines through a pale one
    c.fillRect(x - width / 2, y - height / 2, width, height);
    c.globalAlpha = alpha;
    this.page.drawImage(c, i, x - width / 2, y - height / 2, width, height);
    if (!colour) return;
    c.lineWidth = line;
    c.strokeStyle = colour;
    c.setLineDash(dashes);
    c.strokeRect(x - width / 2 - line / 2, y - height / 2 - line / 2, width + line, height + line);
    c.setLineDash([]);
  }

  drawRing(c, i, colour, radius, line = 2) {
    c.beginPath();
    c.arc(this.screenX(i), this.screenY(i), radius, 0, 2 * Math.PI);
    c.lineWidth = line;
    c.strokeStyle = colour;
    c.stroke();
  }

  // Lines from the pinned images to their neighbours, these images, and what the pointer is on.
  drawAbove() {
    const { page } = this;
    const c = this.begin(1);
    const shown = (i) => page.shown[i];
    const pairs = page.pins.filter(shown).flatMap((pin) =>
      this.neighbours[pin].filter(shown).map((other) => [pin, other, page.frame(pin, other)]));
    for (const [pin, other, { colour, dashes }] of pairs) {
      c.beginPath();
      c.moveTo(this.screenX(pin), this.screenY(pin));
      c.lineTo(this.screenX(other), this.screenY(other));
      c.lineWidth = 1.5;
      c.strokeStyle = colour;
      c.setLineDash(dashes);
      c.stroke();
    }
    c.setLineDash([]);
    const pictured = new Set(page.pictures ? this.pictured() : []);
    const mark = (i, { colour, dashes }, line) => {
      if (pictured.has(i)) return this.drawPicture(c, i, { colour, line, dashes });
      const point = page.marks(this.radius, this.ratio)[page.labels[i]], side = point.width / this.ratio;
      c.drawImage(point, this.screenX(i) - side / 2, this.screenY(i) - side / 2, side, side);
      return this.drawRing(c, i, colour, this.radius + 2.5, line - 0.5);
    };
    for (const [, other, frame] of pairs.reverse()) mark(other, frame, 2);
    for (const pin of page.pins.filter(shown)) mark(pin, page.pinFrame, 3.5);
    if (page.hovered < 0 || !shown(page.hovered)) return;
    if (pictured.has(page.hovered)) this.drawPicture(c, page.hovered, { colour: page.accent, line: 3 });
    else this.drawRing(c, page.hovered, page.accent, this.radius + 5, 2.5);
  }
}
