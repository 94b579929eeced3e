// Starts the page. The address says what is open: `#7650` a feature, `#q=word` a search, `#about` the catalog.
"use strict";

async function start() {
  const [overview, features] = await Promise.all([load("overview"), load("features")]);
  const catalog = { overview, features };
  const { model, site, sae, corpus, tokens, alive } = overview;
  const name = visible(`${model} · ${site}`);
  document.title = name;
  document.getElementById("title").textContent = name;
  const width = `${sae.architecture}${sae.k ? ` k=${sae.k}` : ""}`;
  document.getElementById("overview").textContent = visible(
    `${width} · ${whole(alive)} of ${whole(sae.d_sae)} features alive on ${whole(tokens)} tokens of ${corpus}`,
  );
  const list = featureList(features);
  const view = document.getElementById("view");
  let opened = 0; // number of the latest view; a record that arrives late is dropped

  async function open() {
    const open = ++opened;
    const address = location.hash.slice(1);
    const query = new URLSearchParams(address).get("q");
    if (query !== null) list.search(query);
    const index = /^\d+$/.test(address) && Number(address) < features.label.length ? Number(address) : null;
    document.body.dataset.view = index !== null || address === "about" ? "detail" : "list";
    list.select(index);
    let parts;
    if (index === null) {
      parts = aboutView(catalog, list);
      if (address && address !== "about" && query === null) parts.unshift(make("p", { className: "error" }, `There is no feature ${visible(address)} in this catalog.`));
      document.title = name;
    } else {
      parts = featureView(catalog, index, await record(index, overview.shard)).filter((part) => part !== null);
      if (open !== opened) return;
      document.title = `#${index} ${nameOf(features, index)} · ${name}`;
    }
    view.replaceChildren(...parts);
    view.scrollTop = 0;
    if (document.body.dataset.view === "detail") scrollTo(0, 0);
  }

  const guarded = () => open().catch(failed);
  addEventListener("hashchange", guarded);
  addEventListener("keydown", (event) => {
    const query = document.getElementById("query");
    const typing = event.target.matches?.("input, textarea, select");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      if (!query.checkVisibility()) { // a phone that shows a feature
        document.body.dataset.view = "list";
        location.hash = "";
      }
      query.focus();
      query.select();
    }
    if (event.key === "Escape" && event.target === query) list.search("");
  });
  await guarded();
}

function failed(error) {
  document.getElementById("view").replaceChildren(make("p", { className: "error" }, visible(error.message)));
}

start().catch(failed);
