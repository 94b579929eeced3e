// Data files are scripts that call `receive(name, value)`, because a page opened from disk may not fetch.
"use strict";

const SHARDS_KEPT = 24;
const arriving = new Map(); // name → resolve
const loaded = new Map(); // name → promise of the value, oldest first

function receive(name, value) {
  arriving.get(name)?.(value);
}

/** The value of data/<name>.js. */
function load(name) {
  if (!loaded.has(name)) {
    loaded.set(name, new Promise((resolve, reject) => {
      arriving.set(name, resolve);
      const script = make("script", { src: `data/${name}.js` });
      script.onload = () => script.remove();
      script.onerror = () => {
        script.remove();
        loaded.delete(name);
        reject(new Error(`data/${name}.js could not be read`));
      };
      document.head.append(script);
    }));
    const shards = [...loaded.keys()].filter((key) => key.startsWith("shard-"));
    if (shards.length > SHARDS_KEPT) loaded.delete(shards[0]);
  }
  return loaded.get(name);
}

/** The full record of a feature, its contexts' tokens as strings. */
async function record(index, shard) {
  const { tokens, features } = await load(`shard-${Math.floor(index / shard)}`);
  const found = features[index % shard];
  const spell = (contexts) => contexts.map((context) => ({ ...context, tokens: context.tokens.map((i) => tokens[i]) }));
  const bands = found.bands.map(([low, high, share, contexts]) => [low, high, share, spell(contexts)]);
  return { ...found, contexts: spell(found.contexts), bands };
}
