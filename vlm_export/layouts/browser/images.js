/**
 * Image files to the bytes that the graph takes, as the bundle's own runtime decodes them with Pillow.
 *
 * A browser would turn an image by its EXIF orientation, convert its colours and premultiply its alpha. Models were
 * trained without the first two, and what they make of transparency is stated by the bundle.
 */

import { onWhite, resizeNearest, resizeSmoothly, takesRowsFirst, targetSize } from "./resample.js";

const SIDEWAYS = "this image is stored in a way that browsers read differently";
const LONGEST_THUMBNAIL_EDGE = 512;

/**
 * RGB bytes (height, width, 3) of a file's first frame; `settings` is `images` of page.json.
 *
 * Throws an Error, whose message is for people, where the file is no image that this browser reads, or one that it
 * reads differently from the server.
 */
export async function pixelsOf(file, settings) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const kind = kindOf(bytes);
  const bitmap = await decoded(new Blob([withoutOrientation(bytes)], { type: file.type }));
  const { width, height } = bitmap;
  if (width * height > settings.max_pixels) {
    throw new Error(`the image has more than ${settings.max_pixels.toLocaleString()} pixels`);
  }
  const rgba = exactBytes(bitmap);
  bitmap.close();
  return prepared(rgba, width, height, kind, settings);
}

/** A small upright picture of the file, as people expect to see it. */
export async function thumbnailOf(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_THUMBNAIL_EDGE / Math.max(bitmap.width, bitmap.height));
  const size = [bitmap.width, bitmap.height].map((edge) => Math.max(1, Math.round(edge * scale)));
  const canvas = new OffscreenCanvas(...size);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, ...size);
  bitmap.close();
  return canvas.convertToBlob({ type: "image/webp", quality: 0.85 });
}

async function decoded(blob) {
  try {
    return await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error("this browser cannot read it as an image");
  }
}

/** Conversion to RGB, and the resize where the graph's is not Pillow's: the graph leaves what has its size as it is. */
function prepared(rgba, width, height, kind, { spec, pillow }) {
  if (kind === "alpha" && isOpaque(rgba)) kind = "opaque";
  if (spec.rgb_stage === "never" && kind !== "opaque") {
    throw new Error("the model takes images without transparency or palette");
  }
  if (spec.rgb_stage === "before_resize" || kind === "opaque") {
    rgba = withoutAlpha(rgba, spec);
    kind = "opaque";
  }
  const size = targetSize(width, height, spec);
  const rowsFirst = pillow >= 13 && takesRowsFirst(width, height, ...size);
  if (kind === "palette") rgba = resizeNearest(rgba, width, height, ...size);
  else if (kind === "alpha" || rowsFirst) rgba = resizeSmoothly(rgba, width, height, ...size, spec.resample, rowsFirst);
  if (kind !== "opaque" || rowsFirst) [width, height] = size;
  return { data: rgbOf(withoutAlpha(rgba, spec)), width, height };
}

/** Opaque RGBA, with white behind what is transparent or with the colours that it hides. */
function withoutAlpha(rgba, spec) {
  if (spec.transparency === "white") return onWhite(rgba);
  for (let i = 3; i < rgba.length; i += 4) rgba[i] = 255;
  return rgba;
}

function rgbOf(rgba) {
  const data = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    data[to++] = rgba[from];
    data[to++] = rgba[from + 1];
    data[to++] = rgba[from + 2];
  }
  return data;
}

function isOpaque(rgba) {
  for (let i = 3; i < rgba.length; i += 4) if (rgba[i] !== 255) return false;
  return true;
}

/** RGBA of a bitmap. A canvas keeps opaque colours as they are; those under transparency only WebGL hands over. */
function exactBytes(bitmap) {
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (context === null) throw new Error("there is not enough memory for an image of this size");
  context.drawImage(bitmap, 0, 0);
  const rgba = new Uint8Array(context.getImageData(0, 0, width, height).data.buffer);
  return isOpaque(rgba) ? rgba : (bytesByWebGl(bitmap) ?? rgba);
}

function bytesByWebGl(bitmap) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  const { width, height } = bitmap;
  if (gl === null || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const rgba = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return failed ? null : rgba;
}

/** "palette", "alpha" or "opaque": what Pillow would open, which decides how it resizes. */
function kindOf(bytes) {
  if (startsWith(bytes, "\x89PNG")) return kindOfPng(bytes[24], bytes[25]);
  if (startsWith(bytes, "GIF8")) {
    const entries = bytes[10] & 128 ? 2 << (bytes[10] & 7) : 0;
    return entries && isGreyRamp(bytes, 13, entries, 3) ? "opaque" : "palette";
  }
  if (startsWith(bytes, "BM") && bytes[28] <= 8) {
    const entries = 1 << bytes[28];
    const grey = bytes[28] === 8 && isGreyRamp(bytes, 14 + bytes[14], entries, 4);
    return grey ? "opaque" : "palette";
  }
  if (jpegSegments(bytes).some(({ marker, at }) => isFrame(marker) && bytes[at + 9] === 4)) {
    throw new Error(`${SIDEWAYS}: a JPEG of four colours (CMYK)`);
  }
  return "alpha";
}

function kindOfPng(depth, colour) {
  if (colour === 0 && depth === 16) throw new Error(`${SIDEWAYS}: a PNG of 16-bit grey`);
  if (colour === 3 || (colour === 0 && depth === 1)) return "palette";
  return colour >= 4 ? "alpha" : "opaque";
}

function isGreyRamp(bytes, start, entries, stride) {
  for (let i = 0; i < entries; i++) {
    for (let c = 0; c < 3; c++) if (bytes[start + i * stride + c] !== i) return false;
  }
  return true;
}

/** The file without its EXIF data, by which browsers turn images whatever they are asked. */
function withoutOrientation(bytes) {
  if (startsWith(bytes, "\x89PNG")) return withoutExifChunk(bytes);
  const found = new Uint8Array(bytes);
  for (const { marker, at } of jpegSegments(bytes)) {
    if (marker === 0xe1 && startsWith(bytes.subarray(at + 4), "Exif")) found.fill(0, at + 4, at + 8);
  }
  return found;
}

function withoutExifChunk(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 12 + view.getUint32(at);
    if (startsWith(bytes.subarray(at + 4), "eXIf")) {
      const found = new Uint8Array(bytes.length - (end - at));
      found.set(bytes.subarray(0, at));
      found.set(bytes.subarray(end), at);
      return found;
    }
    at = end;
  }
  return bytes;
}

/** Markers of a JPEG and where they stand, up to its pixels; none for other files. */
function jpegSegments(bytes) {
  const found = [];
  if (!startsWith(bytes, "\xff\xd8")) return found;
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
    found.push({ marker: bytes[at + 1], at });
    at += 2 + (bytes[at + 2] << 8) + bytes[at + 3];
  }
  return found;
}

function isFrame(marker) {
  return marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
}

function startsWith(bytes, text) {
  return [...text].every((character, i) => bytes[i] === character.charCodeAt(0));
}
