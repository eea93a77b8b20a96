// Writes an animated GIF of two colours and the shades between them. Source: the GIF89a specification.

const BITS = 4;
const SHADES = 1 << BITS;

// frames: RGBA bytes of each, delay: hundredths of a second for which each is shown.
export function gif(frames, width, height, from, to, delay) {
  const bytes = [..."GIF89a"].map((c) => c.charCodeAt(0));
  const short = (value) => bytes.push(value & 255, value >> 8);
  short(width);
  short(height);
  bytes.push(0x80 | (BITS - 1), 0, 0);
  for (let shade = 0; shade < SHADES; shade++) {
    const share = shade / (SHADES - 1);
    bytes.push(...from.map((value, i) => Math.round(value + (to[i] - value) * share)));
  }
  bytes.push(0x21, 0xff, 11, ...[..."NETSCAPE2.0"].map((c) => c.charCodeAt(0)), 3, 1, 0, 0, 0); // for ever
  for (const frame of frames) {
    bytes.push(0x21, 0xf9, 4, 0);
    short(delay);
    bytes.push(0, 0, 0x2c, 0, 0, 0, 0);
    short(width);
    short(height);
    bytes.push(0, BITS);
    const data = compress(indices(frame, from, to));
    for (let start = 0; start < data.length; start += 255) {
      const block = data.slice(start, start + 255);
      bytes.push(block.length, ...block);
    }
    bytes.push(0);
  }
  bytes.push(0x3b);
  return new Blob([new Uint8Array(bytes)], { type: "image/gif" });
}

// The nearest shade of each pixel, by the channel in which the two colours differ most.
function indices(pixels, from, to) {
  const spans = from.map((value, i) => Math.abs(to[i] - value));
  const channel = spans.indexOf(Math.max(...spans));
  const shades = [];
  for (let i = channel; i < pixels.length; i += 4) {
    const share = (pixels[i] - from[channel]) / (to[channel] - from[channel]);
    shades.push(Math.min(SHADES - 1, Math.max(0, Math.round(share * (SHADES - 1)))));
  }
  return shades;
}

// LZW with codes of growing length, least significant bit first.
function compress(symbols) {
  const clear = SHADES;
  const output = [];
  let size, table, next;
  let pending = 0;
  let bits = 0;
  const put = (code) => {
    pending |= code << bits;
    for (bits += size; bits >= 8; bits -= 8) {
      output.push(pending & 255);
      pending >>= 8;
    }
  };
  const restart = () => {
    size = BITS + 1;
    next = clear + 2;
    table = new Map();
  };
  restart();
  put(clear);
  let prefix = symbols[0];
  for (const symbol of symbols.slice(1)) {
    const key = prefix * SHADES + symbol;
    const known = table.get(key);
    if (known !== undefined) {
      prefix = known;
      continue;
    }
    put(prefix);
    if (next < 4096) {
      table.set(key, next);
      if (next++ === 1 << size) size++;
    } else {
      put(clear);
      restart();
    }
    prefix = symbol;
  }
  put(prefix);
  put(clear + 1);
  if (bits) output.push(pending);
  return output;
}
