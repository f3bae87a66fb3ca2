/**
 * What originals do to a text before their tokenizer: ftfy's repairs and the decoding of HTML.
 *
 * Tables and patterns come from the ftfy and the Python that packaged the page (cleaning.json), and the order of steps
 * from ftfy 6.3 (`fix_text`, `fix_encoding`) and from `html.unescape` of Python.
 */

const SPACE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]";
const SPACES = new RegExp(`${SPACE}+`, "g");
const ENDS = new RegExp(`^${SPACE}+|${SPACE}+$`, "g");
const ENTITY = /&#?[0-9A-Za-z]{1,24};/g;
const REFERENCE = /&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)/gu;
const TERMINAL_ESCAPE = /\x1b\[(?:\p{Nd}|;)*[a-zA-Z]/gu;
const LAST = 0x10ffff;
const NO_WINDOWS_1252 = /[\x81\x8d\x8f\x90\x9d]/;
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** White space as Python counts it: one space for each run, none at the ends. */
export function collapsed(text) {
  return text.replace(SPACES, " ").replace(ENDS, "");
}

export class Cleaner {
  constructor(tables) {
    this.tables = tables;
    this.patterns = {};
    for (const [name, source] of Object.entries(tables.patterns)) this.patterns[name] = new RegExp(source, "gu");
    this.codecs = tables.encodings.map(({ name, characters }) => {
      const bytes = new Map([...characters].map((character, byte) => [character, byte]));
      return { name, characters: [...characters], bytes };
    });
  }

  /** The text after ftfy's `fix_text`, and after `html.unescape` twice. */
  repaired(text) {
    let unescapes = true;
    const lines = text.match(/[^\n]*\n|[^\n]+$/g) ?? [];
    const fixed = lines.map((line) => {
      unescapes &&= !line.includes("<");
      return this.#fixedLine(line, unescapes);
    });
    return this.#unescaped(this.#unescaped(fixed.join("")));
  }

  #fixedLine(text, unescapes) {
    for (;;) {
      const before = text;
      if (unescapes) text = text.replace(ENTITY, (found) => this.#entity(found));
      text = this.#decodedAgain(text);
      text = this.#withoutControls(text);
      text = this.#translated(text, this.tables.ligatures);
      text = this.#translated(text, this.tables.widths);
      text = text.replace(/[\u201c-\u201f]/g, '"').replace(/[\u02bc\u2018-\u201b]/g, "'");
      text = text.replace(/\r\n|[\r\u2028\u2029\x85]/g, "\n").toWellFormed();
      text = text.replace(TERMINAL_ESCAPE, "").replace(this.patterns.controls, "").normalize("NFC");
      if (text === before) return text;
    }
  }

  #entity(found) {
    if (Object.hasOwn(this.tables.entities, found)) return this.tables.entities[found];
    if (!found.startsWith("&#")) return found;
    const unescaped = this.#unescaped(found);
    return unescaped.includes(";") ? found : unescaped;
  }

  #unescaped(text) {
    return text.replace(REFERENCE, (whole, name) => {
      if (name[0] === "#") return this.#numbered(name);
      const known = this.tables.html;
      if (Object.hasOwn(known, name)) return known[name];
      const letters = [...name];
      for (let end = letters.length - 1; end > 1; end--) {
        const start = letters.slice(0, end).join("");
        if (Object.hasOwn(known, start)) return known[start] + letters.slice(end).join("");
      }
      return whole;
    });
  }

  #numbered(name) {
    const digits = name.replace(/;$/, "").slice(1);
    const code = /^x/i.test(digits) ? parseInt(digits.slice(1), 16) : parseInt(digits, 10);
    if (code in this.tables.references) return this.tables.references[code];
    return code > LAST || (code >= 0xd800 && code <= 0xdfff) ? "\ufffd" : String.fromCodePoint(code);
  }

  #translated(text, table) {
    return Array.from(text, (character) => table[character] ?? character).join("");
  }

  #withoutControls(text) {
    return text.replace(/[\x80-\x9f]/g, (character) => this.#windows1252(character));
  }

  #windows1252(text) {
    const { characters } = this.codecs.find((codec) => codec.name === "sloppy-windows-1252");
    return Array.from(text, (character) => characters[character.codePointAt(0)]).join("");
  }

  #isBad(text) {
    return text.search(this.patterns.badness) >= 0;
  }

  /** ftfy's `fix_encoding`: UTF-8 that was read as something else, as often as that was done. */
  #decodedAgain(text) {
    for (;;) {
      const before = text;
      text = this.#decodedOnce(text);
      if (text === before) return text;
    }
  }

  #decodedOnce(text) {
    if (/^[\x00-\x7f]*$/.test(text) || !this.#isBad(text)) return text;
    const possible = [];
    for (const codec of this.codecs) {
      const bytes = this.#encoded(text, codec);
      if (bytes === null) continue;
      possible.push(codec.name);
      const decoded = this.#asUtf8(bytes, codec.name);
      if (decoded !== null) return decoded;
    }
    const inner = text.replace(this.patterns.utf8, (part) =>
      part.length < text.length && this.#isBad(part) ? this.#decodedAgain(part) : part,
    );
    if (inner !== text) return inner;
    if (possible.includes("latin-1") && !NO_WINDOWS_1252.test(text)) {
      const fixed = this.#windows1252(text);
      if (fixed !== text) return fixed;
    }
    return this.#withoutControls(text);
  }

  /** The text's bytes, each as a character from U+0000 to U+00FF; null where the encoding lacks a character. */
  #encoded(text, codec) {
    const bytes = Array.from(text, (character) => codec.bytes.get(character));
    return bytes.includes(undefined) ? null : String.fromCharCode(...bytes);
  }

  #asUtf8(bytes, encoding) {
    if (encoding !== "macroman" && bytes.search(this.patterns.altered) >= 0) {
      bytes = bytes.replace(this.patterns.a_grave, "\xc3\xa0 ");
      bytes = bytes.replace(this.patterns.altered, (found) => found.replaceAll(" ", "\xa0"));
    }
    if (encoding.startsWith("sloppy")) bytes = bytes.replace(this.patterns.lossy, "\xef\xbf\xbd");
    // Java's zero, and characters beyond U+FFFF as two halves.
    bytes = bytes.replaceAll("\xc0\x80", "\0");
    bytes = bytes.replace(/\xed([\xa0-\xaf])([\x80-\xbf])\xed([\xb0-\xbf])([\x80-\xbf])/g, (_, a, b, c, d) =>
      bytesOf(0x10000 + ((low(a, 15) << 16) | (low(b, 63) << 10) | (low(c, 15) << 6) | low(d, 63))),
    );
    try {
      return UTF8.decode(Uint8Array.from(bytes, (byte) => byte.charCodeAt(0)));
    } catch {
      return null;
    }
  }
}

function low(byte, mask) {
  return byte.charCodeAt(0) & mask;
}

function bytesOf(code) {
  return String.fromCharCode(...new TextEncoder().encode(String.fromCodePoint(code)));
}
