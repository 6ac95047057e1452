// @ts-check
import { html, useState } from "../lib/html.js";
import { Problem, at, post } from "../lib/api.js";
import { go } from "../lib/router.js";
import { useQuery } from "../lib/query.js";
import { Button, Dialog, Field, Notice, Select, toast } from "../parts/index.js";

const KINDS = [
  { value: "canary", text: "Canary: step by step, to all traffic" },
  { value: "shadow", text: "Shadow: copies only, nobody gets its answers" },
  { value: "experiment", text: "Experiment: one share, until you decide" },
];
const POLICIES = ["", "standard", "quick", "direct"].map((value) => ({ value, text: value || "What the settings say of the model" }));

/** @param {{open: boolean, onClose: () => void, then?: () => void, model?: string, version?: number}} props */
export const StartRollout = ({ open, onClose, ...rest }) => html`<${Dialog} open=${open} onClose=${onClose} title="Start a rollout"><${Form} onClose=${onClose} ...${rest} /><//>`;

/** @param {{onClose: () => void, then?: () => void, model?: string, version?: number}} props */
function Form({ onClose, then, model: given = "", version: chosen }) {
  const [model, setModel] = useState(given);
  const [version, setVersion] = useState(chosen ? String(chosen) : "");
  const [kind, setKind] = useState("canary");
  const [policy, setPolicy] = useState("");
  const [share, setShare] = useState("0.1");
  const [reason, setReason] = useState("");
  const [failed, setFailed] = useState("");
  const [busy, setBusy] = useState(false);
  const models = useQuery(given ? null : "/admin/models");
  const names = (models.data?.models ?? []).filter((/** @type {any} */ each) => each.registered).map((/** @type {any} */ each) => each.name);
  const versions = useQuery(model ? `${at("admin", "models", model)}/versions` : null);
  const numbers = (versions.data?.versions ?? []).filter((/** @type {any} */ each) => !["retired", "rejected", "serving"].includes(each.stage));
  const picked = version || String(numbers[0]?.version ?? "");
  const start = async (/** @type {any} */ event) => {
    event.preventDefault();
    setBusy(true);
    setFailed("");
    try {
      const body = { candidates: [`${model}@${picked}`], kind, ...(policy ? { policy } : {}), ...(kind === "canary" ? {} : { share: Number(share) }), reason };
      const rollout = await post("/admin/rollouts", body);
      toast(`The rollout of ${model}@${picked} has begun`);
      then?.();
      onClose();
      go(at("ui", "rollouts", rollout.id));
    } catch (error) {
      setFailed(error instanceof Problem ? error.message : String(error));
    }
    setBusy(false);
  };
  return html`
    <form class="stack" onSubmit=${start}>
      ${!given && html`<${Field} label="Model" hint=${models.data && !names.length ? "The registry has no models yet: fairlead models add" : ""}>${(/** @type {string} */ id) => html`<${Select} id=${id} value=${model} onChange=${(/** @type {string} */ value) => (setModel(value), setVersion(""))} options=${[{ value: "", text: "Choose one" }, ...names]} />`}<//>`}
      <${Field} label="Version" hint=${model && versions.data && !numbers.length ? "None may be rolled out: each one serves already, or was rejected or retired" : ""}>${(/** @type {string} */ id) => html`<${Select} id=${id} value=${picked} onChange=${setVersion} options=${numbers.map((/** @type {any} */ each) => ({ value: String(each.version), text: `${each.version} (${each.stage})` }))} />`}<//>
      <${Field} label="Kind">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${kind} onChange=${setKind} options=${KINDS} />`}<//>
      ${kind === "canary" && html`<${Field} label="Policy">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${policy} onChange=${setPolicy} options=${POLICIES} />`}<//>`}
      ${kind !== "canary" && html`<${Field} label=${kind === "shadow" ? "Share that is copied" : "Share of the traffic"} type="number" min="0.001" max="1" step="any" required value=${share} onInput=${setShare} hint="0.1 is a tenth" />`}
      <${Field} label="Why" value=${reason} onInput=${setReason} maxlength="1000" placeholder="Shown in the audit log" />
      ${failed && html`<${Notice} tone="bad">${failed}<//>`}
      <footer><${Button} onClick=${onClose}>Cancel<//><${Button} type="submit" kind="primary" busy=${busy} disabled=${!model || !picked}>${picked && model ? `Start with ${model}@${picked}` : "Start"}<//></footer>
    </form>
  `;
}
