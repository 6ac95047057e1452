// @ts-check
/** The playground: which model, what is asked of it, and beside which other one. */
import { html, useEffect, useState } from "../lib/html.js";
import { session } from "../lib/api.js";
import { useQuery } from "../lib/query.js";
import { Button, Empty, Failure, Field, Notice, Segments, Select, Skeleton } from "../parts/index.js";
import { named } from "./asking.js";
import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { Embeddings } from "./embeddings.js";
import { Pictures } from "./pictures.js";
import { Tensors } from "./tensor-form.js";

/**
 * @typedef {{name: string, version: string}} Place  version "": the default one.
 *
 * @typedef {object} Model  What the server says of one.
 * @property {string} name
 * @property {string[]} speaks
 * @property {string[]} versions
 * @property {string} version
 * @property {string} platform
 * @property {number} max_model_len
 * @property {any} picture
 * @property {import("./tensors.js").TensorSpec[]} inputs
 * @property {import("./tensors.js").TensorSpec[]} outputs
 * @property {import("./tensors.js").Tensor[] | null} example
 * @property {boolean} tools
 * @property {boolean} structured_output
 *
 * @typedef {{models: {name: string, speaks: string[], versions: string[]}[], total: number, url: string, keys: boolean}} Found
 */

const MODELS = "/ui/playground/models";
/** Models that a list of choices holds; of more the name is typed. */
const MANY = 60;

/** @type {Record<string, string>} */
const WORDS = { chat: "Chat", completions: "Completion", embeddings: "Embeddings", pictures: "Pictures", tensors: "Tensors" };
/** @type {Record<string, any>} */
const VIEWS = { chat: Chat, completions: Completion, embeddings: Embeddings, pictures: Pictures, tensors: Tensors };

/** @param {string | null} text `name@version` @returns {Place} */
export function placeOf(text) {
  const found = /^(.*)@(\d+)$/.exec(text ?? "");
  return found ? { name: found[1] ?? "", version: found[2] ?? "" } : { name: text ?? "", version: "" };
}

/** @param {Place} place */
const described = (place) => (place.name ? `${MODELS}/${encodeURIComponent(place.name)}` : null);

/**
 * @param {{model: string | null, beside: string | null, task: string | null, only?: boolean, onChange: (changes: Record<string, string | null>) => void}} props
 *   `model`, `beside`: `name@version`. `only`: no other model can be chosen.
 */
export function Playground({ model, beside, task, only = false, onChange }) {
  const [search, setSearch] = useState("");
  const list = useQuery(MODELS, { query: { find: search, limit: MANY } });
  /** @type {Found | null} */
  const found = list.data;
  const first = placeOf(model);
  const second = beside === null ? null : placeOf(beside);
  const detail = useQuery(described(first), { query: { version: first.version } });
  useEffect(() => {
    if (!first.name && found?.models[0] && !search) onChange({ model: found.models[0].name });
  }, [first.name, found]);

  if (session.value && !session.value.scopes.includes("infer"))
    return html`<${Empty} icon="key" title="This key may not ask models">The playground needs a key with the scope <code>infer</code> beside <code>admin</code>.<//>`;
  if (list.error) return html`<${Failure} error=${list.error} retry=${list.refresh} />`;
  if (found && !found.total && !search && !first.name)
    return html`<${Empty} icon="box" title="No model is loaded">What <code>fairlead serve</code> loads can be tried here at once.<//>`;

  /** @type {Model | null} */
  const about = detail.data;
  const speaks = about?.speaks ?? [];
  const chosen = speaks.includes(task ?? "") ? /** @type {string} */ (task) : (speaks[0] ?? "");
  const View = VIEWS[chosen];
  const pairs = chosen === "chat" || chosen === "completions";
  const sides = about ? [first, ...(second && pairs ? [second] : [])] : [];
  const where = { url: found?.url ?? "", keys: found?.keys ?? false };
  return html`
    <div class="stack">
      <div class="try-bar">
        <${Picker} label="Model" value=${first} found=${found} search=${search} onSearch=${setSearch} only=${only} versions=${about?.versions ?? []} onChange=${(/** @type {Place} */ next) => onChange({ model: named(next), task: next.name === first.name ? task : null })} />
        ${speaks.length > 1 && html`<div class="field"><span class="label">Ask as</span><${Segments} label="Ask as" value=${chosen} options=${speaks.map((each) => ({ value: each, text: WORDS[each] ?? each }))} onChange=${(/** @type {string} */ next) => onChange({ task: next })} /></div>`}
        ${pairs && second && html`
          <${Picker} label="Beside" value=${second} found=${found} search=${search} onSearch=${setSearch} only=${only} onChange=${(/** @type {Place} */ next) => onChange({ with: named(next) })} />
          <div class="field"><span class="label hidden">Compare</span><${Button} icon="close" label="Compare no more" kind="quiet" onClick=${() => onChange({ with: null })} /></div>
        `}
        ${pairs && !second && (!only || (about?.versions.length ?? 0) > 1) && html`
          <div class="field"><span class="label hidden">Compare</span><${Button} icon="plus" onClick=${() => onChange({ with: named(other(about, first)) })}>Compare<//></div>
        `}
      </div>
      ${detail.loading && html`<${Skeleton} height=${320} />`}
      ${detail.error && html`<${Failure} error=${detail.error} retry=${detail.refresh} />`}
      ${about && !View && html`<${Notice} tone="warn">There is no form for what this model takes.<//>`}
      ${about && View && html`<${View} key=${`${first.name} ${chosen}`} model=${about} sides=${sides} where=${where} />`}
    </div>
  `;
}

/** What to put beside a model: its version before, else itself. @param {Model | null} about @param {Place} first @returns {Place} */
function other(about, first) {
  const versions = about?.versions ?? [];
  const now = first.version || about?.version || "";
  const rest = versions.filter((each) => each !== now);
  return { name: first.name, version: rest.at(-1) ?? first.version };
}

/**
 * @param {{label: string, value: Place, found: Found | null, search: string, onSearch: (text: string) => void, only: boolean, versions?: string[], onChange: (value: Place) => void}} props
 */
function Picker({ label, value, found, search, onSearch, only, versions, onChange }) {
  const known = found?.models ?? [];
  const many = search !== "" || (found?.total ?? 0) > MANY;
  const choices = versions ?? known.find((each) => each.name === value.name)?.versions ?? [];
  const names = known.map((each) => each.name);
  return html`
    ${only
      ? html`<div class="field"><span class="label">${label}</span><strong class="try-name break">${value.name}</strong></div>`
      : many
        ? html`<${Typed} label=${label} value=${value.name} names=${names} onSearch=${onSearch} onChoose=${(/** @type {string} */ name) => onChange({ name, version: "" })} />`
        : html`<${Field} label=${label}>${(/** @type {string} */ id) => html`<${Select} id=${id} value=${value.name} options=${names.includes(value.name) ? names : [value.name, ...names]} onChange=${(/** @type {string} */ name) => onChange({ name, version: "" })} />`}<//>`}
    ${choices.length > 1 && html`
      <${Field} label="Version">${(/** @type {string} */ id) => html`
        <${Select} id=${id} value=${value.version} options=${[{ value: "", text: "default" }, ...choices.map((each) => ({ value: each, text: each }))]} onChange=${(/** @type {string} */ version) => onChange({ ...value, version })} />
      `}<//>
    `}
  `;
}

/** @param {{label: string, value: string, names: string[], onSearch: (text: string) => void, onChoose: (name: string) => void}} props */
function Typed({ label, value, names, onSearch, onChoose }) {
  const [text, setText] = useState(value);
  useEffect(() => setText(value), [value]);
  useEffect(() => {
    if (text !== value && names.includes(text)) onChoose(text);
  }, [names.join("\n")]);
  const list = `try-names-${label}`;
  const typed = (/** @type {any} */ event) => {
    const next = event.currentTarget.value;
    setText(next);
    if (names.includes(next)) onChoose(next);
    else onSearch(next);
  };
  return html`
    <${Field} label=${label}>${(/** @type {string} */ id) => html`
      <input class="input" id=${id} value=${text} list=${list} autocomplete="off" spellcheck=${false} onInput=${typed} />
      <datalist id=${list}>${names.map((each) => html`<option key=${each} value=${each}></option>`)}</datalist>
    `}<//>
  `;
}
