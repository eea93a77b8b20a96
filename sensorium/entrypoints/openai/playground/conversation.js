// What was asked and answered: how it looks, and as messages for the server.

import { button, byId, element, notice } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const log = byId("log");
const scroller = document.querySelector("main");
const NEAR_PX = 80;

// Keeps the end of the conversation in view, unless the reader has scrolled away from it.
export function followEnd(change) {
  const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_PX;
  change();
  if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
}

// A question, with its media.
export class Question {
  constructor(text, media) {
    this.text = text;
    this.media = media;
    this.captions = media.map((each) => each.figure());
    const figures = media.length ? element("div", { className: "media" }, ...this.captions) : null;
    this.view = element("div", { className: "asked" }, element("span", { className: "hidden" }, "You: "), figures, text);
    log.append(this.view);
    scroller.scrollTop = scroller.scrollHeight;
  }

  showTokens() {
    this.media.forEach((each, i) => (this.captions[i].lastChild.textContent = each.caption()));
  }

  async message() {
    if (!this.media.length) return { role: "user", content: this.text };
    const parts = await Promise.all(this.media.map((each) => each.part()));
    return { role: "user", content: this.text ? [...parts, { type: "text", text: this.text }] : parts };
  }

  remove() {
    this.media.forEach((each) => each.release());
    this.view.remove();
  }
}

// An answer that arrives piece by piece, with what it took.
export class Answer {
  constructor(onRetry) {
    this.text = "";
    this.onRetry = onRetry;
    this.body = element("div", { className: "text" });
    this.markdown = new MarkdownView(this.body);
    this.thoughts = null;
    this.pending = "";
    this.view = element("article", { className: "answer", "aria-label": "Answer", "aria-busy": "true" }, this.body);
    followEnd(() => log.append(this.view));
  }

  message() {
    return { role: "assistant", content: this.text };
  }

  append(text) {
    this.text += text;
    if (!this.pending) requestAnimationFrame(() => this.flush());
    this.pending += text;
  }

  appendThought(text) {
    if (!this.thoughts) {
      this.thoughts = document.createTextNode("");
      this.view.prepend(element("details", {}, element("summary", {}, "Thoughts"), this.thoughts));
    }
    this.thoughts.appendData(text);
  }

  flush() {
    const { pending } = this;
    this.pending = "";
    if (pending) followEnd(() => this.markdown.append(pending));
  }

  // facts: [["First token", "80 ms"], ...]
  finish(facts) {
    this.flush();
    const list = element("dl", {}, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    const copy = button("Copy", () => this.copy(copy), { className: "quiet" });
    this.end(list, copy);
  }

  fail(message) {
    this.flush();
    followEnd(() => this.view.append(notice(message)));
    this.end();
  }

  end(...parts) {
    this.retry = button("Ask again", () => this.onRetry(), { className: "quiet" });
    this.actions = element("div", { className: "actions" }, ...parts.slice(1), this.retry);
    this.view.setAttribute("aria-busy", "false");
    followEnd(() => this.view.append(element("div", { className: "foot" }, parts[0], this.actions)));
  }

  // Only the last answer can be asked for again.
  settle() {
    this.retry?.remove();
  }

  async copy(pressed) {
    await navigator.clipboard?.writeText(this.text);
    pressed.textContent = navigator.clipboard ? "Copied" : "Not allowed here";
    setTimeout(() => (pressed.textContent = "Copy"), 1500);
  }
}
