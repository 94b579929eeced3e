// One feature: what it is, what it fires on and how strongly, what it makes the model say, what is near it.
"use strict";

const CONTEXTS_AT_FIRST = 8;
const TOKENS_AT_FIRST = 10;
const BEFORE = 130, AFTER = 80; // characters of a long context that stand around its peak until it is unfolded
const STRENGTH = 0.5; // × the median norm of the activations: a push that shows on any model
const PREVIEW_AFTER = 200; // milliseconds that a pointer rests on a neighbour
let partShown = "strongest"; // which contexts are read, kept from feature to feature: "strongest", "range", or a band's number
let unfolded = false; // whether contexts are shown whole, kept likewise

/** The view of a feature. `catalog`: overview and features; `found`: its full record. */
function featureView(catalog, index, found) {
  const { overview, features } = catalog;
  const max = features.max[index];
  const distribution = countsPlot(found.histogram, {
    label: "How strongly it fires, on a log scale",
    middle: "activation, log scale",
    say: (low, high, count) => `${short(low)} to ${short(high)}: ${tokensOf(count)}`,
  });
  const body = make(
    "div",
    { className: "feature" },
    stepsBetween(catalog, index),
    headOf(catalog, index, found),
    make(
      "div",
      { className: "columns" },
      contextsOf(found, max, distribution),
      make(
        "div", { className: "aside" },
        distribution && section("How strongly it fires", distribution),
        firesOn(found.tokens, max),
        pushesTo(found),
        neuronsOf(found.neurons),
      ),
      make(
        "div", { className: "rest" },
        make("div", { className: "nears" }, ...nearOf(catalog, found)),
        recipeOf(overview, index),
      ),
    ),
  );
  return [body];
}

const tokensOf = (count) => `${whole(count)} ${count === 1 ? "token" : "tokens"}`;

/** "1 in 1,200", to two digits: the density has three, so a third here could be wrong. */
function oneIn(density) {
  const n = Number((1 / density).toPrecision(2));
  return `1 in ${n < 10 ? n : whole(n)}`;
}

/** The indices that this page can open are all of the catalog's, or those that a single file was made for. */
const canOpen = ({ only }, index) => !only || only.includes(index);

/** A link to a feature; its number and name alone where this page does not hold it. */
function featureLink({ overview, features }, index) {
  const link = linkTo(features, index);
  return canOpen(overview, index) ? link : make("span", {}, ...link.childNodes);
}

/** The way to the features before and after this one, by links and by the keys [ and ]. */
function stepsBetween({ overview }, index) {
  const order = overview.only?.toSorted((a, b) => a - b) ?? null;
  const at = order ? order.indexOf(index) : index;
  const last = (order ? order.length : overview.sae.d_sae) - 1;
  const place = (to) => (to < 0 || to > last ? null : order ? order[to] : to);
  const [before, after] = [place(at - 1), place(at + 1)];
  const step = (to, key, name, text) =>
    to === null
      ? make("span", { className: "soft", "aria-hidden": "true" }, text)
      : make("a", { href: `#${to}`, rel: name, title: `${name} feature, key ${key}`, "aria-keyshortcuts": key }, text);
  const pressed = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input, textarea, select")) return;
    const to = { "[": before, "]": after }[event.key] ?? null;
    if (to !== null) location.hash = `#${to}`;
  };
  addEventListener("keydown", pressed);
  onLeave(() => removeEventListener("keydown", pressed));
  return make(
    "nav", { className: "steps", "aria-label": "Features by number" },
    step(before, "[", "previous", before === null ? "first" : `← ${before}`),
    make("a", { className: "back", href: "#features" }, "All features"),
    step(after, "]", "next", after === null ? "last" : `${after} →`),
  );
}

/** Number, explanation with its score, facts, and all of it in one sentence. */
function headOf(catalog, index, found) {
  const { overview, features } = catalog;
  const label = features.label[index], density = features.density[index], max = features.max[index];
  const shown = found.explanations.findIndex(([, text]) => text === label);
  const others = found.explanations.filter((_, i) => i !== shown);
  const [method, , score, how] = found.explanations[shown] ?? [];
  const figure = (name, value, small) => make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, small)));
  return make(
    "div",
    { className: "head" },
    make("p", { className: "number" }, `Feature ${index}`),
    make("h2", { className: max > 0 ? "" : "unnamed" }, make("bdi", {}, nameOf(features, index).replaceAll(" · ", "\u00a0· "))), // no line begins with a dot
    shown < 0 ? null : saidBy(method, score ?? null, how),
    make(
      "div", { className: "known" },
      max > 0
        ? make(
            "dl", { className: "figures" },
            figure("fires on", `${oneIn(density)} tokens`, percent(density)),
            figure("strongest", short(max), "activation"),
            figure("on average", short(found.mean), "where it fires"),
          )
        : make(
            "p", {},
            `It never fired on the ${whole(overview.tokens)} tokens of this corpus, so nobody can say what it reads. What is known is `,
            "the direction that it writes: the words that this would raise, and the features that point the same way.",
          ),
      actionsOf(catalog, index),
    ),
    inShort(found, label),
    others.length ? alsoSaid(others) : null,
  );
}

/** By whom an explanation was given, how well it predicts the feature, and how that was found out. */
function saidBy(method, score, how) {
  const given = make("span", {}, `${METHODS[method] ?? visible(`by ${method}`)}`);
  if (score === null) return make("p", { className: "said" }, given, how ? ` · ${visible(how)}` : " · not scored");
  return make("p", { className: "said" }, scoreMeter(score), given, how ? make("span", { className: "how" }, visible(how)) : null);
}

const METHODS = {
  tokens: "named by tokens it fires on",
  peak_token: "named by the token that its peaks share",
  next_token: "named by the token that follows its peaks",
  logits: "named by the tokens it raises",
  llm: "described by a language model",
  note: "noted by a person",
};

/** A score as a small meter: 0 is chance, 1 is perfect. */
function scoreMeter(score) {
  const share = Math.max(0, Math.min(1, score));
  const words = `score ${score.toFixed(2)}`;
  return make(
    "span",
    {
      className: "meter", role: "meter", "aria-valuemin": "0", "aria-valuemax": "1", "aria-valuenow": share.toFixed(2),
      "aria-label": words, title: "how well the words predict where it fires: 0 is chance, 1 is perfect",
    },
    make("i", { style: { "--share": share } }),
    words,
  );
}

function alsoSaid(others) {
  const item = ([method, text, score, how]) =>
    make("li", {}, make("bdi", {}, visible(text)), saidBy(method, score, how));
  return make(
    "details", { className: "others" },
    make("summary", {}, others.length === 1 ? "One other explanation" : `${others.length} other explanations`),
    make("ul", {}, ...others.map(item)),
  );
}

/** What it reads and what it writes in one line; not what its name says already. */
function inShort({ tokens, raised }, label) {
  const words = (all) => all.slice(0, 3).flatMap(([token], i) => (i ? [" ", code(token)] : [code(token)]));
  const reads = !tokens.slice(0, 3).every(([token]) => label.includes(`"${token}"`)), parts = [];
  if (reads) parts.push("Fires most strongly on ", ...words(tokens));
  if (reads && raised.length) parts.push("; ");
  if (raised.length) parts.push(`${reads ? "turned" : "Turned"} up, it pushes the model to say `, ...words(raised));
  return parts.length ? make("p", { className: "lede" }, ...parts, ".") : null;
}

function actionsOf(catalog, index) {
  return make(
    "p", { className: "actions" },
    catalog.overview.live ? playLink(catalog, index) : null,
    copyingButton("Copy link", () => location.href),
  );
}

/** A button that copies a text and says so for a moment. */
function copyingButton(name, text) {
  const button = make("button", { type: "button" }, name);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "copied";
    } catch {
      button.textContent = "no clipboard here";
    }
    setTimeout(() => (button.textContent = name), 1500);
  };
  return button;
}

/* Contexts */

/** The strongest contexts, and samples of each part of its active range, one set at a time. */
function contextsOf({ contexts, bands }, max, distribution) {
  if (!contexts.length && !bands.some((band) => band[3].length)) return null;
  const sinks = contexts.filter((context) => context.sink).length;
  const flagged = sinks
    ? `${sinks === contexts.length ? "All" : sinks} of these are at attention sinks: tokens of outlying norm that say little about a feature.`
    : null;
  const one = contexts.length === 1;
  const views = [
    { key: "strongest", name: "Strongest", low: null, high: null, body: () => [
      make("p", { className: "caption" }, `Its ${one ? "strongest context" : `${contexts.length} strongest contexts, at most one of a document`}.`, flagged && make("strong", {}, ` ${flagged}`)),
      ...contextList(contexts, max),
    ] },
    { key: "range", name: "Whole range", low: 0, high: max, body: () => bands.filter((band) => band[3].length).reverse().flatMap((band) => bandOf(band, max)) },
    ...bands.map((band, i) => ({ key: i, band, low: band[0], high: band[1], body: () => bandOf(band, max) })),
  ];
  const panel = make("div", { id: "contexts", role: "tabpanel", tabIndex: -1 });
  const fold = make("button", { type: "button", className: "quiet", "aria-pressed": String(unfolded) }, "whole contexts");
  const tabs = views.map((view) => tabOf(view, max));
  function show(key) {
    const view = views.find((v) => v.key === key) ?? views[0];
    partShown = view.key;
    tabs.forEach((tab, i) => {
      const on = views[i] === view;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      if (on) panel.setAttribute("aria-label", tab.getAttribute("aria-label") ?? tab.textContent);
    });
    const body = view.body();
    panel.replaceChildren(...(body.length ? body : [make("p", { className: "caption" }, "No contexts were drawn from this part of its range.")]));
    distribution?.mark(view.key === "strongest" ? null : view.low, view.high);
  }
  tabs.forEach((tab, i) => (tab.onclick = () => show(views[i].key)));
  fold.onclick = () => {
    unfolded = !unfolded;
    fold.setAttribute("aria-pressed", String(unfolded));
    show(partShown);
  };
  const list = make(
    "div", { className: "parts", role: "tablist", "aria-label": "Which contexts" },
    ...tabs.slice(0, 2),
    make("div", { className: "ruler", role: "presentation" }, ...tabs.slice(2)),
  );
  list.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(tabs.length - 1, tabs.indexOf(document.activeElement) + step));
    show(views[to].key);
    tabs[to].focus();
  };
  distribution?.picked((low, high) => {
    const at = bands.findIndex((band) => high <= band[1]);
    show(at < 0 ? bands.length - 1 : at);
  });
  show(partShown);
  return make(
    "section", { className: "contexts-of" },
    make("div", { className: "headline" }, make("h3", {}, "What it fires on"), fold),
    list, panel,
  );
}

/** A tab: words for the first two, a step of the ruler for a band. */
function tabOf({ name, band }, max) {
  const tab = make("button", { type: "button", role: "tab", "aria-controls": "contexts" });
  if (!band) {
    tab.append(name);
    return tab;
  }
  const [low, high, share] = band;
  tab.setAttribute("aria-label", `activations from ${short(low)} to ${short(high)}, about ${percent(share)} of its firings`);
  tab.append(
    make("i", { style: { "--heat": ((low + high) / 2 / max).toFixed(3) } }),
    make("span", {}, brief(share)),
    make("small", {}, `${short(low)}–${short(high)}`),
  );
  return tab;
}

/** A share in few characters: 72 %, 3.1 %, <0.1 %. */
const brief = (share) => (share > 0 && share < 0.001 ? "<0.1 %" : `${Number((100 * share).toPrecision(2))} %`);

function bandOf([low, high, share, contexts], max) {
  return [
    make("p", { className: "caption" }, `Activations from ${short(low)} to ${short(high)}: about ${brief(share)} of its firings; ${contexts.length} drawn.`),
    ...(contexts.length ? contextList(contexts, max) : []),
  ];
}

function contextList(all, max) {
  const list = make("ol", { className: "contexts" });
  return [list, fillList(list, all, CONTEXTS_AT_FIRST, (context) => contextLine(context, max))].filter((part) => part !== null);
}

/** Puts the first few of `all` into a list; returns a button that adds the rest, or null when there is none. */
function fillList(list, all, atFirst, toElement) {
  list.append(...all.slice(0, atFirst).map(toElement));
  const rest = all.slice(atFirst);
  if (!rest.length) return null;
  const more = make("button", { type: "button", className: "quiet more" }, `${rest.length} more`);
  more.onclick = () => {
    const added = rest.map(toElement);
    list.append(...added);
    more.remove();
    const first = added[0].querySelector("a, button, [tabindex]");
    first?.focus({ preventScroll: true });
  };
  return more;
}

/** A context with the activation at its peak. A long one is cut around the peak until it is unfolded. */
function contextLine({ tokens, firings, peak, document: number, sink }, max) {
  const activations = new Array(tokens.length).fill(0);
  for (let i = 0; i < firings.length; i += 2) activations[firings[i]] = firings[i + 1];
  const text = make("p", { dir: "auto" });
  const [start, end] = aroundPeak(tokens, peak);
  function show(whole) {
    const [from, to] = whole ? [0, tokens.length] : [start, end];
    const rest = (name) => {
      const button = make("button", { type: "button", className: "unfold", "aria-label": `unfold the text ${name}` }, "…");
      button.onclick = () => show(true);
      return button;
    };
    text.replaceChildren(
      ...(from > 0 ? [rest("before"), " "] : []),
      tokenText(tokens.slice(from, to), activations.slice(from, to), max, { peak: peak - from }),
      ...(to < tokens.length ? [" ", rest("after")] : []),
    );
  }
  show(unfolded);
  return make(
    "li", {},
    make("span", { className: "peak", title: `document ${whole(number)}` }, short(activations[peak])),
    make("div", {}, text, sink ? make("span", { className: "chip", title: "a token of outlying norm: it says little about a feature" }, "attention sink") : null),
  );
}

/** Where to cut: [start, end) of the tokens around the peak. What would leave only a few characters over is not cut. */
function aroundPeak(tokens, peak) {
  let start = peak, end = peak + 1;
  for (let room = BEFORE; start > 0 && room > 0; ) room -= tokens[--start].length;
  for (let room = AFTER; end < tokens.length && room > 0; ) room -= tokens[end++].length;
  const length = (from, to) => tokens.slice(from, to).join("").length;
  return [length(0, start) < 24 ? 0 : start, length(end, tokens.length) < 24 ? tokens.length : end];
}

/* Numbers as bars */

/** Counts in bins [low, high, count] as bars; each says its range under the pointer and to the arrow keys.
 *  `mark(low, high)` sets a range off, `picked(listener)` tells of clicks. Null where there are no bins. */
function countsPlot(bins, { label, middle, say, value = short }) {
  if (!bins.length) return null;
  const most = Math.max(...bins.map(([, , count]) => count));
  const all = bins.reduce((sum, [, , count]) => sum + count, 0);
  const bars = bins.map(([, , count]) => make("span", { style: { "--share": count ? Math.max(0.012, count / most) : 0 } }));
  const words = ([low, high, count]) => `${say(low, high, count)}${count ? `, ${brief(count / all)}` : ""}`;
  const readout = make("span", { className: "readout" }, middle);
  const plot = make("div", { className: "counts", role: "slider", tabIndex: 0, "aria-label": label, "aria-valuemin": "0", "aria-valuemax": String(bins.length - 1) }, ...bars);
  let at = null;
  let listener = null;
  function point(to) {
    if (at !== null) bars[at].classList.remove("here");
    at = to;
    readout.textContent = at === null ? middle : words(bins[at]);
    if (at === null) return;
    bars[at].classList.add("here");
    plot.setAttribute("aria-valuenow", String(at));
    plot.setAttribute("aria-valuetext", words(bins[at]));
  }
  const fullest = bins.findIndex(([, , count]) => count === most);
  plot.setAttribute("aria-valuenow", String(fullest));
  plot.setAttribute("aria-valuetext", words(bins[fullest]));
  const under = ({ clientX }) => {
    const { left, width } = plot.getBoundingClientRect();
    return Math.max(0, Math.min(bins.length - 1, Math.floor(((clientX - left) / width) * bins.length)));
  };
  plot.onpointermove = plot.onpointerdown = (event) => point(under(event));
  plot.onpointerleave = plot.onblur = () => point(null);
  plot.onclick = (event) => listener?.(bins[under(event)][0], bins[under(event)][1]);
  plot.onfocus = () => { if (plot.matches(":focus-visible") && at === null) point(fullest); };
  plot.onkeydown = (event) => {
    const from = at ?? fullest;
    const to = { ArrowRight: from + 1, ArrowUp: from + 1, ArrowLeft: from - 1, ArrowDown: from - 1, Home: 0, End: bins.length - 1 }[event.key];
    if (event.key === "Enter" && listener) listener(bins[from][0], bins[from][1]);
    if (to === undefined) return;
    event.preventDefault();
    point(Math.max(0, Math.min(bins.length - 1, to)));
  };
  const figure = make(
    "div", {}, plot,
    make("div", { className: "axis" }, make("span", {}, value(bins[0][0])), readout, make("span", {}, value(bins.at(-1)[1]))),
  );
  figure.mark = (low, high) =>
    bars.forEach((column, i) => column.classList.toggle("beyond", low !== null && (bins[i][1] <= low || bins[i][0] >= high)));
  figure.picked = (told) => {
    listener = told;
    plot.classList.add("can-pick");
  };
  return figure;
}

function firesOn(all, max) {
  if (!all.length) return null;
  const filled = table(["token", "mean", "times", "share"], []);
  const row = ([token, mean, count, share]) => tableRow([code(token), bar(short(mean), mean / max), whole(count), brief(share)]);
  return section("Tokens it fires on", filled, fillList(filled.tBodies[0], all, TOKENS_AT_FIRST, row));
}

/** Tokens whose logits its direction raises and lowers (past the later layers), and how it moves those of all tokens. */
function pushesTo({ raised, lowered, effects }) {
  if (!raised.length && !lowered.length) return null;
  const most = Math.max(...[...raised, ...lowered].map(([, effect]) => Math.abs(effect)));
  const rows = (all, kind) => all.map(([token, effect]) => [code(token), bar(signed(effect), Math.abs(effect) / most, kind)]);
  const plot = countsPlot(effects, {
    label: "Its direct effects on the logits of all tokens",
    middle: "direct effect on all logits",
    say: (low, high, count) => `${signed(low)} to ${signed(high)}: ${tokensOf(count)}`,
    value: signed,
  });
  return section(
    "What it pushes the model to say",
    make("div", { className: "moved" }, table(["raised", "logit"], rows(raised, "raised")), table(["lowered", "logit"], rows(lowered, "lowered"))),
    plot,
  );
}

const signed = (x) => (x === null ? short(x) : `${x < 0 ? "−" : "+"}${short(Math.abs(x))}`);

function neuronsOf(all) {
  if (!all.length) return null;
  const rows = all.map(([neuron, cosine]) => [`neuron ${neuron}`, bar(signed(cosine), Math.abs(cosine), cosine < 0 ? "lowered" : "raised")]);
  return section("Neurons along its direction", table(["neuron", "cosine"], rows));
}

/* Neighbours */

function nearOf(catalog, found) {
  const list = (title, measure, about, all) => {
    if (!all.length) return null;
    const rows = all.map(([index, similarity]) => {
      const link = featureLink(catalog, index);
      if (canOpen(catalog.overview, index)) previewed(catalog, index, link);
      return [link, bar(similarity.toFixed(2), similarity)];
    });
    return make("section", {}, make("h3", {}, title), make("p", { className: "caption" }, about), table(["feature", measure], rows));
  };
  return [
    list("Points the same way", "cosine", "Features whose directions are nearest.", found.neighbours),
    list("Fires on the same tokens", "overlap", "Features that are active together (Jaccard index).", found.coactive),
  ];
}

/** A glimpse of a feature beside a link to it, while the pointer rests or the focus is there; its data is then there
 *  when the link is followed. */
function previewed(catalog, index, link) {
  let waiting = null, card = null;
  const hide = () => {
    clearTimeout(waiting);
    waiting = null;
    card?.remove();
    card = null;
  };
  const show = async () => {
    const asked = waiting;
    try {
      const found = await record(index, catalog.overview.shard);
      if (asked !== waiting || card || !link.isConnected) return;
      card = glimpseOf(catalog, index, found);
      link.parentElement.append(card);
      const { right } = card.getBoundingClientRect();
      if (right > document.documentElement.clientWidth - 8) card.classList.add("leftward");
    } catch {
      // the link itself will say what is wrong
    }
  };
  const soon = (event) => {
    if (event.pointerType === "touch" || waiting !== null) return;
    waiting = setTimeout(show, PREVIEW_AFTER);
  };
  link.onpointerenter = soon;
  link.onpointerleave = link.onblur = hide;
  link.onfocus = (event) => {
    if (link.matches(":focus-visible")) soon(event);
  };
  link.onkeydown = (event) => {
    if (event.key === "Escape") hide();
  };
}

function glimpseOf({ features }, index, found) {
  const max = features.max[index];
  const lines = [make("span", { className: "soft" }, max > 0 ? `fires on ${oneIn(features.density[index])} tokens, at most ${short(max)}` : "never fired")];
  if (found.contexts.length) {
    const { tokens, firings, peak } = found.contexts[0];
    const activations = new Array(tokens.length).fill(0);
    for (let i = 0; i < firings.length; i += 2) activations[firings[i]] = firings[i + 1];
    const [from, to] = [Math.max(0, peak - 14), Math.min(tokens.length, peak + 8)];
    const text = make("span", { className: "line", dir: "auto" });
    for (let i = from; i < to; i++) text.append(i === peak ? make("b", {}, visible(tokens[i])) : visible(tokens[i]));
    lines.push(text);
  }
  const words = (title, all) => all.length && lines.push(make("span", { className: "line" }, `${title} `, ...all.slice(0, 4).flatMap(([token]) => [code(token), " "])));
  words("on", found.tokens);
  words("raises", found.raised);
  return make("span", { className: "glimpse", "aria-hidden": "true" }, ...lines);
}

/* Steering */

/** How to steer with it, to copy. */
function recipeOf({ name, model }, index) {
  const python = [
    "import saekit",
    `model = saekit.load_model(${JSON.stringify(model)})`,
    `feature = saekit.Catalog.open(${JSON.stringify(name)})[${index}]`,
    `edit = feature.add(${STRENGTH}, unit="norm")`,
    'print(saekit.compare(model, "Once upon a time", edit))',
  ].join("\n");
  const command = `saekit steer ${shellWord(name)} ${index} --strength ${STRENGTH} --unit norm --prompt "Once upon a time"`;
  return section("Steer with it", make("div", { className: "recipes" }, copyable("Python", python), copyable("Command line", command)));
}
