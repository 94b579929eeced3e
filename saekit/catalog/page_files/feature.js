// One feature: what it fires on, how strongly, what it makes the model say, what is near it.
"use strict";

const CONTEXTS_AT_FIRST = 8;
const TOKENS_AT_FIRST = 10;
const STRENGTH = 0.5; // × the median norm of the activations: a push that shows on any model

/** The view of a feature. `catalog`: overview and features; `found`: its full record. */
function featureView(catalog, index, found) {
  const { overview, features } = catalog;
  const density = features.density[index], max = features.max[index];
  const facts = max > 0
    ? `fires on ${percent(density)} of tokens · mean ${short(found.mean)} · max ${short(max)}`
    : `never fired on the ${whole(overview.tokens)} tokens of this corpus`;
  const title = make("h2", {}, make("span", { className: "index" }, `#${index}`), " ");
  title.append(make("bdi", {}, nameOf(features, index)));
  return [
    make("a", { href: "#", className: "back" }, "← all features"),
    title,
    make("p", { className: "facts" }, facts),
    explanations(found.explanations, features.label[index]),
    make(
      "div",
      { className: "record" },
      make("div", {}, contexts(found.contexts, max), bands(found.bands, max)),
      make(
        "div",
        {},
        histogram(found.histogram),
        tokens(found.tokens, max),
        logits(found.raised, found.lowered),
        neighbours("Nearest directions", "cosine", found.neighbours, features),
        neighbours("Fire on the same tokens", "Jaccard", found.coactive, features),
      ),
      make("div", {}, overview.live ? steering(index, max) : null, recipe(overview, index)),
    ),
  ];
}

function explanations(all, title) {
  const said = all.filter(([, text, score]) => text !== title || score !== null); // what the title says needs no second line
  if (!said.length) return null;
  const item = ([method, text, score]) =>
    make("li", {}, make("bdi", {}, visible(text)), make("small", {}, ` ${visible(method)}${score === null ? "" : `, score ${short(score)}`}`));
  return make("ul", { className: "explanations" }, ...said.map(item));
}

function contexts(all, max) {
  if (!all.length) return null;
  const list = make("ol", { className: "contexts" });
  return section("Strongest contexts", list, fill(list, all, CONTEXTS_AT_FIRST, (context) => contextLine(context, max)));
}

/** Samples from the equal parts of the active range, the strongest part first. */
function bands(all, max) {
  const filled = all.filter(([, , , found]) => found.length).reverse();
  if (!filled.length) return null;
  const part = ([low, high, share, found]) =>
    make(
      "div", {},
      make("p", { className: "facts" }, `${short(low)} to ${short(high)} · about ${percent(share)} of its firings`),
      make("ol", { className: "contexts" }, ...found.map((context) => contextLine(context, max))),
    );
  return section("Samples over its range", ...filled.map(part));
}

/** Puts the first few of `all` into a list; returns a button that adds the rest, or null when there is none. */
function fill(list, all, atFirst, toElement) {
  list.append(...all.slice(0, atFirst).map(toElement));
  const rest = all.slice(atFirst);
  if (!rest.length) return null;
  const more = make("button", { type: "button", className: "more" }, `${rest.length} more`);
  more.onclick = () => {
    list.append(...rest.map(toElement));
    more.remove();
  };
  return more;
}

/** A stretch of text, each token coloured by its activation; the number appears under the pointer. */
function contextLine({ tokens, firings, peak, document: number, sink }, max) {
  const activation = new Map();
  for (let i = 0; i < firings.length; i += 2) activation.set(firings[i], firings[i + 1]);
  const pieces = tokens.flatMap((token, i) => heated(i ? token : token.trimStart(), activation.get(i) ?? 0, max, i === peak));
  const text = make("p", { dir: "auto" }, ...pieces);
  const strongest = make("span", { className: "peak", title: `document ${number}${sink ? ", an attention sink" : ""}` }, short(activation.get(peak) ?? 0));
  return make("li", {}, strongest, text);
}

/** A token's text; where the feature fires, its opening spaces and a coloured span for the rest. */
function heated(token, activation, max, isPeak) {
  if (!activation) return [visible(token)];
  const spaces = /^ *(?=[^ ])/.exec(token)?.[0] ?? ""; // coloured ones would glue words together and hang at line ends
  const heat = Math.min(1, activation / max).toFixed(3);
  const span = make("span", { className: isPeak ? "fires strongest" : "fires", style: { "--heat": heat } });
  span.textContent = visible(token.slice(spaces.length));
  span.dataset.activation = short(activation);
  return [spaces, span];
}

function histogram(bins) {
  if (!bins.length) return null;
  const most = Math.max(...bins.map(([, , count]) => count));
  const columns = bins.map(([low, high, count]) =>
    make("span", { title: `${short(low)} to ${short(high)}: ${whole(count)} tokens`, style: { "--share": count / most } }));
  const from = short(bins[0][0]), to = short(bins.at(-1)[1]);
  const label = `${bins.length} logarithmic bins from ${from} to ${to}, at most ${whole(most)} tokens in one`;
  return section(
    "Activations",
    make("div", { className: "histogram", role: "img", "aria-label": label }, ...columns),
    make("div", { className: "axis" }, make("span", {}, from), make("span", {}, "log scale"), make("span", {}, to)),
  );
}

function tokens(all, max) {
  if (!all.length) return null;
  const filled = table(["token", "mean", "times", "share"], []);
  const row = ([token, mean, count, share]) => tableRow([code(token), bar(short(mean), mean / max), whole(count), percent(share)]);
  return section("Tokens it fires on", filled, fill(filled.tBodies[0], all, TOKENS_AT_FIRST, row));
}

function logits(raised, lowered) {
  if (!raised.length && !lowered.length) return null;
  const most = Math.max(...[...raised, ...lowered].map(([, effect]) => Math.abs(effect)));
  const rows = (all, kind) => all.map(([token, effect]) => [code(token), bar(short(effect), Math.abs(effect) / most, kind)]);
  return section(
    "Logits it moves",
    make("div", { className: "pair" }, table(["raised", ""], rows(raised, "raised")), table(["lowered", ""], rows(lowered, "lowered"))),
  );
}

function neighbours(title, measure, all, features) {
  if (!all.length) return null;
  const rows = all.map(([index, similarity]) => [linkTo(features, index), bar(short(similarity), similarity)]);
  return section(title, table(["feature", measure], rows));
}

/** How to steer with it, to copy. */
function recipe({ name, model }, index) {
  const shell = (word) => (/^[\w./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);
  const python = [
    "import saekit",
    `model = saekit.load_model(${JSON.stringify(model)})`,
    `feature = saekit.Catalog.open(${JSON.stringify(name)})[${index}]`,
    `edit = feature.add(${STRENGTH}, unit="norm")`,
    'print(saekit.compare(model, "Once upon a time", edit))',
  ].join("\n");
  const command = `saekit steer ${shell(name)} ${index} --strength ${STRENGTH} --unit norm --prompt "Once upon a time"`;
  return section("Steer with it", copyable("Python", python), copyable("Command line", command));
}

function copyable(title, text) {
  const block = make("pre", { tabIndex: 0 }, visible(text).replaceAll("⏎", "\n"));
  const button = make("button", { type: "button" }, "copy");
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(block); // no clipboard here: the reader copies the selection
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  };
  return make("div", { className: "copyable" }, make("div", {}, make("small", {}, title), button), block);
}
