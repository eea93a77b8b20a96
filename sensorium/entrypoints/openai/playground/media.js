// Media that wait to be sent, and how they look: from files, the clipboard, the microphone or the camera.

import { element, icon } from "./dom.js";

const NAMES = { image: "a picture", video: "a clip", audio: "a sound" };
const KINDS_BY_SUFFIX = [
  [/\.(png|jpe?g|webp|bmp|tiff?|avif|heic)$/i, "image"],
  [/\.(mp4|m4v|mov|mkv|webm|avi|gif)$/i, "video"],
  [/\.(wav|mp3|flac|ogg|oga|opus|m4a|aac|aiff?)$/i, "audio"],
];
const MAX_BYTES = 256 * 2 ** 20; // beyond that, a browser's tab may not live to see the server's answer

export class MediaError extends Error {}

// One item: its kind is "image", "video" or "audio". `tokens` is null until the server has counted them.
export class Media {
  constructor(kind, blob, name) {
    this.kind = kind;
    this.blob = blob;
    this.name = name;
    this.url = URL.createObjectURL(blob);
    this.isDrawn = kind === "image" || blob.type === "image/gif"; // shown by <img>
    this.tokens = null;
    this.dataUrl = null;
  }

  // The item as a part of a message.
  async part() {
    this.dataUrl ??= await readDataUrl(this.blob);
    const type = `${this.kind}_url`;
    return { type, [type]: { url: this.dataUrl } };
  }

  figure() {
    const caption = element("figcaption", {}, this.caption());
    return element("figure", {}, this.player(), caption);
  }

  caption() {
    const tokens = this.tokens === null ? "" : ` · ${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`;
    return `${this.name}${tokens}`;
  }

  player() {
    if (this.isDrawn) return element("img", { src: this.url, alt: `Attached: ${this.name}` });
    const name = this.kind === "video" ? "video" : "audio";
    return element(name, { src: this.url, controls: true, preload: "metadata", "aria-label": this.name });
  }

  thumbnail() {
    if (this.isDrawn) return element("img", { className: "thumb", src: this.url, alt: "" });
    if (this.kind === "audio") return element("span", { className: "thumb" }, icon("sound"));
    return element("video", { className: "thumb", src: this.url, muted: true, preload: "metadata", "aria-hidden": "true", tabIndex: -1 });
  }

  release() {
    URL.revokeObjectURL(this.url);
  }
}

// Raises MediaError for a file that is no media, or of a kind that the model doesn't take.
export async function fromFile(file, limits) {
  const name = file.name || "pasted";
  const kind = await kindOf(file, limits);
  const taken = Object.keys(limits).filter((each) => NAMES[each]);
  if (!taken.includes(kind)) {
    const got = kind ? NAMES[kind] : file.type || "a file of unknown type";
    const expected = listed(taken.map((each) => NAMES[each])) || "text: this model takes no media";
    throw new MediaError(`${name}: got ${got}, expected ${expected}.`);
  }
  if (file.size > MAX_BYTES) throw new MediaError(`${name}: got ${Math.round(file.size / 2 ** 20)} MiB, expected at most ${MAX_BYTES / 2 ** 20}.`);
  return new Media(kind, file, name);
}

// "a", "a or b", "a, b or c"
const listed = (words) => [words.slice(0, -1).join(", "), words.at(-1)].filter(Boolean).join(" or ");

async function kindOf(file, limits) {
  const major = file.type.split("/")[0];
  const kind = NAMES[major] ? major : (KINDS_BY_SUFFIX.find(([pattern]) => pattern.test(file.name)) ?? [])[1];
  if (/gif$/i.test(file.type || file.name)) return "video" in limits && (await isAnimated(file)) ? "video" : "image";
  return kind;
}

async function isAnimated(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let frames = 0;
  for (let i = 0; i < bytes.length - 3 && frames < 2; i++) {
    if (bytes[i] === 0 && bytes[i + 1] === 0x21 && bytes[i + 2] === 0xf9 && bytes[i + 3] === 4) frames++;
  }
  return frames > 1;
}

function readDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new MediaError("The file can't be read any more. Attach it again."));
    reader.readAsDataURL(blob);
  });
}
