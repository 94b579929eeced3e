// The map: features in the plane, those whose directions are near each other near each other, on one canvas.
"use strict";

const MAP_SIDE = 65535; // places are whole numbers 0 … this
const CLOSEST = 80; // zoom; 1 shows the whole map
const ZOOM_STEP = 1.6;
const LEVELS = 24; // colours between a scale's ends
const CELLS = 128; // of the grid that finds the feature under the pointer, each way
const REACH = { mouse: 9, pen: 9, touch: 22 }; // pixels from which a feature is found
const SLOP = 5; // pixels that a press may move and still be a click
const LABELS = 28; // names in view
const LABELS_FROM = 1.8; // the zoom from which on well-scored features are named
const EDGE = 24; // pixels, more than twice the largest radius
const RAISED = 1.5; // how much larger highlighted features are
const SEEN = 2000; // highlighted features that are outlined
const FEW = 40; // highlighted features that are named at any zoom

let mapLeft = null; // zoom, place, colour and size, as the reader left them
let openedLast = null; // the feature that was open before

addEventListener("hashchange", ({ oldURL }) => {
  const [, index] = /#(\d+)$/.exec(oldURL) ?? [];
  if (index !== undefined) openedLast = Number(index);
});

/** What points can be coloured by. */
const COLOURS = {
  density: { title: "how often", format: percent },
  max: { title: "how strongly", format: short },
  score: { title: "explanation score", format: short },
};

/** Levels 0 … LEVELS − 1 of a column's values by rank, so that every colour is as common as any other; equal values share
 *  one, those without a value have 255. `ticks`: the values at the scale's beginning, middle and end. */
function levelsOf(values, alive) {
  const sorted = Float64Array.from(alive.filter((i) => values[i] !== null), (i) => values[i]).sort();
  const rank = new Map(); // value → mean rank
  for (let low = 0, high; low < sorted.length; low = high) {
    for (high = low; sorted[high] === sorted[low]; high++);
    rank.set(sorted[low], (low + high) / 2 / sorted.length);
  }
  const level = new Uint8Array(values.length).fill(255);
  for (const i of alive) if (values[i] !== null) level[i] = Math.min(LEVELS - 1, Math.floor(rank.get(values[i]) * LEVELS));
  return { level, ticks: [0, 0.5, 1].map((share) => sorted[Math.round(share * (sorted.length - 1))] ?? null) };
}

/** Finds the point nearest to a place: points sorted into the cells of a grid. */
function pointFinder(x, y, alive) {
  const cell = (value) => Math.max(0, Math.min(CELLS - 1, Math.floor((value / (MAP_SIDE + 1)) * CELLS)));
  const start = new Uint32Array(CELLS * CELLS + 1), inside = new Uint32Array(alive.length);
  for (const i of alive) start[cell(y[i]) * CELLS + cell(x[i]) + 1]++;
  for (let c = 0; c < CELLS * CELLS; c++) start[c + 1] += start[c];
  const next = start.slice();
  for (const i of alive) inside[next[cell(y[i]) * CELLS + cell(x[i])]++] = i;
  return (px, py, radius, fits) => {
    let best = null, least = radius * radius;
    for (let row = cell(py - radius); row <= cell(py + radius); row++)
      for (let n = start[row * CELLS + cell(px - radius)]; n < start[row * CELLS + cell(px + radius) + 1]; n++) {
        const i = inside[n];
        const far = (x[i] - px) ** 2 + (y[i] - py) ** 2;
        if (far < least && fits(i)) [best, least] = [i, far];
      }
    return best;
  };
}

/** The point nearest to `from` among those that lie rather in the direction (dx, dy) than beside it; null for none. */
function nextToward(x, y, points, from, dx, dy) {
  let best = null, least = Infinity;
  for (const i of points) {
    const along = (x[i] - x[from]) * dx + (y[i] - y[from]) * dy;
    const beside = Math.abs((x[i] - x[from]) * dy) + Math.abs((y[i] - y[from]) * dx);
    if (i === from || along <= 0 || beside > along) continue;
    const far = along * along + beside * beside;
    if (far < least) [best, least] = [i, far];
  }
  return best;
}

/** Colours as pixels: red in the lowest byte, opaque. */
function pixelsOf(colours) {
  const canvas = make("canvas", { width: colours.length, height: 1 }), pen = canvas.getContext("2d", { willReadFrequently: true });
  colours.forEach((colour, n) => {
    pen.fillStyle = colour;
    pen.fillRect(n, 0, 1, 1);
  });
  return new Uint32Array(pen.getImageData(0, 0, colours.length, 1).data.buffer);
}

/** A disc on an image `width` pixels wide: steps from its middle pixel, and how much of each pixel there it covers, of 256. */
function discOf(radius, width) {
  const reach = Math.ceil(radius), steps = [], cover = [];
  for (let row = -reach; row <= reach; row++)
    for (let column = -reach; column <= reach; column++) {
      const share = Math.round(256 * Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(row, column))));
      if (!share) continue;
      steps.push(row * width + column);
      cover.push(share);
    }
  return { steps: Int32Array.from(steps), cover: Uint16Array.from(cover) };
}

/** Lays a disc of a colour over the pixel `at`; a canvas's own shapes take some ten times as long for tens of thousands. */
function stamp(pixels, at, { steps, cover }, colour) {
  const redBlue = colour & 0xff00ff, green = colour & 0xff00;
  for (let n = 0; n < steps.length; n++) {
    const share = cover[n], under = pixels[at + steps[n]];
    if (share === 256) pixels[at + steps[n]] = colour;
    else {
      const mixed = (redBlue * share + (under & 0xff00ff) * (256 - share)) >>> 8;
      const mixedGreen = (green * share + (under & 0xff00) * (256 - share)) >>> 8;
      pixels[at + steps[n]] = 0xff000000 | (mixed & 0xff00ff) | (mixedGreen & 0xff00);
    }
  }
}

async function mapView(catalog) {
  const { overview, features, list } = catalog;
  const wanted = awaited();
  const opening = openedLast === null ? null : record(openedLast, overview.shard).catch(() => null);
  const { x, y } = await load("map");
  const nearest = (await opening)?.neighbours.map(([i]) => i).filter((i) => x[i] !== null) ?? []; // the map is whole without
  if (!wanted()) return [];
  const alive = Uint32Array.from(x.keys()).filter((i) => x[i] !== null);
  const find = pointFinder(x, y, alive);
  const columns = Object.keys(COLOURS).filter((column) => column !== "score" || overview.scored);
  const often = levelsOf(features.density, alive).level;
  const byScore = Array.from(alive).sort((a, b) => (features.score[b] ?? -1) - (features.score[a] ?? -1) || features.density[b] - features.density[a]);
  const landmarks = overview.examples.filter((i) => x[i] !== null);
  const opened = openedLast !== null && (x[openedLast] ?? null) !== null ? openedLast : null;
  const state = {
    zoom: 1, x: MAP_SIDE / 2, y: MAP_SIDE / 2, // what is in the middle
    colour: "density", size: "equal",
    ...mapLeft,
    hovered: null, focused: null, opened, neighbours: opened === null ? [] : nearest,
  };
  const returning = mapLeft !== null;
  let kept = null; // Set of the features that the list has searched or filtered; null: all
  let points = alive; // those of them that have a place
  let levels, colours, image = null, named = []; // image, named: the points and names of this part of the map, null: not yet
  let frame = 0, width = 1, height = 1;

  // What there is to see

  const canvas = make("canvas", {
    tabIndex: 0,
    role: "application",
    "aria-roledescription": "map",
    "aria-label": `Map of ${whole(alive.length)} features`,
    "aria-describedby": "map-keys",
  });
  const pen = canvas.getContext("2d");
  const card = make("a", { className: "map-card", hidden: true, tabIndex: -1 });
  const spoken = make("p", { className: "unseen", role: "status", "aria-live": "polite" });
  const highlight = make("p", { className: "map-highlight", hidden: true });
  const choice = (label, of, options) => {
    const select = make("select", {}, ...Object.entries(options).map(([value, title]) => make("option", { value }, title)));
    select.value = state[of];
    select.onchange = () => {
      state[of] = select.value;
      recolour();
    };
    return make("label", {}, `${label} `, select);
  };
  const button = (sign, label, act) => {
    const element = make("button", { type: "button", title: label, "aria-label": label }, sign);
    element.onclick = act;
    return element;
  };
  const ticks = [0, 1, 2].map(() => make("small", {}));
  const unknown = make("span", { className: "map-unknown" }, "no score");
  const legend = make("p", { className: "map-legend", "aria-label": "Colours: lowest, middle and highest value", role: "group" }, ...ticks);
  const plane = make(
    "div",
    { className: "map-plane" },
    canvas,
    card,
    make(
      "div",
      { className: "map-zoom", role: "group", "aria-label": "Zoom" },
      button("+", "Zoom in", () => zoomBy(ZOOM_STEP)),
      button("−", "Zoom out", () => zoomBy(1 / ZOOM_STEP)),
      button("⤢", "Show the whole map", () => go(1, MAP_SIDE / 2, MAP_SIDE / 2)),
    ),
    highlight,
  );

  // Places: of the map to pixels and back

  const unit = () => ((Math.min(width, height) - 32) / MAP_SIDE) * state.zoom; // pixels per step of the map
  const across = (i) => (x[i] - state.x) * unit() + width / 2;
  const down = (i) => (y[i] - state.y) * unit() + height / 2;
  const visibleHere = (i) => 2 * Math.abs(x[i] - state.x) * unit() <= width && 2 * Math.abs(y[i] - state.y) * unit() <= height;
  const pick = (px, py, radius) => {
    const [mx, my, reach] = [(px - width / 2) / unit() + state.x, (py - height / 2) / unit() + state.y, radius / unit()];
    return find(mx, my, reach, (i) => !kept || kept.has(i)) ?? find(mx, my, reach, () => true);
  };

  /** Shows a place at a zoom, within the map. */
  function go(zoom, cx, cy) {
    const inside = (value) => Math.max(0, Math.min(MAP_SIDE, value));
    [state.zoom, state.x, state.y] = [Math.max(1, Math.min(CLOSEST, zoom)), inside(cx), inside(cy)];
    if (state.zoom === 1) [state.x, state.y] = [MAP_SIDE / 2, MAP_SIDE / 2];
    mapLeft = { zoom: state.zoom, x: state.x, y: state.y, colour: state.colour, size: state.size };
    repaint();
  }

  /** Shows the part of the map that holds some features. */
  function around(some) {
    const [left, right, top, bottom] = [Math.min(...some.map((i) => x[i])), Math.max(...some.map((i) => x[i])), Math.min(...some.map((i) => y[i])), Math.max(...some.map((i) => y[i]))];
    const zoom = (0.8 / unit()) * state.zoom * Math.min(width / (right - left + 1), height / (bottom - top + 1));
    go(Math.min(zoom, 8), (left + right) / 2, (top + bottom) / 2);
  }

  /** Zooms so that what lies at (px, py) stays there: by default the feature in focus, else the middle. */
  function zoomBy(factor, px = state.focused === null ? width / 2 : across(state.focused), py = state.focused === null ? height / 2 : down(state.focused)) {
    const before = unit();
    const [mx, my] = [(px - width / 2) / before + state.x, (py - height / 2) / before + state.y];
    const zoom = Math.max(1, Math.min(CLOSEST, state.zoom * factor));
    const after = (before / state.zoom) * zoom;
    go(zoom, mx - (px - width / 2) / after, my - (py - height / 2) / after);
  }

  const pan = (dx, dy) => go(state.zoom, state.x - dx / unit(), state.y - dy / unit());

  // Drawing

  const redraw = () => (frame ||= requestAnimationFrame(draw));
  const repaint = () => {
    image = null;
    redraw();
  };

  /** Reads the colours of the style sheet again, as they are under the theme of the moment. */
  function recolour() {
    const column = columns.includes(state.colour) ? state.colour : columns[0];
    const { level, ticks: values } = levelsOf(features[column], alive);
    levels = level;
    values.forEach((value, n) => (ticks[n].textContent = COLOURS[column].format(value)));
    unknown.hidden = !alive.some((i) => levels[i] === 255);
    const probe = make("i", { hidden: true });
    plane.append(probe);
    const read = (colour) => {
      probe.style.setProperty("color", colour);
      return getComputedStyle(probe).color;
    };
    const mixed = (_, n) => {
      const half = (2 * n) / (LEVELS - 1); // of the scale: 0 … 1 from low to middle, … 2 to high
      const [from, to] = half < 1 ? ["low", "middle"] : ["middle", "high"];
      return read(`color-mix(in oklab, var(--map-${to}) ${100 * (half - (half < 1 ? 0 : 1))}%, var(--map-${from}))`);
    };
    colours = { font: getComputedStyle(probe).fontFamily };
    for (const name of ["paper", "ink", "soft", "line", "accent"]) colours[name] = read(`var(--${name})`);
    const bright = [...Array.from({ length: LEVELS }, mixed), colours.soft]; // the last one: without a value
    const dim = bright.map((colour) => read(`color-mix(in oklab, ${colour} 30%, var(--paper))`));
    const [paper, faded, ...scales] = pixelsOf([colours.paper, colours.line, ...bright, ...dim]);
    Object.assign(colours, { pixels: { paper, faded, bright: scales.slice(0, LEVELS + 1), dim: scales.slice(LEVELS + 1) } });
    probe.remove();
    go(state.zoom, state.x, state.y);
  }

  /** The radius of points, by how often they fire: one number per level. */
  function radii() {
    const crowd = Math.max(0.9, Math.min(2.6, (0.3 * Math.min(width, height)) / Math.sqrt(alive.length)));
    const radius = Math.min(5, crowd * state.zoom ** 0.4);
    return Array.from({ length: LEVELS }, (_, level) => (state.size === "equal" ? radius : radius * (0.5 + (1.2 * level) / LEVELS)));
  }
  const radiusOf = (i) => radii()[often[i]] * (kept?.has(i) ? RAISED : 1);

  /** The points of this part of the map, as an image that is wider than the canvas by EDGE on each side, for discs that cross it. */
  function painted() {
    const ratio = canvas.width / width, edge = Math.ceil(EDGE * ratio);
    const picture = pen.createImageData(canvas.width + 2 * edge, canvas.height + 2 * edge);
    const pixels = new Uint32Array(picture.data.buffer), wide = picture.width, { paper, faded, bright, dim } = colours.pixels;
    pixels.fill(paper);
    const step = unit() * ratio, [ox, oy] = [wide / 2 - state.x * step, picture.height / 2 - state.y * step];
    const each = (all, larger, scale) => {
      const discs = radii().map((radius) => discOf(radius * larger * ratio, wide));
      for (const i of all) {
        const px = Math.round(x[i] * step + ox), py = Math.round(y[i] * step + oy);
        if (px < edge / 2 || py < edge / 2 || px >= wide - edge / 2 || py >= picture.height - edge / 2) continue;
        stamp(pixels, py * wide + px, discs[often[i]], scale ? scale[Math.min(levels[i], LEVELS)] : faded);
      }
    };
    if (kept) each(alive, 1, null);
    each(points, kept ? RAISED : 1, state.opened === null || kept ? bright : dim);
    if (state.opened !== null) each([state.opened, ...state.neighbours], RAISED, bright);
    return picture;
  }

  function draw() {
    frame = 0;
    if (!image) [image, named] = [painted(), names()];
    pen.putImageData(image, (canvas.width - image.width) / 2, (canvas.height - image.height) / 2);
    const ratio = canvas.width / width;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (signposts()) rings(landmarks.filter(visibleHere), (i) => radiusOf(i) + 1.5, 1.5, colours.ink);
    if (kept && points.length <= SEEN) rings(points.filter(visibleHere), radiusOf, 1, colours.ink);
    relations();
    write();
    rings([state.focused, state.hovered].filter((i) => i !== null), (i) => radiusOf(i) + 3, 2, colours.ink);
    place();
    Object.assign(canvas.dataset, {
      zoom: state.zoom.toFixed(2),
      highlighted: kept ? points.length : "all",
      hovered: state.hovered ?? "",
      focused: state.focused ?? "",
      opened: state.opened ?? "",
    });
  }

  function rings(all, radiusOf, thick, colour) {
    pen.beginPath();
    for (const i of all) {
      const r = radiusOf(i);
      pen.moveTo(across(i) + r, down(i));
      pen.arc(across(i), down(i), r, 0, 2 * Math.PI);
    }
    pen.lineWidth = thick;
    pen.strokeStyle = colour;
    pen.stroke();
  }

  /** The feature that was open, and lines to those nearest to it. */
  function relations() {
    if (state.opened === null) return;
    pen.beginPath();
    for (const i of state.neighbours) {
      pen.moveTo(across(state.opened), down(state.opened));
      pen.lineTo(across(i), down(i));
    }
    pen.lineWidth = 1;
    pen.strokeStyle = colours.accent;
    pen.stroke();
    rings(state.neighbours, () => 4, 1.5, colours.accent);
    rings([state.opened], () => 8, 2.5, colours.accent);
  }

  /** Whether the features worth a first look are set off: where nothing else is. */
  const signposts = () => !kept && state.opened === null;

  /** Names [text, left, middle], where there is room: of the open feature, the highlighted ones if few, of
   *  those worth a first look, the well-scored. */
  function names() {
    const first = [state.opened, ...state.neighbours, ...(points.length <= FEW ? points : []), ...(signposts() ? landmarks : [])].filter((i) => i !== null);
    const rest = state.zoom >= LABELS_FROM ? byScore : [];
    const found = [], taken = [];
    pen.font = `12px ${colours.font}`;
    for (const i of first.concat(rest)) {
      if (found.length >= LABELS) break;
      if (!visibleHere(i) || !features.label[i] || (kept && !kept.has(i) && !first.includes(i))) continue;
      const letters = [...nameOf(features, i).split(" · ", signposts() && landmarks.includes(i) ? 2 : undefined).join(" · ")], text = letters.length > 30 ? `${letters.slice(0, 29).join("")}…` : letters.join("");
      const left = across(i) + (i === state.opened ? 14 : 9), middle = down(i);
      const box = [left - 14, middle - 10, left + pen.measureText(text).width + 6, middle + 10];
      if (box[2] > width || taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
      taken.push(box);
      found.push([text, left, middle]);
    }
    return found;
  }

  function write() {
    Object.assign(pen, { font: `12px ${colours.font}`, textBaseline: "middle", lineWidth: 4, lineJoin: "round", strokeStyle: colours.paper, fillStyle: colours.ink });
    for (const [text, left, middle] of named) {
      pen.strokeText(text, left, middle);
      pen.fillText(text, left, middle);
    }
  }

  /** The card beside the feature under the pointer or in focus. */
  function place() {
    const i = state.hovered ?? state.focused;
    card.hidden = i === null || !visibleHere(i);
    if (card.hidden) return;
    if (card.dataset.feature !== String(i)) {
      card.dataset.feature = i;
      card.href = `#${i}`;
      card.replaceChildren(...described(i));
    }
    const left = across(i) + (across(i) + 16 + card.offsetWidth > width ? -16 - card.offsetWidth : 16);
    const top = down(i) + (down(i) + 16 + card.offsetHeight > height ? -16 - card.offsetHeight : 16);
    card.style.setProperty("left", `${Math.max(8, Math.min(left, width - card.offsetWidth - 8))}px`);
    card.style.setProperty("top", `${Math.max(8, top)}px`);
  }

  function described(i) {
    const score = features.score[i] === null ? "" : ` · score ${short(features.score[i])}`;
    return [
      make("b", {}, make("span", { className: "index" }, `#${i}`), " ", make("bdi", {}, nameOf(features, i))),
      make("small", {}, `fires on ${percent(features.density[i])} of tokens · up to ${short(features.max[i])}${score}`),
    ];
  }

  // Pointing

  const held = new Map(); // pointer id → where it is
  let moved = false; // whether the press has become a drag
  const where = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };
  const open = (i) => (location.hash = `#${i}`);
  const hover = (i) => {
    if (i === state.hovered) return;
    state.hovered = i;
    canvas.style.setProperty("cursor", i === null ? "" : "pointer");
    redraw();
  };

  canvas.onpointerdown = (event) => {
    if (event.button > 0) return;
    if (!held.size) moved = false;
    held.set(event.pointerId, where(event));
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    const [px, py] = where(event), before = held.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "touch") hover(pick(px, py, REACH.mouse));
      return;
    }
    const [other] = [...held].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    if (!other && !moved && Math.hypot(px - before[0], py - before[1]) < SLOP) return;
    moved = true;
    hover(null);
    held.set(event.pointerId, [px, py]);
    if (other) {
      const apart = ([ax, ay]) => Math.hypot(ax - other[0], ay - other[1]) || 1;
      pan((px - before[0]) / 2, (py - before[1]) / 2);
      zoomBy(apart([px, py]) / apart(before), (px + other[0]) / 2, (py + other[1]) / 2);
    } else pan(px - before[0], py - before[1]);
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    if (!held.delete(event.pointerId) || moved || event.type === "pointercancel") return;
    const i = pick(...where(event), REACH[event.pointerType] ?? REACH.mouse);
    if (i === null) focus(null);
    else if (event.pointerType === "touch" && i !== state.focused) focus(i); // a finger looks first
    else open(i);
  };
  canvas.onpointerleave = () => hover(null);
  canvas.ondblclick = (event) => zoomBy(event.shiftKey ? 1 / ZOOM_STEP ** 2 : ZOOM_STEP ** 2, ...where(event));
  const wheel = (event) => {
    event.preventDefault();
    const pixels = event.deltaY * [1, 24, height][event.deltaMode];
    const [px, py] = where(event);
    zoomBy(Math.exp(-Math.max(-240, Math.min(240, pixels)) * (event.ctrlKey ? 0.01 : 0.002)), px, py);
    hover(pick(px, py, REACH.mouse));
  };
  canvas.addEventListener("wheel", wheel, { passive: false });

  // Keys

  /** Puts a feature in focus, in view, and says what it is. */
  function focus(i) {
    [state.focused, state.hovered] = [i, null];
    card.classList.toggle("map-pinned", i !== null);
    if (i !== null) {
      const [px, py] = [across(i), down(i)];
      if (px < 40 || py < 40 || px > width - 40 || py > height - 40) go(state.zoom, x[i], y[i]);
      spoken.textContent = described(i).map((part) => part.textContent).join(": ");
    }
    redraw();
  }

  canvas.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const act = {
      "+": () => zoomBy(ZOOM_STEP),
      "=": () => zoomBy(ZOOM_STEP),
      "-": () => zoomBy(1 / ZOOM_STEP),
      0: () => go(1, MAP_SIDE / 2, MAP_SIDE / 2),
      Enter: () => state.focused !== null && open(state.focused),
      Escape: lift,
    }[event.key];
    if (!arrow && !act) return;
    event.preventDefault();
    if (act) act();
    else if (event.shiftKey) pan((-arrow[0] * width) / 4, (-arrow[1] * height) / 4);
    else step(...arrow);
  };

  function step(dx, dy) {
    if (!points.length) return;
    const start = state.focused ?? state.opened;
    if (start === null) {
      const far = (i) => (x[i] - state.x) ** 2 + (y[i] - state.y) ** 2;
      focus(points.reduce((best, i) => (far(i) < far(best) ? i : best)));
      return;
    }
    const next = nextToward(x, y, points, start, dx, dy);
    if (next === null) spoken.textContent = "No feature further that way.";
    else focus(next);
  }

  // What changes around the map

  /** Takes over what the list has searched and filtered, and says what is highlighted. */
  function listed() {
    kept = list.shown();
    points = kept ? alive.filter((i) => kept.has(i)) : alive;
    let said = null;
    if (kept) said = points.length ? `${whole(points.length)} of ${whole(alive.length)} features highlighted` : "No feature fits the search.";
    else if (state.opened !== null) said = `#${state.opened} and the ${whole(state.neighbours.length)} features nearest to it`;
    highlight.hidden = said === null;
    if (said) highlight.replaceChildren(make("span", {}, said), button("Show all", "Show all features", kept ? list.clear : lift));
    repaint();
  }

  /** Forgets the feature that was open. */
  function lift() {
    [state.opened, openedLast, state.neighbours] = [null, null, []];
    focus(null);
    canvas.focus({ preventScroll: true });
    listed();
  }

  function resized() {
    [width, height] = [plane.clientWidth || 1, plane.clientHeight || 1];
    const ratio = Math.min(devicePixelRatio || 1, 3);
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    image = null;
    draw();
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themed = new MutationObserver(recolour), sized = new ResizeObserver(() => (colours ? resized() : started()));

  /** The plane is in the document and has a size: colours can be read and features found. */
  function started() {
    recolour();
    listed();
    if (opened !== null && (!returning || !visibleHere(opened))) around([opened, ...nearest]);
    resized();
  }

  sized.observe(plane);
  themed.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  dark.addEventListener("change", recolour);
  const unlisten = list.listen(listed);
  onLeave(() => {
    sized.disconnect();
    themed.disconnect();
    dark.removeEventListener("change", recolour);
    unlisten();
    cancelAnimationFrame(frame);
  });
  return [
    make(
      "div",
      { className: "map-head" },
      make("h2", {}, "Map"),
      make(
        "div",
        { className: "map-choices" },
        choice("Colour", "colour", Object.fromEntries(columns.map((column) => [column, COLOURS[column].title]))),
        choice("Size", "size", { equal: "equal", density: "how often" }),
        unknown,
        legend,
      ),
      make("p", { className: "facts" }, "Each point is a feature. Neighbours push the model in similar directions; how far apart others lie says little."),
    ),
    plane,
    spoken,
    make(
      "p",
      { id: "map-keys", className: "map-keys" },
      "Drag to move, scroll to zoom · arrow keys walk from feature to feature, ",
      make("kbd", {}, "Enter"),
      " opens · ",
      ...["+", "−", "0"].flatMap((key) => [make("kbd", {}, key), " "]),
      "zoom · ",
      make("kbd", {}, "Shift"),
      " with arrows moves",
    ),
  ];
}
