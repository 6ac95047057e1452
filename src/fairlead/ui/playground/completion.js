// @ts-check
import { html, useState } from "../lib/html.js";
import { Button, Card } from "../parts/index.js";
import { named, useConversation } from "./asking.js";
import { CopyAs } from "./copy-as.js";
import { Said, Verdict } from "./said.js";
import { Sampling } from "./sampling-form.js";
import { samplingOf } from "./sampling.js";
import { ofCompletion } from "./snippets.js";

/** A text, continued. @param {{sides: import("./view.js").Place[], where: import("./snippets.js").Where}} props */
export function Completion({ sides, where }) {
  const left = useConversation();
  const right = useConversation();
  const talks = [left, right].slice(0, sides.length);
  const [text, setText] = useState("");
  const [values, setValues] = useState(/** @type {Record<string, string>} */ ({ max_tokens: "64" }));
  const [wrong, setWrong] = useState("");
  const busy = talks.some((each) => each.busy);

  /** @param {import("./view.js").Place} side @returns {Record<string, any>} */
  const bodyOf = (side) => ({ model: named(side), prompt: text, ...samplingOf(values) });
  const ask = () => {
    try {
      samplingOf(values);
    } catch (error) {
      return setWrong(/** @type {Error} */ (error).message);
    }
    setWrong("");
    talks.forEach((talk, index) => {
      const side = /** @type {import("./view.js").Place} */ (sides[index]);
      talk.ask("", "/v1/completions", () => ({ ...bodyOf(side), stream: true, stream_options: { include_usage: true } }));
    });
  };
  return html`
    <div class="grid try">
      <div class="w9 stack">
        <form class="try-composer" onSubmit=${(/** @type {any} */ event) => (event.preventDefault(), busy || ask())}>
          <label class="hidden" for="try-text">Text to continue</label>
          <textarea class="input" id="try-text" rows="6" placeholder="A text that the model continues" value=${text} onInput=${(/** @type {any} */ event) => setText(event.currentTarget.value)}></textarea>
          <div class="row wrap between">
            <${CopyAs} make=${() => ofCompletion(where, bodyOf(/** @type {any} */ (sides[0])))} where=${where} />
            ${busy
              ? html`<${Button} icon="stop" kind="danger" onClick=${() => talks.forEach((each) => each.stop())}>Stop<//>`
              : html`<${Button} icon="send" kind="primary" type="submit" disabled=${!text}>Continue it<//>`}
          </div>
          ${wrong && html`<p class="bad small" role="alert">${wrong}</p>`}
        </form>
        ${sides.length > 1 && html`<${Verdict} turns=${talks.map((each) => each.turns.at(-1) ?? null)} names=${sides.map(named)} />`}
        <div class=${`try-sides ${sides.length > 1 ? "two" : ""}`}>
          ${talks.map((talk, index) => html`
            <section key=${index} class="card try-side" aria-label=${named(/** @type {any} */ (sides[index]))}>
              <header><h2 class="break">${named(/** @type {any} */ (sides[index]))}</h2></header>
              <div class="try-log short" role="log" tabindex="0" aria-label=${`Answers of ${named(/** @type {any} */ (sides[index]))}`}>
                ${talk.turns.length === 0 ? html`<p class="try-nothing muted">What it goes on with stands here.</p>` : html`<${Said} turn=${talk.turns.at(-1)} busy=${talk.busy} />`}
              </div>
            </section>
          `)}
        </div>
      </div>
      <div class="w3"><${Card} title="Settings"><div class="stack"><${Sampling} values=${values} onChange=${setValues} /></div><//></div>
    </div>
  `;
}
