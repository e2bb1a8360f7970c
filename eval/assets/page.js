// Values on hover, and where a finger taps: the nearest thing in a figure that has one.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const title of document.querySelectorAll("figure .value > title")) {
  title.parentNode.dataset.value = title.textContent;
  title.remove(); // or the browser would show it, too
}
function nearest(svg, x, y) {
  let found = null, least = 24;
  for (const each of svg.querySelectorAll(".value")) {
    const box = each.getBoundingClientRect();
    const away = Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
    const far = away + Math.hypot((box.left + box.right) / 2 - x, (box.top + box.bottom) / 2 - y) / 1000;
    if (far < least) [found, least] = [each, far];
  }
  return found;
}
function show(event) {
  const svg = event.target.closest ? event.target.closest("figure svg") : null;
  const found = svg && nearest(svg, event.clientX, event.clientY);
  for (const each of document.querySelectorAll(".value.here")) each.classList.remove("here");
  tip.hidden = !found;
  if (!found) return;
  found.classList.add("here");
  tip.textContent = found.dataset.value;
  const box = found.getBoundingClientRect(), room = document.documentElement.clientWidth;
  const left = Math.min(Math.max(8, (box.left + box.right - tip.offsetWidth) / 2), room - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
