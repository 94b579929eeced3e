// Bars over a range of numbers, of which a reader selects a part: by dragging, by touch, or with the arrow keys.
"use strict";

const SNUG = 1e-9; // of a bar's width: how far below its round number a bar begins, so that rounding leaves nothing between two

/** A histogram of `values` (numbers in [low, high]; others are left out) that a range can be brushed on.
 *
 *  `log`: whether bars are equally wide in the logarithm; `root`: whether their heights are square roots of the counts,
 *  where one bar would dwarf all others; `label`: what is counted, in words; `format`: a number as
 *  text; `onSelect(low, high)`: called with the ends of a selection, with two nulls when it is lifted.
 *
 *  `setSelection(low, high)` shows a range without calling `onSelect`; `setShown(kept)` pales what is not
 *  kept, a function from the place in `values` to whether it is; null where everything is. */
function brushPlot({ values, low, high, bins, log = false, root = false, label, format, onSelect }) {
  const scale = log ? Math.log : (x) => x, back = log ? Math.exp : (x) => x;
  const width = (scale(high) - scale(low)) / bins;
  const edges = Float64Array.from({ length: bins + 1 }, (_, i) => (i === 0 ? low : i === bins ? high : back(scale(low) + (i - SNUG) * width)));
  function binOf(x) {
    let i = Math.max(0, Math.min(bins - 1, Math.floor((scale(x) - scale(low)) / width)));
    while (i > 0 && x < edges[i]) i--;
    while (i < bins - 1 && x >= edges[i + 1]) i++;
    return i;
  }
  const places = Int32Array.from(values, (x) => (x !== null && x >= low && x <= high ? binOf(x) : -1));
  const counted = (kept) => {
    const counts = new Uint32Array(bins);
    places.forEach((bin, place) => bin >= 0 && kept(place) && counts[bin]++);
    return counts;
  };
  const counts = counted(() => true);
  const most = Math.max(1, ...counts);
  const height = (count) => (root ? Math.sqrt(count / most) : count / most);
  let selection = null; // [first, last] bar
  let cursor = 0, anchor = 0; // for the keys; the other end for both
  let dragged = false;

  const bars = Array.from(counts, (count) => make("span", { className: "brushable-bar", style: { "--share": height(count), "--shown": height(count) } }));
  const brush = make("span", { className: "brush", hidden: true });
  const readout = make("span", { className: "readout" });
  const area = make(
    "div",
    { className: "brushable", tabIndex: 0, role: "slider", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": bins - 1, "aria-orientation": "horizontal" },
    ...bars, brush,
  );
  const axis = make("div", { className: "axis" }, make("span", {}, format(low)), readout, make("span", {}, format(high)));
  const plot = make("div", { className: "plot" }, area, axis);

  const total = (from, to) => counts.slice(from, to + 1).reduce((sum, count) => sum + count, 0);
  const words = (from, to) => `${format(edges[from])} to ${format(edges[to + 1])}: ${whole(total(from, to))}`;

  function say(pointed = null) {
    area.setAttribute("aria-valuenow", cursor);
    area.setAttribute("aria-valuetext", words(cursor, cursor) + (selection ? `, selected ${words(...selection)}` : ""));
    readout.textContent = pointed !== null ? words(pointed, pointed) : selection ? words(...selection) : "";
  }

  function show() {
    brush.hidden = selection === null;
    plot.classList.toggle("brushed", selection !== null);
    if (selection) {
      brush.style.setProperty("left", `${(100 * selection[0]) / bins}%`);
      brush.style.setProperty("width", `${(100 * (selection[1] + 1 - selection[0])) / bins}%`);
    }
    bars.forEach((bar, i) => bar.classList.toggle("within", selection !== null && i >= selection[0] && i <= selection[1]));
    say();
  }

  function choose(a, b) {
    selection = a === null ? null : [Math.min(a, b), Math.max(a, b)];
    show();
    if (selection === null) return onSelect(null, null);
    onSelect(edges[selection[0]], edges[selection[1] + 1]);
  }

  const at = (event) => {
    const box = area.getBoundingClientRect();
    return Math.max(0, Math.min(bins - 1, Math.floor((bins * (event.clientX - box.left)) / box.width)));
  };
  area.onpointerdown = (event) => {
    if (event.button) return;
    area.setPointerCapture(event.pointerId);
    cursor = anchor = at(event);
    dragged = false;
  };
  area.onpointermove = (event) => {
    const here = at(event);
    if (!area.hasPointerCapture(event.pointerId)) return say(here);
    if (here === cursor) return;
    dragged = true;
    cursor = here;
    choose(anchor, cursor);
  };
  area.onpointerup = () => {
    if (dragged) return;
    const outside = selection !== null && (cursor < selection[0] || cursor > selection[1]);
    if (outside) choose(null); // beside a selection: lifts it
    else choose(cursor, cursor);
  };
  area.onpointerleave = () => say();
  area.onpointercancel = () => (dragged = false);
  area.onkeydown = (event) => {
    const next = { ArrowLeft: cursor - 1, ArrowRight: cursor + 1, Home: 0, End: bins - 1 }[event.key];
    if (next !== undefined) {
      cursor = Math.max(0, Math.min(bins - 1, next));
      if (event.shiftKey) choose(anchor, cursor);
      else say((anchor = cursor));
    } else if (event.key === "Enter" || event.key === " ") choose((anchor = cursor), cursor);
    else if (event.key === "Escape" && selection) choose(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  plot.setSelection = (from, to) => {
    selection = null;
    if (from !== null) {
      const last = binOf(Math.min(to, high));
      selection = [binOf(Math.max(from, low)), last > 0 && to === edges[last] ? last - 1 : last];
    }
    show();
  };
  plot.setShown = (kept) => {
    const shown = kept === null ? counts : counted(kept);
    plot.classList.toggle("partly", kept !== null);
    bars.forEach((bar, i) => bar.style.setProperty("--shown", height(shown[i])));
  };
  show();
  return plot;
}
