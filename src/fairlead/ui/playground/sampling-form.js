// @ts-check
import { html } from "../lib/html.js";
import { Field } from "../parts/index.js";
import { PARAMETERS } from "./sampling.js";

/**
 * @param {{values: Record<string, string>, onChange: (values: Record<string, string>) => void, tools?: boolean, structured?: boolean}} props
 */
export function Sampling({ values, onChange, tools = false, structured = false }) {
  const set = (/** @type {string} */ name) => (/** @type {string} */ value) => onChange({ ...values, [name]: value });
  const one = (/** @type {import("./sampling.js").Parameter} */ each) => html`
    <${Field} key=${each.name} label=${each.label} hint=${each.hint} type="number" inputmode="decimal" min=${each.min} max=${each.max} step=${each.step} placeholder="default" value=${values[each.name] ?? ""} onInput=${set(each.name)} />
  `;
  return html`
    <div class="try-pairs">${PARAMETERS.filter((each) => !each.more).map(one)}</div>
    <${Area} label="Stop texts" hint="One a line" rows=${1} value=${values.stop} onInput=${set("stop")} />
    ${tools && html`<${Area} label="Tools" hint="JSON, as the OpenAI API has it" rows=${4} value=${values.tools} onInput=${set("tools")} />`}
    ${structured && html`<${Area} label="Response format" hint=${'JSON, such as {"type": "json_object"}'} rows=${3} value=${values.response_format} onInput=${set("response_format")} />`}
    <details class="try-more">
      <summary>More parameters</summary>
      <div class="stack">
        <div class="try-pairs">${PARAMETERS.filter((each) => each.more).map(one)}</div>
        <${Area} label="Anything else, as JSON" hint="Goes into the request as it is" rows=${3} value=${values.more} onInput=${set("more")} />
      </div>
    </details>
  `;
}

/** @param {{label: string, hint?: string, rows: number, value: string | undefined, onInput: (text: string) => void}} props */
const Area = ({ label, hint, rows, value, onInput }) => html`
  <${Field} label=${label} hint=${hint}>${(/** @type {string} */ id) => html`<textarea class="input mono" id=${id} rows=${rows} spellcheck=${false} value=${value ?? ""} onInput=${(/** @type {any} */ event) => onInput(event.currentTarget.value)}></textarea>`}<//>
`;
