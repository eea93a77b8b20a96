// Sounds from the microphone; pictures and clips from the camera. Both need a page served by https or from this machine.

import { byId } from "./dom.js";
import { Media } from "./media.js";

const SOUND_TYPES = ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];
const CLIP_TYPES = ["video/webm;codecs=vp8", "video/mp4"];
const MAX_SECONDS = { audio: 60, video: 20 };

let count = 0;

export const canRecord = () => Boolean(navigator.mediaDevices?.getUserMedia && window.MediaRecorder);

// Records a stream until `stop` is called or the time is over; then calls `onDone` with a Media.
function record(stream, kind, onDone) {
  const mimeType = (kind === "audio" ? SOUND_TYPES : CLIP_TYPES).find((type) => MediaRecorder.isTypeSupported(type));
  const recorder = new MediaRecorder(stream, { mimeType });
  const pieces = [];
  recorder.ondataavailable = (event) => pieces.push(event.data);
  const timer = setTimeout(() => stop(), 1000 * MAX_SECONDS[kind]);
  recorder.onstop = () => {
    clearTimeout(timer);
    const type = recorder.mimeType.split(";")[0];
    onDone(new Media(kind, new Blob(pieces, { type }), `recording ${++count}.${type.split("/")[1]}`));
  };
  const stop = () => recorder.state !== "inactive" && recorder.stop();
  recorder.start();
  return stop;
}

const endStream = (stream) => stream.getTracks().forEach((track) => track.stop());

// A button that records while it is pressed in.
export function microphone(toggle, onMedia, onError) {
  let stop = null;
  const show = (isOn) => toggle.setAttribute("aria-pressed", String(isOn));
  toggle.addEventListener("click", async () => {
    if (stop) return stop();
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      show(true);
      stop = record(stream, "audio", (media) => {
        endStream(stream);
        stop = null;
        show(false);
        onMedia(media);
      });
    } catch (error) {
      onError(`The microphone can't be used (${error.name}).`);
    }
  });
}

// A dialog with the camera's picture.
export function camera(opener, kinds, onMedia, onError) {
  const dialog = byId("camera-dialog");
  const view = byId("camera-view");
  const picture = byId("camera-picture");
  const clip = byId("camera-clip");
  let stream = null;
  let stop = null;

  opener.addEventListener("click", async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      onError(`The camera can't be used (${error.name}).`);
      return;
    }
    view.srcObject = stream;
    picture.disabled = clip.disabled = true; // until there is something to take
    picture.hidden = !("image" in kinds());
    clip.hidden = !("video" in kinds());
    dialog.showModal();
  });
  view.addEventListener("playing", () => (picture.disabled = clip.disabled = false));
  picture.addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    canvas.width = view.videoWidth;
    canvas.height = view.videoHeight;
    canvas.getContext("2d").drawImage(view, 0, 0);
    canvas.toBlob((blob) => blob && onMedia(new Media("image", blob, `photo ${++count}.jpg`)), "image/jpeg", 0.92);
    dialog.close();
  });
  clip.addEventListener("click", () => {
    if (stop) return stop();
    clip.setAttribute("aria-pressed", "true");
    clip.textContent = "Stop and attach";
    stop = record(stream, "video", (media) => {
      stop = null;
      onMedia(media);
      dialog.close();
    });
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    stop?.();
    endStream(stream);
    view.srcObject = null;
    clip.setAttribute("aria-pressed", "false");
    clip.textContent = "Record a clip";
  });
}
