// Texts read token by token: which features fire on each, and which mark the whole text.
"use strict";

const WHOLE_AT_FIRST = 12; // features of a whole text that are listed at first
const COMMON = 0.01; // density above which a feature says little about one text

/** All texts, or the one of number `which`. */
async function promptsView(catalog, which) {
  const texts = await load("prompts");
  if (!texts.length) {
    return [
      make("h2", {}, "Prompts"),
      make("p", {}, "This page holds no texts. ", code("saekit catalog page CATALOG OUT --prompt \"…\""), " writes it with some of yours."),
    ];
  }
  if (which === null) return textsOf(catalog, texts);
  if (which >= texts.length) return [make("p", { className: "error", role: "alert" }, `There is no text ${which}; this page holds ${texts.length}.`), ...textsOf(catalog, texts)];
  return [textOf(catalog, texts, which)];
}

/** Every text with the features that mark it. */
function textsOf(catalog, texts) {
  const item = ({ text, source }, i) =>
    make(
      "li", {},
      make("a", { href: `#prompts/${i}`, className: "excerpt", dir: "auto" }, visible(text.trim().length > 180 ? `${text.trim().slice(0, 180)}…` : text.trim())),
      make(
        "p", { className: "marks" },
        make("span", { className: "soft" }, source === "prompt" ? "given" : "from the corpus"),
        ...marking(catalog, summed(evaluated(catalog, texts[i]))).slice(0, 3).map(({ index }) => featureLink(catalog, index)),
      ),
    );
  return [
    make(
      "div", { className: "prompts" },
      make("h2", {}, "Prompts"),
      make("p", { className: "lede" }, `${texts.length === 1 ? "A text" : `${texts.length} texts`}, read by the model. Open one to see token by token which features fire.`),
      catalog.overview.live ? make("p", {}, "For a text of your own there is the ", make("a", { href: "#play" }, "playground"), ".") : null,
      make("ol", { className: "text-list" }, ...texts.map(item)),
    ),
  ];
}

/** What fires on each token; nothing on those that the catalog leaves out, such as the one that opens a text. */
const evaluated = ({ overview }, { tokens, firing }) => firing.map((row, i) => (overview.excluded.includes(tokens[i]) ? [] : row));

/** Features of a text by the sum of their activations: [{index, sum, at: per token}]. */
function summed(firing) {
  const found = new Map();
  firing.forEach((row, t) => {
    for (const [index, activation] of row) {
      if (!found.has(index)) found.set(index, { index, sum: 0, at: new Array(firing.length).fill(0) });
      const feature = found.get(index);
      feature.sum += activation;
      feature.at[t] = activation;
    }
  });
  return [...found.values()].sort((a, b) => b.sum - a.sum || a.index - b.index);
}

/** Of a text's features, those that do not fire all over the corpus. */
const marking = ({ features }, all) => all.filter(({ index }) => !(features.density[index] > COMMON));

/** One text: its tokens, and beside them the features of the whole or of the token that is chosen. */
function textOf(catalog, texts, which) {
  const { features } = catalog;
  const { tokens, source } = texts[which];
  const firing = evaluated(catalog, texts[which]);
  const all = summed(firing);
  const byIndex = new Map(all.map((feature) => [feature.index, feature]));
  const rare = marking(catalog, all);
  const nearest = tokens.map((_, t) => Math.max(0, ...rare.map(({ index, at }) => at[t] && at[t] / (features.max[index] || at[t]))));
  let common = !rare.length; // whether features that fire all over the corpus are listed
  let chosen = null; // token
  let pinned = null; // feature whose activations colour the text
  let whole = false; // whether all features of the text are listed

  const words = make("div", { className: "token-flow", dir: "auto", role: "group", "aria-label": "Tokens of the text" });
  const spans = tokens.map((token, i) => {
    const spaces = /^ *(?=[^ ])/.exec(token)?.[0] ?? "";
    const span = make("span", { className: "pickable", role: "button" }, visible(token.slice(spaces.length)) || "∅");
    span.onclick = () => choose(chosen === i ? null : i);
    words.append(i ? spaces : "", span);
    if (token.includes("\n")) words.append(make("br"));
    return span;
  });
  words.onkeydown = (event) => {
    const from = spans.indexOf(event.target);
    const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (from >= 0 && ["Enter", " "].includes(event.key)) {
      event.preventDefault();
      spans[from].click();
    }
    if (event.key === "Escape") choose(null);
    if (to === undefined || from < 0 || !spans[to]) return;
    event.preventDefault();
    choose(to);
    spans[to].focus();
  };
  const legend = make("p", { className: "caption", role: "status" });
  const panel = make("div", { className: "firing" });

  /** Colours the text by one feature, or by how near any feature comes to its strongest activation. */
  function colour(index) {
    const feature = byIndex.get(index);
    const top = feature ? features.max[index] || Math.max(...feature.at) : 1;
    spans.forEach((span, i) => {
      const activation = feature ? feature.at[i] : nearest[i] ** 2; // squared: near its strongest is what stands out
      span.style.setProperty("--heat", Math.min(1, activation / top).toFixed(3));
      span.classList.toggle("fires", activation > 0);
      if (feature && activation) span.dataset.activation = short(activation);
      else delete span.dataset.activation;
    });
    legend.replaceChildren(
      ...(feature
        ? ["Coloured by ", make("bdi", {}, `${index} ${nameOf(features, index)}`), `: strongest here ${short(Math.max(...feature.at))}, in the corpus ${short(features.max[index])}.`]
        : ["Coloured by how close any feature that fires on less than 1 token in 100 comes to its strongest."]),
    );
  }

  function choose(token) {
    chosen = token;
    spans.forEach((span, i) => {
      span.setAttribute("aria-pressed", String(i === chosen));
      span.tabIndex = i === (chosen ?? 0) ? 0 : -1;
    });
    list();
  }

  function pin(index) {
    pinned = pinned === index ? null : index;
    for (const strip of panel.querySelectorAll(".strip")) strip.setAttribute("aria-pressed", String(Number(strip.dataset.index) === pinned));
    colour(pinned);
  }

  /** A feature with where in the text it fires; it colours the text while the pointer or the focus is on it. */
  function row(feature, value, most) {
    const { index, at } = feature;
    const top = Math.max(...at);
    const cells = at.map((activation, t) => make("i", { className: t === chosen ? "here" : "", style: { "--heat": (activation / top).toFixed(3) } }));
    const strip = make(
      "button",
      { type: "button", className: "strip", "aria-pressed": String(pinned === index), "aria-label": `colour the text by feature ${index}`, title: "colour the text by this feature" },
      ...cells,
    );
    strip.dataset.index = index;
    strip.onclick = () => pin(index);
    const item = make("li", {}, make("div", { className: "name" }, featureLink(catalog, index), bar(short(value), value / most)), strip);
    item.onpointerenter = (event) => {
      if (event.pointerType !== "touch") colour(index);
    };
    item.onpointerleave = () => colour(pinned);
    item.addEventListener("focusin", () => colour(index));
    item.addEventListener("focusout", () => colour(pinned));
    return item;
  }

  /** The features of the whole text, or of the token that is chosen. */
  function list() {
    colour(pinned);
    if (chosen !== null) {
      const back = make("button", { type: "button", className: "quiet" }, "whole text");
      back.onclick = () => {
        const left = spans[chosen];
        choose(null);
        left.focus();
      };
      const here = firing[chosen];
      panel.replaceChildren(
        make("div", { className: "headline" }, make("h3", {}, "On ", code(tokens[chosen])), back),
        make("p", { className: "caption" }, here.length ? "Strongest first, by activation. The strips show the whole text." : "No feature fires on this token."),
        make("ol", {}, ...here.map(([index, activation]) => row(byIndex.get(index), activation, here[0][1]))),
      );
      return;
    }
    const listed = common ? all : rare;
    const shown = whole ? listed : listed.slice(0, WHOLE_AT_FIRST);
    const button = (text, change) => {
      const made = make("button", { type: "button", className: "quiet" }, text);
      made.onclick = () => {
        change();
        list();
        panel.querySelector("a")?.focus({ preventScroll: true });
      };
      return made;
    };
    const rest = listed.length - shown.length, hidden = all.length - rare.length;
    panel.replaceChildren(
      make("h3", {}, "In the whole text"),
      make("p", { className: "caption" }, all.length ? "Features by the sum of their activations. The strips show where they fire." : "No feature fires on this text."),
      make("ol", {}, ...shown.map((feature) => row(feature, feature.sum, listed[0].sum))),
      make(
        "p", { className: "further" },
        rest ? button(`${rest} more`, () => (whole = true)) : null,
        hidden && rare.length ? button(common ? "leave out common features" : `and ${hidden} that fire everywhere`, () => (common = !common)) : null,
      ),
    );
  }

  choose(null);
  const step = (to, text) => (texts[to] ? make("a", { href: `#prompts/${to}` }, text) : make("span", {}));
  return make(
    "div",
    { className: "prompts" },
    make(
      "nav", { className: "steps", "aria-label": "Texts" },
      make("a", { href: "#prompts" }, "All texts"),
      step(which - 1, "← before"),
      step(which + 1, "next →"),
    ),
    make("h2", {}, `Text ${which + 1} of ${texts.length}`),
    make("p", { className: "caption" }, `${source === "prompt" ? "A given prompt" : "From the corpus"}, ${tokensOf(tokens.length)}. Choose a token, or the strip of a feature.`),
    make("div", { className: "reading" }, make("div", { className: "read" }, words, legend), panel),
  );
}
