// What the playground's reader turns: the features that fire on the prompt, those found by words, and a card for each edit.
"use strict";

const FOUND = 6, FIRING = 6; // rows shown of a search, of a token

/** The prompt's tokens, coloured by what fires on them; one that is chosen lists its features. */
function playStrip({ overview, features }, state, add) {
  const line = make("div", { className: "tokens", role: "toolbar", "aria-label": "Tokens of the prompt", "aria-orientation": "horizontal" });
  const by = make("select");
  const details = make("div", { className: "on-token", "aria-live": "polite" });
  const hint = make("span", {}, "Choose a token to see what fires on it.");
  const legend = make("p", { className: "facts legend", hidden: true }, make("label", {}, "coloured by ", by), hint);
  let tokens = [], firing = [], buttons = [], chosen = null;

  function heat() {
    const feature = by.value ? Number(by.value) : null;
    const of = (fires) => fires.reduce((sum, [i, a]) => (feature === null || i === feature ? sum + a : sum), 0);
    const sums = firing.map((fires, i) => (overview.excluded.includes(tokens[i]) ? 0 : of(fires)));
    const top = feature === null ? Math.max(...sums, 0) : features.max[feature];
    buttons.forEach((button, i) => {
      button.style.setProperty("--heat", top > 0 ? Math.min(1, sums[i] / top).toFixed(3) : 0);
      button.classList.toggle("cold", !sums[i]);
      button.title = !sums[i] ? "" : feature === null ? `${short(sums[i])}: the sum over its ${firing[i].length} strongest` : short(sums[i]);
    });
  }

  function recolour() {
    const before = by.value;
    const options = [...new Set(state.edits.map((edit) => edit.feature))].map((i) => make("option", { value: i }, `feature ${i}`));
    by.replaceChildren(make("option", { value: "" }, "all that fires"), ...options);
    by.value = before;
    if (by.selectedIndex < 0) by.value = "";
    heat();
  }

  function choose(place) {
    chosen = place;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === place);
      button.tabIndex = i === (place ?? 0) ? 0 : -1;
    });
    hint.hidden = place !== null;
    if (place === null) return details.replaceChildren();
    const fires = firing[place];
    const row = ([i, a]) => featureRow(features, i, bar(short(a), a / fires[0][1]), add);
    const rows = make("ul", { className: "features" }, ...fires.slice(0, FIRING).map(row));
    const rest = fires.slice(FIRING);
    const more = rest.length ? make("button", { type: "button", className: "more" }, `${rest.length} more`) : null;
    if (more) more.onclick = () => (rows.append(...rest.map(row)), more.remove());
    const excluded = overview.excluded.includes(tokens[place]) ? make("p", { className: "facts" }, "The catalog leaves this token out: what fires here says little.") : null;
    details.replaceChildren(...[excluded, fires.length ? rows : make("p", { className: "facts" }, "Nothing fires here."), more].filter((part) => part !== null));
  }

  /** New tokens, with the features that fire on each. */
  function show(newTokens, newFiring) {
    const kept = chosen !== null && newTokens[chosen] === tokens[chosen] ? chosen : null;
    [tokens, firing] = [newTokens, newFiring];
    const focused = buttons.indexOf(document.activeElement);
    buttons = tokens.map((token, i) => {
      const button = make("button", { type: "button", className: "token" }, spelled(token));
      button.onclick = () => choose(chosen === i ? null : i);
      return button;
    });
    line.replaceChildren(...buttons);
    legend.hidden = !tokens.length;
    recolour();
    choose(kept);
    if (focused >= 0) buttons[Math.min(focused, buttons.length - 1)]?.focus();
  }

  line.onkeydown = (event) => {
    const place = buttons.indexOf(event.target);
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (place < 0 || next === undefined || !buttons[next]) return;
    event.preventDefault();
    buttons[place].tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
  };
  by.onchange = heat;
  return { element: make("div", {}, line, legend, details), show, recolour };
}

/** A feature with a figure and a button that adds it to the edits. */
function featureRow(features, index, figure, add) {
  const title = `Add feature ${index} to the edits`;
  const plus = make("button", { type: "button", className: "plus", title, "aria-label": title, onclick: () => add(index) }, "+");
  return make("li", {}, plus, linkTo(features, index), figure);
}

/** Finds features by words or by number. */
function finder(features, add) {
  const rows = make("ul", { className: "features" });
  const none = make("p", { className: "facts", role: "status" });
  const input = make("input", { type: "search", placeholder: "Find a feature: a word, or its number", "aria-label": "Find a feature to add", autocomplete: "off", spellcheck: false });
  let found = [], index = null; // the words of the catalog, read when first asked for
  async function look() {
    const query = input.value.trim();
    const number = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
    index ??= load("search").then(searcher);
    const score = query ? (await index)(query) : new Map();
    if (query !== input.value.trim()) return;
    if (features.label[number] !== undefined) score.set(number, Infinity);
    found = [...score].sort(([a, x], [b, y]) => y - x || a - b).slice(0, FOUND).map(([i]) => i);
    rows.replaceChildren(...found.map((i) => featureRow(features, i, null, add)));
    none.textContent = query && !found.length ? "No feature fits." : "";
  }
  const lookSoon = debounced(look, WRITING);
  input.oninput = lookSoon;
  input.onkeydown = async (event) => {
    if (event.key === "Escape") input.value = "";
    else if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    lookSoon.cancel();
    await look();
    if (event.key === "Enter" && found.length) add(found[0]);
  };
  return make("div", { className: "finder" }, input, none, rows);
}

/** The cards of the edits: a feature turned, how, and how far. */
function playCards(catalog, changed, removed) {
  const cards = new Map(); // edit → its card
  const none = make("p", { className: "facts" }, "No feature is turned: find one below, or choose a token above and press + beside what fires on it.");
  const list = make("ol", { className: "edits" });
  const element = make("div", {}, list, none);

  function add(edit) {
    const card = playCard(catalog, edit, changed, () => {
      const focused = card.element.nextElementSibling ?? card.element.previousElementSibling;
      card.element.remove();
      cards.delete(edit);
      none.hidden = cards.size > 0;
      removed(edit);
      (focused ?? element.parentElement).querySelector("input")?.focus();
    });
    cards.set(edit, card);
    list.append(card.element);
    none.hidden = true;
  }

  /** Says an error at an edit's card; of null, takes all back. */
  function say(edit, message = "") {
    for (const [other, card] of cards) card.say(other === edit ? message : "");
  }

  return { element, add, say, refresh: (edit) => cards.get(edit)?.refresh(), focus: (edit) => cards.get(edit)?.focus() };
}

function playCard(catalog, edit, changed, removed) {
  const { overview, features } = catalog;
  const about = `feature ${edit.feature}`;
  const error = problem();
  const on = make("input", { type: "checkbox", checked: edit.on, title: "on or off", "aria-label": `${about} is on` });
  const gone = make("button", { type: "button", className: "remove", title: "Remove", "aria-label": `Remove ${about}`, onclick: removed }, "×");
  const slider = make("input", { type: "range", "aria-label": `strength of ${about}` });
  const number = make("input", { type: "number", step: "any", required: true, min: -MAX_STRENGTH, max: MAX_STRENGTH, "aria-label": `strength of ${about}, as a number` });
  const words = Object.fromEntries(Object.entries(KINDS).map(([kind, { does }]) => [kind, `${kind} — ${does}`]));
  const chosen = (value) => {
    edit.kind = value;
    const units = unitsOf(edit, features);
    if (!units.includes(edit.unit)) edit.unit = units[0];
    edit.strength = usual(edit, features);
    refresh();
    changed();
  };
  const kind = menu(words, edit.kind, chosen, { "aria-label": `what is done with ${about}` });
  const unit = make("select", { "aria-label": `unit of the strength of ${about}` });
  unit.onchange = () => {
    edit.unit = unit.value;
    edit.strength = usual(edit, features);
    refresh();
    changed();
  };
  const effect = make("p", { className: "facts effect" });
  const element = make(
    "li", { className: "edit", role: "group", "aria-label": about },
    make("div", { className: "named" }, on, linkTo(features, edit.feature), gone),
    make("div", { className: "how" }, kind, unit),
    make("div", { className: "strength" }, slider, number),
    effect,
    error.element,
  );

  function bounds() {
    const [low, high, step] = range(edit, features);
    Object.assign(slider, { min: low, max: high, step }); // before the value: a range clips what it is given
    slider.value = edit.strength;
  }

  /** Shows the edit as it now is. */
  function refresh() {
    const units = unitsOf(edit, features);
    unit.replaceChildren(...units.map((name) => make("option", { value: name }, UNIT_WORDS[name])));
    unit.value = edit.unit;
    unit.hidden = units.length < 2;
    kind.value = edit.kind;
    slider.disabled = number.disabled = Boolean(KINDS[edit.kind].bare);
    slider.parentElement.hidden = slider.disabled;
    number.value = edit.strength;
    bounds();
    element.classList.toggle("off", !edit.on);
  }

  slider.oninput = () => {
    number.value = edit.strength = Number(slider.value);
    changed();
  };
  number.oninput = () => {
    if (!number.validity.valid) return; // the browser marks it, the last good one stays
    edit.strength = Number(number.value);
    bounds();
    changed();
  };
  on.onchange = () => {
    edit.on = on.checked;
    refresh();
    changed();
  };
  record(edit.feature, overview.shard).then(({ raised }) => {
    if (raised.length) effect.append("makes likelier ", ...raised.slice(0, 6).flatMap(([token]) => [code(token), " "]));
  }, () => effect.remove()); // the card does without
  refresh();
  return { element, refresh, say: error.say, focus: () => (slider.disabled ? kind : slider).focus() };
}
