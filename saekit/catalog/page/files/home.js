// What the catalog is: the view a reader starts from, and the page about it.
"use strict";

const SPREAD_BARS = 48;
const ENOUGH = 30; // features that make a plot worth looking at
const PEEK_BEFORE = 26; // characters shown before a peak
const PEEK_AFTER = 10; // tokens from the peak on; what has no room is cut

/** What this is, what is worth a first look, and how features spread. */
function homeView(catalog) {
  const { overview } = catalog;
  const few = overview.only ? `${whole(overview.only.length)} of ` : ""; // a page of chosen features
  return [
    make(
      "div", { className: "opening" },
      make("h2", { className: "grand" }, `${few}${whole(overview.alive)} patterns found inside `, make("bdi", {}, visible(overview.model))),
      origin(overview),
      make(
        "p", { className: "lead" },
        "A language model turns each word it reads into a long list of numbers. A ", make("i", {}, "sparse autoencoder"),
        " takes these lists apart into ", make("b", {}, "features"), ": patterns that switch on, or ", make("i", {}, "fire"),
        ", for some kind of text: a name, a topic, the end of a question. Many are easy to name, some are not.",
      ),
      make(
        "p", { className: "lead" },
        "Here you see what every feature fires on and what it makes the model say next. ",
        few ? "Open one of those that this page holds." : "Open one below, search for a word that matters to you, or select a range in the plots.",
      ),
      ways(catalog),
    ),
    examples(catalog),
    spread(catalog),
    figures(overview.figures),
  ];
}

/** The buttons: into the playground, to the list (which a phone shows as a view of its own), to chance. */
function ways({ overview, features, list }) {
  const any = make("button", { type: "button" }, "Surprise me");
  any.onclick = () => {
    const alive = (overview.only ?? features.density.map((_, i) => i)).filter((i) => features.density[i] > 0 && (list.shown()?.has(i) ?? true));
    if (alive.length) location.hash = alive[Math.floor(Math.random() * alive.length)];
  };
  const buttons = make(
    "p", { className: "ways" },
    overview.live ? make("a", { href: "#play", className: "button main" }, "Talk to the model with a feature turned up") : null,
    make("a", { href: "#features", className: "button narrow" }, "Search the features"),
    any,
  );
  const command = make("code", {}, visible(`saekit serve ${shellWord(overview.name)}`));
  const hint = make("p", { className: "facts" }, "To talk to the model with a feature turned up, start this page with ", command, ".");
  return make("div", {}, buttons, overview.live || overview.only ? null : hint);
}

/** Where the features come from, in one sentence. */
function origin({ model, place, sae, corpus, tokens }) {
  const width = sae.k ? `${whole(sae.k)} of ${whole(sae.d_sae)} features at a time` : `${whole(sae.d_sae)} features`;
  return make("p", { className: "facts" }, make("bdi", {}, visible(`${model}, read ${place} by a ${sae.architecture} autoencoder (${width}), on ${whole(tokens)} tokens of the corpus ${corpus}.`)));
}

/** Features worth a first look, each with the context in which it fires most; these arrive after the first view. */
function examples({ overview, features }) {
  if (!overview.examples.length) return null;
  const item = (index) => {
    const text = make("span", { className: "peek" });
    record(index, overview.shard).then(
      ({ contexts: [context] }) => context && text.append(peek(context, features.max[index])),
      () => {}, // the link is there; the feature's own view says what failed
    );
    return make("li", {}, linkTo(features, index), text);
  };
  return section(overview.only ? "On this page" : "Worth a first look", make("ol", { className: "examples" }, ...overview.examples.map(item)));
}

/** The words around a context's peak, as many before it as leave it in sight on a narrow screen. */
function peek({ tokens, firings, peak }, top) {
  let from = peak;
  for (let room = PEEK_BEFORE; from > 0 && room >= tokens[from - 1].length; from--) room -= tokens[from - 1].length;
  const activations = tokens.map(() => 0);
  for (let i = 0; i < firings.length; i += 2) activations[firings[i]] = firings[i + 1];
  const to = peak + PEEK_AFTER;
  const text = tokenText(tokens.slice(from, to), activations.slice(from, to), top, { peak: peak - from });
  if (from) text.prepend("… ");
  return text;
}

/** The plots that select by brushing, kept in step with the list. */
function spread({ overview, features, list }) {
  const indices = overview.only ?? features.density.map((_, i) => i);
  if (indices.length < ENOUGH) return null;
  const plots = new Map(); // column → plot
  const add = (column, options) => {
    const values = indices.map((i) => features[column][i]);
    const plot = brushPlot({ values, bins: SPREAD_BARS, ...options, onSelect: (low, high) => list.filter(column, low, high) });
    plots.set(column, plot);
    return plot;
  };
  const parts = [];
  const firing = indices.map((i) => features.density[i]).filter((d) => d > 0);
  if (firing.length) {
    const low = 10 ** Math.floor(Math.log10(firing.reduce((a, b) => Math.min(a, b))));
    const high = Math.min(1, 10 ** Math.ceil(Math.log10(firing.reduce((a, b) => Math.max(a, b)))));
    const silent = indices.length - firing.length;
    const plot = add("density", { low, high, log: true, format: (x) => `${Number((100 * x).toPrecision(2))} %`, label: "Features by the share of tokens they fire on" });
    parts.push(titled("How often they fire", `Share of tokens: rare ones on the left, those that nearly every token wakes on the right.${silent ? ` ${whole(silent)} never fired.` : ""}`, plot));
  }
  const scores = overview.scored ? indices.map((i) => features.score[i]).filter((x) => x !== null) : [];
  if (scores.length) {
    const low = Math.min(0, Math.floor(10 * scores.reduce((a, b) => Math.min(a, b))) / 10);
    const plot = add("score", { low, high: 1, format: (x) => String(Number(x.toPrecision(2))), root: true, label: "Features by the score of their explanation" });
    parts.push(titled("How well their explanation predicts them", `Score on texts that it was not made from; 1 is perfect, half of them reach ${short(overview.median_score)}. Heights are square roots of counts.`, plot));
  }
  if (!parts.length) return null;
  const left = make("p", { className: "left", role: "status" });
  const follow = () => {
    const shown = list.shown();
    for (const [column, plot] of plots) {
      plot.setShown(shown && ((place) => shown.has(indices[place])));
      plot.setSelection(...(list.range(column) ?? [null, null]));
    }
    if (!shown) return left.replaceChildren("Drag over the bars to keep only those features in the list.");
    const clear = make("button", { type: "button" }, "Show all");
    clear.onclick = list.clear;
    const count = make("a", { href: "#features" }, `${whole(shown.size)} of ${whole(indices.length)} features`);
    left.replaceChildren(count, " left ", clear);
  };
  onLeave(list.listen(follow));
  follow();
  return section("All of them at once", make("div", { className: "plots" }, ...parts), left);
}

const titled = (title, words, plot) =>
  make("figure", {}, make("figcaption", {}, make("b", {}, title), " ", make("small", {}, words)), plot);

/** What is known of the autoencoder's quality: a number, its name, and what it means. */
function figures(all) {
  if (!all.length) return null;
  const part = ([label, value, words]) =>
    make("div", {}, make("dt", {}, visible(label)), make("dd", {}, make("b", {}, visible(value)), make("small", {}, visible(words))));
  return section("How good is this autoencoder", make("dl", { className: "quality" }, ...all.map(part)));
}

/** Where the catalog comes from, how its numbers are defined, and how to open it in Python. */
function aboutView({ overview }) {
  const { name, model, site, place, sae, corpus, licence, tokens, excluded, definitions, explained, scored, median_score } = overview;
  const terms = (pairs) =>
    make("dl", { className: "terms" }, ...pairs.flatMap(([term, text]) => [make("dt", {}, visible(term)), make("dd", {}, make("bdi", {}, visible(String(text))))]));
  const python = [
    "import saekit",
    `catalog = saekit.Catalog.open(${JSON.stringify(name)})`,
    'for feature in catalog.search("boat", limit=5):',
    "    print(feature.index, feature.explanation)",
  ].join("\n");
  const methods = Object.entries(explained).map(([method, count]) => `${whole(count)} ${METHODS[method] ?? `by ${method}`}`).join(" · ");
  return [
    make("h2", { className: "grand" }, "About this catalog"),
    section(
      "What it describes",
      terms([
        ["model", model],
        ["place", `${place} (${site})`],
        ["autoencoder", `${sae.architecture}${sae.k ? `, k = ${sae.k}` : ""}, ${whole(sae.d_in)} → ${whole(sae.d_sae)}`],
        ["text", `${corpus}, ${whole(tokens)} tokens`],
        ["licence of the text", licence || "not stated"],
        ["left out", excluded.length ? `${excluded.map(spelled).join(" ")} (special tokens: counted nowhere)` : "nothing"],
        ["explanations", methods || "none"],
        ["scored", scored ? `${whole(scored)}, median ${short(median_score)}` : "none"],
      ]),
    ),
    section("How its numbers are defined", terms(Object.entries(definitions))),
    section("Open it in Python", copyable("Python", python)),
    make("p", { className: "facts" }, "This page asks no other host for anything. It works from a folder, offline."),
  ];
}
