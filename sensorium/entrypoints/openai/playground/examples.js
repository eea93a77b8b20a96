// A picture, a clip and a sound that are made here, each with a question whose answer one can see or hear.

import { gif } from "./gif.js";

const SIDE = 112;
const BACKGROUND = [240, 240, 235];
const RATE = 16000;

export const EXAMPLES = [
  { kind: "image", title: "Picture", name: "red circle.png", question: "What is in the image?", make: picture },
  { kind: "video", title: "Clip", name: "green circle.gif", question: "What moves?", make: clip },
  { kind: "audio", title: "Sound", name: "beeps.wav", question: "How many beeps are there?", make: sound },
];

function canvas() {
  const made = document.createElement("canvas");
  made.width = made.height = SIDE;
  const context = made.getContext("2d", { willReadFrequently: true });
  context.fillStyle = `rgb(${BACKGROUND})`;
  context.fillRect(0, 0, SIDE, SIDE);
  return [made, context];
}

function disc(context, x, y, radius, color) {
  context.fillStyle = `rgb(${color})`;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

// A red circle at the top left, a blue square at the bottom right.
function picture() {
  const [made, context] = canvas();
  disc(context, 24, 24, 14, [220, 20, 30]);
  context.fillStyle = "rgb(30 80 220)";
  context.fillRect(75, 77, 26, 26);
  return new Promise((resolve) => made.toBlob(resolve, "image/png"));
}

// A green circle that moves to the right: eight frames in four seconds.
async function clip() {
  const color = [40, 160, 60];
  const frames = [];
  for (let index = 0; index < 8; index++) {
    const [, context] = canvas();
    disc(context, 24 + 9 * index, 56, 13, color);
    frames.push(context.getImageData(0, 0, SIDE, SIDE).data);
  }
  return gif(frames, SIDE, SIDE, BACKGROUND, color, 50);
}

// Three beeps of 880 hertz.
async function sound() {
  const beep = 0.16 * RATE;
  const pause = 0.2 * RATE;
  const samples = new Int16Array(3 * (beep + pause) + pause);
  for (let index = 0; index < 3; index++) {
    const start = pause + index * (beep + pause);
    for (let i = 0; i < beep; i++) {
      const edge = Math.min(1, i / 160, (beep - 1 - i) / 160); // soft, without clicks
      samples[start + i] = 0.5 * edge * 32767 * Math.sin((2 * Math.PI * 880 * i) / RATE);
    }
  }
  return new Blob([wavHeader(samples.length), samples], { type: "audio/wav" });
}

// The header of a mono WAV file of 16-bit samples.
function wavHeader(count) {
  const view = new DataView(new ArrayBuffer(44));
  const text = (offset, value) => [...value].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * count, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // samples as they are
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * count, true);
  return view.buffer;
}

// What stands for a sound: its loudness over time, drawn in the colour of the text.
export async function drawWave(blob, made) {
  const samples = new Int16Array(await blob.slice(44).arrayBuffer());
  const context = made.getContext("2d");
  const bars = 56;
  made.width = 2 * 224;
  made.height = 2 * 112;
  context.fillStyle = getComputedStyle(made).color;
  const step = made.width / bars;
  for (let bar = 0; bar < bars; bar++) {
    const part = samples.subarray((bar * samples.length) / bars, ((bar + 1) * samples.length) / bars);
    const loudest = part.reduce((most, each) => Math.max(most, Math.abs(each)), 0) / 32768;
    const height = Math.max(6, loudest * made.height * 1.3);
    context.beginPath();
    context.roundRect(bar * step + 1, (made.height - height) / 2, step - 3, height, 3);
    context.fill();
  }
}
