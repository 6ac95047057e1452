// @ts-check
/** Numbers as people read them. Null and what is no number become an en dash, so that a column never moves. */

export const NONE = "\u2013";
/** @param {unknown} value @returns {value is number} */
const is = (value) => typeof value === "number" && Number.isFinite(value);

/** 1234567 -> 1,234,567. @param {any} value @param {number} [digits] */
export const number = (value, digits = 0) => (is(value) ? value.toLocaleString("en-US", { maximumFractionDigits: digits }) : NONE);

/** 1234567 -> 1.23M. @param {any} value @returns {string} */
export function short(value) {
  if (!is(value)) return NONE;
  const size = Math.abs(value);
  for (const [bound, unit] of /** @type {[number, string][]} */ ([[1e9, "G"], [1e6, "M"], [1e3, "k"]])) {
    if (size >= bound) return `${three(value / bound)}${unit}`;
  }
  return three(value);
}

/** Three figures. @param {number} value */
function three(value) {
  const size = Math.abs(value);
  if (size >= 100 || size === 0) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1).replace(/\.0$/, "");
  return value.toFixed(2).replace(/\.?0+$/, "") || "0";
}

/** @param {any} value */
export const rate = (value) => (is(value) ? short(value) : NONE);

/** 0.0123 -> 12.3 ms. @param {any} value @returns {string} */
export function seconds(value) {
  if (!is(value)) return NONE;
  if (value === 0) return "0";
  if (value < 0.001) return `${three(value * 1e6)} \u00b5s`;
  if (value < 1) return `${three(value * 1e3)} ms`;
  if (value < 120) return `${three(value)} s`;
  return duration(value);
}

/** 7384 -> 2 h 3 min. @param {any} value @returns {string} */
export function duration(value) {
  if (!is(value)) return NONE;
  const units = /** @type {[number, string][]} */ ([[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]);
  const first = units.findIndex(([size]) => value >= size);
  if (first < 0) return "0 s";
  const parts = [];
  let rest = Math.round(value);
  for (const [size, unit] of units.slice(first, first + 2)) {
    if (Math.floor(rest / size)) parts.push(`${Math.floor(rest / size)} ${unit}`);
    rest %= size;
  }
  return parts.join(" ");
}

/** @param {any} value @returns {string} */
export function bytes(value) {
  if (!is(value)) return NONE;
  for (const [size, unit] of /** @type {[number, string][]} */ ([[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])) {
    if (Math.abs(value) >= size) return `${three(value / size)} ${unit}`;
  }
  return `${value} B`;
}

/** 0.1234 -> 12.3%. @param {any} value @param {number} [digits] */
export const percent = (value, digits = 1) => (is(value) ? `${(value * 100).toFixed(digits).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")}%` : NONE);

/** @param {any} value */
export const money = (value) => (is(value) ? (Math.abs(value) >= 100 ? number(value) : value === 0 ? "0" : value.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")) : NONE);

/** Anything that names a moment: seconds since 1970, or ISO 8601. @param {any} value @returns {Date | null} */
export function moment(value) {
  if (value === null || value === undefined || value === "") return null;
  const date = new Date(is(value) ? value * 1000 : value);
  return Number.isNaN(date.getTime()) ? null : date;
}

/** @param {any} value */
export const clock = (value) => moment(value)?.toLocaleTimeString("en-GB") ?? NONE;
/** @param {any} value */
export const date = (value) => moment(value)?.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) ?? NONE;

/** 3 min ago. @param {any} value @param {number} [now] milliseconds @returns {string} */
export function ago(value, now = Date.now()) {
  const then = moment(value);
  if (!then) return NONE;
  const past = (now - then.getTime()) / 1000;
  if (Math.abs(past) < 5) return "now";
  const words = duration(Math.abs(past)).split(" ").slice(0, 2).join(" ");
  return past > 0 ? `${words} ago` : `in ${words}`;
}

/** A digest's beginning. @param {any} value */
export const digest = (value) => (value ? String(value).replace(/^sha256:/, "").slice(0, 12) : NONE);

/** 1 model, 2 models. @param {number} count @param {string} one @param {string} [many] */
export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
