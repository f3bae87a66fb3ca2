/** The bundle's encoders on onnxruntime-web: image files and texts to vectors of unit length, labels to probabilities. */

import { pixelsOf } from "./images.js";
import { Texts } from "./texts.js";

const PACKAGE = new URL("./packages/onnxruntime-web/", import.meta.url).href;
const LEAST_COSINE = 0.9999;

/**
 * Loads both encoders, on WebGPU where the browser has it and computes the same vectors, otherwise on WebAssembly.
 *
 * `settings` is what page.json holds, beside which the other files lie; `progress` is told of each step as
 * {step, done, total}, in bytes.
 */
export async function openModel(settings, { base = import.meta.url, engines = enginesHere(), progress = () => {} } = {}) {
  const files = await fetched(settings, base, progress);
  const failures = [];
  for (const engine of await engines) {
    progress({ step: `starting ${engine.label}` });
    try {
      const model = await Model.start(settings, files, engine);
      progress({ step: `checking ${engine.label}` });
      await model.check();
      return model;
    } catch (error) {
      failures.push(`${engine.label}: ${error.message ?? error}`);
    }
  }
  throw new Error(`no engine of this browser runs the model. ${failures.join("; ")}`);
}

const WASM = { label: "WebAssembly", library: "ort.wasm.min.mjs", provider: "wasm" };
const WEBGPU = { label: "WebGPU", library: "ort.webgpu.min.mjs", provider: "webgpu" };

/** The engines that this browser may have, the fastest first; only the one that is named, if any is. */
export async function enginesHere(name = null) {
  if (name !== null) return [WEBGPU, WASM].filter((engine) => engine.provider === name);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  // One that computes on the processor is slower there than WebAssembly.
  return adapter && !adapter.info?.isFallbackAdapter ? [WEBGPU, WASM] : [WASM];
}

/** The cosine of two vectors of unit length. */
export function cosine(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

class Model {
  static async start(settings, files, engine) {
    const ort = await import(PACKAGE + engine.library);
    ort.env.wasm.wasmPaths = PACKAGE;
    // More threads need headers that plain servers of files do not send.
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    const options = { executionProviders: [engine.provider], graphOptimizationLevel: "all", logSeverityLevel: 3 };
    const sessions = {};
    for (const name of ["images", "texts"]) {
      const { file, data } = settings[name];
      const externalData = data.map((path) => ({ path: path.split("/").at(-1), data: files.get(path) }));
      sessions[name] = await ort.InferenceSession.create(files.get(file), { ...options, externalData });
    }
    const tables = settings.texts.cleaning && JSON.parse(textOf(files.get(settings.texts.cleaning)));
    const texts = new Texts(JSON.parse(textOf(files.get(settings.texts.tokenizer))), settings.texts.spec, tables);
    return new Model(settings, engine, ort, sessions, texts);
  }

  constructor(settings, engine, ort, sessions, texts) {
    Object.assign(this, { settings, engine, ort, sessions, texts });
  }

  /** A file's vector, float32 (D); an Error, whose message is for people, where the file cannot be read. */
  async encodeImage(file) {
    const { data, width, height } = await pixelsOf(file, this.settings.images);
    return this.#imageVector(data, height, width);
  }

  /** A text's vector, float32 (D); an Error where it is too long. */
  async encodeText(text) {
    return this.#textVector(this.texts.ids(text));
  }

  /** For each label its probability for an image's vector, by the bundle's score; null where it has none. */
  async classify(vector, labels, template = "{}") {
    const { score } = this.settings;
    if (score === null) return null;
    const logits = [];
    for (const label of labels) {
      const text = await this.encodeText(template.replaceAll("{}", label));
      logits.push(Math.fround(Math.fround(score.scale) * Math.fround(cosine(vector, text))) + score.bias);
    }
    if (score.activation === "sigmoid") return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
    const most = Math.max(...logits);
    const weights = logits.map((logit) => Math.exp(logit - most));
    const sum = weights.reduce((a, b) => a + b, 0);
    return weights.map((weight) => weight / sum);
  }

  /** Throws an Error unless the vectors of the bundle's records come out here, and its texts' ids. */
  async check() {
    const { pixels, ids, texts } = this.settings.check;
    const bytes = Uint8Array.from(atob(pixels.base64), (character) => character.charCodeAt(0));
    const image = await this.#imageVector(bytes, ...pixels.shape);
    const text = await this.#textVector(ids.row);
    const cosines = [cosine(image, unit(pixels.vector)), cosine(text, unit(ids.vector))];
    if (!(Math.min(...cosines) >= LEAST_COSINE)) throw new Error("it does not compute the original's vectors");
    const wrong = texts.filter((entry) => String(this.texts.ids(entry.text, { truncate: true })) !== String(entry.ids));
    if (wrong.length) throw new Error(`the tokenizer gives other ids for ${JSON.stringify(wrong[0].text)}`);
  }

  async #imageVector(data, height, width) {
    const pixels = new this.ort.Tensor("uint8", data, [1, height, width, 3]);
    return this.#run("images", [pixels]);
  }

  async #textVector(row) {
    const { ids, mask } = this.texts.padded(row);
    const shape = [1, ids.length];
    return this.#run("texts", [ids, mask].map((values) => new this.ort.Tensor("int64", values, shape)));
  }

  async #run(name, tensors) {
    const { inputs, output } = this.settings[name];
    const feeds = Object.fromEntries(inputs.map((input, i) => [input, tensors[i]]));
    const found = await this.sessions[name].run(feeds, [output]);
    return unit(await found[output].getData());
  }
}

function unit(vector) {
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return Float32Array.from(vector, (value) => value / (length || 1));
}

function textOf(bytes) {
  return new TextDecoder().decode(bytes);
}

/** Path → bytes of every file that the model needs, one after another. */
async function fetched(settings, base, progress) {
  const total = settings.files.reduce((sum, file) => sum + file.size_bytes, 0);
  const files = new Map();
  let before = 0;
  for (const { path, size_bytes } of settings.files) {
    const response = await fetch(new URL(path, base)).catch(() => null);
    if (!response?.ok) throw new Error(`${path} cannot be loaded: is the server still running?`);
    const bytes = new Uint8Array(size_bytes);
    let done = 0;
    for (const reader = response.body.getReader(); ; ) {
      const { value } = await reader.read();
      if (value === undefined) break;
      if (done + value.length > size_bytes) throw new Error(`${path} is another file than the one that was packaged`);
      bytes.set(value, done);
      done += value.length;
      progress({ step: "loading the model", done: before + done, total });
    }
    if (done !== size_bytes) throw new Error(`${path} is cut short: load the page again`);
    before += size_bytes;
    files.set(path, bytes);
  }
  return files;
}
