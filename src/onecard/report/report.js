// Values under the pointer; without this script the page only lacks them.
document.querySelectorAll("svg[data-frame]").forEach((svg) => {
  const line = svg.querySelector(".line");
  if (!line) return;
  const [left, right, bottom, top, last, low, high, isLog] = svg.dataset.frame.split(" ").map(Number);
  const points = line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number));
  const make = (name, kind) => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", name);
    part.setAttribute("class", kind);
    part.style.display = "none";
    return svg.appendChild(part);
  };
  const cursor = make("path", "cursor"), tip = make("text", "tip");
  const valueAt = (y) => {
    const share = (y - bottom) / (top - bottom);
    return isLog ? low * Math.pow(high / low, share) : low + share * (high - low);
  };
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const [x, y] = points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    const step = Math.round(((x - left) / (right - left)) * last);
    cursor.setAttribute("d", `M${x} ${top}V${bottom}`);
    tip.textContent = `${step.toLocaleString()}: ${Number(valueAt(y).toPrecision(3))}`;
    tip.setAttribute("x", x > (left + right) / 2 ? x - 6 : x + 6);
    tip.setAttribute("y", top + 10);
    tip.setAttribute("text-anchor", x > (left + right) / 2 ? "end" : "start");
    cursor.style.display = tip.style.display = "";
  });
  svg.addEventListener("pointerleave", () => { cursor.style.display = tip.style.display = "none"; });
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
