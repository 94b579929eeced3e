// What the model says: the texts beside each other as they come, and the probabilities that moved.
"use strict";

const SIDE_WORDS = { plain: "Plain", steered: "Steered", control: "Random control" };
const TAIL = 70; // characters of the prompt that stand before each text

/** Plain, steered and control beside each other as they are written, and what moved. */
function playAnswer() {
  const sides = make("div", { className: "sides" });
  const outcome = make("div", { className: "outcome" });
  const invitation = make("p", { className: "invitation" }, "Press ", make("b", {}, "Steer"), ": the model goes on from the prompt, once as it is and once with the features turned. Both roll the same dice, so what differs is what the features did.");
  const element = make("div", { className: "texts" }, invitation, sides, outcome);
  element.dataset.state = "idle"; // then waiting, running, and done or failed; idle again where it was stopped
  let texts = {}, parts = {}, prompt = "", drawing = false;

  function draw() {
    drawing = false;
    for (const [side, { text }] of Object.entries(parts)) {
      const words = side === "plain" ? [[texts.plain, false]] : playDifference(texts.plain, texts[side]);
      text.replaceChildren(
        make("span", { className: "prompt" }, visible(prompt.length > TAIL ? `…${prompt.slice(-TAIL)}` : prompt)),
        ...words.map(([word, same]) => make("span", { className: same ? "same" : "" }, visible(word))),
      );
    }
  }

  function soon() {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(draw);
  }

  function begin(event) {
    const height = sides.offsetHeight;
    invitation.hidden = true;
    texts = Object.fromEntries(event.sides.map((side) => [side, ""]));
    parts = Object.fromEntries(event.sides.map((side) => [side, { text: make("p", { className: "text", dir: "auto" }), figure: make("p", { className: "facts" }, "\u00a0") }]));
    const turned = { steered: event.edits.join("; ") || "no feature is turned", plain: "as it is", control: "a random direction, pushed as hard" };
    sides.replaceChildren(...event.sides.map((side) =>
      make("section", { className: `side ${side}` }, make("h3", {}, SIDE_WORDS[side]), make("p", { className: "facts turned" }, visible(turned[side])), parts[side].text, parts[side].figure)));
    sides.style.setProperty("min-height", `${height}px`); // what is below stays where it is while the text grows
    outcome.replaceChildren(moved(event));
    soon();
  }

  function end({ texts: whole_, perplexity }) {
    for (const [side, text] of Object.entries(whole_)) texts[side] = text.startsWith(prompt) ? text.slice(prompt.length) : text;
    for (const [side, part] of Object.entries(parts)) {
      part.figure.textContent = `perplexity ${short(perplexity[side])}`;
      part.figure.title = "how surprising the plain model finds the text: among how many equally likely tokens each of its own would be";
    }
    outcome.prepend(make("p", { className: "told" }, surprise(perplexity)));
    sides.style.removeProperty("min-height");
    draw();
  }

  /** One event of a stream. */
  function take(event, asked) {
    if (event.event === "start") {
      prompt = asked;
      begin(event);
      stale(false);
      become("running");
    }
    if (event.event === "text") {
      texts[event.side] += event.text;
      soon();
    }
    if (event.event === "done") {
      end(event);
      become("done");
    }
  }

  function become(state) {
    element.dataset.state = state;
  }

  function stale(is) {
    element.classList.toggle("stale", is);
  }

  /** Scrolls to the texts where too little of them can be seen. */
  function reveal() {
    if (element.getBoundingClientRect().top > innerHeight / 2) element.scrollIntoView();
  }

  return { element, take, become, stale, reveal };
}

/** How much stranger than its own text the plain model finds the others, in words. */
function surprise({ plain, steered, control }) {
  if (typeof plain !== "number" || typeof steered !== "number") return "The text has been steered beyond what the plain model can give odds for.";
  const times = (x) => (x / plain >= 10 ? whole(Math.round(x / plain)) : (x / plain).toFixed(1));
  const random = typeof control === "number" ? ` With the random direction it is ${times(control)} times.` : "";
  return `To the plain model, each token of the steered text is ${times(steered)} times as surprising as one of its own.${random}`;
}

/** KL in words: what a reader may expect to see. */
function shift(kl) {
  const much = kl < 0.001 ? "stay as they are" : kl < 0.05 ? "hardly move" : kl < 0.5 ? "move a little" : kl < 2 ? "move a lot" : "are other ones altogether";
  return `The odds of the next token ${much}: KL ${short(kl)} nats.`;
}

/** The next-token probabilities that moved most, a bar for each side. */
function moved({ sides, kl, top_tokens: rows }) {
  const most = Math.max(...rows.flatMap(([, ...p]) => p), 1e-9);
  const line = (p, i) =>
    make("span", { className: `odds ${sides[i]}`, style: { "--share": p / most } }, make("span", { className: "unseen" }, SIDE_WORDS[sides[i]]), make("span", {}, percent(p)));
  const body = rows.map(([token, ...p]) => make("tr", {}, make("th", { scope: "row" }, code(token)), make("td", {}, ...p.map(line))));
  const head = make("thead", { className: "unseen" }, make("tr", {}, make("th", { scope: "col" }, "token"), make("th", { scope: "col" }, "probability")));
  return section("What comes next", make("p", { className: "told" }, shift(kl)), make("table", { className: "chances" }, head, make("tbody", {}, ...body)));
}

/** The words of `text`, each with whether `plain` has it too: those of a longest common subsequence. */
function playDifference(plain, text) {
  const [a, b] = [plain, text].map((words) => words.match(/\s*\S+|\s+$/g) ?? []);
  const wide = b.length + 1, common = new Uint16Array((a.length + 1) * wide); // of a from i on and b from j on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * wide + j] = a[i] === b[j] ? 1 + common[(i + 1) * wide + j + 1] : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
  const words = [];
  for (let i = 0, j = 0; j < b.length; ) {
    if (i < a.length && a[i] === b[j]) {
      words.push([b[j++], true]);
      i++;
    } else if (i < a.length && common[(i + 1) * wide + j] >= common[i * wide + j + 1]) i++;
    else words.push([b[j++], false]);
  }
  return words;
}

/** A button that copies the address; where there is no clipboard, a field with it to copy from. */
function shareButton(address) {
  const button = make("button", { type: "button" }, "Copy link");
  const field = make("input", { readOnly: true, hidden: true, "aria-label": "Link to this state" });
  const said = make("span", { role: "status", className: "facts" });
  button.onclick = async () => {
    const link = address();
    try {
      await navigator.clipboard.writeText(link);
      said.textContent = "Copied: it opens this very state on any machine that serves this catalog here.";
    } catch {
      Object.assign(field, { value: link, hidden: false });
      field.select();
      said.textContent = "Copy it from here.";
    }
  };
  return make("div", { className: "share" }, button, said, field);
}
