// @ts-check
/** What can be done with a model of a repository, and how its states look. */
import { html } from "../lib/html.js";
import { at, post } from "../lib/api.js";
import { Button, attempt, confirm } from "../parts/index.js";

/** @type {Record<string, ["ok" | "warn" | "bad" | "info" | "idle" | "busy", string]>} */
export const STATES = { ready: ["ok", "Ready"], loading: ["busy", "Loading"], failed: ["bad", "Failed"], unloaded: ["idle", "Unloaded"] };

const path = (/** @type {string} */ model, /** @type {string} */ act) => `/ui/data${at("v2", "repository", "models", model)}/${act}`;

/** @param {string} model @param {() => void} [then] */
export const load = (model, then) => html`<${Button} onClick=${() => attempt(() => post(path(model, "load"), {}), `${model} is loaded`).then(then)} label=${`Load ${model}`}>Load<//>`;

/** @param {string} model @param {() => void} [then] */
export const unload = (model, then) => html`
  <${Button} label=${`Unload ${model}`} onClick=${() => {
    confirm({
      title: `Unload ${model}?`,
      body: "Requests that are under way finish; later ones are told that there is no such model, until it is loaded again.",
      action: "Unload",
      danger: true,
      act: () => post(path(model, "unload"), {}),
    }).then(then);
  }}>Unload<//>
`;
