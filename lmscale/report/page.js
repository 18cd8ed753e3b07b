// Shows, under each chart, the values at the pointer; the last ones where it is elsewhere.
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), output = figure.querySelector("output");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", data.top);
  cursor.setAttribute("y2", data.bottom);
  const shown = (value) => value === null ? "not finite"
    : Math.abs(value) >= 1e5 ? value.toLocaleString("en", { maximumSignificantDigits: 6 }) : String(value);
  const nearest = (places, x) => {
    let low = 0, high = places.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - places[low - 1] < places[low] - x ? low - 1 : low;
  };
  const tell = (x) => {
    const parts = data.series.filter((line) => line.at.length).map((line) => {
      const index = x === null ? line.at.length - 1 : nearest(line.at, x);
      if (x !== null) { cursor.setAttribute("x1", line.at[index]); cursor.setAttribute("x2", line.at[index]); }
      const name = data.series.length > 1 ? `${line.name} ` : "";
      return `${name}${shown(line.y[index])} at ${shown(line.x[index])}`;
    });
    const near = x === null ? [] : data.marks.filter(([at]) => Math.abs(at - x) < 3).map(([, text]) => text);
    output.textContent = [`${parts.join("; ")} (${data.x})`, ...near].join(" · ");
  };
  svg.addEventListener("pointermove", (event) => {
    svg.append(cursor);
    tell(new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x);
  });
  svg.addEventListener("pointerleave", () => { cursor.remove(); tell(null); });
  tell(null);
}
