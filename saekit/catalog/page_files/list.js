// The list of features: search, filter, sort, and only those rows in the document that can be seen.
"use strict";

const ROW = 40; // pixels
const DECADES = 5; // of density that a row's bar spans
const BEYOND = 8; // rows kept above and below what can be seen

const wordsOf = (text) =>
  text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];

/** Scores as `catalog.search` gives them: share of activation on matching tokens, ¼ / (1 + rank) of the best matching
 *  raised token, 1 for an explanation. Returns feature → score. */
function scores({ words, said }, query) {
  const score = new Map();
  const add = (feature, amount) => score.set(feature, (score.get(feature) ?? 0) + amount);
  for (const word of wordsOf(query)) {
    const matches = (text) => wordsOf(text).some((w) => w.startsWith(word));
    const best = new Map();
    for (const [token, fires, raised] of words) {
      if (!matches(token)) continue;
      for (let i = 0; i < fires.length; i += 2) add(fires[i], fires[i + 1]);
      for (let i = 0; i < raised.length; i += 2)
        best.set(raised[i], Math.min(raised[i + 1], best.get(raised[i]) ?? Infinity));
    }
    for (const [feature, rank] of best) add(feature, 0.25 / (1 + rank));
    for (const [feature, text] of said) if (matches(text)) add(feature, 1);
  }
  return score;
}

/** Wires up the list. `features`: columns label, density, max. Returns what the rest of the page may do with it. */
function featureList(features) {
  const $ = (id) => document.getElementById(id);
  const rows = $("rows"), items = rows.firstElementChild;
  const all = features.label.map((_, index) => index);
  let shown = all; // indices in order
  let current = null; // the open feature
  let sort = { by: "index", down: false };
  let asked = 0; // number of the latest search; answers to earlier ones are dropped
  document.documentElement.style.setProperty("--row", `${ROW}px`);

  const columns = {
    score: { title: "match", down: true },
    index: { title: "#", down: false, value: (i) => i },
    label: { title: "fires on", down: false, value: (i) => features.label[i].toLowerCase() || "\uffff" },
    density: { title: "density", down: true, value: (i) => features.density[i] },
    max: { title: "max", down: true, value: (i) => features.max[i] },
  };
  const buttons = Object.fromEntries(Object.entries(columns).map(([by, { title, down }]) => {
    const button = make("button", { type: "button", className: by }, title);
    button.onclick = () => {
      sort = { by, down: sort.by === by ? !sort.down : down };
      update();
    };
    $("columns").append(button);
    return [by, button];
  }));

  async function update() {
    const ask = ++asked;
    const query = $("query").value.trim();
    const number = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
    const score = query ? scores(await load("search"), query) : null;
    if (ask !== asked) return;
    if (number !== null && number < all.length) score.set(number, Infinity);
    const [least, most] = [$("least").value, $("most").value];
    const passes = (i) =>
      (!score || score.has(i)) &&
      (!least || 100 * features.density[i] >= Number(least)) &&
      (!most || 100 * features.density[i] <= Number(most));
    if (!score && sort.by === "score") sort = { by: "index", down: false };
    const value = sort.by === "score" ? (i) => score.get(i) : columns[sort.by].value;
    const sign = sort.down ? -1 : 1;
    const keys = new Map(all.filter(passes).map((i) => [i, value(i)]));
    shown = [...keys.keys()].sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      return x < y ? -sign : x > y ? sign : a - b;
    });
    for (const [by, button] of Object.entries(buttons)) {
      button.dataset.sorted = by !== sort.by ? "" : sort.down ? "down" : "up";
      button.setAttribute("aria-pressed", by === sort.by);
      button.hidden = by === "score" && !score;
    }
    $("shown").textContent = shown.length === all.length ? whole(all.length) : `${whole(shown.length)} of ${whole(all.length)}`;
    rows.scrollTop = 0;
    draw();
  }

  function row(place) {
    const i = shown[place];
    const link = make(
      "a",
      { href: `#${i}`, tabIndex: i === current || (place === 0 && !shown.includes(current)) ? 0 : -1 },
      make("span", { className: "index" }, String(i)),
      make("span", { className: "label" }, make("bdi", {}, nameOf(features, i))),
      bar(percent(features.density[i]), 1 + Math.log10(features.density[i]) / DECADES, "density"),
      make("span", { className: "max" }, short(features.max[i])),
    );
    if (i === current) link.setAttribute("aria-current", "true");
    link.dataset.place = place;
    const set = { "aria-posinset": place + 1, "aria-setsize": shown.length };
    return make("li", { ...set, style: { top: `${place * ROW}px` } }, link);
  }

  function draw() {
    const focused = rows.contains(document.activeElement) ? document.activeElement.dataset.place : null;
    const first = Math.max(0, Math.floor(rows.scrollTop / ROW) - BEYOND);
    const last = Math.min(shown.length, Math.ceil((rows.scrollTop + rows.clientHeight) / ROW) + BEYOND);
    items.style.setProperty("height", `${shown.length * ROW}px`);
    items.replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, n) => row(first + n)));
    if (!shown.length) items.append(make("li", { className: "none" }, "No feature fits."));
    if (focused !== null) items.querySelector(`[data-place="${focused}"]`)?.focus({ preventScroll: true });
  }

  function reveal(place) {
    const top = place * ROW, height = rows.clientHeight;
    const above = rows.scrollTop - top, below = top + ROW - (rows.scrollTop + height);
    if (Math.max(above, below) > 2 * ROW) rows.scrollTop = top - (height - ROW) / 2; // a jump: to the middle
    else if (above > 0) rows.scrollTop = top;
    else if (below > 0) rows.scrollTop += below;
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
    if (place >= 0) reveal(place);
    current = index;
    draw();
  }

  rows.onscroll = () => requestAnimationFrame(draw);
  new ResizeObserver(draw).observe(rows);
  $("filters").onsubmit = (event) => event.preventDefault();
  $("query").oninput = () => {
    sort = $("query").value.trim() ? { by: "score", down: true } : { by: "index", down: false };
    update();
  };
  $("least").oninput = $("most").oninput = update;
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

  /** Keeps features whose density lies in [least, most], in percent; empty strings for no bound. */
  function filterDensity(least, most) {
    [$("least").value, $("most").value] = [least, most];
    update();
  }

  /** Searches for words. */
  function search(query) {
    $("query").value = query;
    $("query").oninput();
  }

  update();
  return { select, search, filterDensity };
}
