// What needs the model: steering, and what fires on a text. Only on a page that `saekit serve` serves.
"use strict";

/** Posts to the server beside the page. Rejects with the server's own words. */
async function ask(path, question) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question),
  });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

/** A form that asks the server and shows the answer under itself. */
function asking(fields, label, question, show) {
  const button = make("button", { type: "submit" }, label);
  const result = make("div", { className: "result", role: "status" });
  const form = make("form", { className: "ask" }, ...fields, button, result);
  form.onsubmit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    result.replaceChildren(make("p", { className: "facts" }, "asking the model …"));
    try {
      result.replaceChildren(...show(await question()));
    } catch (error) {
      result.replaceChildren(make("p", { className: "error" }, visible(error.message)));
    }
    button.disabled = false;
  };
  return form;
}

function field(label, input) {
  return make("label", {}, make("small", {}, label), input);
}

const number = (value, step, min = "") => make("input", { type: "number", required: true, step, min, value });

function choice(...options) {
  return make("select", {}, ...options.map((option) => make("option", {}, option)));
}

const UNITS = {
  add: ["norm", "max", "raw"], clamp: ["max", "raw"], min_clamp: ["max", "raw"], scale: ["raw"], ablate: ["raw"],
  project_out: ["raw"], rescale: ["raw"], cap: ["norm", "raw"],
};
const WITHOUT_STRENGTH = ["ablate", "project_out"];
let lastPrompt = "Once upon a time"; // kept from feature to feature

/** The steering box of a feature. */
function steering(index, max) {
  const prompt = make("textarea", { rows: 2, required: true, value: lastPrompt });
  const kind = choice(...Object.keys(UNITS)), unit = choice();
  const strength = number(STRENGTH, "any"), length = number(30, 1, 1);
  const temperature = number(1, "any", 0), seed = number(0, 1, 0);
  kind.onchange = () => {
    const fitting = UNITS[kind.value].filter((name) => name !== "max" || max > 0);
    unit.replaceChildren(...fitting.map((name) => make("option", {}, name)));
    strength.disabled = WITHOUT_STRENGTH.includes(kind.value);
  };
  kind.onchange();
  const question = () => {
    lastPrompt = prompt.value;
    return ask("api/steer", {
      prompt: prompt.value,
      edits: [{ feature: index, kind: kind.value, strength: strength.disabled ? 0 : Number(strength.value), unit: unit.value }],
      max_new_tokens: Number(length.value),
      temperature: Number(temperature.value),
      seed: Number(seed.value),
    });
  };
  const fields = [
    field("prompt", prompt),
    make(
      "div", { className: "fields" },
      field("edit", kind), field("strength", strength), field("times", unit),
      field("new tokens", length), field("temperature", temperature), field("seed", seed),
    ),
  ];
  return section("Try it", asking(fields, "steer", question, comparison));
}

/** Plain and steered beside each other, and the next-token probabilities that moved. */
function comparison({ prompt, plain, steered, kl, top_tokens: moved }) {
  const said = (title, text) => {
    const known = text.startsWith(prompt) ? prompt.length : 0;
    return make(
      "div", {}, make("small", {}, title),
      make("p", { dir: "auto" }, visible(text.slice(0, known)), make("b", {}, visible(text.slice(known)))),
    );
  };
  const most = Math.max(...moved.map(([, before, after]) => Math.max(before, after)));
  const rows = moved.map(([token, ...p]) => [code(token), ...p.map((x) => bar(percent(x), x / most))]);
  return [
    make("div", { className: "pair" }, said("plain", plain), said("steered", steered)),
    make("p", { className: "facts" }, `KL ${short(kl)} nats for the token after the prompt`),
    table(["next token", "plain", "steered"], rows),
  ];
}

/** The prompt view: which features fire on a text, token by token. */
function probing(features) {
  const text = make("textarea", { rows: 3, required: true, value: lastPrompt });
  const show = ({ tokens, features: firing }) => {
    const details = make("div", {});
    const buttons = tokens.map((token, i) => {
      const button = make("button", { type: "button", className: "token" }, spelled(token));
      button.onclick = () => {
        for (const other of buttons) other.setAttribute("aria-pressed", other === button);
        const rows = firing[i].map(([index, activation]) => [
          linkTo(features, index),
          bar(short(activation), activation / firing[i][0][1]),
        ]);
        details.replaceChildren(rows.length ? table(["feature", "activation"], rows) : make("p", {}, "Nothing fires here."));
      };
      return button;
    });
    buttons.at(-1)?.click();
    return [make("div", { className: "tokens" }, ...buttons), details];
  };
  return section("What fires on a text", asking([field("text", text)], "show", () => ask("api/activations", { text: text.value }), show));
}
