// The page: puts together a question, asks it, shows the answer and what it took.

import { chat, models, ServerError, setApiKey, tokenCost } from "./client.js";
import { Answer, Question } from "./conversation.js";
import { button, byId, element, icon, notice } from "./dom.js";
import { drawWave, EXAMPLES } from "./examples.js";
import { fromFile, Media, MediaError } from "./media.js";
import { camera, canRecord, microphone } from "./recorder.js";

const COST_DELAY_MS = 350;
const RECOUNT_BYTES = 4 * 2 ** 20; // with larger media, only a change of media asks for the cost again

const question = byId("question");
const settings = byId("settings");

let available = []; // models
let turns = []; // [{question, answer}], the last one perhaps without an answer that counts
let attached = []; // Media
let running = null; // AbortController of the answer that streams
let counting = null; // AbortController of the token cost that was asked for last
let costTimer = 0;

// The model

const model = () => available.find((each) => each.id === byId("model").value) ?? available[0];
const limits = () => model()?.limit_mm_per_prompt ?? {};

async function connect() {
  try {
    available = await models();
  } catch (error) {
    if (error.status === 401) askForKey();
    else complain(error.message);
    return;
  }
  byId("notices").replaceChildren();
  byId("model").replaceChildren(...available.map(({ id }) => element("option", { value: id }, id)));
  byId("model-choice").hidden = available.length < 2;
  byId("model-name").textContent = available.length < 2 ? model().id : "";
  const hasMedia = Object.keys(limits()).length > 0;
  byId("attach").hidden = !hasMedia;
  byId("record").hidden = !canRecord() || !("audio" in limits());
  byId("camera").hidden = !canRecord() || !("image" in limits() || "video" in limits());
  await showExamples();
  countSoon(0);
}

function askForKey() {
  byId("notices").replaceChildren(notice("This server asks for an API key. Enter one in the settings."));
  toggleSettings(true);
  byId("api-key").focus();
}

// What goes wrong outside an answer

function complain(message) {
  byId("notices").replaceChildren(notice(message));
}

const announce = (text) => (byId("status").textContent = text);

// Media

function attach(media) {
  attached.push(media);
  showAttached();
  question.focus();
}

async function attachFiles(files) {
  for (const file of files) {
    try {
      attach(await fromFile(file, limits()));
    } catch (error) {
      if (!(error instanceof MediaError)) throw error;
      complain(error.message);
    }
  }
}

function showAttached() {
  byId("attachments").replaceChildren(...attached.map(attachedItem));
  countSoon(0);
}

function attachedItem(media) {
  const remove = button(icon("remove"), () => detach(media), { className: "icon", "aria-label": `Remove ${media.name}` });
  const what = element("span", { className: "what" }, element("span", { className: "name" }, media.name), element("span", { className: "tokens" }, tokensText(media)));
  return element("li", {}, media.thumbnail(), what, remove);
}

const tokensText = (media) => (media.tokens === null ? "…" : `${media.tokens} ${media.tokens === 1 ? "token" : "tokens"}`);

function detach(media) {
  attached = attached.filter((each) => each !== media);
  media.release();
  showAttached();
  question.focus();
}

// Examples

async function showExamples() {
  const shown = EXAMPLES.filter(({ kind }) => kind in limits());
  byId("examples-block").hidden = !shown.length;
  const made = await Promise.all(shown.map(exampleItem));
  byId("examples").replaceChildren(...made.map(([item]) => item));
  made.forEach(([, draw]) => draw()); // in the colours that it has on the page
}

// An item of the list, and what is to be done once it is there.
async function exampleItem(example) {
  const blob = await example.make();
  let preview = element("canvas", { className: "wave", "aria-hidden": "true" });
  if (example.kind !== "audio") preview = element("img", { src: URL.createObjectURL(blob), alt: "" });
  const ask = () => {
    attached.push(new Media(example.kind, blob, example.name));
    question.value = example.question;
    send();
  };
  const made = button(preview, ask);
  made.append(element("strong", {}, example.title), element("span", {}, example.question));
  return [element("li", {}, made), () => example.kind === "audio" && drawWave(blob, preview)];
}

// What a question would cost

function countSoon(delay) {
  clearTimeout(costTimer);
  costTimer = setTimeout(count, delay);
}

async function count() {
  counting?.abort();
  if (!model() || running) return;
  if (!attached.length && !question.value.trim()) return showCost(null);
  const own = (counting = new AbortController());
  const waiting = [...attached];
  try {
    const content = await new DraftMessage(question.value, waiting).message();
    const cost = await tokenCost(model().id, [...(await history()), content], own.signal);
    if (own.signal.aborted) return;
    takeTokens(cost.media_tokens, waiting);
    document.querySelectorAll("#attachments .tokens").forEach((each, i) => (each.textContent = tokensText(attached[i])));
    showCost(cost);
  } catch (error) {
    if (error.name === "AbortError" || own.signal.aborted) return;
    showCost(null);
    byId("cost-text").textContent = error.message;
  }
}

// A question that is still being written.
class DraftMessage {
  constructor(text, media) {
    Object.assign(this, { text, media });
  }

  message() {
    return Question.prototype.message.call(this);
  }
}

// The counts of a conversation come in its order, so that those of the last question are the last ones.
function takeTokens(counts, media) {
  for (const [kind, tokens] of Object.entries(counts)) {
    const own = media.filter((each) => each.kind === kind);
    own.forEach((each, i) => (each.tokens = tokens[tokens.length - own.length + i] ?? null));
  }
}

function showCost(cost) {
  const meter = byId("cost-meter");
  meter.hidden = !cost;
  byId("cost-text").textContent = cost ? `${cost.prompt_tokens} of ${cost.max_model_len} tokens` : "";
  if (cost) meter.value = cost.prompt_tokens / cost.max_model_len;
}

// Asking

async function history() {
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    if (!turn.answer?.text) continue; // failed, or stopped before it began
    messages.push(await turn.question.message(), turn.answer.message());
  }
  return messages;
}

function sampling() {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  return { temperature: number("temperature"), top_p: number("top-p"), max_tokens: number("max-tokens"), seed: number("seed") };
}

function send() {
  const text = question.value.trim();
  if (running || (!text && !attached.length)) return question.focus();
  if (!model()) return void connect();
  counting?.abort();
  clearTimeout(costTimer);
  byId("welcome").hidden = true;
  const last = turns.at(-1);
  last?.answer.settle();
  if (last && !last.answer.text) last.question.view.classList.add("unanswered");
  turns.push({ question: new Question(text, attached), answer: null });
  attached = [];
  question.value = "";
  byId("attachments").replaceChildren();
  showCost(null);
  question.focus();
  void answer();
}

function askAgain() {
  if (running) return;
  const turn = turns.at(-1);
  turn.answer.view.remove();
  turn.answer = null;
  void answer();
}

async function answer() {
  const turn = turns.at(-1);
  turn.answer = new Answer(askAgain);
  running = new AbortController();
  showRunning(true);
  const watch = new Watch();
  try {
    const messages = [...(await history()), await turn.question.message()];
    if (turn.question.media.some((each) => each.tokens === null)) {
      void countAsked(turn.question, messages);
    }
    watch.start();
    for await (const chunk of chat({ model: model().id, messages, ...sampling() }, running.signal)) take(chunk, turn.answer, watch);
    finish(turn, watch, "Answer complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      watch.reason = "stopped";
      finish(turn, watch, "Stopped.");
    } else {
      if (!(error instanceof ServerError)) console.error(error);
      turn.answer.fail(error.message);
      if (error.status === 401) askForKey();
    }
  } finally {
    const hadFocus = document.activeElement === byId("stop");
    running = null;
    showRunning(false);
    if (hadFocus) question.focus();
    countSoon(0);
  }
}

// The tokens of media that were sent before they had been counted.
async function countAsked(asked, messages) {
  try {
    takeTokens((await tokenCost(model().id, messages, running.signal)).media_tokens, asked.media);
    asked.showTokens();
  } catch {
    // the answer tells what is wrong
  }
}

function take(chunk, shown, watch) {
  if (chunk.usage) watch.usage = chunk.usage;
  const [choice] = chunk.choices;
  if (!choice) return;
  const { content, reasoning_content: thought } = choice.delta;
  if (content || thought) watch.tick();
  if (thought) shown.appendThought(thought);
  if (content) shown.append(content);
  if (choice.finish_reason) watch.reason = choice.finish_reason;
}

function finish(turn, watch, text) {
  turn.answer.finish(watch.facts());
  announce(text);
}

// When things happened to an answer, as this page saw it.
class Watch {
  constructor() {
    this.usage = null;
    this.reason = null;
    this.first = this.last = null;
  }

  start() {
    this.begin = performance.now();
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  facts() {
    const facts = [];
    if (this.first !== null) facts.push(["First token", duration(this.first - this.begin)]);
    if (this.usage) {
      const { prompt_tokens: prompt, completion_tokens: made, prompt_tokens_details: details } = this.usage;
      if (made > 1 && this.last > this.first) facts.push(["Speed", `${rate((1000 * (made - 1)) / (this.last - this.first))} tokens/s`]);
      facts.push(["Prompt", `${prompt} tokens${details?.cached_tokens ? `, ${details.cached_tokens} cached` : ""}`]);
      facts.push(["Answer", `${made} ${made === 1 ? "token" : "tokens"}`]);
    }
    if (this.reason && this.reason !== "stop") facts.push(["Ended by", this.reason === "stopped" ? "you" : this.reason]);
    return facts;
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const rate = (value) => (value < 10 ? value.toFixed(1) : String(Math.round(value)));

function showRunning(isRunning) {
  byId("stop").hidden = !isRunning;
  byId("send").hidden = isRunning;
  byId("clear").disabled = isRunning;
  if (isRunning) announce("Answering.");
}

function clear() {
  turns.forEach((turn) => {
    turn.question.remove();
    turn.answer?.view.remove();
  });
  turns = [];
  attached.forEach((each) => each.release());
  attached = [];
  question.value = "";
  showAttached();
  byId("welcome").hidden = false;
  byId("notices").replaceChildren();
  announce("New conversation.");
  question.focus();
}

function toggleSettings(isOpen) {
  settings.hidden = !isOpen;
  byId("show-settings").setAttribute("aria-expanded", String(isOpen));
}

// Wiring

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
question.addEventListener("input", () => {
  const bytes = attached.reduce((sum, each) => sum + each.blob.size, 0);
  if (bytes <= RECOUNT_BYTES) countSoon(COST_DELAY_MS);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (!settings.hidden && settings.contains(document.activeElement)) {
    toggleSettings(false);
    byId("show-settings").focus();
  }
});
byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", clear);
byId("show-settings").addEventListener("click", () => toggleSettings(settings.hidden));
byId("model").addEventListener("change", () => countSoon(0));
byId("system").addEventListener("input", () => countSoon(COST_DELAY_MS));
byId("temperature").addEventListener("input", ({ target }) => (byId("temperature-value").textContent = target.value));
byId("api-key").addEventListener("change", ({ target }) => {
  setApiKey(target.value);
  void connect();
});
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", async ({ target }) => {
  await attachFiles([...target.files]);
  target.value = "";
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  void attachFiles(files);
});

let depth = 0; // of elements that what is dragged has entered and not left
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const showDrop = (change) => {
  depth = Math.max(0, depth + change);
  byId("drop-hint").hidden = !depth;
};
addEventListener("dragenter", (event) => carriesFiles(event) && showDrop(1));
addEventListener("dragleave", (event) => carriesFiles(event) && showDrop(-1));
addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  showDrop(-depth);
  void attachFiles([...event.dataTransfer.files]);
});

microphone(byId("record"), attach, complain);
camera(byId("camera"), limits, attach, complain);
question.focus();
void connect();
