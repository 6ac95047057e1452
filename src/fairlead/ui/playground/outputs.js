// @ts-check
/** What a model of tensors answered: likely classes, pictures, or a table. */
import { number } from "../lib/format.js";
import { html, useEffect, useRef } from "../lib/html.js";
import { Badge } from "../parts/index.js";
import { pictureShape, ranked, rowsOf, said } from "./tensors.js";

const MAX_ROWS = 20;
const MAX_COLUMNS = 24;

/** @param {{response: any, specs: import("./tensors.js").TensorSpec[]}} props */
export const Outputs = ({ response, specs }) => html`
  <div class="stack">
    <p class="small muted">${response.model_name}, version ${response.model_version}</p>
    ${(response.outputs ?? []).map((/** @type {any} */ output) => html`<${Output} key=${output.name} output=${output} labels=${specs.find((each) => each.name === output.name)?.labels ?? []} />`)}
  </div>
`;

/** @param {{output: any, labels: string[]}} props */
function Output({ output, labels }) {
  const rows = ranked(output, labels);
  const picture = output.datatype === "BYTES" || rows ? null : pictureShape(output.shape);
  return html`
    <section aria-label=${output.name} class="stack tight">
      <h3 class="row wrap"><span class="strong break">${output.name}</span><${Badge}>${output.datatype} ${said(output.shape)}<//></h3>
      ${rows ? html`<${Classes} rows=${rows} />` : picture && picture.height > 0 ? html`<${Drawn} output=${output} shape=${picture} />` : html`<${Values} output=${output} labels=${labels} />`}
    </section>
  `;
}

/** @param {{rows: {label: string, score: number}[][]}} props */
const Classes = ({ rows }) => html`
  ${rows.slice(0, MAX_ROWS).map((row, index) => {
    const top = Math.max(...row.map((each) => Math.abs(each.score)), 1e-9);
    return html`
      <ol key=${index} class="try-classes" aria-label=${rows.length > 1 ? `Row ${index + 1}` : "Likeliest first"}>
        ${row.map(({ label, score }) => html`
          <li key=${label}><span class="clip" title=${label}>${label}</span><span class="meter" aria-hidden="true"><span style=${{ width: `${(100 * Math.max(score, 0)) / top}%` }}></span></span><span class="num right">${figure(score)}</span></li>
        `)}
      </ol>
    `;
  })}
  ${rows.length > MAX_ROWS && html`<p class="small muted">and ${number(rows.length - MAX_ROWS)} rows more</p>`}
`;

/** @param {{output: any, labels: string[]}} props */
function Values({ output, labels }) {
  const { rows, width, more } = rowsOf(output, MAX_ROWS);
  const shown = Math.min(width, MAX_COLUMNS);
  const named = labels.length === width && width > 1;
  return html`
    <div class="table" role="region" aria-label=${`Values of ${output.name}`} tabindex="0">
      <table>
        ${named && html`<thead><tr>${labels.slice(0, shown).map((label) => html`<th key=${label} scope="col" class="num">${label}</th>`)}</tr></thead>`}
        <tbody>
          ${rows.map((row, index) => html`<tr key=${index}>${row.slice(0, shown).map((value, column) => html`<td key=${column} class=${output.datatype === "BYTES" ? "wraps" : "num"}>${figure(value)}${width === 1 && labels[value] !== undefined ? ` ${labels[value]}` : ""}</td>`)}${width > shown && html`<td class="muted">and ${number(width - shown)} more</td>`}</tr>`)}
        </tbody>
      </table>
    </div>
    ${more > 0 && html`<p class="small muted">and ${number(more)} rows more</p>`}
  `;
}

/** @param {any} value */
const figure = (value) => (typeof value === "number" ? (Number.isInteger(value) ? String(value) : value.toPrecision(5).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")) : String(value));

/** A tensor that has a picture's shape, from its smallest value to its largest. @param {{output: any, shape: import("./tensors.js").PictureShape}} props */
function Drawn({ output, shape }) {
  const canvas = useRef(/** @type {any} */ (null));
  const { width, height, channels, layout } = shape;
  useEffect(() => {
    const size = width * height;
    const values = output.data.slice(0, size * channels).map(Number);
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    const image = new ImageData(width, height);
    for (let pixel = 0; pixel < size; pixel++) {
      for (let channel = 0; channel < 3; channel++) {
        const at = channels === 1 ? pixel : layout === "HWC" ? 3 * pixel + channel : channel * size + pixel;
        image.data[4 * pixel + channel] = (255 * (values[at] - low)) / (high - low || 1);
      }
      image.data[4 * pixel + 3] = 255;
    }
    canvas.current.width = width;
    canvas.current.height = height;
    canvas.current.getContext("2d").putImageData(image, 0, 0);
  }, [output]);
  return html`<canvas class="try-canvas large" ref=${canvas} role="img" aria-label=${`${output.name} as a picture`}></canvas>`;
}
