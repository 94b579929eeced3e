// The playground: a prompt, what fires on it, edits, and what the model says plainly and steered. Needs a live server.
"use strict";

// What each kind does, and the units of its strength, the usual one first; as saekit/steering/kinds.py, but for `swap`,
// which takes a second text.
const KINDS = {
  add: { does: "push along it", units: ["norm", "max", "raw"] },
  clamp: { does: "hold it at", units: ["max", "raw"] },
  min_clamp: { does: "hold it at least at", units: ["max", "raw"] },
  scale: { does: "multiply it by", units: ["raw"] },
  ablate: { does: "take it out", units: ["raw"], bare: true },
  rescale: { does: "multiply its direction by", units: ["raw"] },
  cap: { does: "let its direction reach at most", units: ["norm", "raw"] },
  project_out: { does: "take its direction out", units: ["raw"], bare: true },
};
const UNIT_WORDS = { norm: "× typical activation", max: "× its maximum", raw: "raw" };
const POSITION_WORDS = { all: "everywhere", prompt: "on the prompt", generated: "on what is written", last_prompt: "from the prompt's last token on" };
const SIDE_WORDS = { plain: "Plain", steered: "Steered", control: "Random control" };
const START_PROMPT = "Mike pulls out his"; // of the model that ships
const START_WORDS = ["Tano", "Padawan", "Amidala", "lightsaber", "Jedi"]; // what its first feature is to make it say
const OTHER_PROMPT = "Once upon a time";
const NUMBERS = { tokens: 30, temperature: 1, seed: 0 };
const MAX_TEMPERATURE = 100, MAX_STRENGTH = 1e6, SEEDS = 2 ** 31;
const SWEPT = 8; // strengths of a sweep
const FOUND = 6, FIRING = 6; // rows shown of a search, of a token
const TAIL = 70; // characters of the prompt that stand before each text
const TYPING = 500, DRAGGING = 250, WRITING = 150; // milliseconds of quiet before asking, and before the address changes

/* The state, and its address */

/** What an address asks for; whatever is malformed or out of bounds is as if it were not there. */
function playState(query, { overview, features }) {
  const given = new URLSearchParams(query), { limits } = overview;
  const number = (name, low, high, step) => {
    const x = given.get(name) ? Number(given.get(name)) : NaN;
    return x >= low && x <= high && (!step || x % step === 0) ? x : Math.min(high, NUMBERS[name]);
  };
  const prompt = given.get("prompt");
  return {
    prompt: prompt && prompt.length <= limits.text ? prompt : overview.embedded ? START_PROMPT : OTHER_PROMPT,
    edits: given.getAll("edit").map((text) => editFrom(text, features)).filter((edit) => edit !== null).slice(0, limits.edits),
    positions: Object.hasOwn(POSITION_WORDS, given.get("at")) ? given.get("at") : "all",
    tokens: number("tokens", 1, limits.new_tokens, 1),
    temperature: number("temperature", 0, MAX_TEMPERATURE),
    seed: number("seed", 0, Number.MAX_SAFE_INTEGER, 1),
    control: given.get("control") === "on",
    live: given.get("live") !== "off",
  };
}

/** An edit from `2189:add:0.3:norm`, or with `:off` at its end; null for a feature that is not here. */
function editFrom(text, features) {
  const [index, kind, strength, unit, off] = text.split(":");
  const feature = Number(index);
  if (!/^\d+$/.test(index) || features.label[feature] === undefined) return null;
  const edit = { feature, kind: Object.hasOwn(KINDS, kind) ? kind : "add", on: off !== "off" };
  const units = unitsOf(edit, features);
  edit.unit = units.includes(unit) ? unit : units[0];
  edit.strength = strength && Math.abs(Number(strength)) <= MAX_STRENGTH ? Number(strength) : usual(edit, features);
  return edit;
}

/** The units that an edit can have: none in multiples of a maximum that there is not. */
const unitsOf = ({ feature, kind }, features) => KINDS[kind].units.filter((unit) => unit !== "max" || features.max[feature] > 0);

/** A strength that shows and lets most texts survive. */
function usual({ feature, kind, unit }, features) {
  if (kind === "scale" || kind === "rescale") return 2;
  if (unit === "norm") return 0.3;
  if (unit === "max") return 5;
  return kind === "cap" ? 0 : Number((5 * (features.max[feature] || 1)).toPrecision(2));
}

/** The slider's least, greatest and step: what makes sense, widened to hold the strength there is. */
function range({ feature, kind, unit, strength }, features) {
  const scale = kind === "scale" || kind === "rescale" || kind === "cap" || unit === "max" ? 1 : Number((features.max[feature] || 1).toPrecision(1));
  let [low, high, step] = unit === "norm" ? [0, 1, 0.01] : kind === "scale" || kind === "rescale" ? [-2, 5, 0.1] : [-2 * scale, 10 * scale, scale / 10];
  while (strength > high) high *= 2;
  if (strength < low) low = -high;
  while (strength < low) low *= 2;
  return [low, high, Number(step.toPrecision(1))];
}

const editText = ({ feature, kind, strength, unit, on }) => [feature, kind, strength, unit, ...(on ? [] : ["off"])].join(":");

/** The address of a state, after `#play?`. */
function playAddress({ prompt, edits, positions, tokens, temperature, seed, control, live }) {
  const words = new URLSearchParams({ prompt });
  for (const edit of edits) words.append("edit", editText(edit));
  for (const [name, value] of Object.entries({ at: positions, tokens, temperature, seed, control: control ? "on" : "off", live: live ? "on" : "off" }))
    words.append(name, value);
  return words.toString().replaceAll("%3A", ":");
}

/** An edit with a feature as one begins with it. */
const freshEdit = (feature, features) => editFrom(String(feature), features);

/** A link that opens the playground with a feature turned up. */
const playLink = ({ features }, index) =>
  make("a", { href: `#play?edit=${editText(freshEdit(index, features))}`, className: "play-link" }, "Steer with it");

/** The feature to begin with. Of the model that ships, the one whose direction raises most of `START_WORDS` highest: a
 *  feature is a good handle for what it makes the model say, not for what it fires on. Else the first example. */
async function firstFeature({ overview, features }) {
  const best = new Map();
  if (overview.embedded) {
    const { words } = await load("search");
    for (const [token, , raised] of words) {
      if (!START_WORDS.includes(token.trim())) continue;
      for (let i = 0; i < raised.length; i += 2) best.set(raised[i], (best.get(raised[i]) ?? 0) + 1 / (1 + raised[i + 1]));
    }
  }
  const [first] = [...best].sort(([a, x], [b, y]) => y - x || a - b).map(([feature]) => feature);
  return first ?? overview.examples?.[0] ?? Math.max(0, features.max.findIndex((max) => max > 0));
}

/** The Python that does what the state says, to the letter. */
function playPython({ name, model }, { prompt, edits, positions, tokens, temperature, seed, control }) {
  const text = (words) => JSON.stringify(words).replace(INVISIBLE, (character) =>
    `\\U${character.codePointAt(0).toString(16).padStart(8, "0")}`);
  const call = ({ feature, kind, strength, unit }) => {
    const given = [KINDS[kind].bare ? [] : [String(strength)], unit === "raw" ? [] : [`unit="${unit}"`]].flat();
    return `    catalog[${feature}].${kind}(${given.join(", ")}),`;
  };
  const options = `max_new_tokens=${tokens}, seed=${seed}, temperature=${temperature}, positions="${positions}"`;
  return [
    "import saekit",
    ...(control ? ["from saekit.steering.sweep import control_of"] : []),
    "",
    `model = saekit.load_model(${text(model)})`,
    `catalog = saekit.Catalog.open(${text(name)})`,
    `prompt = ${text(prompt)}`,
    "edits = [",
    ...edits.filter((edit) => edit.on).map(call),
    "]",
    `options = dict(${options})`,
    "side = saekit.compare(model, prompt, edits, **options)",
    "print(side)",
    ...(control
      ? [`controls = [control_of(edit, ${seed} + i) for i, edit in enumerate(edits)]`, "control = saekit.compare(model, prompt, controls, **options)", "print(control.steered)"]
      : []),
    "",
  ].join("\n");
}

/* The view */

/** The playground, in the state that the address has after its `?`, if it has one: as it is there, since unescaping all of it
 *  before it is taken apart would mix a prompt's own & and = with those between the fields. */
async function playView(catalog) {
  const { overview, features } = catalog;
  const query = location.hash.split("?").slice(1).join("?");
  const state = playState(query, catalog);
  if (!state.edits.length) state.edits.push(freshEdit(await firstFeature(catalog), features));
  const running = oneAtATime(), reading = oneAtATime();
  let begun = false; // whether anything was asked for: until then a change starts nothing

  const errors = { prompt: problem(), edits: problem(), options: problem(), answer: problem() };
  const status = make("p", { className: "facts", role: "status" });
  const answer = playAnswer();
  const python = make("div", {});
  const runs = make("button", { type: "submit", className: "main", "aria-keyshortcuts": "Control+Enter Meta+Enter" }, "Steer");
  const stops = make("button", { type: "button", className: "stop", hidden: true, onclick: running.stop }, "Stop");

  const writeAddress = () => history.replaceState(null, "", `#play?${playAddress(state)}`);
  const showAddress = debounced(writeAddress, WRITING);
  const runSoon = debounced(run, DRAGGING), typedSoon = debounced(run, 2 * TYPING), readSoon = debounced(read, TYPING);

  /** Something of the state is another; `soon` runs it, when the reader has that on. */
  function changed(soon = runSoon) {
    showAddress();
    python.replaceChildren(copyable("Python that does exactly this", playPython(overview, state)));
    answer.stale(begun);
    if (begun && state.live) soon();
    sweeper.list();
  }

  /** Asks for the texts; `asked`: by the reader, who is then shown them, where they are below what can be seen. */
  async function run(asked) {
    runSoon.cancel();
    typedSoon.cancel();
    for (const error of Object.values(errors)) error.say("");
    cards.say(null);
    if (!state.prompt.trim()) return errors.prompt.say("Type a prompt: the model goes on from there.");
    begun = true;
    stops.hidden = false;
    if (asked) answer.reveal();
    const sent = state.edits.filter((edit) => edit.on);
    status.textContent = "Asking the model …";
    try {
      const ended = await running.start(async (signal) => {
        for await (const event of askStream("api/stream", { ...question(state, sent), control: state.control }, signal)) {
          if (signal.aborted) return;
          if (event.event === "waiting") status.textContent = queued(event.ahead);
          if (event.event === "start") status.textContent = "Writing …";
          answer.take(event, state.prompt);
          if (event.event === "done") status.textContent = `Plain and steered text ready: ${whole(event.tokens)} tokens in ${short(event.seconds)} s.`;
        }
      });
      if (!ended && !running.busy()) status.textContent = "Stopped.";
    } catch (error) {
      status.textContent = "";
      blame(error, sent);
    }
    stops.hidden = !running.busy();
  }

  /** Shows an error where its cause is: the server names the field first. */
  function blame({ message }, sent) {
    const [field, place] = message.split(/[.:]/);
    if (field === "edits" && sent[Number(place)]) cards.say(sent[Number(place)], message);
    else if (["prompt", "text"].includes(field)) errors.prompt.say(message);
    else if (["max_new_tokens", "temperature", "seed", "positions"].includes(field)) errors.options.say(message);
    else if (/^feature \d+/.test(message) && sent.some((edit) => message.startsWith(`feature ${edit.feature}`)))
      cards.say(sent.find((edit) => message.startsWith(`feature ${edit.feature}`)), message);
    else errors.answer.say(message);
  }

  async function read() {
    readSoon.cancel();
    errors.prompt.say("");
    if (!state.prompt.trim()) return strip.show([], []);
    try {
      await reading.start(async (signal) => {
        const { tokens, features: firing } = await ask("api/activations", { text: state.prompt }, signal);
        strip.show(tokens, firing);
      });
    } catch (error) {
      strip.show([], []);
      errors.prompt.say(error.message);
    }
  }

  const add = (feature) => {
    errors.edits.say("");
    const there = state.edits.find((edit) => edit.feature === feature);
    if (there) return cards.focus(there);
    if (state.edits.length >= overview.limits.edits) return errors.edits.say(`At most ${overview.limits.edits} edits at a time: remove one first.`);
    const edit = freshEdit(feature, features);
    state.edits.push(edit);
    cards.add(edit);
    strip.recolour();
    changed();
    cards.focus(edit);
  };
  const remove = (edit) => {
    state.edits.splice(state.edits.indexOf(edit), 1);
    strip.recolour();
    changed();
  };

  const prompt = make("textarea", { rows: 3, value: state.prompt, maxLength: overview.limits.text, spellcheck: false, dir: "auto" });
  prompt.oninput = () => {
    state.prompt = prompt.value;
    readSoon();
    changed(typedSoon);
  };
  const strip = playStrip(catalog, state, add);
  const cards = playCards(catalog, changed, remove);
  const sweeper = playSweep(catalog, state, (edit, swept) => {
    if (!state.edits.includes(edit)) return; // taken away since
    Object.assign(edit, swept);
    cards.refresh(edit);
    changed();
  });
  for (const edit of state.edits) cards.add(edit);

  const form = make(
    "form", { className: "play", onsubmit: (event) => { event.preventDefault(); run(true); } },
    make(
      "div", { className: "asking" },
      section("Prompt", make("label", {}, make("span", { className: "unseen" }, "Prompt"), prompt), errors.prompt.element, strip.element),
      section("Features turned", cards.element, errors.edits.element, finder(features, add)),
      playOptions(overview.limits, state, changed, errors.options.element),
      make("div", { className: "run" }, runs, stops, make("small", {}, kbd("Ctrl"), " ", kbd("Enter")), tick("as I change things", state, "live", showAddress)),
      status,
    ),
    make(
      "div", { className: "answer" },
      errors.answer.element,
      answer.element,
      sweeper.element,
      section("Take it with you", shareButton(() => { writeAddress(); return location.href; }), python),
    ),
  );
  form.onkeydown = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run(true);
  };
  onLeave(() => {
    for (const task of [running, reading]) task.stop();
    for (const later of [showAddress, runSoon, typedSoon, readSoon]) later.cancel();
    sweeper.leave();
  });
  changed();
  showAddress.cancel(); // an address is written once something changes
  read();
  if (query) run();
  return [
    make("h2", {}, "Playground"),
    make("p", { className: "facts lead" }, "Type something, turn a feature up, and read what the model says with it and without."),
    form,
  ];
}

/** What is asked of the server about a state, with some of its edits. */
const question = ({ prompt, positions, tokens, temperature, seed }, edits) => ({
  prompt,
  edits: edits.map(({ feature, kind, strength, unit }) => ({ feature, kind, strength: KINDS[kind].bare ? 0 : strength, unit })),
  positions,
  max_new_tokens: tokens,
  temperature,
  seed,
});

const queued = (ahead) => (ahead ? `Waiting: ${whole(ahead)} before you.` : "Next in line.");
const kbd = (name) => make("kbd", {}, name);

/** A place for an error. */
function problem() {
  const element = make("p", { className: "error", role: "alert", hidden: true });
  const say = (message) => {
    element.textContent = visible(message);
    element.hidden = !message;
  };
  return { element, say };
}

/** A box to tick that is `state[name]`. */
function tick(words, state, name, then) {
  const box = make("input", { type: "checkbox", checked: state[name] });
  box.onchange = () => {
    state[name] = box.checked;
    then();
  };
  return make("label", { className: "tick" }, box, words);
}

/** A menu of values with words for them. */
function menu(words, value, choose, properties = {}) {
  const select = make("select", properties, ...Object.entries(words).map(([name, said]) => make("option", { value: name }, said)));
  select.value = value;
  select.onchange = () => choose(select.value);
  return select;
}

function playOptions(limits, state, changed, error) {
  const number = (words, name, given) => {
    const input = make("input", { type: "number", required: true, value: state[name], ...given });
    input.oninput = () => {
      if (!input.validity.valid) return; // the browser marks it, the last good one stays
      state[name] = Number(input.value);
      changed();
    };
    return [make("label", {}, make("small", {}, words), input), input];
  };
  const [length] = number("new tokens", "tokens", { min: 1, max: limits.new_tokens, step: 1 });
  const [temperature] = number("temperature", "temperature", { min: 0, max: MAX_TEMPERATURE, step: "any" });
  const [seed, field] = number("seed", "seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 });
  const dice = make("button", { type: "button", className: "dice", title: "Another seed", "aria-label": "Another seed" }, "⚄");
  dice.onclick = () => {
    field.value = state.seed = Math.floor(SEEDS * Math.random());
    changed();
  };
  const where = menu(POSITION_WORDS, state.positions, (value) => {
    state.positions = value;
    changed();
  });
  return section(
    "How",
    make("div", { className: "how" }, make("label", { className: "where" }, make("small", {}, "acting"), where), length, temperature, make("div", { className: "seed" }, seed, dice)),
    tick("beside them, a random direction pushed as hard", state, "control", changed),
    error,
  );
}

/* What fires on the prompt */

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

/* The edits */

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

/* What the model says */

/** Plain, steered and control beside each other as they are written, and what moved. */
function playAnswer() {
  const sides = make("div", { className: "sides" });
  const outcome = make("div", { className: "outcome" });
  const invitation = make("p", { className: "invitation" }, "Press ", make("b", {}, "Steer"), ": the model goes on from the prompt, once as it is and once with the features turned. Both roll the same dice, so what differs is what the features did.");
  const element = make("div", { className: "texts" }, invitation, sides, outcome);
  let texts = {}, parts = {}, prompt = "", drawing = false;

  function draw() {
    drawing = false;
    for (const [side, { text }] of Object.entries(parts)) {
      const words = side === "plain" ? [[texts.plain, false]] : playDifference(texts.plain, texts[side]);
      text.replaceChildren(
        make("span", { className: "prompt" }, visible(prompt.length > TAIL ? `…${prompt.slice(-TAIL)}` : prompt)),
        ...words.map(([word, same]) => make("span", { className: same ? "same" : "" }, visible(word))),
      );
    }
  }

  function soon() {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(draw);
  }

  function begin(event) {
    const height = sides.offsetHeight;
    invitation.hidden = true;
    texts = Object.fromEntries(event.sides.map((side) => [side, ""]));
    parts = Object.fromEntries(event.sides.map((side) => [side, { text: make("p", { className: "text", dir: "auto" }), figure: make("p", { className: "facts" }, "\u00a0") }]));
    const turned = { steered: event.edits.join("; ") || "no feature is turned", plain: "as it is", control: "a random direction, pushed as hard" };
    sides.replaceChildren(...event.sides.map((side) =>
      make("section", { className: `side ${side}` }, make("h3", {}, SIDE_WORDS[side]), make("p", { className: "facts turned" }, visible(turned[side])), parts[side].text, parts[side].figure)));
    sides.style.setProperty("min-height", `${height}px`); // what is below stays where it is while the text grows
    outcome.replaceChildren(moved(event));
    soon();
  }

  function end({ texts: whole_, perplexity }) {
    for (const [side, text] of Object.entries(whole_)) texts[side] = text.startsWith(prompt) ? text.slice(prompt.length) : text;
    for (const [side, part] of Object.entries(parts)) {
      part.figure.textContent = `perplexity ${short(perplexity[side])}`;
      part.figure.title = "how surprising the plain model finds the text: among how many equally likely tokens each of its own would be";
    }
    outcome.prepend(make("p", { className: "told" }, surprise(perplexity)));
    sides.style.removeProperty("min-height");
    draw();
  }

  /** One event of a stream. */
  function take(event, asked) {
    if (event.event === "start") {
      prompt = asked;
      begin(event);
      stale(false);
    }
    if (event.event === "text") {
      texts[event.side] += event.text;
      soon();
    }
    if (event.event === "done") end(event);
  }

  function stale(is) {
    element.classList.toggle("stale", is);
  }

  /** Scrolls to the texts where they begin below what can be seen. */
  function reveal() {
    if (element.getBoundingClientRect().top > innerHeight - 200) element.scrollIntoView();
  }

  return { element, take, stale, reveal };
}

/** How much stranger than its own text the plain model finds the others, in words. */
function surprise({ plain, steered, control }) {
  if (typeof plain !== "number" || typeof steered !== "number") return "The text has been steered beyond what the plain model can give odds for.";
  const times = (x) => (x / plain >= 10 ? whole(Math.round(x / plain)) : (x / plain).toFixed(1));
  const random = typeof control === "number" ? ` With the random direction it is ${times(control)} times.` : "";
  return `To the plain model, each token of the steered text is ${times(steered)} times as surprising as one of its own.${random}`;
}

/** KL in words: what a reader may expect to see. */
function shift(kl) {
  const much = kl < 0.001 ? "stay as they are" : kl < 0.05 ? "hardly move" : kl < 0.5 ? "move a little" : kl < 2 ? "move a lot" : "are other ones altogether";
  return `The odds of the next token ${much}: KL ${short(kl)} nats.`;
}

/** The next-token probabilities that moved most, a bar for each side. */
function moved({ sides, kl, top_tokens: rows }) {
  const most = Math.max(...rows.flatMap(([, ...p]) => p), 1e-9);
  const line = (p, i) =>
    make("span", { className: `odds ${sides[i]}`, style: { "--share": p / most } }, make("span", { className: "unseen" }, SIDE_WORDS[sides[i]]), make("span", {}, percent(p)));
  const body = rows.map(([token, ...p]) => make("tr", {}, make("th", { scope: "row" }, code(token)), make("td", {}, ...p.map(line))));
  const head = make("thead", { className: "unseen" }, make("tr", {}, make("th", { scope: "col" }, "token"), make("th", { scope: "col" }, "probability")));
  return section("What comes next", make("p", { className: "told" }, shift(kl)), make("table", { className: "chances" }, head, make("tbody", {}, ...body)));
}

/** The words of `text`, each with whether `plain` has it too: those of a longest common subsequence. */
function playDifference(plain, text) {
  const [a, b] = [plain, text].map((words) => words.match(/\s*\S+|\s+$/g) ?? []);
  const wide = b.length + 1, common = new Uint16Array((a.length + 1) * wide); // of a from i on and b from j on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * wide + j] = a[i] === b[j] ? 1 + common[(i + 1) * wide + j + 1] : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
  const words = [];
  for (let i = 0, j = 0; j < b.length; ) {
    if (i < a.length && a[i] === b[j]) {
      words.push([b[j++], true]);
      i++;
    } else if (i < a.length && common[(i + 1) * wide + j] >= common[i * wide + j + 1]) i++;
    else words.push([b[j++], false]);
  }
  return words;
}

/** A button that copies the address; where there is no clipboard, a field with it to copy from. */
function shareButton(address) {
  const button = make("button", { type: "button" }, "Copy link");
  const field = make("input", { readOnly: true, hidden: true, "aria-label": "Link to this state" });
  const said = make("span", { role: "status", className: "facts" });
  button.onclick = async () => {
    const link = address();
    try {
      await navigator.clipboard.writeText(link);
      said.textContent = "Copied: it opens this very state on any machine that serves this catalog here.";
    } catch {
      Object.assign(field, { value: link, hidden: false });
      field.select();
      said.textContent = "Copy it from here.";
    }
  };
  return make("div", { className: "share" }, button, said, field);
}

/* The sweep */

const SVG = "http://www.w3.org/2000/svg";
const PANEL = { height: 108, gap: 26, left: 52, right: 12, top: 20, bottom: 30 }; // pixels

/** An SVG element with attributes and children. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A sweep over the strengths of one edit: what each does to the text, beside a random direction as strong. */
function playSweep({ overview, features }, state, choose) {
  const sweeping = oneAtATime(), error = problem();
  const which = make("select", { "aria-label": "The edit whose strength is swept" });
  const go = make("button", { type: "button" }, "Try its strengths");
  const stops = make("button", { type: "button", hidden: true, onclick: sweeping.stop }, "Stop");
  const status = make("p", { className: "facts", role: "status" });
  const told = make("p", { className: "told" });
  const box = make("div", { className: "plot" });
  const key = make("p", { className: "facts key", hidden: true }, ...Object.entries({ steered: "the feature", control: "a random direction, as strong", plain: "plain text" }).map(([side, words]) => make("span", { className: side }, words)));
  const readout = make("p", { className: "facts readout" });
  let rows = [], plain = null, knee = null, edit = null, swept = null, asked = [];

  const candidates = () => state.edits.filter((one) => one.on && !KINDS[one.kind].bare);

  /** Offers the edits there are. */
  function list() {
    const all = candidates(), before = which.value;
    which.replaceChildren(...all.map((one, i) => make("option", { value: i }, `${one.kind} feature ${one.feature}`)));
    which.value = all[before] ? before : all.length ? "0" : "";
    which.hidden = all.length < 2;
    go.disabled = !all.length;
    mark();
  }

  function strengths(one) {
    const [low, high] = range(one, features);
    const from = Math.max(low, 0), n = Math.min(SWEPT, overview.limits.strengths);
    return Array.from({ length: n }, (_, i) => Number((from + ((high - from) * i) / (n - 1)).toPrecision(2)));
  }

  async function sweep() {
    const all = candidates(), one = all[Number(which.value)];
    error.say("");
    if (!state.prompt.trim() || !one) return error.say("Type a prompt first.");
    [rows, plain, knee, edit, swept, asked] = [[], null, null, one, { kind: one.kind, unit: one.unit }, strengths(one)];
    told.textContent = "";
    box.replaceChildren();
    key.hidden = true;
    readout.textContent = "";
    stops.hidden = false;
    status.textContent = "Asking the model …";
    const edits = [one, ...all.filter((other) => other !== one), ...state.edits.filter((other) => other.on && KINDS[other.kind].bare)];
    try {
      const ended = await sweeping.start(async (signal) => {
        for await (const event of askStream("api/sweep", { ...question(state, edits), strengths: asked, samples: 1 }, signal)) {
          if (event.event === "waiting") status.textContent = queued(event.ahead);
          if (event.event === "row") {
            rows.push(event);
            readout.textContent ||= `Across: the strength, ${UNIT_WORDS[swept.unit]}. Choose one to set it.`;
            status.textContent = `${rows.length} of ${asked.length} strengths`;
          }
          if (event.event === "done") {
            [plain, knee] = [event.plain, event.knee];
            status.textContent = "";
            told.textContent = knee === null
              ? "No strength here is both fluent and beyond what the random direction does."
              : `Suggested: ${knee}, the strongest whose text is still fluent (perplexity at most twice the plain one) and which does what the random direction does not.`;
          }
          if (rows.length) show();
        }
      });
      if (!ended && !sweeping.busy()) status.textContent = "Stopped.";
    } catch (failure) {
      status.textContent = "";
      error.say(failure.message);
    }
    stops.hidden = !sweeping.busy();
  }

  /** The figure that tells the effect: the feature read again where that is known, else KL. */
  const effect = () => (rows.some((row) => typeof row.steered.reactivation === "number") ? ["reactivation", "the feature, when the text is read again"] : ["kl", "KL of the next token, nats"]);

  function show() {
    const known = [...rows].sort((a, b) => a.strength - b.strength);
    const width = Math.max(240, box.clientWidth);
    const panels = [["perplexity", "perplexity under the plain model", true], [...effect(), false]];
    const height = panels.length * (PANEL.height + PANEL.gap) + PANEL.bottom;
    const [first, last] = [asked[0], asked.at(-1)];
    const x = (strength) => PANEL.left + ((strength - first) / (last - first || 1)) * (width - PANEL.left - PANEL.right);
    const image = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": "Strengths tried; choose one to set it" });
    panels.forEach((panel, i) => image.append(playPanel(panel, known, plain, x, PANEL.top + i * (PANEL.height + PANEL.gap), width)));
    if (knee !== null)
      image.append(
        draw("line", { class: "knee", x1: x(knee), x2: x(knee), y1: PANEL.top, y2: height - PANEL.bottom - 6 }),
        draw("text", { class: "knee", x: Math.max(PANEL.left + 20, Math.min(x(knee), width - 34)), y: height - 5, "text-anchor": "middle" }, "suggested"),
      );
    const half = (width - PANEL.left - PANEL.right) / Math.max(1, known.length - 1) / 2;
    known.forEach((row) => image.append(point(row, x(row.strength), half, height)));
    box.replaceChildren(image);
    key.hidden = false;
    mark();
  }

  const describe = ({ strength, steered, control }) => {
    const [name] = effect();
    const words = { reactivation: "the feature read again", kl: "KL" }[name];
    return `${strength}: perplexity ${short(steered.perplexity)} (random ${short(control.perplexity)}), ${words} ${short(steered[name])} (random ${short(control[name])})`;
  };

  /** A strength of the plot as a button: the whole column can be clicked. */
  function point(row, x, half, height) {
    const hit = draw("rect", { class: "hit", x: x - half, y: 4, width: 2 * half, height: height - 18 });
    const button = draw("g", { class: "point", role: "button", tabindex: 0, "aria-label": `Set strength ${describe(row)}`, "data-strength": row.strength }, hit,
      draw("text", { class: "tell", x, y: height - PANEL.bottom + 6, "text-anchor": "middle" }, String(row.strength)));
    const set = () => choose(edit, { ...swept, strength: row.strength });
    const say = () => (readout.textContent = describe(row));
    button.addEventListener("click", set);
    button.addEventListener("pointerenter", say);
    button.addEventListener("focus", say);
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      set();
    });
    return button;
  }

  /** Marks the strength that the edit has, where it is one of those tried. */
  function mark() {
    for (const button of box.querySelectorAll(".point"))
      button.setAttribute("aria-pressed", Boolean(edit) && Number(button.dataset.strength) === edit.strength);
  }

  let width = 0;
  const watch = new ResizeObserver(() => {
    if (box.clientWidth !== width && rows.length) show();
    width = box.clientWidth;
  });
  watch.observe(box);
  go.onclick = sweep;
  const element = section(
    "How far to turn it",
    make("p", { className: "facts" }, "Too little does nothing, too much breaks the text, and so does any random direction. Try several strengths, and choose one by a click."),
    make("div", { className: "run" }, which, go, stops, status),
    error.element, key, box, readout, told,
  );
  const leave = () => {
    sweeping.stop();
    watch.disconnect();
  };
  return { element, list, leave };
}

/** One figure over the strengths: the feature's line, the random direction's, and where plain text lies. */
function playPanel([name, title, logarithmic], rows, plain, x, top, width) {
  const values = rows.flatMap((row) => [row.steered[name], row.control?.[name]]).concat(plain?.[name]).filter((value) => typeof value === "number");
  const scale = logarithmic ? Math.log10 : (value) => value;
  if (!values.length) return draw("g"); // a text that was steered to pieces has no figures
  const [least, most] = [logarithmic ? Math.min(...values) : Math.min(0, ...values), Math.max(...values, logarithmic ? 1 : 0)];
  const y = (value) => top + PANEL.height - ((scale(value) - scale(least)) / (scale(most) - scale(least) || 1)) * (PANEL.height - 8);
  const panel = draw("g", { "aria-hidden": true }, draw("text", { class: "tell", x: PANEL.left, y: top - 6 }, title));
  for (const value of [least, most])
    panel.append(
      draw("line", { class: "grid", x1: PANEL.left, x2: width - PANEL.right, y1: y(value), y2: y(value) }),
      draw("text", { class: "tell", x: PANEL.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)),
    );
  if (typeof plain?.[name] === "number") panel.append(draw("line", { class: "side plain", x1: PANEL.left, x2: width - PANEL.right, y1: y(plain[name]), y2: y(plain[name]) }));
  for (const side of ["control", "steered"]) {
    const known = rows.filter((row) => typeof row[side]?.[name] === "number");
    panel.append(draw("polyline", { class: `side ${side}`, points: known.map((row) => `${x(row.strength).toFixed(1)},${y(row[side][name]).toFixed(1)}`).join(" ") }));
    for (const row of known) panel.append(draw("circle", { class: `side ${side}`, cx: x(row.strength).toFixed(1), cy: y(row[side][name]).toFixed(1), r: side === "steered" ? 3.5 : 2 }));
  }
  return panel;
}
