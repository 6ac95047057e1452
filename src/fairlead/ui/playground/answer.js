// @ts-check
/** What an answer in pieces comes to, piece by piece. Times are milliseconds of one clock, and arguments. */

/**
 * @typedef {object} Answer
 * @property {string} text
 * @property {string} reasoning
 * @property {{name: string, arguments: string}[]} calls tools that the model wants called
 * @property {number} pieces
 * @property {number} began
 * @property {number | null} first when its first text came
 * @property {number | null} last
 * @property {number | null} ended
 * @property {string} finish why it ended: `stop`, `length`, ...; "" while it goes on
 * @property {{prompt_tokens: number, completion_tokens: number, cached_tokens: number} | null} usage
 * @property {string} requestId
 *
 * @typedef {{message: string, detail: string}} Complaint  detail: its code or kind, and the field that is wrong.
 */

/** From the first piece to the last: what comes at once was computed before. */
const MEASURABLE_SECONDS = 0.02;

/** @param {number} now @returns {Answer} */
export function begun(now) {
  return { text: "", reasoning: "", calls: [], pieces: 0, began: now, first: null, last: null, ended: null, finish: "", usage: null, requestId: "" };
}

/**
 * With one chunk of a chat or of a completion.
 * @param {Answer} answer
 * @param {any} chunk
 * @param {number} now
 * @returns {Answer}
 */
export function taken(answer, chunk, now) {
  const next = { ...answer, requestId: answer.requestId || String(chunk.id ?? "").replace(/^(chatcmpl|cmpl)-/, "") };
  for (const choice of chunk.choices ?? []) {
    const delta = choice.delta ?? {};
    const text = delta.content ?? choice.text ?? choice.message?.content ?? "";
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    if (text || reasoning || delta.tool_calls?.length) {
      next.text += text;
      next.reasoning += reasoning;
      next.pieces += 1;
      next.first ??= now;
      next.last = now;
    }
    for (const call of delta.tool_calls ?? []) next.calls = called(next.calls, call);
    if (choice.finish_reason) next.finish = choice.finish_reason;
  }
  if (chunk.usage) {
    const { prompt_tokens = 0, completion_tokens = 0, prompt_tokens_details } = chunk.usage;
    next.usage = { prompt_tokens, completion_tokens, cached_tokens: prompt_tokens_details?.cached_tokens ?? 0 };
  }
  return next;
}

/**
 * @param {Answer["calls"]} calls
 * @param {any} piece
 */
function called(calls, piece) {
  const at = piece.index ?? 0;
  const next = [...calls];
  while (next.length <= at && next.length < 128) next.push({ name: "", arguments: "" });
  if (!next[at]) return calls;
  next[at] = { name: next[at].name + (piece.function?.name ?? ""), arguments: next[at].arguments + (piece.function?.arguments ?? "") };
  return next;
}

/**
 * The numbers to show. While it goes on a piece counts as a token, which is near enough: `exact` says when they are counted.
 * @param {Answer} answer
 */
export function speed({ first, last, usage, pieces, began, ended }) {
  const tokens = usage?.completion_tokens ?? pieces;
  const seconds = first === null || last === null ? 0 : (last - first) / 1000;
  return {
    tokens,
    exact: usage !== null,
    firstSeconds: first === null ? null : (first - began) / 1000,
    seconds: ended === null ? null : (ended - began) / 1000,
    perSecond: tokens > 1 && seconds >= MEASURABLE_SECONDS ? (tokens - 1) / seconds : null,
  };
}

/**
 * What a server says went wrong, in its own words, whichever protocol's body it is.
 * @param {any} body decoded JSON, or text
 * @param {number} status 0 in the middle of an answer
 * @returns {Complaint}
 */
export function complaint(body, status) {
  const error = body?.error;
  if (error && typeof error === "object" && typeof error.message === "string") {
    const about = [error.code ?? error.type, error.param && `parameter ${error.param}`].filter((each) => typeof each === "string" && each);
    return { message: error.message, detail: [status || "", ...about].filter(Boolean).join(" · ") };
  }
  if (typeof error === "string") return { message: error, detail: String(status || "") };
  if (typeof body?.detail === "string") return { message: body.detail, detail: [status || "", body.title].filter(Boolean).join(" · ") };
  if (Array.isArray(body?.detail)) return { message: body.detail.map((/** @type {any} */ each) => each?.msg).join("; "), detail: String(status) };
  const text = typeof body === "string" && body.length < 500 && !body.includes("<") ? body : "";
  return { message: text || `the server answered ${status}`, detail: String(status || "") };
}
