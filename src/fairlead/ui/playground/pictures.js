// @ts-check
import { events, post } from "../lib/api.js";
import { number, seconds } from "../lib/format.js";
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { Badge, Button, Card, Empty, Field, Meter, Select, attempt } from "../parts/index.js";
import { DATA, complained, fileOf, named } from "./asking.js";
import { CopyAs } from "./copy-as.js";
import { Complaint } from "./said.js";
import { ofPictures } from "./snippets.js";

const ENDED = ["complete", "failed", "aborted"];
/** Pictures on the page. */
const KEPT = 60;

/** @param {{model: import("./view.js").Model, sides: import("./view.js").Place[], where: import("./snippets.js").Where}} props */
export function Pictures({ model, sides, where }) {
  const info = model.picture;
  const side = /** @type {import("./view.js").Place} */ (sides[0]);
  const [values, setValues] = useState(/** @type {Record<string, string>} */ ({ prompt: "", width: String(info.width), height: String(info.height), num_steps: String(info.num_steps), n: "1" }));
  const [job, setJob] = useState(/** @type {any} */ (null));
  const [made, setMade] = useState(/** @type {{url: string, prompt: string, seed: number | null, width: number, height: number, took: number | null}[]} */ ([]));
  const [error, setError] = useState(/** @type {import("./answer.js").Complaint | null} */ (null));
  const [busy, setBusy] = useState(false);
  const watching = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => watching.current?.abort(), []);
  const set = (/** @type {string} */ name) => (/** @type {string} */ value) => setValues({ ...values, [name]: value });

  const body = () => {
    /** @type {Record<string, any>} */
    const input = { prompt: values.prompt };
    for (const [name, text] of Object.entries(values)) {
      if (name === "prompt" || !text.trim()) continue;
      input[name] = ["negative_prompt", "scheduler", "mode"].includes(name) ? text : Number(text);
    }
    return { model: named(side), input };
  };
  const ask = async () => {
    const wanted = body();
    setError(null);
    setBusy(true);
    setJob({ status: "queued" });
    const controller = (watching.current = new AbortController());
    try {
      /** @type {any} */
      let last = await post(`${DATA}/v1/jobs`, { ...wanted, input: { ...wanted.input, ...(info.previews === false ? {} : { preview_steps: 1 }) } });
      setJob(last);
      for await (const { data } of events(`${DATA}/v1/jobs/${last.id}/events`, { method: "GET", signal: controller.signal })) {
        const next = JSON.parse(data);
        if (next.progress && !next.progress.preview) next.progress.preview = last.progress?.preview ?? "";
        last = next;
        setJob(last);
      }
      if (last.status === "complete") {
        const took = last.started && last.ended ? last.ended - last.started : null;
        const pictures = last.result.pictures.map((/** @type {any} */ each) => ({ ...each, url: fileOf(each.url), prompt: wanted.input.prompt, took }));
        setMade((old) => [...pictures, ...old].slice(0, KEPT));
      } else if (last.status === "failed") setError({ message: last.error.message || "it failed", detail: last.error.reason });
      else if (!ENDED.includes(last.status)) setError({ message: "the server broke off its answer: the job may go on", detail: last.id });
    } catch (failure) {
      if (!controller.signal.aborted) setError(complained(failure));
    }
    setJob(null);
    setBusy(false);
  };
  const cancel = () => attempt(() => post(`${DATA}/v1/jobs/${job.id}/cancel`));
  const numbers = [
    { name: "width", label: "Width", min: info.multiple, step: info.multiple, hint: `Multiples of ${info.multiple}` },
    { name: "height", label: "Height", min: info.multiple, step: info.multiple },
    { name: "num_steps", label: "Steps", min: 1, max: info.max_steps, step: 1, hint: `At most ${info.max_steps}` },
    ...(info.has_guidance === false ? [] : [{ name: "guidance", label: "Guidance", min: 0, max: 100, step: 0.5, placeholder: String(info.guidance), hint: "How closely it follows the prompt" }]),
    { name: "seed", label: "Seed", min: 0, step: 1, placeholder: "by chance", hint: "The same one makes the same picture" },
    { name: "n", label: "How many", min: 1, max: 16, step: 1 },
  ];
  return html`
    <div class="grid try">
      <div class="w4">
        <${Card} title="Settings">
          <form class="stack" onSubmit=${(/** @type {any} */ event) => (event.preventDefault(), busy || ask())}>
            <${Field} label="Prompt">${(/** @type {string} */ id) => html`<textarea class="input" id=${id} rows="3" placeholder="What it shall show" value=${values.prompt} onInput=${(/** @type {any} */ event) => set("prompt")(event.currentTarget.value)}></textarea>`}<//>
            ${info.has_negative !== false && html`<${Field} label="Not in it" value=${values.negative_prompt ?? ""} onInput=${set("negative_prompt")} />`}
            <div class="try-pairs">
              ${numbers.map(({ name, label, hint, ...more }) => html`<${Field} key=${name} label=${label} hint=${hint} type="number" value=${values[name] ?? ""} onInput=${set(name)} ...${more} />`)}
              ${info.schedulers?.length > 0 && html`<${Field} label="Scheduler">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${values.scheduler ?? ""} options=${[{ value: "", text: "the model's own" }, ...info.schedulers]} onChange=${set("scheduler")} />`}<//>`}
              ${info.modes?.length > 1 && html`<${Field} label="Mode">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${values.mode ?? "exact"} options=${info.modes} onChange=${set("mode")} />`}<//>`}
            </div>
            <div class="row wrap between">
              <${CopyAs} make=${() => ofPictures(where, body())} where=${where} />
              ${busy ? html`<${Button} icon="stop" kind="danger" disabled=${!job?.id} onClick=${cancel}>Cancel<//>` : html`<${Button} icon="image" kind="primary" type="submit">Make it<//>`}
            </div>
          </form>
        <//>
      </div>
      <div class="w8 stack">
        ${error && html`<${Complaint} error=${error} />`}
        <${Card} title="Pictures">
          ${!job && !made.length && html`<${Empty} icon="image" title="Nothing was made yet">Pictures of this page stay here until it is closed.<//>`}
          <ul class="try-gallery">
            ${job && html`<li><${Making} job=${job} /></li>`}
            ${made.map((each) => html`
              <li key=${each.url}>
                <figure>
                  <a href=${each.url} target="_blank" rel="noopener"><img src=${each.url} width=${each.width} height=${each.height} alt=${each.prompt || "A picture without a prompt"} /></a>
                  <figcaption class="small muted num"><span class="clip" title=${each.prompt}>${each.prompt}</span><span>${each.width}×${each.height}, seed ${each.seed ?? "\u2013"}${each.took === null ? "" : `, ${seconds(each.took)}`}</span></figcaption>
                </figure>
                <${Button} kind="quiet" onClick=${() => set("seed")(String(each.seed ?? ""))}>Use this seed<//>
              </li>
            `)}
          </ul>
        <//>
      </div>
    </div>
  `;
}

/** A job on its way. @param {{job: any}} props */
export function Making({ job }) {
  const progress = job.progress;
  const words = job.status === "queued" ? (job.position ? `queued, ${number(job.position)} before it` : "queued") : progress ? `step ${progress.step} of ${progress.num_steps}` : job.status;
  return html`
    <figure aria-busy="true">
      <div class="try-preview">${progress?.preview ? html`<img src=${progress.preview} alt="How far it is" />` : html`<span class="skeleton"></span>`}</div>
      <${Meter} value=${progress?.fraction ?? 0} label="How far it is" />
      <figcaption class="small muted num" role="status"><${Badge} tone="info">${words}<//></figcaption>
    </figure>
  `;
}
