// @ts-check
/** How an answer is generated: the parameters that a page offers. What is left empty is the model's own. */

/** @typedef {{name: string, label: string, hint?: string, min?: number, max?: number, step?: number, more?: boolean}} Parameter */

/** @type {Parameter[]} */
export const PARAMETERS = [
  { name: "temperature", label: "Temperature", hint: "0: always the likeliest token", min: 0, max: 2, step: 0.1 },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1 },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.05 },
  { name: "seed", label: "Seed", hint: "Makes sampling repeatable", step: 1 },
  { name: "top_k", label: "Top k", min: -1, step: 1, more: true },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, more: true },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, more: true },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, more: true },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0, step: 0.05, more: true },
];

/**
 * The fields of a body. Throws a RangeError, in words for a person.
 * @param {Record<string, string>} values as they were typed
 */
export function samplingOf(values) {
  /** @type {Record<string, any>} */
  const body = {};
  for (const { name, label } of PARAMETERS) {
    const text = (values[name] ?? "").trim();
    if (!text) continue;
    const value = Number(text);
    if (!Number.isFinite(value)) throw new RangeError(`${label}: ${text} is no number`);
    body[name] = value;
  }
  if (values.stop) body.stop = values.stop.split("\n").filter(Boolean);
  return { ...body, ...jsonOf("tools", values.tools), ...jsonOf("response_format", values.response_format), ...moreOf(values.more) };
}

/** @param {string} name @param {string | undefined} text */
function jsonOf(name, text) {
  if (!text?.trim()) return {};
  try {
    return { [name]: JSON.parse(text) };
  } catch {
    throw new RangeError(`\`${name}\` is no JSON`);
  }
}

/** @param {string | undefined} text */
function moreOf(text) {
  const { more } = /** @type {any} */ (jsonOf("more", text));
  if (more === undefined) return {};
  if (!more || typeof more !== "object" || Array.isArray(more)) throw new RangeError("what is said as JSON must be an object");
  return more;
}
