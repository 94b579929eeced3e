// The playground's state: its address, what it begins with, and the Python that does the same.
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
const START_PROMPT = "Mike pulls out his"; // of the model that ships
const START_WORDS = ["Tano", "Padawan", "Amidala", "lightsaber", "Jedi"]; // what its first feature is to make it say
const OTHER_PROMPT = "Once upon a time";
const NUMBERS = { tokens: 30, temperature: 1, seed: 0 };
const MAX_TEMPERATURE = 100, MAX_STRENGTH = 1e6, SEEDS = 2 ** 31;

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
  make("a", { href: `#play?edit=${editText(freshEdit(index, features))}`, className: "button main" }, "Steer with it");

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
