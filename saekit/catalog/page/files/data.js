// Data are scripts that call `receive(name, value)`, because a page opened from disk may not fetch: files in data/, or, where
// the page is a single file, scripts in it.
"use strict";

const SHARDS_KEPT = 64;
const SINGLE = document.documentElement.dataset.single === "yes"; // everything came with the page
const ALPHABET = Array.from({ length: 94 }, (_, i) => String.fromCharCode(33 + i)).filter((letter) => !"\"'\\<".includes(letter)).join("");
const arriving = new Map(); // name → resolve
const loaded = new Map(); // name → promise of the value, oldest first

function receive(name, value) {
  if (arriving.has(name)) arriving.get(name)(value);
  else loaded.set(name, Promise.resolve(value));
  arriving.delete(name);
}

/** The value of data/<name>.js. */
function load(name) {
  if (!loaded.has(name)) {
    if (SINGLE) return Promise.reject(new Error(`This file holds no ${name}.`));
    loaded.set(name, new Promise((resolve, reject) => {
      arriving.set(name, resolve);
      const script = make("script", { src: `data/${name}.js` });
      script.onload = () => script.remove();
      script.onerror = () => {
        script.remove();
        loaded.delete(name);
        reject(new Error(`data/${name}.js could not be read.`));
      };
      document.head.append(script);
    }));
    const shards = [...loaded.keys()].filter((key) => key.startsWith("shard-"));
    if (shards.length > SHARDS_KEPT) loaded.delete(shards[0]);
  }
  return loaded.get(name);
}

/** The full record of a feature, its contexts' tokens as strings and their firings as flat pairs (offset, activation). */
async function record(index, shard) {
  const { tokens, width, features } = await load(`shard-${Math.floor(index / shard)}`);
  const found = features[index % shard];
  const context = ([document, peak, sink, letters, offsets, activations]) => ({
    document,
    peak,
    sink: sink === 1,
    tokens: unpacked(letters, width).map((place) => tokens[place]),
    firings: offsets.flatMap((offset, i) => [offset, activations[i]]),
  });
  return {
    ...found,
    contexts: found.contexts.map(context),
    bands: found.bands.map(([low, high, share, contexts]) => [low, high, share, contexts.map(context)]),
    effects: evenBars(...found.effects),
  };
}

/** The numbers that `letters` stand for, `width` letters each, the highest digit first. */
function unpacked(letters, width) {
  const numbers = [];
  for (let i = 0; i < letters.length; i += width) {
    let number = 0;
    for (let j = i; j < i + width; j++) number = number * ALPHABET.length + ALPHABET.indexOf(letters[j]);
    numbers.push(number);
  }
  return numbers;
}

/** Bars [low, high, count] of equal width. */
function evenBars(low, high, counts = []) {
  const edge = (i) => low + ((high - low) * i) / counts.length;
  return counts.map((count, i) => [edge(i), edge(i + 1), count]);
}
