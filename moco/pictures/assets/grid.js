"use strict";
// An image is enlarged while the pointer is on it; a click or Enter keeps it until the next one or Escape.
{
  const box = document.getElementById("enlarged"), [image, words] = box.children;
  let kept = null;
  const show = (figure) => {
    box.hidden = !figure;
    if (!figure) return;
    image.src = figure.querySelector("img").src;
    words.textContent = figure.dataset.detail;
    const place = figure.getBoundingClientRect(), own = box.getBoundingClientRect();
    const right = place.right + 8 + own.width < innerWidth;
    box.style.left = Math.max(0, right ? place.right + 8 : place.left - 8 - own.width) + "px";
    box.style.top = Math.max(0, Math.min(place.top, innerHeight - own.height - 8)) + "px";
  };
  const keep = (figure) => show(kept = figure === kept ? null : figure);
  const figureOf = (event) => event.target.closest?.("figure");
  addEventListener("pointermove", (event) => kept || show(figureOf(event)));
  addEventListener("click", (event) => keep(figureOf(event) ?? null));
  addEventListener("keydown", (event) => {
    if (event.key === "Enter") keep(figureOf(event) ?? null);
    if (event.key === "Escape") show(kept = null);
  });
  for (const one of document.querySelectorAll("figure img"))
    one.decode().then(() => one.closest("figure").classList.toggle("large", one.naturalWidth > 108), () => {});
}
