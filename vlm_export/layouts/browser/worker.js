/** The model and the index, off the page's own thread: answers {id, method, args} with {id, result} or {id, error}. */

import { thumbnailOf } from "./images.js";
import { cosine, enginesHere, openModel } from "./model.js";
import { Store } from "./store.js";

let model, store;
const entries = new Map();

const METHODS = {
  /** Loads everything, on the named engine if one is named; tells `progress` on the way. */
  async open(engine) {
    const response = await fetch("./page.json").catch(() => null);
    if (!response?.ok) throw new Error("page.json cannot be loaded: is the server still running?");
    const settings = await response.json();
    store = await Store.open(settings.identity);
    for (const entry of await store.all()) entries.set(entry.key, entry);
    const progress = (progress) => postMessage({ progress });
    model = await openModel(settings, { engines: enginesHere(engine), progress });
    return { name: settings.name, engine: model.engine.label, score: settings.score?.activation ?? null };
  },

  /** Embeds one file and keeps it; a file that is there already is not embedded again. */
  async add(file) {
    const key = `${file.name} ${file.size} ${file.lastModified}`;
    if (!entries.has(key)) {
      const vector = await model.encodeImage(file);
      const entry = { key, name: file.name, vector, thumbnail: await thumbnailOf(file), added: Date.now() };
      await store.put(entry);
      entries.set(key, entry);
    }
    return shown(entries.get(key));
  },

  /** All images, those that fit the text best first; without a text those that were added last. */
  async search(text) {
    const found = [...entries.values()];
    if (!text) return found.sort((a, b) => b.added - a.added).map((entry) => shown(entry));
    const vector = await model.encodeText(text);
    const ranked = found.map((entry) => ({ entry, cosine: cosine(entry.vector, vector) }));
    return ranked.sort((a, b) => b.cosine - a.cosine).map(({ entry, cosine }) => shown(entry, cosine));
  },

  /** [{label, probability}] for an image, the most probable first. */
  async classify(key, labels, template) {
    const probabilities = await model.classify(entries.get(key).vector, labels, template);
    return labels
      .map((label, i) => ({ label, probability: probabilities[i] }))
      .sort((a, b) => b.probability - a.probability);
  },

  async remove(key) {
    await store.delete(key);
    entries.delete(key);
  },

  async clear() {
    await store.clear();
    entries.clear();
  },

  /** What the page's tests compare: ids and vectors. */
  ids: async (text) => model.texts.ids(text, { truncate: true }),
  textVector: async (text) => model.encodeText(text),
  imageVector: async (file) => model.encodeImage(file),
};

function shown({ key, name, thumbnail }, cosine = null) {
  return { key, name, thumbnail, cosine };
}

onmessage = async ({ data: { id, method, args } }) => {
  try {
    postMessage({ id, result: await METHODS[method](...args) });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
};
