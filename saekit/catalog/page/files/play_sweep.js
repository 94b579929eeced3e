// How far to turn a feature: a small plot of what each strength does, row by row.
"use strict";

const SWEPT = 8; // strengths of a sweep

const SVG = "http://www.w3.org/2000/svg";
const PANEL = { height: 108, gap: 34, left: 52, right: 12, top: 20, bottom: 30 }; // pixels

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
