// @ts-check
import { events } from "../lib/api.js";
import { seconds } from "../lib/format.js";
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { Badge, Button, Card, Check, Empty, Field, Segments, Select } from "../parts/index.js";
import { complained, inferPath, refusal } from "./asking.js";
import { CopyAs } from "./copy-as.js";
import { Outputs } from "./outputs.js";
import { Complaint } from "./said.js";
import { ofTensors } from "./snippets.js";
import { PIXELS, fieldOf, lenient, packed, pictured, said, shaped, written } from "./tensors.js";

/** Of a model that streams, the last ones. */
const MAX_RESPONSES = 100;
const LARGEST_SIDE = 1024;

/** @typedef {{text: string, boxes: string[], as: "form" | "json", image: ImageData | null, range: string, invert: boolean}} Filled */

/** @param {{model: import("./view.js").Model, sides: import("./view.js").Place[], where: import("./snippets.js").Where}} props */
export function Tensors({ model, sides, where }) {
  const side = /** @type {import("./view.js").Place} */ (sides[0]);
  const fields = model.inputs.map(fieldOf);
  const [filled, setFilled] = useState(/** @type {Record<string, Filled>} */ ({}));
  const [responses, setResponses] = useState(/** @type {any[]} */ ([]));
  const [took, setTook] = useState(/** @type {number | null} */ (null));
  const [error, setError] = useState(/** @type {import("./answer.js").Complaint | null} */ (null));
  const [busy, setBusy] = useState(false);
  const abort = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => abort.current?.abort(), []);

  /** What is in the form. Throws a RangeError. */
  const tensors = () => fields.map((field) => tensorOf(field, filled[field.spec.name] ?? empty(field))).filter((each) => each !== null);
  const example = () => {
    /** @type {Record<string, Filled>} */
    const next = {};
    for (const field of fields) {
      const sample = model.example?.find((each) => each.name === field.spec.name);
      if (sample) next[field.spec.name] = ofSample(field, sample);
    }
    setFilled(next);
  };
  const ask = async () => {
    setError(null);
    setBusy(true);
    const controller = (abort.current = new AbortController());
    const began = performance.now();
    /** @type {any[]} */
    let found = [];
    try {
      const { body, head } = packed(tensors());
      const binary = typeof body !== "string";
      const headers = binary ? { "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": String(head) } : undefined;
      for await (const { data } of events(inferPath(side), { body: binary ? body : JSON.parse(body), headers, signal: controller.signal })) {
        const response = lenient(data);
        if (response.error) throw refusal(response);
        found = [...found, response].slice(-MAX_RESPONSES);
        setResponses(found);
        setTook((performance.now() - began) / 1000);
      }
    } catch (failure) {
      if (!controller.signal.aborted) setError(failure instanceof RangeError ? { message: failure.message, detail: "" } : complained(failure));
    }
    setBusy(false);
  };
  return html`
    <div class="grid try">
      <div class="w6">
        <${Card} title="Inputs" actions=${model.example && html`<${Button} icon="flask" onClick=${example}>Example<//>`}>
          <form class="stack" onSubmit=${(/** @type {any} */ event) => (event.preventDefault(), busy || ask())}>
            ${fields.map((field) => html`<${Input} key=${field.spec.name} field=${field} filled=${filled[field.spec.name] ?? empty(field)} onChange=${(/** @type {Filled} */ next) => setFilled({ ...filled, [field.spec.name]: next })} />`)}
            ${!fields.length && html`<p class="muted">This model takes no inputs.</p>`}
            <div class="row wrap between">
              <${CopyAs} make=${() => ofTensors(where, side.name, side.version, tensors())} where=${where} />
              ${busy ? html`<${Button} icon="stop" kind="danger" onClick=${() => abort.current?.abort()}>Stop<//>` : html`<${Button} icon="send" kind="primary" type="submit">Ask<//>`}
            </div>
          </form>
        <//>
      </div>
      <div class="w6 stack">
        ${error && html`<${Complaint} error=${error} />`}
        <${Card} title="Answer" actions=${took !== null && html`<span class="small muted num" role="status">${seconds(took)}${responses.length > 1 ? `, ${responses.length} responses` : ""}</span>`}>
          ${responses.length
            ? html`<${Outputs} response=${responses.at(-1)} specs=${model.outputs} />`
            : html`<${Empty} icon="box" title="Nothing was asked yet">${model.outputs.map((each) => html`<${Badge} key=${each.name}>${each.name} ${each.datatype} ${said(each.shape)}<//> `)}<//>`}
        <//>
      </div>
    </div>
  `;
}

/** @param {import("./tensors.js").Field} field @returns {Filled} */
const empty = ({ kind, count }) => ({ text: "", boxes: Array.from({ length: kind === "numbers" || kind === "number" ? count : 0 }, () => ""), as: kind === "json" ? "json" : "form", image: null, range: "unit", invert: false });

/** @param {import("./tensors.js").Field} field @param {import("./tensors.js").Tensor} sample @returns {Filled} */
function ofSample(field, sample) {
  const base = empty(field);
  // what single precision holds of 5.1 reads as 5.099999904632568
  const data = field.spec.datatype === "FP32" ? sample.data.map((each) => Number(Number(each).toPrecision(7))) : sample.data;
  const values = data.map(String);
  if ((field.kind === "number" || field.kind === "numbers") && values.length === field.count) return { ...base, boxes: values };
  if (field.kind === "text" && values.length === 1) return { ...base, text: values[0] ?? "" };
  return { ...base, as: "json", text: JSON.stringify({ shape: sample.shape, data }) };
}

/**
 * @param {import("./tensors.js").Field} field
 * @param {Filled} filled
 * @returns {import("./tensors.js").Tensor | null} null for an optional one that was left out
 */
function tensorOf(field, filled) {
  const { spec } = field;
  const nothing = filled.as === "json" ? !filled.text.trim() : field.kind === "picture" ? !filled.image : field.kind === "text" ? false : filled.boxes.every((each) => !each.trim());
  if (nothing && spec.optional) return null;
  if (nothing) throw new RangeError(field.kind === "picture" && filled.as === "form" ? `${spec.name}: choose a picture` : `${spec.name} is empty`);
  if (filled.as === "json") return written(spec, filled.text);
  if (field.kind === "text") return shaped(spec, [filled.text], null);
  if (field.kind === "picture") {
    const { data, width, height } = /** @type {ImageData} */ (filled.image);
    return pictured(field, data, width, height, filled);
  }
  return shaped(spec, filled.boxes, null);
}

/** @param {{field: import("./tensors.js").Field, filled: Filled, onChange: (next: Filled) => void}} props */
function Input({ field, filled, onChange }) {
  const { spec, kind } = field;
  const json = filled.as === "json";
  return html`
    <fieldset class="try-input">
      <legend><span class="strong break">${spec.name}</span> <span class="small muted mono">${spec.datatype} ${said(spec.shape)}${spec.optional ? ", optional" : ""}</span></legend>
      ${kind !== "json" && html`<${Segments} label=${`How ${spec.name} is given`} value=${filled.as} options=${[{ value: "form", text: kind === "picture" ? "Picture" : kind === "text" ? "Text" : "Numbers" }, { value: "json", text: "JSON" }]} onChange=${(/** @type {any} */ as) => onChange({ ...filled, as })} />`}
      ${json && html`<${Field} label="Values" hint=${`JSON, or numbers with commas between; ${said(spec.shape)}`}>${(/** @type {string} */ id) => html`<textarea class="input mono" id=${id} rows="5" spellcheck=${false} value=${filled.text} onInput=${(/** @type {any} */ event) => onChange({ ...filled, text: event.currentTarget.value })}></textarea>`}<//>`}
      ${!json && kind === "text" && html`<${Field} label="Text">${(/** @type {string} */ id) => html`<textarea class="input" id=${id} rows="3" value=${filled.text} onInput=${(/** @type {any} */ event) => onChange({ ...filled, text: event.currentTarget.value })}></textarea>`}<//>`}
      ${!json && (kind === "number" || kind === "numbers") && html`
        <div class="try-boxes">
          ${filled.boxes.map((box, index) => html`<${Field} key=${index} label=${spec.labels?.[index] ?? (filled.boxes.length === 1 ? "Value" : `Value ${index + 1}`)} inputmode="decimal" value=${box} onInput=${(/** @type {string} */ value) => onChange({ ...filled, boxes: filled.boxes.map((each, at) => (at === index ? value : each)) })} />`)}
        </div>
      `}
      ${!json && kind === "picture" && html`<${Picture} field=${field} filled=${filled} onChange=${onChange} />`}
    </fieldset>
  `;
}

/** A file, dropped or chosen, brought to the size that the model takes. @param {{field: import("./tensors.js").Field, filled: Filled, onChange: (next: Filled) => void}} props */
function Picture({ field, filled, onChange }) {
  const [over, setOver] = useState(false);
  const [wrong, setWrong] = useState("");
  const canvas = useRef(/** @type {any} */ (null));
  useEffect(() => {
    if (!filled.image || !canvas.current) return;
    canvas.current.width = filled.image.width;
    canvas.current.height = filled.image.height;
    canvas.current.getContext("2d").putImageData(filled.image, 0, 0);
  }, [filled.image]);
  const take = async (/** @type {File | undefined} */ file) => {
    setOver(false);
    if (!file) return;
    try {
      const image = await pixels(file, /** @type {import("./tensors.js").PictureShape} */ (field.picture));
      setWrong("");
      onChange({ ...filled, image });
    } catch {
      setWrong(`${file.name} is no picture that this browser can read`);
    }
  };
  return html`
    <div class=${`try-drop ${over ? "over" : ""}`} onDragOver=${(/** @type {any} */ event) => (event.preventDefault(), setOver(true))} onDragLeave=${() => setOver(false)} onDrop=${(/** @type {any} */ event) => (event.preventDefault(), take(event.dataTransfer.files[0]))}>
      ${filled.image && html`<canvas class="try-canvas" ref=${canvas} role="img" aria-label="The picture as the model gets it"></canvas>`}
      <label>${filled.image ? "Another picture" : "Drop a picture here, or choose one"}<input type="file" accept="image/*" onChange=${(/** @type {any} */ event) => take(event.currentTarget.files[0])} /></label>
    </div>
    ${wrong && html`<p class="bad small" role="alert">${wrong}</p>`}
    <div class="row wrap">
      <${Field} label="Values of its pixels">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${filled.range} options=${Object.entries(PIXELS).map(([value, { label }]) => ({ value, text: label }))} onChange=${(/** @type {string} */ range) => onChange({ ...filled, range })} />`}<//>
      <${Check} checked=${filled.invert} onChange=${(/** @type {boolean} */ invert) => onChange({ ...filled, invert })}>Dark is bright<//>
    </div>
  `;
}

/** @param {File} file @param {import("./tensors.js").PictureShape} shape @returns {Promise<ImageData>} */
async function pixels(file, shape) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = shape.width === -1 ? Math.round(bitmap.width * scale) : shape.width;
  const height = shape.height === -1 ? Math.round(bitmap.height * scale) : shape.height;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}
