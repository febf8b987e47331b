const tip = document.getElementById("tip"), [image, text] = tip.children;
function show(event) {
  const point = event.target.closest("circle");
  tip.hidden = !point;
  if (!point) return;
  image.src = point.dataset.image;
  text.textContent = point.dataset.text;
  tip.style.left = Math.min(event.clientX + 12, innerWidth - 160) + "px";
  tip.style.top = Math.min(event.clientY + 12, innerHeight - 190) + "px";
}
for (const kind of ["pointermove", "pointerdown"]) addEventListener(kind, show);
