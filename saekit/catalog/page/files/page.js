// Starts the page. The address says what is open: `#` home, `#features` the list, `#q=word` a search, `#7650` a feature,
// `#map`, `#prompts`, `#prompts/2`, `#about`, and `#play?…` where a model answers.
"use strict";

const THEMES = ["auto", "light", "dark"];
const THEME_SIGNS = { auto: "◐", light: "☼", dark: "☾" };
const SLOW = 250; // milliseconds after which a view that waits for its data says so

let opened = 0; // number of the latest view
let leaving = []; // what the view that is open wants done before the next one

/** Has `leave` called once, before the next view is drawn: the end of a stream, of listeners on the window. */
function onLeave(leave) {
  leaving.push(leave);
}

/** For a view that waits for data before it registers or starts anything: a function that says whether it is still wanted. */
function awaited() {
  const number = opened;
  return () => number === opened;
}

function left() {
  const all = leaving;
  leaving = [];
  for (const leave of all) leave();
}

async function start() {
  const [overview, features] = await Promise.all([load("overview"), load("features")]);
  const catalog = { overview, features };
  const name = visible(`${overview.name} · features`);
  document.getElementById("title").textContent = visible(overview.name);
  const list = (catalog.list = featureList(catalog));
  for (const [place, there] of [["map", overview.map], ["prompts", overview.prompts], ["play", overview.live]])
    document.querySelector(`[data-place="${place}"]`).hidden = !there;
  const main = document.getElementById("view");

  /** The place of an address in the navigation, a title, and the view: elements, or a promise of them. */
  function viewOf(address) {
    const home = { place: "home", title: "", view: () => homeView(catalog) };
    if (address === "") return home;
    if (address === "features" || address.startsWith("q=")) return { ...home, place: "features" };
    if (address === "about") return { place: "about", title: "About", view: () => aboutView(catalog) };
    if (/^play(\?|$)/.test(address) && overview.live) return { place: "play", title: "Playground", view: () => playView(catalog) };
    if (address === "map" && overview.map) return { place: "map", title: "Map", view: () => mapView(catalog) };
    const prompt = /^prompts(?:\/(\d+))?$/.exec(address);
    if (prompt && overview.prompts) {
      const which = prompt[1] === undefined ? null : Number(prompt[1]);
      return { place: "prompts", title: "Prompts", view: () => promptsView(catalog, which) };
    }
    const index = /^\d+$/.test(address) ? Number(address) : null;
    if (index !== null && list.holds(index)) {
      const view = async () => {
        const wanted = awaited(), found = await record(index, overview.shard);
        return wanted() ? featureView(catalog, index, found) : []; // one nobody waits for any more takes no keys
      };
      return { place: "feature", title: `#${index} ${nameOf(features, index)}`, index, view };
    }
    const missing = index === null ? `This page has no view “${visible(address)}”.` : `There is no feature ${index} ${overview.only ? "on this page" : "in this catalog"}.`;
    return { ...home, view: () => [make("p", { className: "error", role: "alert" }, missing), ...homeView(catalog)] };
  }

  async function open() {
    opened++;
    const wanted = awaited();
    const address = unescaped(location.hash.slice(1));
    const query = new URLSearchParams(location.hash.slice(1)).get("q");
    if (query !== null && query !== document.getElementById("query").value.trim()) list.search(query); // else it stands as it was left
    const { place, title, index = null, view } = viewOf(address);
    left();
    const waiting = setTimeout(() => main.setAttribute("aria-busy", true), SLOW);
    let parts;
    try {
      parts = await view();
    } catch (error) {
      parts = [make("p", { className: "error", role: "alert" }, visible(error.message))];
    }
    clearTimeout(waiting);
    if (!wanted()) return; // its data came too late
    document.body.dataset.view = place;
    list.select(index);
    mark(place);
    document.title = title ? `${title} · ${visible(overview.name)}` : name;
    const within = main.contains(document.activeElement);
    main.removeAttribute("aria-busy");
    main.replaceChildren(...parts.filter((part) => part !== null));
    main.scrollTop = 0;
    if (within) main.focus({ preventScroll: true }); // the link that led here is gone
  }

  /** Marks the place in the navigation; its link to the list keeps the search. */
  function mark(place) {
    for (const link of document.querySelectorAll("#places a")) {
      const here = link.dataset.place === place || (link.dataset.place === "features" && ["home", "feature"].includes(place));
      if (here) link.setAttribute("aria-current", link.dataset.place === place ? "page" : "true");
      else link.removeAttribute("aria-current");
    }
  }

  list.listen(() => {
    const query = document.getElementById("query").value.trim();
    const address = query ? `#${new URLSearchParams({ q: query })}` : "#features";
    document.querySelector('[data-place="features"]').href = address;
    if (["home", "features"].includes(document.body.dataset.view) && (query || location.hash.startsWith("#q=")))
      history.replaceState(null, "", address); // the search can be shared; every letter is not a step back
  });
  keys(list);
  addEventListener("hashchange", open);
  await open();
}

/** An address as its reader typed it; one that is no valid escape stays as it is. */
function unescaped(address) {
  try {
    return decodeURIComponent(address);
  } catch {
    return address;
  }
}

function keys(list) {
  const query = document.getElementById("query"), help = document.getElementById("keys");
  document.getElementById("help").onclick = () => help.showModal();
  document.getElementById("skip").onclick = () => document.getElementById("view").focus();
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.key === "Escape" && event.target === query) list.search("");
    if (event.target.matches?.("input, textarea, select")) return;
    if (event.key === "?") help.showModal();
    if (event.key === "/") {
      event.preventDefault();
      if (!query.checkVisibility()) {
        // on a phone the list is a view of its own, and some views leave it no room
        location.hash = document.querySelector('[data-place="features"]').hash;
        document.body.dataset.view = "features";
      }
      query.focus();
      query.select();
    }
  });
}

/** Dark or light: as the system has it until the reader chooses; the choice stays where the browser allows it. */
function theme() {
  const button = document.getElementById("theme");
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("theme") ?? "auto";
  } catch {} // a page on disk may have no storage
  const show = () => {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.textContent = THEME_SIGNS[chosen];
    button.title = `Colours: ${chosen}`;
    button.setAttribute("aria-label", button.title);
  };
  if (!THEMES.includes(chosen)) chosen = "auto";
  show();
  button.onclick = () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    show();
    try {
      localStorage.setItem("theme", chosen);
    } catch {}
  };
}

theme();
start()
  .catch((error) => document.getElementById("view").replaceChildren(make("p", { className: "error", role: "alert" }, visible(error.message))))
  .finally(() => (document.body.dataset.ready = "yes"));
