/* Markdown as elements. A model's text becomes elements and text nodes only, never markup. */

const FENCE = /^([ \t]*)(`{3,}(?=[^`]*$)|~{3,})/, HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/, QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/, ITEM = /^([ \t]*)(?:[-*+]|(\d{1,9})[.)])(?:[ \t]+|$)/;
const TOKEN = new RegExp([
  /(?<ticks>`+)/, /(?<mark>\*\*?|__?)/, /\\(?<escaped>[\\`*_])/,
  /\[(?<label>[^[\]\n]+)\]\((?<target>https?:\/\/[^\s()]+)\)/,
  /(?<url>https?:\/\/[^\s<>()[\]"'`*\u3000-\u303f\uff00-\uffef]*[^\s<>()[\]"'`*\u3000-\u303f\uff00-\uffef.,;:!?])/,
].map(part => part.source).join("|"), "g");
const MAX_DEPTH = 8; // of lists and quotes in each other

function element(name, className = "", text = "") {
  const created = document.createElement(name);
  if (className) created.className = className;
  created.textContent = text;
  return created;
}

const width = space => space.replaceAll("\t", "    ").length;
const indent = line => width(line.match(/^[ \t]*/)[0]);

function dedent(line, columns) {
  let i = 0;
  for (let used = 0; used < columns && /[ \t]/.test(line[i] ?? ""); i++) used += width(line[i]);
  return line.slice(i);
}

function kindOf(line) {
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  const item = ITEM.exec(line);
  return item ? (item[2] ? "ol" : "ul") : "paragraph";
}

/* Returns whether `line` ends the code that a line of this `fence` has begun. */
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");

/* Yields [kind, lines] of each block. */
function* blocks(lines) {
  for (let i = 0; i < lines.length;) {
    const start = i, line = lines[i++], kind = kindOf(line);
    if (!line.trim()) continue;
    const take = condition => { while (i < lines.length && condition(lines[i])) i++; };
    if (kind === "fence") {
      const fence = FENCE.exec(line)[2];
      take(next => !closes(next, fence));
      i++;
    } else if (kind === "quote") take(next => QUOTE.test(next));
    else if (kind === "paragraph") take(next => next.trim() && kindOf(next) === "paragraph");
    else if (kind === "ol" || kind === "ul") {
      let end = i; // a list goes on after blank lines, but does not end with them
      const goesOn = next => kindOf(next) === kind || indent(next) > indent(line);
      for (; i < lines.length && (!lines[i].trim() || goesOn(lines[i])); i++) if (lines[i].trim()) end = i + 1;
      i = end;
    }
    yield [kind, lines.slice(start, i)];
  }
}

/* Shows `text`. A block that has not changed keeps its elements, and so a selection in it. */
function showMarkdown(parent, text) {
  let count = 0;
  for (const [kind, lines] of blocks(text.split("\n"))) {
    const source = lines.join("\n"), shown = parent.children[count++];
    if (shown?.source === source) continue;
    const created = blockElement(kind, lines, 0);
    created.source = source;
    shown ? shown.replaceWith(created) : parent.append(created);
  }
  while (parent.children.length > count) parent.lastElementChild.remove();
}

function blockElement(kind, lines, depth) {
  if (kind === "rule") return element("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return withInline(element(`h${marks.length}`), text);
  }
  if (kind === "fence") {
    const [, space, fence] = FENCE.exec(lines[0]), code = lines.slice(1).map(line => dedent(line, width(space)));
    if (code.length && closes(code.at(-1), fence)) code.pop();
    const pre = element("pre");
    pre.append(element("code", "", code.join("\n")));
    return pre;
  }
  if (kind === "paragraph" || depth === MAX_DEPTH) return withInline(element("p"), lines.join("\n").trim());
  if (kind === "quote") return withBlocks(element("blockquote"), lines.map(line => line.replace(QUOTE, "")), depth + 1);
  return listElement(kind, lines, depth);
}

function listElement(kind, lines, depth) {
  const list = element(kind), base = indent(lines[0]), items = [];
  for (const line of lines) {
    const item = indent(line) <= base && ITEM.exec(line);
    if (item) items.push({ columns: width(item[0]), lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(dedent(line, items.at(-1).columns));
  }
  const first = ITEM.exec(lines[0])[2];
  if (first && first !== "1") list.start = Number(first);
  for (const item of items) list.append(withBlocks(element("li"), item.lines, depth + 1));
  return list;
}

function withBlocks(parent, lines, depth) {
  for (const [kind, own] of blocks(lines)) parent.append(blockElement(kind, own, depth));
  return parent;
}

/* Appends `text` with code, emphasis and links. Takes time in proportion to the text, whatever is left open in it. */
function withInline(parent, text) {
  const open = [], unclosed = new Set(); // emphasis that has begun; runs of backticks that nothing closes
  const isWord = character => /[\p{L}\p{N}_]/u.test(character ?? ""), isSpace = character => !(character ?? "").trim();
  const add = node => (open.at(-1)?.node ?? parent).append(node);
  const leaveOpen = count => { // shows the marks that nothing closes
    while (open.length > count) {
      const { mark, node } = open.pop();
      node.before(mark);
      while (node.firstChild) node.before(node.firstChild);
      node.remove();
    }
  };
  let end = 0;
  for (TOKEN.lastIndex = 0; ;) {
    const token = TOKEN.exec(text);
    if (!token) break;
    let { ticks, mark, escaped, label, target, url } = token.groups, next = TOKEN.lastIndex;
    add(text.slice(end, token.index));
    if (escaped) add(escaped);
    else if (ticks) {
      const close = unclosed.has(ticks) ? undefined : text.slice(next).matchAll(/`+/g).find(run => run[0] === ticks);
      if (close) add(element("code", "", text.slice(next, next + close.index)));
      else unclosed.add(ticks);
      if (close) next += close.index + ticks.length;
      else add(ticks);
    } else if (mark) {
      if (open.at(-1)?.mark === "*" && text.startsWith("***", token.index)) mark = "*"; // closes `***a***`
      next = token.index + mark.length;
      const before = text[token.index - 1], after = text[next], isUnderscore = mark[0] === "_";
      const index = open.findIndex(begun => begun.mark === mark);
      if (index >= 0 && !isSpace(before) && !(isUnderscore && isWord(after)) && open[index].node.textContent) {
        leaveOpen(index + 1);
        open.pop();
      } else if (index < 0 && !isSpace(after) && !(isUnderscore && isWord(before))) {
        const node = element(mark.length === 2 ? "strong" : "em");
        add(node);
        open.push({ mark, node });
      } else add(mark);
    } else {
      const link = withInline(element("a"), label ?? "");
      if (url) link.textContent = url;
      Object.assign(link, { href: target ?? url, target: "_blank", rel: "noopener noreferrer" });
      add(link);
    }
    end = TOKEN.lastIndex = next;
  }
  add(text.slice(end));
  leaveOpen(0);
  return parent;
}
