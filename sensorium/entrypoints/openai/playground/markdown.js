// A safe subset of Markdown, as nodes: code, headings, lists, bold, italics. Everything else stays as it was written;
// links and HTML stay text.

import { element } from "./dom.js";

const FENCE = /^\s*(`{3,}|~{3,})/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBERED = /^\s*(\d{1,9})[.)]\s+(.*)$/;
const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=\S)\*(?![\w*])/s;

// Shows a text that grows at its end. Blocks that are complete are made once; only the last one is made anew.
export class MarkdownView {
  constructor(parent) {
    this.parent = parent;
    this.source = "";
    this.start = 0; // where the last block begins
    this.last = null;
  }

  append(text) {
    this.source += text;
    const blocks = split(this.source.slice(this.start));
    this.last?.remove();
    this.last = null;
    for (const [index, block] of blocks.entries()) {
      const node = render(block);
      this.parent.append(node);
      if (index === blocks.length - 1) {
        this.last = node;
        this.start += block.offset;
      }
    }
  }
}

// Blocks of a text: {kind, lines, offset}, the offset of each in the text.
export function split(text) {
  const blocks = [];
  let block = null;
  let fence = null;
  let offset = 0;
  for (const line of text.split("\n")) {
    const kind = fence ? "code" : kindOf(line, block);
    if (kind === "blank") block = null;
    else if (fence) {
      if (line.trim().startsWith(fence) && line.trim().replaceAll(fence[0], "") === "") {
        fence = null;
        block = null;
      } else block.lines.push(line);
    } else {
      if (!block || block.kind !== kind || kind === "heading" || kind === "code") {
        block = { kind, lines: [], offset };
        blocks.push(block);
      }
      if (kind === "code") fence = FENCE.exec(line)[1];
      else block.lines.push(line);
    }
    offset += line.length + 1;
  }
  return blocks;
}

function kindOf(line, block) {
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (BULLET.test(line)) return "bullets";
  if (NUMBERED.test(line)) return "numbers";
  return block && (block.kind === "bullets" || block.kind === "numbers") && /^\s/.test(line) ? block.kind : "text";
}

function render({ kind, lines }) {
  if (kind === "code") return element("pre", { tabIndex: 0 }, element("code", {}, lines.join("\n")));
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return element(`h${Math.min(marks.length + 2, 5)}`, {}, ...inline(text));
  }
  if (kind === "bullets") return element("ul", {}, ...items(lines, BULLET, 1));
  if (kind === "numbers") return element("ol", { start: Number(NUMBERED.exec(lines[0])[1]) }, ...items(lines, NUMBERED, 2));
  return element("p", {}, ...inline(lines.join("\n")));
}

function items(lines, pattern, group) {
  const texts = [];
  for (const line of lines) {
    const found = pattern.exec(line);
    if (found) texts.push(found[group]);
    else texts[texts.length - 1] += ` ${line.trim()}`;
  }
  return texts.map((text) => element("li", {}, ...inline(text)));
}

function inline(text) {
  const nodes = [];
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    if (found.index) nodes.push(rest.slice(0, found.index));
    if (found[2] !== undefined) nodes.push(element("code", {}, found[2]));
    else if (found[3] !== undefined) nodes.push(element("strong", {}, ...inline(found[3])));
    else nodes.push(element("em", {}, ...inline(found[4])));
    rest = rest.slice(found.index + found[0].length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}
