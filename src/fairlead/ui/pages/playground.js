// @ts-check
import { html } from "../lib/html.js";
import { setQuery } from "../lib/router.js";
import { Page } from "../parts/index.js";
import { Playground } from "../playground/view.js";

/** @param {{query: URLSearchParams}} props */
export default function View({ query }) {
  return html`
    <${Page} title="Playground" note="Ask the models of this server, and take the request along as code">
      <${Playground} model=${query.get("model")} beside=${query.get("with")} task=${query.get("task")} onChange=${setQuery} />
    <//>
  `;
}
