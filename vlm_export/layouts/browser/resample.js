/**
 * Pillow's resizing of what the graph does otherwise: transparent images, palettes, and with Pillow 13 very tall ones.
 *
 * Facts: Pillow 12 and 13, `Image.resize` (RGBA is premultiplied, resized and divided again; palettes take the nearest pixel),
 * src/libImaging/Resample.c (8-bit weights in 22 bits, a horizontal, then a vertical pass, each rounded and clipped),
 * Convert.c, Geometry.c and AlphaComposite.c. All arrays are RGBA bytes, row by row.
 */

const PRECISION = 22;
const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(1 - Math.abs(x), 0) },
  bicubic: { support: 2, at: cubic },
};

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Width and height after the resize that an ImageSpec asks for. */
export function targetSize(width, height, spec) {
  if (spec.resize === "stretch") return [spec.resize_pixels[1], spec.resize_pixels[0]];
  const edge = spec.resize_pixels[0];
  const longer = Math.floor((edge * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [edge, longer] : [longer, edge];
}

/** Whether Pillow 13 resizes rows before columns, which rounds otherwise; the graph and Pillow 12 never do. */
export function takesRowsFirst(width, height, toWidth, toHeight) {
  return height > toHeight && height - toHeight > 2 * (width - toWidth);
}

/** RGBA resized as Pillow resizes mode RGBA, rows before columns where that is asked for. */
export function resizeSmoothly(rgba, width, height, toWidth, toHeight, filter, rowsFirst) {
  if (width === toWidth && height === toHeight) return rgba;
  let pixels = premultiplied(rgba);
  if (rowsFirst) {
    pixels = pass(pixels, width, height, toHeight, FILTERS[filter], false);
    return divided(pass(pixels, width, toHeight, toWidth, FILTERS[filter], true));
  }
  pixels = pass(pixels, width, height, toWidth, FILTERS[filter], true);
  return divided(pass(pixels, toWidth, height, toHeight, FILTERS[filter], false));
}

/** RGBA of the nearest pixels, as Pillow resizes palettes and bitmaps. */
export function resizeNearest(rgba, width, height, toWidth, toHeight) {
  const pixels = new Uint32Array(rgba.buffer, rgba.byteOffset, width * height);
  const found = new Uint32Array(toWidth * toHeight);
  const columns = nearest(width, toWidth);
  nearest(height, toHeight).forEach((row, y) => {
    for (let x = 0; x < toWidth; x++) found[y * toWidth + x] = pixels[row * width + columns[x]];
  });
  return new Uint8Array(found.buffer);
}

/** RGBA on a white ground, opaque. */
export function onWhite(rgba) {
  const found = new Uint8Array(rgba.length).fill(255);
  for (let i = 0; i < rgba.length; i += 4) {
    const whole = rgba[i + 3] * 255 + 255 * (255 - rgba[i + 3]);
    const weight = Math.floor((rgba[i + 3] * 255 * 255 * 128) / whole);
    for (let c = i; c < i + 3; c++) {
      const sum = rgba[c] * weight + 255 * (255 * 128 - weight) + (128 << 7);
      found[c] = ((sum >> 8) + sum) >> 8 >> 7;
    }
  }
  return found;
}

function nearest(length, wanted) {
  const found = new Int32Array(wanted);
  let at = (length / wanted) * 0.5;
  for (let i = 0; i < wanted; i++, at += length / wanted) found[i] = at;
  return found;
}

function premultiplied(rgba) {
  const found = new Uint8Array(rgba);
  for (let i = 0; i < rgba.length; i += 4) {
    for (let c = i; c < i + 3; c++) {
      const product = rgba[c] * rgba[i + 3] + 128;
      found[c] = ((product >> 8) + product) >> 8;
    }
  }
  return found;
}

function divided(rgba) {
  for (let i = 0; i < rgba.length; i += 4) {
    const alpha = rgba[i + 3];
    if (alpha === 0 || alpha === 255) continue;
    for (let c = i; c < i + 3; c++) rgba[c] = Math.min(Math.floor((255 * rgba[c]) / alpha), 255);
  }
  return rgba;
}

/** One pass: `width` becomes `wanted` where it goes across, `height` otherwise. */
function pass(pixels, width, height, wanted, filter, across) {
  const length = across ? width : height;
  if (length === wanted) return pixels;
  const [toWidth, toHeight] = across ? [wanted, height] : [width, wanted];
  const step = across ? 4 : 4 * width;
  const found = new Uint8ClampedArray(toWidth * toHeight * 4);
  weights(length, wanted, filter).forEach(({ first, values }, i) => {
    for (let line = 0; line < (across ? height : width); line++) {
      const from = (across ? line * width * 4 : line * 4) + first * step;
      const to = across ? (line * toWidth + i) * 4 : (i * toWidth + line) * 4;
      for (let c = 0; c < 4; c++) {
        let sum = 1 << (PRECISION - 1);
        for (let k = 0; k < values.length; k++) sum += pixels[from + k * step + c] * values[k];
        found[to + c] = sum >> PRECISION;
      }
    }
  });
  return new Uint8Array(found.buffer);
}

/** For each pixel of the result: the first pixel that it is made of, and the weights of these, as whole numbers. */
function weights(length, wanted, { support, at }) {
  const ratio = length / wanted;
  const scale = Math.max(ratio, 1);
  return Array.from({ length: wanted }, (_, i) => {
    const centre = (i + 0.5) * ratio;
    const first = Math.max(Math.trunc(centre - support * scale + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support * scale + 0.5), length);
    const exact = Array.from({ length: end - first }, (_, k) => at((k + first - centre + 0.5) / scale));
    const sum = exact.reduce((a, b) => a + b, 0);
    return { first, values: exact.map((w) => Math.trunc((w / sum) * (1 << PRECISION) + (w / sum < 0 ? -0.5 : 0.5))) };
  });
}
