// The playground: a prompt, what fires on it, edits, and what the model says plainly and steered. Needs a live server.
"use strict";

const TYPING = 500, DRAGGING = 250, WRITING = 150; // milliseconds of quiet before asking, and before the address changes

/** The playground, in the state that the address has after its `?`, if it has one: as it is there, since unescaping all of it
 *  before it is taken apart would mix a prompt's own & and = with those between the fields. */
async function playView(catalog) {
  const { overview, features } = catalog;
  const query = location.hash.split("?").slice(1).join("?"), wanted = awaited();
  const state = playState(query, catalog);
  if (!state.edits.length) state.edits.push(freshEdit(await firstFeature(catalog), features));
  if (!wanted()) return [];
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
    answer.become("waiting");
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
      if (!ended && !running.busy()) {
        status.textContent = "Stopped.";
        answer.become("idle");
      }
    } catch (error) {
      status.textContent = "";
      answer.become("failed");
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
      make("div", { className: "run going" }, status, runs, stops, make("small", {}, kbd("Ctrl"), " ", kbd("Enter")), tick("as I change things", state, "live", showAddress)),
    ),
    make(
      "div", { className: "answer" },
      errors.answer.element,
      answer.element,
      sweeper.element,
      section("Take it with you", shareButton(() => { writeAddress(); return location.href; }), python),
    ),
  );
  const pressed = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run(true);
  };
  addEventListener("keydown", pressed); // wherever the focus is: a reader who has just come has it nowhere
  onLeave(() => {
    removeEventListener("keydown", pressed);
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
