// The list of features: search, filter, sort, and only those rows in the document that can be seen.
"use strict";

const ROW = 40; // pixels
const DECADES = 5; // of density that a row's bar spans
const BEYOND = 8; // rows kept above and below what can be seen

const wordsOf = (text) =>
  text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];

/** The words of texts in order, so that those with a beginning are found without reading the others.
 *  Returns `beginning` → the numbers of the texts that have a word which begins so, each once. */
function byBeginning(texts) {
  const places = new Map(); // word → numbers of texts
  texts.forEach((text, number) => {
    for (const word of new Set(wordsOf(text))) {
      const known = places.get(word);
      if (known) known.push(number);
      else places.set(word, [number]);
    }
  });
  const words = [...places.keys()].sort();
  return (beginning) => {
    let from = 0;
    for (let to = words.length; from < to; ) {
      const middle = (from + to) >> 1;
      if (words[middle] < beginning) from = middle + 1;
      else to = middle;
    }
    const found = new Set();
    for (; from < words.length && words[from].startsWith(beginning); from++) for (const number of places.get(words[from])) found.add(number);
    return found;
  };
}

/** Reads the search data once; returns query → scores (feature → score) as `catalog.search` gives them: share of
 *  activation on matching tokens, ¼ / (1 + rank) of the best matching raised token, 1 for an explanation. */
function searcher({ words, said }) {
  const tokens = byBeginning(words.map(([token]) => token)), sayings = byBeginning(said.map(([, text]) => text));
  let n = 0;
  for (const [, fires, raised] of words)
    for (const flat of [fires, raised]) for (let i = 0; i < flat.length; i += 2) if (flat[i] >= n) n = flat[i] + 1;
  for (const [feature] of said) if (feature >= n) n = feature + 1;
  return (query) => {
    const score = new Float64Array(n);
    for (const word of wordsOf(query)) {
      const best = new Float64Array(n).fill(Infinity);
      for (const number of tokens(word)) {
        const [, fires, raised] = words[number];
        for (let i = 0; i < fires.length; i += 2) score[fires[i]] += fires[i + 1];
        for (let i = 0; i < raised.length; i += 2) if (raised[i + 1] < best[raised[i]]) best[raised[i]] = raised[i + 1];
      }
      for (let feature = 0; feature < n; feature++) score[feature] += 0.25 / (1 + best[feature]);
      for (const number of sayings(word)) score[said[number][0]] += 1;
    }
    const found = new Map();
    for (let feature = 0; feature < n; feature++) if (score[feature]) found.set(feature, score[feature]);
    return found;
  };
}

/** What a reader can filter by: a column, in units of 1 / `scale`. */
const RANGES = {
  density: { title: "fires on", unit: "% of tokens", scale: 100, format: percent },
  max: { title: "strongest activation", unit: "", scale: 1, format: short },
  score: { title: "explanation score", unit: "", scale: 1, format: short },
};

/** Wires up the list. Returns what the rest of the page may do with it. */
function featureList({ overview, features }) {
  const $ = (id) => document.getElementById(id);
  const rows = $("rows"), items = rows.firstElementChild;
  const all = overview.only?.toSorted((a, b) => a - b) ?? features.label.map((_, index) => index);
  const held = new Set(all);
  const ranges = new Map(); // column → [low, high]
  const listeners = new Set();
  let shown = all; // indices in order
  let kept = null; // the same as a set, where something is searched or filtered
  let current = null; // the open feature
  let sort = { by: "index", down: false };
  let asked = 0; // number of the latest search; answers to earlier ones are dropped
  let scroll = 0; // where the rows stand; browsers may forget it of a list that is not displayed
  let find = null; // promise of the searcher
  document.documentElement.style.setProperty("--row", `${ROW}px`);

  const prepared = () => (find ??= load("search").then(searcher));
  const orders = {
    match: { title: "best match", down: true },
    index: { title: "number", down: false, value: (i) => i },
    label: { title: "name", down: false, value: (i) => features.label[i].replace(/^[\s"]+/, "").toLowerCase() || null },
    density: { title: "how often", down: true, value: (i) => features.density[i] },
    max: { title: "how strongly", down: true, value: (i) => features.max[i] },
    score: { title: "explanation score", down: true, value: (i) => features.score[i] },
  };
  const figures = {
    density: { title: "share of tokens", text: (i) => bar(percent(features.density[i]), 1 + Math.log10(features.density[i]) / DECADES, "density") },
    max: { title: "strongest activation", text: (i) => make("span", {}, short(features.max[i])) },
    score: { title: "explanation score", text: (i) => bar(short(features.score[i]), features.score[i], "density") },
  };
  const figure = () => figures[sort.by] ?? figures.density;
  if (!overview.scored) delete orders.score;
  const options = Object.fromEntries(Object.entries(orders).map(([by, { title }]) => [by, make("option", { value: by }, title)]));
  $("sort").append(...Object.values(options));

  const columns = Object.keys(RANGES).filter((column) => column !== "score" || overview.scored);
  const inputs = Object.fromEntries(columns.map((column) => {
    const { title, unit, scale } = RANGES[column];
    const input = (end) => make("input", { type: "number", min: 0, step: "any", inputMode: "decimal", "aria-label": `${title}: ${end}${unit && `, ${unit}`}` });
    const pair = [input("at least"), input("at most")];
    const bound = ({ value }, none) => (value === "" ? none : Number(value) / scale);
    for (const one of pair)
      one.oninput = () => {
        const [low, high] = [bound(pair[0], -Infinity), bound(pair[1], Infinity)];
        if (low === -Infinity && high === Infinity) ranges.delete(column);
        else ranges.set(column, [low, high]);
        update();
      };
    $("ranges").lastElementChild.append(make("p", {}, make("span", {}, unit ? `${title}, ${unit}` : title), pair[0], "–", pair[1]));
    return [column, pair];
  }));

  /** The removable signs of what is filtered. */
  function chips() {
    const words = ([low, high], format) =>
      high === Infinity ? `at least ${format(low)}` : low === -Infinity ? `at most ${format(high)}` : `${format(low)} to ${format(high)}`;
    $("chips").replaceChildren(...[...ranges].map(([column, range]) => {
      const { title, format } = RANGES[column];
      const text = `${title} ${words(range, format)}`;
      const chip = make("button", { type: "button", className: "chip", "aria-label": `Lift the filter: ${text}` }, text);
      chip.onclick = () => {
        filter(column, null, null);
        $("query").focus({ preventScroll: true });
      };
      return chip;
    }));
  }

  async function update() {
    const ask = ++asked;
    const query = $("query").value.trim();
    const number = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
    let score = null;
    if (query) {
      score = (await prepared())(query);
      if (ask !== asked) return;
      if (number !== null && held.has(number)) score.set(number, Infinity);
    }
    if (sort.by === "match" && !score) sort = { by: "index", down: false };
    const passes = (i) => {
      if (score && !score.has(i)) return false;
      for (const [column, [low, high]] of ranges) {
        const value = features[column][i];
        if (value === null || value < low || value > high) return false;
      }
      return true;
    };
    const { by, down } = sort;
    shown = score || ranges.size ? all.filter(passes) : all.slice();
    if (by !== "index") {
      const value = by === "match" ? (i) => score.get(i) : orders[by].value;
      const keyed = shown.map((i) => [value(i), i]);
      const sign = down ? -1 : 1;
      keyed.sort(([x, a], [y, b]) => {
        if (x === null || y === null) return (x === null) - (y === null) || a - b; // what is unknown comes last either way
        return x < y ? -sign : x > y ? sign : a - b;
      });
      shown = keyed.map(([, i]) => i);
    } else if (down) shown.reverse();
    kept = score || ranges.size ? new Set(shown) : null;
    options.match?.toggleAttribute("hidden", !score);
    $("sort").value = by;
    $("turn").textContent = down ? "↓" : "↑";
    $("turn").setAttribute("aria-label", `${down ? "Falling" : "Rising"}; turn the order`);
    $("shown").textContent = kept ? `${whole(shown.length)} of ${whole(all.length)} features` : `${whole(all.length)} features`;
    $("figure").textContent = figure().title;
    chips();
    rows.scrollTop = scroll = 0;
    draw();
    for (const listener of [...listeners]) listener();
  }

  function row(place) {
    const i = shown[place];
    const link = make(
      "a",
      { href: `#${i}`, tabIndex: i === current || (place === 0 && !(kept?.has(current) ?? held.has(current))) ? 0 : -1 },
      make("span", { className: "index" }, String(i)),
      make("span", { className: "label" }, make("bdi", {}, nameOf(features, i))),
      figure().text(i),
    );
    if (!features.label[i]) link.classList.add("unnamed");
    if (i === current) link.setAttribute("aria-current", "true");
    link.dataset.row = place;
    const set = { "aria-posinset": place + 1, "aria-setsize": shown.length };
    return make("li", { ...set, style: { top: `${place * ROW}px` } }, link);
  }

  function draw() {
    const focused = rows.contains(document.activeElement) ? document.activeElement.dataset.row : undefined;
    const first = Math.max(0, Math.floor(rows.scrollTop / ROW) - BEYOND);
    const last = Math.min(shown.length, Math.ceil((rows.scrollTop + rows.clientHeight) / ROW) + BEYOND);
    items.style.setProperty("height", `${shown.length * ROW}px`);
    items.replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, n) => row(first + n)));
    if (!shown.length) items.append(nothing());
    if (focused !== undefined) items.querySelector(`[data-row="${focused}"]`)?.focus({ preventScroll: true });
  }

  /** What a list without rows says: why, and the way out. */
  function nothing() {
    const words = $("query").value.trim();
    const out = make("button", { type: "button" }, "Show all features");
    out.onclick = clear;
    const why = words ? "No feature fits. Words match from their beginning: try a shorter one." : "No feature fits these filters.";
    return make("li", { className: "none" }, make("p", {}, why), out);
  }

  function reveal(place) {
    const top = place * ROW, height = rows.clientHeight;
    const above = rows.scrollTop - top, below = top + ROW - (rows.scrollTop + height);
    if (Math.max(above, below) > 2 * ROW) rows.scrollTop = top - (height - ROW) / 2; // a jump: to the middle
    else if (above > 0) rows.scrollTop = top;
    else if (below > 0) rows.scrollTop += below;
    scroll = rows.scrollTop;
  }

  /** Opens the feature `step` rows after the current one, and puts the focus on its row. */
  function move(step) {
    if (!shown.length) return;
    const place = shown.indexOf(current);
    const next = place < 0 ? 0 : Math.max(0, Math.min(shown.length - 1, place + step));
    location.replace(`#${shown[next]}`); // browsing with the arrows does not fill the history
    select(shown[next]);
    items.querySelector("[aria-current]")?.focus({ preventScroll: true });
  }

  /** Marks a feature as the open one, or none; brings its row, or that of the one just left, into view. */
  function select(index) {
    const place = shown.indexOf(index ?? current);
    if (place >= 0 && rows.clientHeight) reveal(place);
    current = index;
    draw();
  }

  /** Keeps features whose column lies in [low, high]; two nulls lift the filter. Columns: density in shares, score, max. */
  function filter(column, low, high) {
    if (low === null) ranges.delete(column);
    else ranges.set(column, [low, high]);
    const { scale } = RANGES[column];
    const shownAs = (x) => (x === null || !Number.isFinite(x) ? "" : String(Number((x * scale).toPrecision(3))));
    [inputs[column][0].value, inputs[column][1].value] = [shownAs(low), shownAs(high)];
    update();
  }

  /** Searches for words. */
  function search(query) {
    $("query").value = query;
    $("query").oninput();
  }

  /** Lifts search and filters. */
  function clear() {
    ranges.clear();
    for (const input of Object.values(inputs).flat()) input.value = "";
    search("");
  }

  rows.onscroll = () => {
    if (rows.clientHeight) scroll = rows.scrollTop;
    requestAnimationFrame(draw);
  };
  new ResizeObserver(() => {
    if (rows.clientHeight) rows.scrollTop = scroll;
    draw();
  }).observe(rows);
  $("filters").onsubmit = (event) => event.preventDefault();
  $("query").onfocus = () => prepared().catch(() => {}); // there by the first letter; what fails is said when something is searched
  $("query").oninput = () => {
    if ($("query").value.trim()) sort = { by: "match", down: true };
    update();
  };
  $("sort").onchange = () => {
    sort = { by: $("sort").value, down: orders[$("sort").value].down };
    update();
  };
  $("turn").onclick = () => {
    sort = { ...sort, down: !sort.down };
    update();
  };
  addEventListener("pointerdown", (event) => {
    if (!$("ranges").contains(event.target)) $("ranges").open = false; // it lies over the rows
  });
  $("ranges").onkeydown = (event) => {
    if (event.key !== "Escape") return;
    $("ranges").open = false;
    $("ranges").firstElementChild.focus();
  };
  $("query").onkeydown = (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      if (shown.length) current = null;
      move(1);
    }
  };
  rows.onkeydown = (event) => {
    const page = Math.max(1, Math.floor(rows.clientHeight / ROW) - 1);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(step);
  };

  update();
  return {
    select,
    search,
    filter,
    clear,
    holds: (index) => held.has(index),
    range: (column) => ranges.get(column) ?? null,
    shown: () => kept,
    /** Has `listener` called after every change; returns what ends that. */
    listen(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}
