// @ts-check
import { html } from "../lib/html.js";
import { at } from "../lib/api.js";
import { useQuery } from "../lib/query.js";
import { Card, Code, Loaded, Page } from "../parts/index.js";
import { RolloutPanel, namesOf } from "./rollout-panel.js";

/** @param {{params: Record<string, string>}} props */
export default function Rollout({ params }) {
  const id = params.rollout ?? "";
  const query = useQuery(at("admin", "rollouts", id), { every: 2 });
  const report = useQuery(`${at("admin", "rollouts", id)}/report`, { every: 10 });
  const shadow = report.data?.shadow;
  const name = query.data ? namesOf(query.data) : id;
  return html`
    <${Page} title=${`Rollout of ${name}`} crumbs=${[{ href: "/ui/rollouts", text: "Rollouts" }]}>
      <${Loaded} query=${query} height=${320}>${(/** @type {any} */ data) => html`<${RolloutPanel} rollout=${data} refresh=${query.refresh} />`}<//>
      ${shadow && Object.keys(shadow).length > 0 && html`<${Card} title="What the shadow found"><${Code} label="Report of the shadow" text=${JSON.stringify(shadow, null, 2)} /><//>`}
    <//>
  `;
}
