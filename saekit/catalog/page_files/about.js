// The catalog as a whole: densities, definitions, and how to read the page.
"use strict";

const BINS_PER_DECADE = 8;
const key = (name) => make("kbd", {}, name);

function aboutView({ overview, features }, list) {
  const { sae, excluded, definitions } = overview;
  const facts = [
    ["model", overview.model],
    ["site", overview.site],
    ["SAE", `${sae.architecture}${sae.k ? `, k = ${sae.k}` : ""}, ${whole(sae.d_in)} → ${whole(sae.d_sae)}`],
    ["corpus", `${overview.corpus}, ${whole(overview.tokens)} tokens`],
    ["excluded tokens", excluded.map(spelled).join(" ") || "none"],
    ...Object.entries(definitions),
  ];
  return [
    make("a", { href: "#", className: "back" }, "← all features"),
    make("h2", {}, "About this catalog"),
    overview.live ? probing(features) : null,
    densities(features.density, list),
    section(
      "What it describes",
      make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, visible(name)), make("dd", {}, make("bdi", {}, visible(String(value))))])),
    ),
    section(
      "Keys",
      make("p", {}, key("/"), " search · ", key("↑"), " ", key("↓"), " through the list · ", key("Esc"), " clears the search"),
    ),
  ].filter((part) => part !== null);
}

/** How many features have which density; a bar keeps the features it stands for. */
function densities(density, list) {
  const alive = density.filter((d) => d > 0);
  if (!alive.length) return null;
  const bin = (d) => Math.floor(BINS_PER_DECADE * Math.log10(d));
  const counts = new Map();
  for (const d of alive) counts.set(bin(d), (counts.get(bin(d)) ?? 0) + 1);
  const [first, last] = [Math.min(...counts.keys()), Math.max(...counts.keys())];
  const most = Math.max(...counts.values());
  const edge = (i) => Number((100 * 10 ** (i / BINS_PER_DECADE)).toPrecision(3));
  const bars = [];
  for (let i = first; i <= last; i++) {
    const count = counts.get(i) ?? 0;
    const title = `${whole(count)} features fire on ${edge(i)} to ${edge(i + 1)} % of tokens`;
    const column = make("button", { type: "button", title, "aria-label": title, style: { "--share": count / most } });
    column.onclick = () => list.filterDensity(edge(i), edge(i + 1));
    bars.push(column);
  }
  return section(
    "Density of features",
    make("div", { className: "histogram" }, ...bars),
    make(
      "div", { className: "axis" },
      make("span", {}, `${edge(first)} %`), make("span", {}, "share of tokens, log scale"), make("span", {}, `${edge(last + 1)} %`),
    ),
  );
}
