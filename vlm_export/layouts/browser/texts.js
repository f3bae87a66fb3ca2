/** Texts to token ids, as the bundle's own runtime makes them: cleaning, the tokenizer, truncation and padding. */

import { Tokenizer } from "./packages/tokenizers/tokenizers.min.mjs";
import { charsmap } from "./charsmap.js";
import { Cleaner, collapsed } from "./cleaning.js";

const PUNCTUATION = /[!-/:-@[-`{-~]/g;
const LETTER_NUMBER_OR_SPACE = /[\p{L}\p{N}\s\x1c-\x1f\x85\u0345]$/u;

export class Texts {
  /** `tables` are the data of cleaning.json, or null where nothing is cleaned. */
  constructor(tokenizerJson, spec, tables) {
    this.spec = spec;
    this.cleaner = tables && new Cleaner(tables);
    const whole = new Tokenizer(tokenizerJson, {});
    correctCharacterMaps(whole.normalizer);
    this.start = whole.encode("").ids.slice(0, -1);
    this.splits = ["openai", "open_clip"].includes(spec.cleaning);
    // The cleaning normalises, and special tokens are found here: elsewhere their letters are plain text.
    this.tokenizer = this.splits ? new Tokenizer({ ...tokenizerJson, normalizer: null, added_tokens: [] }, {}) : whole;
    const special = tokenizerJson.added_tokens.filter((token) => token.special);
    this.specials = new Map(special.map((token) => [token.content, token.id]));
    if (spec.cleaning === "open_clip") {
      this.specials = new Map([["<start_of_text>", this.start[0]], ["<end_of_text>", spec.end_token_id]]);
    }
  }

  /** Ids of one text, start and end included, unpadded; cut at the context with `truncate`, otherwise an Error. */
  ids(text, { truncate = false } = {}) {
    const row = this.splits ? this.#split(text) : this.#plain(text);
    const limit = this.spec.context_length;
    if (row.length <= limit) return row;
    if (truncate) return this.#cut(row);
    throw new Error(`the text is too long for the model: ${row.length} tokens, and it takes ${limit}`);
  }

  /** Ids and mask of one text, filled as the model was trained; arrays of BigInt. */
  padded(row) {
    const length = Math.max(row.length, this.spec.padding === "context" ? this.spec.context_length : 1);
    const ids = new BigInt64Array(length).fill(BigInt(this.spec.pad_token_id));
    ids.set(row.map(BigInt));
    const mask = new BigInt64Array(length).fill(1n, 0, row.length);
    return { ids, mask };
  }

  #plain(text) {
    const { cleaning, adds_eos } = this.spec;
    if (cleaning !== "none") {
      text = this.cleaner.repaired(text);
      if (cleaning === "canonicalize") text = text.replaceAll("_", " ").replace(PUNCTUATION, "");
      text = collapsed(cleaning === "whitespace" ? text : text.toLowerCase());
    }
    return this.tokenizer.encode(text, { add_special_tokens: adds_eos }).ids;
  }

  #split(text) {
    const found = [...this.start];
    for (const piece of this.#pieces(collapsed(this.cleaner.repaired(text)).toLowerCase())) {
      if (typeof piece === "number") found.push(piece);
      else if (piece) found.push(...this.tokenizer.encode(piece, { add_special_tokens: false }).ids);
    }
    return [...found, this.spec.end_token_id];
  }

  /** Texts and ids of special tokens. A run of symbols swallows a token that follows it without a space. */
  #pieces(text) {
    const names = [...this.specials.keys()].map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    if (names.length === 0) return [text];
    const pieces = [];
    let done = 0;
    for (const match of text.matchAll(new RegExp(names.join("|"), "g"))) {
      const before = text.slice(done, match.index);
      if (before && !LETTER_NUMBER_OR_SPACE.test(before)) continue;
      pieces.push(before, this.specials.get(match[0]));
      done = match.index + match[0].length;
    }
    return [...pieces, text.slice(done)];
  }

  #cut(row) {
    const { context_length: limit, truncation_side, adds_eos, end_token_id } = this.spec;
    const left = truncation_side === "left";
    if (!adds_eos) return left ? row.slice(-limit) : row.slice(0, limit);
    const words = row.slice(this.start.length, -1);
    const room = limit - this.start.length - 1;
    return [...this.start, ...(left ? words.slice(words.length - room) : words.slice(0, room)), end_token_id];
  }
}

/** The library replaces a few ranges of characters and normalises, instead of reading the map that the file holds. */
function correctCharacterMaps(normalizer) {
  if (normalizer === null) return;
  const { type, precompiled_charsmap } = normalizer.config;
  if (type === "Precompiled") normalizer.normalize = charsmap(precompiled_charsmap);
  for (const inner of normalizer.normalizers ?? []) correctCharacterMaps(inner);
}
