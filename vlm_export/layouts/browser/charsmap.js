/**
 * SentencePiece's map of characters, the normalizer "Precompiled" of tokenizer.json, as the Rust tokenizer applies it.
 *
 * Facts: huggingface/spm_precompiled 0.1.4, src/lib.rs: a size, a double-array trie (Darts) of so many bytes, and texts
 * that end with a zero byte. A grapheme of less than six bytes is looked up as a whole, by its shortest prefix, and
 * otherwise each of its characters by itself.
 */

const LONGEST_WHOLE = 6;
const GRAPHEMES = new Intl.Segmenter("und", { granularity: "grapheme" });
const UTF8 = new TextEncoder();

/** A function from text to text. */
export function charsmap(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const trie = new Uint32Array(bytes.buffer.slice(4, 4 + size));
  const texts = bytes.subarray(4 + size);
  const found = (part) => {
    const start = shortestPrefix(trie, UTF8.encode(part));
    return start < 0 ? null : new TextDecoder().decode(texts.subarray(start, texts.indexOf(0, start)));
  };
  const mapped = (grapheme) => {
    const whole = UTF8.encode(grapheme).length < LONGEST_WHOLE ? found(grapheme) : null;
    return whole ?? Array.from(grapheme, (character) => found(character) ?? character).join("");
  };
  return (text) => Array.from(GRAPHEMES.segment(text), ({ segment }) => mapped(segment)).join("");
}

/** Where the text of the shortest key begins that the bytes begin with; -1 where there is none. */
function shortestPrefix(trie, key) {
  let at = offset(trie[0]);
  for (const byte of key) {
    if (byte === 0) break;
    at ^= byte;
    const unit = trie[at];
    if (unit === undefined || (unit & 0x800000ff) !== byte) return -1;
    at ^= offset(unit);
    if ((unit >>> 8) & 1) return trie[at] & 0x7fffffff;
  }
  return -1;
}

function offset(unit) {
  return (unit >>> 10) << ((unit & (1 << 9)) >>> 6);
}
