// @ts-check
/** A form for a model's tensors: what each input looks like, and from what was filled in to a request. */

/**
 * @typedef {object} TensorSpec
 * @property {string} name
 * @property {string} datatype
 * @property {number[]} shape -1 where any length goes; a leading -1 is the batch
 * @property {boolean} [optional]
 * @property {string[]} [labels]
 *
 * @typedef {"number" | "numbers" | "text" | "picture" | "json"} FieldKind
 * @typedef {{layout: "CHW" | "HWC" | "HW", channels: number, height: number, width: number}} PictureShape height, width: -1 for any
 * @typedef {{spec: TensorSpec, kind: FieldKind, count: number, picture: PictureShape | null}} Field
 * @typedef {{name: string, datatype: string, shape: number[], data: (number | string | boolean)[]}} Tensor
 */

/** Numbers that are written one by one; more go into one text. */
export const MAX_BOXES = 16;
/** The server reads a mebibyte of JSON; more goes as bytes. */
export const MAX_JSON_VALUES = 20_000;
const WITHOUT_JSON = ["FP16", "BF16"];

/** @type {Record<string, [number, number]>} */
const RANGES = {
  INT8: [-128, 127],
  UINT8: [0, 255],
  INT16: [-32768, 32767],
  UINT16: [0, 65535],
  INT32: [-(2 ** 31), 2 ** 31 - 1],
  UINT32: [0, 2 ** 32 - 1],
  INT64: [-(2 ** 63), 2 ** 63],
  UINT64: [0, 2 ** 64],
};

/** @param {TensorSpec} spec @returns {Field} */
export function fieldOf(spec) {
  const count = spec.shape.reduce((product, length) => product * (length === -1 ? 1 : length), 1);
  const open = spec.shape.slice(1).includes(-1);
  const picture = spec.datatype === "BYTES" || spec.datatype === "BOOL" ? null : pictureShape(spec.shape);
  if (picture) return { spec, kind: "picture", count, picture };
  if (spec.datatype === "BYTES") return { spec, kind: "text", count, picture };
  if (count === 1 && !open) return { spec, kind: "number", count, picture };
  if (count <= MAX_BOXES && !open) return { spec, kind: "numbers", count, picture };
  return { spec, kind: "json", count, picture };
}

/**
 * @param {number[]} shape
 * @returns {PictureShape | null}
 */
export function pictureShape(shape) {
  const inner = shape.length > 2 && (shape[0] ?? 0) < 2 ? shape.slice(1) : shape;
  const side = (/** @type {number} */ length) => length === -1 || length >= 8;
  const [a = 0, b = 0, c = 0] = inner;
  if (inner.length === 3) {
    if ((a === 1 || a === 3) && side(b) && side(c)) return { layout: "CHW", channels: a, height: b, width: c };
    if ((c === 1 || c === 3) && side(a) && side(b)) return { layout: "HWC", channels: c, height: a, width: b };
  }
  if (inner.length === 2 && shape.length > 2 && a === b && side(a)) return { layout: "HW", channels: 1, height: a, width: b };
  return null;
}

/**
 * What was written for a field, as a tensor. JSON, nested or flat, or just values with commas or spaces between.
 * @param {TensorSpec} spec
 * @param {string} text
 * @returns {Tensor}
 * @throws {RangeError} in words for a person
 */
export function written(spec, text) {
  const given = text.trim();
  if (spec.datatype === "BYTES" && !given.startsWith("[")) return shaped(spec, [text], null);
  let value;
  try {
    value = JSON.parse(given);
  } catch {
    if (/[[{"]/.test(given)) throw new RangeError(`${spec.name}: this is no JSON`);
    value = given.split(/[\s,;]+/).filter(Boolean);
  }
  if (value && typeof value === "object" && !Array.isArray(value)) {
    if (!Array.isArray(value.data)) throw new RangeError(`${spec.name}: an object must have \`data\`, a list`);
    const shape = Array.isArray(value.shape) ? value.shape : null;
    return shaped(spec, value.data.flat(Infinity), shape ?? nesting(value.data));
  }
  return shaped(spec, Array.isArray(value) ? value.flat(Infinity) : [value], nesting(value));
}

/** @param {any} value @returns {number[] | null} the shape of nested lists; null for a flat one, whose shape the model says */
function nesting(value) {
  const shape = [];
  for (let each = value; Array.isArray(each); each = each[0]) shape.push(each.length);
  return shape.length > 1 ? shape : null;
}

/**
 * @param {TensorSpec} spec
 * @param {any[]} values flat
 * @param {number[] | null} shape null: whatever of the model's holds so many
 * @returns {Tensor}
 */
export function shaped(spec, values, shape) {
  const data = values.map((each, index) => scalar(spec, each, index));
  const whole = shape ? completed(spec, shape) : fitting(spec, data.length);
  const product = whole.reduce((a, b) => a * b, 1);
  if (product !== data.length) throw new RangeError(`${spec.name}: the shape ${said(whole)} holds ${product} values, and there are ${data.length}`);
  return { name: spec.name, datatype: spec.datatype, shape: whole, data };
}

/** A row without its batch is a batch of one. @param {TensorSpec} spec @param {number[]} shape */
function completed(spec, shape) {
  return shape.length === spec.shape.length - 1 && spec.shape[0] === -1 ? [1, ...shape] : shape;
}

/** @param {TensorSpec} spec @param {number} count @returns {number[]} */
function fitting(spec, count) {
  const fixed = spec.shape.reduce((product, length) => product * (length === -1 ? 1 : length), 1);
  if (!count || count % fixed || (count !== fixed && !spec.shape.includes(-1)))
    throw new RangeError(`${spec.name} takes ${said(spec.shape)}: ${count} values do not fill that`);
  const shape = [...spec.shape];
  let rest = count / fixed;
  for (let at = shape.length - 1; at >= 0; at--)
    if (shape[at] === -1) {
      shape[at] = rest;
      rest = 1;
    }
  return shape;
}

/** @param {number[]} shape -1 reads as a star */
export function said(shape) {
  return `[${shape.map((length) => (length === -1 ? "*" : length)).join(", ")}]`;
}

/**
 * @param {TensorSpec} spec
 * @param {any} value
 * @param {number} index
 */
function scalar(spec, value, index) {
  const where = `${spec.name}, value ${index + 1}`;
  if (spec.datatype === "BYTES") return typeof value === "string" ? value : JSON.stringify(value);
  if (spec.datatype === "BOOL") {
    if (value === true || value === 1 || /^(true|1)$/i.test(value)) return true;
    if (value === false || value === 0 || /^(false|0)$/i.test(value)) return false;
    throw new RangeError(`${where}: ${JSON.stringify(value)} is neither true nor false`);
  }
  const number = typeof value === "number" ? value : typeof value === "string" && value.trim() ? Number(value) : NaN;
  if (!Number.isFinite(number)) throw new RangeError(`${where}: ${JSON.stringify(value)} is no number`);
  const range = RANGES[spec.datatype];
  if (range) {
    if (!Number.isInteger(number)) throw new RangeError(`${where}: ${value} is no whole number, which ${spec.datatype} takes`);
    if (number < range[0] || number > range[1]) throw new RangeError(`${where}: ${value} does not fit ${spec.datatype}`);
    if (!Number.isSafeInteger(number)) throw new RangeError(`${where} is too large for a browser to hold exactly`);
  }
  return number;
}

/**
 * A picture's pixels as the tensor that a model takes.
 * @param {Field} field
 * @param {Uint8ClampedArray} rgba
 * @param {number} width
 * @param {number} height
 * @param {{range: string, invert: boolean}} how range: a key of PIXELS
 * @returns {Tensor}
 */
export function pictured(field, rgba, width, height, how) {
  const { layout, channels } = /** @type {PictureShape} */ (field.picture);
  const whole = field.spec.datatype in RANGES;
  const scale = PIXELS[how.range]?.scale ?? Number;
  const data = new Array(width * height * channels);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const [red = 0, green = 0, blue = 0] = rgba.subarray(4 * pixel, 4 * pixel + 3);
    const values = channels === 1 ? [0.299 * red + 0.587 * green + 0.114 * blue] : [red, green, blue];
    values.forEach((value, channel) => {
      const at = layout === "HWC" ? pixel * channels + channel : channel * width * height + pixel;
      const number = scale((how.invert ? 255 - value : value) / 255, channel);
      data[at] = whole ? Math.round(number) : Number(number.toPrecision(7));
    });
  }
  const inner = layout === "CHW" ? [channels, height, width] : layout === "HWC" ? [height, width, channels] : [height, width];
  const shape = inner.length < field.spec.shape.length ? [1, ...inner] : inner;
  return { name: field.spec.name, datatype: field.spec.datatype, shape, data };
}

const MEAN = [0.485, 0.456, 0.406];
const SPREAD = [0.229, 0.224, 0.225];

/** @type {Record<string, {label: string, scale: (value: number, channel: number) => number}>} what models want of a pixel between 0 and 1 */
export const PIXELS = {
  unit: { label: "0 to 1", scale: (value) => value },
  bytes: { label: "0 to 255", scale: (value) => 255 * value },
  signed: { label: "-1 to 1", scale: (value) => 2 * value - 1 },
  sixteen: { label: "0 to 16 (digits)", scale: (value) => 16 * value },
  imagenet: { label: "ImageNet mean and deviation", scale: (value, channel) => (value - (MEAN[channel] ?? 0)) / (SPREAD[channel] ?? 1) },
};

/**
 * The body of a KServe request, and the header that says where its JSON ends (0: all of it is).
 * @param {Tensor[]} tensors
 * @returns {{body: string | Uint8Array<ArrayBuffer>, head: number}}
 */
export function packed(tensors) {
  const many = tensors.reduce((sum, each) => sum + each.data.length, 0) > MAX_JSON_VALUES;
  if (!many && !tensors.some((each) => WITHOUT_JSON.includes(each.datatype))) return { body: JSON.stringify({ inputs: tensors }), head: 0 };
  const parts = tensors.map(bytesOf);
  const inputs = tensors.map(({ name, datatype, shape }, index) => ({ name, datatype, shape, parameters: { binary_data_size: parts[index]?.length } }));
  const head = new TextEncoder().encode(JSON.stringify({ inputs }));
  const body = new Uint8Array(parts.reduce((sum, part) => sum + part.length, head.length));
  let at = 0;
  for (const part of [head, ...parts]) {
    body.set(part, at);
    at += part.length;
  }
  return { body, head: head.length };
}

/** @type {Record<string, [number, string]>} bytes of each value, and how a DataView writes one */
const WRITERS = {
  BOOL: [1, "setUint8"],
  INT8: [1, "setInt8"],
  UINT8: [1, "setUint8"],
  INT16: [2, "setInt16"],
  UINT16: [2, "setUint16"],
  INT32: [4, "setInt32"],
  UINT32: [4, "setUint32"],
  INT64: [8, "setBigInt64"],
  UINT64: [8, "setBigUint64"],
  FP32: [4, "setFloat32"],
  FP64: [8, "setFloat64"],
};

/** @param {Tensor} tensor @returns {Uint8Array} */
function bytesOf(tensor) {
  const { datatype, data } = tensor;
  if (datatype === "BYTES") {
    const texts = data.map((each) => new TextEncoder().encode(String(each)));
    const bytes = new Uint8Array(texts.reduce((sum, text) => sum + 4 + text.length, 0));
    const view = new DataView(bytes.buffer);
    let at = 0;
    for (const text of texts) {
      view.setUint32(at, text.length, true);
      bytes.set(text, at + 4);
      at += 4 + text.length;
    }
    return bytes;
  }
  if (WITHOUT_JSON.includes(datatype)) {
    const halves = Uint16Array.from(data, (each) => (datatype === "BF16" ? brain : half)(Number(each)));
    return new Uint8Array(halves.buffer);
  }
  const [size, write] = /** @type {[number, string]} */ (WRITERS[datatype]);
  const view = new DataView(new ArrayBuffer(size * data.length));
  const big = size === 8 && datatype !== "FP64";
  data.forEach((each, index) => /** @type {any} */ (view)[write](index * size, big ? BigInt(Number(each)) : Number(each), true));
  return new Uint8Array(view.buffer);
}

/** @param {number} value @returns {number} the bits of the nearest bfloat16 */
function brain(value) {
  const bits = new Uint32Array(Float32Array.of(value).buffer)[0] ?? 0;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

/** @param {number} value @returns {number} the bits of the nearest float16 */
export function half(value) {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const size = Math.abs(value);
  if (size >= 65520) return sign | 0x7c00;
  if (size < 2 ** -14) return sign | Math.round(size * 2 ** 24); // 1024 of them are the smallest normal one
  const exponent = Math.floor(Math.log2(size));
  const steps = even((size / 2 ** exponent) * 1024); // from 1024 to 2048
  return sign | (((exponent + 15) << 10) + steps - 1024);
}

/** @param {number} value */
function even(value) {
  const down = Math.floor(value);
  const rest = value - down;
  return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down;
}

/**
 * JSON as servers of tensors write it, with NaN and the infinities bare: here they become texts.
 * @param {string} text
 */
export function lenient(text) {
  try {
    return JSON.parse(text);
  } catch {
    return JSON.parse(text.replace(/"(?:[^"\\]|\\.)*"|-?\bInfinity\b|\bNaN\b/g, (each) => (each.startsWith('"') ? each : `"${each}"`)));
  }
}

/**
 * The likeliest classes of each row; null where these are no scores of classes.
 * @param {{shape: number[], data: any[], datatype: string}} output
 * @param {string[]} labels
 * @param {number} most
 * @returns {{label: string, score: number}[][] | null}
 */
export function ranked(output, labels, most = 5) {
  const width = output.shape.at(-1) ?? 0;
  if (!labels.length || width !== labels.length || output.datatype === "BYTES") return null;
  const rows = [];
  for (let at = 0; at < output.data.length; at += width) {
    const row = output.data.slice(at, at + width).map((value, index) => ({ label: labels[index] ?? "", score: Number(value) }));
    rows.push(row.sort((a, b) => b.score - a.score).slice(0, most));
  }
  return rows;
}

/**
 * The rows of a table of one output, flat rows of its last dimension.
 * @param {{shape: number[], data: any[]}} output
 * @param {number} most
 */
export function rowsOf(output, most = 50) {
  const width = output.shape.length > 1 ? Math.max(output.shape.at(-1) ?? 1, 1) : 1;
  const rows = [];
  for (let at = 0; at < output.data.length && rows.length < most; at += width) rows.push(output.data.slice(at, at + width));
  return { rows, width, more: Math.max(Math.ceil(output.data.length / width) - most, 0) };
}
