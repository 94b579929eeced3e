// Making elements. Everything from a catalog enters as text, never as markup, with the invisible spelled out.
"use strict";

// Control characters, zero-width ones but the joiners that scripts need, and those that turn the reading direction.
const INVISIBLE =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu;

/** Text as it can be shown: a line break as ⏎, ESC as \x1b, a right-to-left override as \u202e. */
function visible(text) {
  return text.replace(INVISIBLE, (character) => {
    if (character === "\n") return "⏎";
    if (character === "\t") return "⇥";
    const code = character.codePointAt(0).toString(16);
    return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`;
  });
}

/** A token as shown in tables: its spaces as ·, an empty one as ∅. */
const spelled = (token) => visible(token).replaceAll(" ", "·") || "∅";

/** An element with properties and children; strings among the children become text, null ones are left out. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A section with a heading. */
const section = (title, ...children) => make("section", {}, make("h3", {}, title), ...children);

/** A table from a head and rows of cells; cells are strings or elements. */
function table(head, rows) {
  return make("table", {}, make("thead", {}, tableRow(head, "th")), make("tbody", {}, ...rows.map((row) => tableRow(row))));
}

const tableRow = (cells, tag = "td") => make("tr", {}, ...cells.map((cell) => make(tag, {}, cell)));

/** A number with a bar under it; share in [0, 1]. */
const bar = (text, share, kind = "") =>
  make("span", { className: `bar ${kind}`, style: { "--share": Math.max(0, Math.min(1, share || 0)) } }, text);

const QUOTED = '"(?:[^"\\\\]|\\\\.)*"';
const TOKEN_LIST = new RegExp(`^((?:say |say one of )?)(${QUOTED}(?:, ${QUOTED})*)$`);

/** A label as shown: one that lists tokens, `" Jedi", " Sith"`, as Jedi · Sith. */
function readable(label) {
  const [, opening, tokens] = TOKEN_LIST.exec(label) ?? [];
  if (tokens === undefined) return visible(label);
  try {
    return opening + JSON.parse(`[${tokens}]`).map((token) => visible(token.replace(/^ +| +$/g, "")) || (token && "␣") || "∅").join(" · ");
  } catch {
    return visible(label); // somebody's own words that only look like a list
  }
}

/** A feature's name for people: its label, else what is known. */
const nameOf = ({ label, density }, i) => readable(label[i]) || (density[i] > 0 ? "no label" : "never fired");

/** A link to a feature, by number and name. */
const linkTo = (features, i) =>
  make("a", { href: `#${i}` }, make("span", { className: "index" }, String(i)), " ", make("bdi", {}, nameOf(features, i)));

const code = (token) => make("code", { className: "token", dir: "auto" }, spelled(token));

/** A word as a shell takes it. */
const shellWord = (word) => (/^[\w./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

/** Text to copy, with a title and a button. */
function copyable(title, text) {
  const block = make("pre", { tabIndex: 0 }, text.split("\n").map(visible).join("\n"));
  const button = make("button", { type: "button", "aria-label": `Copy: ${title}` }, "Copy");
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block); // no clipboard here: the reader copies the selection
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  return make("div", { className: "copyable" }, make("div", {}, make("small", {}, title), button), block);
}

/** A stretch of text, each token coloured by its activation in units of `top`; the number shows under the pointer, on
 *  touch, and with the keyboard (one stop per text, ← and → from one firing token to the next). `activations` holds one
 *  number per token, 0 where nothing fires; `peak` is the token to mark. */
function tokenText(tokens, activations, top, { peak = -1 } = {}) {
  const fires = [];
  const pieces = tokens.flatMap((token, i) => {
    const shown = i ? token : token.trimStart();
    const activation = activations[i];
    if (!activation) return [visible(shown)];
    const spaces = /^ *(?=[^ ])/.exec(shown)?.[0] ?? ""; // coloured ones would glue words together and hang at line ends
    const heat = Math.max(0, Math.min(1, activation / top)).toFixed(3);
    const span = make("span", { className: "fires", tabIndex: -1, style: { "--heat": heat } }, visible(shown.slice(spaces.length)));
    span.dataset.activation = short(activation);
    span.setAttribute("aria-description", `activation ${short(activation)}`);
    if (i === peak) span.classList.add("strongest");
    fires.push(span);
    return [spaces, span];
  });
  const text = make("span", { className: "text", dir: "auto" }, ...pieces);
  const first = fires.find((span) => span.classList.contains("strongest")) ?? fires[0];
  if (first) first.tabIndex = 0;
  text.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = fires[fires.indexOf(event.target) + step];
    if (step === undefined || !next) return;
    event.preventDefault();
    event.stopPropagation();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  };
  return text;
}

/** Three significant digits, trailing zeros kept so that columns line up; – for what is undefined. */
function short(x) {
  if (x === null) return "–";
  return x === 0 || Math.abs(x) >= 1000 ? whole(Math.round(x)) : x.toPrecision(3);
}

const percent = (x) => `${short(100 * x)} %`;
const whole = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");
