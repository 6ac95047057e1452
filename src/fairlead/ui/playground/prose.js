// @ts-check
/** A model's text as blocks: paragraphs, and code between fences. Nothing else is read into it, so nothing can be smuggled in. */

/**
 * @typedef {{kind: "text", spans: Span[]} | {kind: "code", language: string, text: string}} Block
 * @typedef {{code: boolean, strong: boolean, text: string}} Span
 */

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]{0,32})[^\n]*$/;

/**
 * @param {string} text whole, or as far as it has come: an open fence is code to its end
 * @returns {Block[]}
 */
export function blocks(text) {
  /** @type {Block[]} */
  const found = [];
  /** @type {string[]} */
  let lines = [];
  /** @type {{mark: string, language: string} | null} */
  let open = null;
  const flush = () => {
    const said = lines.join("\n");
    if (open) found.push({ kind: "code", language: open.language, text: said });
    else if (said.trim()) found.push({ kind: "text", spans: spans(said.replace(/^\n+|\s+$/g, "")) });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const [, mark = "", language = ""] = FENCE.exec(line) ?? [];
    if (open && mark && !language && mark.startsWith(open.mark)) {
      flush();
      open = null;
    } else if (!open && mark) {
      flush();
      open = { mark, language };
    } else lines.push(line);
  }
  flush();
  return found;
}

/**
 * @param {string} text of a paragraph
 * @returns {Span[]}
 */
export function spans(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*/g)) {
    if (match.index > at) found.push(plain(text.slice(at, match.index)));
    found.push({ code: match[1] !== undefined, strong: match[2] !== undefined, text: match[1] ?? match[2] ?? "" });
    at = match.index + match[0].length;
  }
  if (at < text.length || !found.length) found.push(plain(text.slice(at)));
  return found;
}

/** @param {string} text @returns {Span} */
function plain(text) {
  return { code: false, strong: false, text };
}
